"""The strongly varied view: what it may do to an image, and that only seed, epoch and sample decide it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from methods.data import strong
from methods.data.base import Augment, Images
from methods.data.stream import Stream
from methods.data.strong import GREY, OPERATIONS, strong_view

VARIED = Augment(pad=2, flip=True)
IDS = np.arange(40, 80)


def pixels(num_images: int = 40, channels: int = 3, side: int = 16) -> Tensor:
    random = np.random.default_rng(0)
    return torch.from_numpy(random.integers(0, 256, (num_images, channels, side, side), dtype=np.uint8))


@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_is_varied_alike_in_any_company(channels: int) -> None:
    images = pixels(channels=channels)
    whole = strong_view(images, VARIED, seed=1, epoch=2, ids=IDS)
    assert whole.dtype == torch.uint8
    assert whole.shape == images.shape
    for part in (slice(0, 1), slice(3, 17), slice(39, 40)):
        alone = strong_view(images[part], VARIED, seed=1, epoch=2, ids=IDS[part])
        assert torch.equal(alone, whole[part])
    assert torch.equal(whole, strong_view(images, VARIED, seed=1, epoch=2, ids=IDS))


def test_seed_and_epoch_change_nearly_every_image() -> None:
    images = pixels()
    first = strong_view(images, VARIED, seed=1, epoch=2, ids=IDS)
    for seed, epoch in ((2, 2), (1, 3)):
        other = strong_view(images, VARIED, seed=seed, epoch=epoch, ids=IDS)
        assert (first != other).flatten(1).any(dim=1).float().mean() > 0.9


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.__name__)
@pytest.mark.parametrize("level", [0.0, 0.999])
def test_every_operation_stays_among_pixels(operation: strong.Operation, level: float) -> None:
    images = pixels(4).float()
    images[0] = 9.0  # an image of one single value
    changed = operation(images, torch.full((4,), level)).round().clamp(0, 255)
    assert changed.shape == images.shape
    assert changed.isfinite().all()
    if operation.__name__ != "identity" and not (
        operation.__name__ in ("posterize", "solarize") and level > 0.9
    ):
        assert not torch.equal(changed[1:], images[1:])


@pytest.mark.parametrize(
    ("operation", "level", "before", "after"),
    [
        (strong.brightness, 0.5, [100, 200], [50, 100]),
        (strong.solarize, 0.5, [100, 200], [100, 55]),
        (strong.posterize, 0.0, [100, 200], [96, 192]),
        (strong.posterize, 0.9, [101, 203], [101, 203]),
        (strong.autocontrast, 0.0, [100, 200], [0, 255]),
        (strong.contrast, 0.5, [100, 200], [125, 175]),
        (strong.equalize, 0.0, [100, 200], [0, 255]),
    ],
)
def test_values_of_known_operations(
    operation: strong.Operation, level: float, before: list[int], after: list[int]
) -> None:
    image = torch.tensor(before, dtype=torch.float32).repeat(512).view(1, 1, 32, 32)
    changed = operation(image, torch.tensor([level])).round().clamp(0, 255)
    assert changed.flatten()[:2].tolist() == pytest.approx(after)


def test_moves_are_the_ones_their_names_say() -> None:
    image = torch.arange(64.0).view(1, 1, 8, 8)
    none = torch.tensor([0.5])
    for move in (strong.rotate, strong.shear_x, strong.shear_y, strong.translate_x, strong.translate_y):
        assert torch.equal(move(image, none), image)
    left = strong.translate_x(image, torch.tensor([0.5 + 2 / 8 / 0.6]))  # two pixels
    assert torch.equal(left[..., :6], image[..., 2:])
    assert left[..., 6:].eq(0).all()


def test_a_square_of_up_to_half_the_image_is_cut_out() -> None:
    images = torch.zeros(200, 3, 16, 16)
    cut = strong._cut_out(images, seed=0, epoch=0, ids=np.arange(200)) == GREY
    sides = torch.stack([cut[:, 0].any(dim=2).sum(1), cut[:, 0].any(dim=1).sum(1)])
    assert int(sides.max()) == 8
    assert int(sides.min()) >= 1
    assert torch.equal(cut[:, 0], cut[:, 2])


def stream(**changes: object) -> Stream:
    images = Images(pixels().numpy(), np.arange(40) % 5)
    settings: dict[str, object] = {
        "indices": np.arange(30), "batch_size": 10, "seed": 3, "mean": (0.5,) * 3, "std": (0.25,) * 3,
        "augment": VARIED, "shuffle": True, "device": torch.device("cpu"), "strong": True,
    }  # fmt: skip
    return Stream(images, **{**settings, **changes})  # type: ignore[arg-type]


def by_sample(made: Stream) -> dict[int, Tensor]:
    found = {}
    for batch in made.batches(1):
        assert batch.strong is not None
        found |= {int(i): image for i, image in zip(batch.indices, batch.strong, strict=True)}
    return found


def test_a_stream_brings_strong_views_only_when_asked_and_alike_for_any_worker() -> None:
    assert all(batch.strong is None for batch in stream(strong=False).batches(0))
    reference = by_sample(stream(batch_size=30))
    assert len(reference) == 30
    for rank in range(2):
        for sample, image in by_sample(stream(rank=rank, num_workers=2)).items():
            assert torch.equal(image, reference[sample])
    weak = {int(i): image for b in stream().batches(1) for i, image in zip(b.indices, b.images, strict=True)}
    plain = stream(strong=False).batches(1)
    assert all(
        torch.equal(weak[int(i)], image) for b in plain for i, image in zip(b.indices, b.images, strict=True)
    )
    assert any(not torch.equal(weak[sample], reference[sample]) for sample in weak)


def test_labels_are_known_only_of_samples_that_come_up() -> None:
    labels = stream(indices=np.array([3, 7])).known_labels()
    assert labels.tolist() == [3 if i == 3 else 2 if i == 7 else -1 for i in range(40)]
