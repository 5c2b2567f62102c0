from __future__ import annotations

import threading
import warnings
from typing import Any

import numpy as np
import pytest
import torch

from methods.base import Batch
from methods.data.base import Augment, Images
from methods.data.stream import Stream

CPU = torch.device("cpu")
NUM_SAMPLES = 53
PIXELS = np.random.default_rng(0).integers(0, 256, (NUM_SAMPLES, 3, 8, 8), dtype=np.uint8)
IMAGES = Images(PIXELS, np.arange(NUM_SAMPLES) % 7)
VARIED = Augment(pad=2, flip=True)


def stream(images: Images = IMAGES, **changes: Any) -> Stream:
    settings: dict[str, Any] = {
        "indices": np.arange(len(images)),
        "batch_size": 8,
        "seed": 5,
        "mean": (0.5, 0.4, 0.3),
        "std": (0.2, 0.25, 0.3),
        "augment": VARIED,
        "shuffle": True,
        "device": CPU,
    }
    return Stream(images, **{**settings, **changes})


def by_id(batches: list[Batch]) -> dict[int, torch.Tensor]:
    return {int(i): image for batch in batches for i, image in zip(batch.indices, batch.images, strict=True)}


def ids(batches: list[Batch]) -> list[int]:
    return [int(i) for batch in batches for i in batch.indices]


def test_a_batch_carries_labels_identity_and_epoch() -> None:
    for batch in stream().batches(3):
        assert batch.images.dtype == torch.float32
        assert batch.labels.dtype == batch.indices.dtype == torch.int64
        assert torch.equal(batch.labels, batch.indices % 7)
        assert batch.epoch == 3


def test_plain_images_are_the_normalised_pixels() -> None:
    for batch in stream(augment=None).batches(0):
        pixels = torch.from_numpy(PIXELS[batch.indices.numpy()]).double() / 255
        expected = (pixels - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)) / torch.tensor(
            [0.2, 0.25, 0.3]
        ).view(3, 1, 1)
        assert torch.allclose(batch.images.double(), expected, atol=1e-5)


@pytest.mark.parametrize("batch_size", [4, 8, 17, 53, 100])
@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_sample_is_augmented_alike_in_any_batch_on_any_worker(batch_size: int, num_workers: int) -> None:
    reference = by_id(list(stream(batch_size=NUM_SAMPLES).batches(2)))
    for rank in range(num_workers):
        share = stream(batch_size=batch_size, rank=rank, num_workers=num_workers)
        for sample, image in by_id(list(share.batches(2))).items():
            assert torch.equal(image, reference[sample])


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_workers_share_the_global_batches(num_workers: int) -> None:
    whole = list(stream(batch_size=12).batches(1))
    shares = [
        list(stream(batch_size=12, rank=r, num_workers=num_workers).batches(1)) for r in range(num_workers)
    ]
    for number, batches in enumerate(zip(*shares, strict=True)):
        for rank, batch in enumerate(batches):
            assert torch.equal(batch.indices, whole[number].indices[rank::num_workers])
            assert torch.equal(batch.images, whole[number].images[rank::num_workers])


def test_the_order_depends_on_seed_and_epoch_but_not_on_the_batch_size_or_the_listing() -> None:
    order = ids(list(stream().batches(0)))
    assert sorted(order) == list(range(NUM_SAMPLES))
    assert order != sorted(order)
    assert ids(list(stream(batch_size=5).batches(0))) == order
    assert ids(list(stream(indices=np.arange(NUM_SAMPLES)[::-1]).batches(0))) == order
    assert ids(list(stream().batches(1))) != order
    assert ids(list(stream(seed=6).batches(0))) != order


def test_leaving_samples_out_keeps_the_order_and_look_of_the_others() -> None:
    whole, some = stream(), stream(indices=np.arange(0, NUM_SAMPLES, 2))
    assert ids(list(some.batches(4))) == [i for i in ids(list(whole.batches(4))) if i % 2 == 0]
    reference = by_id(list(whole.batches(4)))
    assert all(torch.equal(image, reference[i]) for i, image in by_id(list(some.batches(4))).items())


@pytest.mark.parametrize("start", [0, 1, 5, 7, 99])
def test_an_epoch_can_be_entered_in_the_middle(start: int) -> None:
    expected, found = list(stream().batches(2))[start:], list(stream().batches(2, start))
    assert len(expected) == len(found)
    for one, other in zip(expected, found, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one[:3], other[:3], strict=True))


@pytest.mark.parametrize("num_workers", [1, 2, 3, 4])
@pytest.mark.parametrize("batch_size", [1, 4, 7, 13, 60])
def test_evaluation_sees_every_sample_once_in_order(num_workers: int, batch_size: int) -> None:
    chosen = np.arange(2, 40)
    seen: list[int] = []
    for rank in range(num_workers):
        share = stream(
            indices=chosen,
            batch_size=batch_size,
            augment=None,
            shuffle=False,
            rank=rank,
            num_workers=num_workers,
        )
        assert share.num_batches == -(-len(chosen) // batch_size)
        batches = list(share.batches(0))
        assert all(len(batch.indices) > 0 for batch in batches)
        assert ids(batches) == sorted(ids(batches))
        seen += ids(batches)
    assert sorted(seen) == chosen.tolist()


@pytest.mark.parametrize(
    ("num_samples", "num_workers", "num_batches"),
    [(16, 1, 2), (17, 1, 2), (18, 1, 3), (18, 2, 2), (19, 2, 2), (20, 2, 3), (23, 4, 2)],
)
def test_a_last_batch_too_small_for_every_worker_is_dropped(
    num_samples: int, num_workers: int, num_batches: int
) -> None:
    for rank in range(num_workers):
        share = stream(indices=np.arange(num_samples), rank=rank, num_workers=num_workers)
        batches = list(share.batches(0))
        assert share.num_batches == len(batches) == num_batches
        assert min(len(batch.indices) for batch in batches) >= 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"batch_size": 1}, "batch_size 1 is too small for 1 worker.*at least 2"),
        ({"batch_size": 3, "num_workers": 2}, "batch_size 3 is too small for 2 worker.*at least 4"),
        ({"indices": np.arange(3), "num_workers": 2}, "number of training samples 3 is too small"),
        ({"rank": 2, "num_workers": 2}, r"rank must lie in 0\.\.1, got 2"),
        ({"indices": np.array([0, 1, 53])}, r"indices must lie in 0\.\.52, got up to 53"),
    ],
)
def test_impossible_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stream(**changes)


def test_an_empty_validation_part_has_no_batches() -> None:
    nothing = stream(indices=np.arange(0), augment=None, shuffle=False)
    assert nothing.num_batches == 0
    assert list(nothing.batches(0)) == []


def test_read_only_pixels_are_neither_warned_about_nor_copied_as_a_whole() -> None:
    frozen = PIXELS.copy()
    frozen.setflags(write=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batches = list(stream(Images(frozen, IMAGES.labels)).batches(0))
    assert all(torch.equal(a.images, b.images) for a, b in zip(batches, stream().batches(0), strict=True))


def test_the_pixels_are_never_written_to() -> None:
    before = PIXELS.copy()
    for batch in stream(augment=None).batches(0):
        batch.images.zero_()
        batch.labels.zero_()
    assert np.array_equal(PIXELS, before)
    assert IMAGES.labels[1] == 1


class Decoded:
    """A pixel source that is asked for each batch."""

    shape = PIXELS.shape

    def __init__(self, broken: int | None = None) -> None:
        self.asked: list[np.ndarray] = []
        self.broken = broken

    def __len__(self) -> int:
        return NUM_SAMPLES

    def gather(self, indices: np.ndarray) -> np.ndarray:
        self.asked.append(indices)
        if self.broken in indices:
            raise OSError(f"image {self.broken} is gone")
        return PIXELS[indices]


def test_images_decoded_on_demand_give_the_same_batches() -> None:
    source = Decoded()
    lazy = list(stream(Images(source, IMAGES.labels)).batches(1))
    for one, other in zip(lazy, stream().batches(1), strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.indices, other.indices)
    assert sum(map(len, source.asked)) == NUM_SAMPLES


def test_decoding_runs_at_most_one_batch_ahead_and_ends_with_the_loop() -> None:
    source = Decoded()
    threads = threading.active_count()
    batches = stream(Images(source, IMAGES.labels)).batches(0)
    next(batches)
    assert len(source.asked) <= 2
    batches.close()  # type: ignore[attr-defined]
    assert threading.active_count() == threads


def test_a_device_is_fed_from_a_thread_beside_the_training() -> None:
    """Arrays too: gathering and staging a batch costs the training nothing. Meta tensors have no content."""
    threads = threading.active_count()
    batches = stream(device=torch.device("meta")).batches(0)
    first = next(batches)
    assert threading.active_count() == threads + 1
    assert [first.images.shape, *(batch.images.shape for batch in batches)] == [
        batch.images.shape for batch in stream().batches(0)
    ]
    assert threading.active_count() == threads


def test_an_image_that_cannot_be_decoded_stops_the_epoch() -> None:
    with pytest.raises(OSError, match="image 11 is gone"):
        list(stream(Images(Decoded(broken=11), IMAGES.labels)).batches(0))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_on_a_gpu_are_those_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for limit in (1 << 30, 0):
        monkeypatch.setattr("methods.data.stream.RESIDENT_BYTES", limit)
        on_gpu = stream(device=torch.device("cuda"), indices=np.arange(3, 50)).batches(1)
        for one, other in zip(on_gpu, stream(indices=np.arange(3, 50)).batches(1), strict=True):
            assert torch.equal(one.indices.cpu(), other.indices)
            assert torch.allclose(one.images.cpu(), other.images, atol=1e-6)
