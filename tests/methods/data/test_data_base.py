from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from methods.data import DATASETS
from methods.data.base import Augment, DataError, ImageData, Images, channel_statistics


def images(num: int = 4, channels: int = 3, label: int = 1) -> Images:
    pixels = np.random.default_rng(0).integers(0, 256, (num, channels, 8, 8), dtype=np.uint8)
    return Images(pixels, np.full(num, label))


@pytest.mark.parametrize("name", sorted(DATASETS))
def test_every_data_set_is_a_frozen_settings_class(name: str) -> None:
    source = DATASETS[name]
    assert dataclasses.is_dataclass(source)
    assert isinstance(source.default_augment, Augment)
    required = [f.name for f in dataclasses.fields(source) if f.default is dataclasses.MISSING]
    own = {"digits": [], "shapes_ref": [], "refer": ["root", "collection"]}
    assert required == own.get(name, ["root"])


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        (images(label=2), images(), "labels of the train split run from 2 to 2; with 2 classes"),
        (images(), images(label=-1), "labels of the test split run from -1 to -1"),
        (images(), images(num=0), "the test split holds no image"),
        (
            images(),
            images(channels=1),
            r"train images are \(3, 8, 8\) \(C, H, W\) but test images \(1, 8, 8\)",
        ),
    ],
)
def test_inconsistent_splits(train: Images, test: Images, message: str) -> None:
    with pytest.raises(DataError, match=message):
        ImageData(train=train, test=test, class_names=("a", "b"), mean=(0.0,), std=(1.0,))


def test_an_image_without_label() -> None:
    with pytest.raises(DataError, match="4 images have 3 labels"):
        Images(images().pixels, np.zeros(3, dtype=np.int64))


def test_statistics_equal_the_plain_ones() -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (2500, 3, 4, 4), dtype=np.uint8)
    pixels[:, 2] = 51
    mean, std = channel_statistics(pixels)
    assert mean == pytest.approx((pixels / 255).mean(axis=(0, 2, 3)))
    assert std[:2] == pytest.approx((pixels / 255).std(axis=(0, 2, 3))[:2])
    assert std[2] == 1.0
    chosen = pixels[np.linspace(0, 2499, 10).round().astype(int)]
    assert channel_statistics(pixels, max_images=10)[0] == pytest.approx((chosen / 255).mean(axis=(0, 2, 3)))
