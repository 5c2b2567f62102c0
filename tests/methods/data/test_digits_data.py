from __future__ import annotations

import numpy as np
import pytest

from methods.base import Task
from methods.data import DATASETS, Augment
from methods.data.digits import Digits


def test_the_bundled_scans() -> None:
    data = Digits().load()
    assert DATASETS["digits"] is Digits
    assert len(data.train) + len(data.test) == 1797
    assert len(data.test) == 449
    assert data.task() == Task(num_classes=10, in_channels=1, image_size=8)
    assert data.class_names == tuple("0123456789")
    for images in (data.train, data.test):
        assert images.pixels.dtype == np.uint8
        assert images.labels.dtype == np.int64
        assert set(images.pixels.ravel().tolist()) == {round(v * 255 / 16) for v in range(17)}
    share = np.bincount(data.test.labels) / (np.bincount(data.test.labels) + np.bincount(data.train.labels))
    assert np.abs(share - 0.25).max() < 0.01
    assert Digits.default_augment == Augment(pad=1, flip=False)


def test_statistics_are_those_of_the_training_pixels() -> None:
    data = Digits(test_fraction=0.5).load()
    assert data.mean == pytest.approx([(data.train.pixels / 255).mean()], abs=1e-9)
    assert data.std == pytest.approx([(data.train.pixels / 255).std()], abs=1e-9)


def test_the_test_set_is_the_same_every_time_and_disjoint_from_training() -> None:
    first, second = Digits().load(), Digits().load()
    assert np.array_equal(first.test.pixels, second.test.pixels)
    train = {image.tobytes() for image in first.train.pixels}
    assert not any(image.tobytes() in train for image in first.test.pixels)


def test_the_fingerprint_follows_the_content() -> None:
    assert Digits().fingerprint() == Digits(test_fraction=0.25).fingerprint()
    assert Digits().fingerprint() != Digits(test_fraction=0.3).fingerprint()


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5])
def test_impossible_test_fraction(fraction: float) -> None:
    with pytest.raises(ValueError, match=f"test_fraction must lie between 0 and 1, got {fraction}"):
        Digits(test_fraction=fraction)
