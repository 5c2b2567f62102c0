"""The batched augmentation against a plain loop with Pillow."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from methods.data.augment import Normalise, apply_draws, draw
from methods.data.base import Augment

CPU = torch.device("cpu")
IDS = np.arange(100, 140)


def pictures(channels: int, height: int = 8, width: int = 8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (len(IDS), channels, height, width), dtype=np.uint8)


def plain(picture: np.ndarray, pad: int, top: int, left: int, flip: bool) -> np.ndarray:
    """Pad, crop, mirror one ``[C, H, W]`` image, as one would with Pillow."""
    _, height, width = picture.shape
    image = Image.fromarray(picture.transpose(1, 2, 0) if picture.shape[0] == 3 else picture[0])
    image = ImageOps.expand(image, border=pad, fill=0).crop((left, top, left + width, top + height))
    if flip:
        image = ImageOps.mirror(image)
    return np.asarray(image).reshape(height, width, -1).transpose(2, 0, 1)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("sides", [(8, 8), (6, 10)])
@pytest.mark.parametrize(
    "augment", [Augment(pad=2, flip=True), Augment(pad=1), Augment(flip=True), Augment()]
)
def test_equals_a_plain_loop(channels: int, sides: tuple[int, int], augment: Augment) -> None:
    images = pictures(channels, *sides)
    draws = draw(augment, seed=4, epoch=1, ids=IDS, device=CPU)
    expected = [
        plain(image, augment.pad, int(top), int(left), bool(flip))
        for image, top, left, flip in zip(images, draws.top, draws.left, draws.flip, strict=True)
    ]
    varied = apply_draws(torch.from_numpy(images), draws)
    assert varied.dtype == torch.uint8
    assert np.array_equal(varied.numpy(), np.stack(expected))
    as_float = apply_draws(torch.from_numpy(images).float(), draws)
    assert torch.equal(as_float, varied.float())


def test_draws_cover_every_offset_and_both_orientations() -> None:
    ids = np.arange(4000)
    draws = draw(Augment(pad=4, flip=True), seed=0, epoch=0, ids=ids, device=CPU)
    assert set(draws.top.tolist()) == set(draws.left.tolist()) == set(range(9))
    assert 0.45 < float(draws.flip.float().mean()) < 0.55
    assert not torch.equal(draws.top, draws.left)
    still = draw(Augment(), seed=0, epoch=0, ids=ids, device=CPU)
    assert not still.flip.any()
    assert still.top.max() == still.left.max() == 0


def test_draws_change_with_the_epoch_and_the_seed() -> None:
    augment = Augment(pad=4, flip=True)
    first = draw(augment, seed=0, epoch=0, ids=IDS, device=CPU)
    for seed, epoch in ((0, 1), (1, 0)):
        assert not torch.equal(first.top, draw(augment, seed=seed, epoch=epoch, ids=IDS, device=CPU).top)


def test_the_input_is_left_alone() -> None:
    images = torch.from_numpy(pictures(3))
    before = images.clone()
    for augment in (Augment(pad=1, flip=True), Augment()):
        apply_draws(images, draw(augment, seed=0, epoch=0, ids=IDS, device=CPU)).zero_()
    assert torch.equal(images, before)


def test_normalise_divides_by_the_deviation_of_scaled_pixels() -> None:
    images = pictures(3)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    expected = (images / 255.0 - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1))
    found = Normalise(mean, std, CPU)(torch.from_numpy(images))
    assert found.dtype == torch.float32
    assert np.allclose(found.numpy(), expected, atol=1e-5)


def test_padding_is_black_before_normalisation() -> None:
    white = torch.full((1, 1, 4, 4), 255, dtype=torch.uint8)
    draws = draw(Augment(pad=4), seed=0, epoch=0, ids=IDS[:1], device=CPU)._replace(top=torch.tensor([0]))
    pixels = Normalise((0.5,), (0.25,), CPU)(apply_draws(white, draws))
    assert torch.equal(pixels, torch.full((1, 1, 4, 4), (0.0 - 0.5) / 0.25))


def test_negative_padding_is_refused() -> None:
    with pytest.raises(ValueError, match="pad must be 0 or more pixels, got -1"):
        Augment(pad=-1)
