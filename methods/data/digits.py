"""scikit-learn's bundled handwritten digits: 1,797 real 8x8 scans, no download.

Optical Recognition of Handwritten Digits (Alpaydin, Kaynak 1998), the test part of the UCI set.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import numpy as np

from methods.data.base import Augment, DataError, ImageData, Images, channel_statistics
from methods.data.split import stratified_split

_TEST_SEED = 0
"""Fixed: the test images are the same in every experiment."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Digits:
    """The settings of ``digits``."""

    test_fraction: float = 0.25
    """Share of the scans, drawn per class, that is the test set."""

    default_augment: ClassVar[Augment] = Augment(pad=1)

    def __post_init__(self) -> None:
        if not 0.0 < self.test_fraction < 1.0:
            raise ValueError(f"test_fraction must lie between 0 and 1, got {self.test_fraction}")

    def fingerprint(self) -> str:
        pixels, labels = _scans()
        digest = hashlib.sha256(pixels.tobytes() + labels.tobytes())
        digest.update(f"digits test_fraction={self.test_fraction!r}".encode())
        return digest.hexdigest()

    def load(self) -> ImageData:
        pixels, labels = _scans()
        try:
            train, test = stratified_split(labels, self.test_fraction, _TEST_SEED)
        except ValueError as error:
            raise DataError(
                f"digits cannot be split by test_fraction={self.test_fraction}: {error}"
            ) from error
        mean, std = channel_statistics(pixels[train])
        return ImageData(
            train=Images(pixels[train], labels[train]),
            test=Images(pixels[test], labels[test]),
            class_names=tuple("0123456789"),
            mean=mean,
            std=std,
        )


@cache
def _scans() -> tuple[np.ndarray, np.ndarray]:
    """All scans as uint8 ``[1797, 1, 8, 8]`` (0..16 stretched to 0..255) with their labels."""
    from sklearn.datasets import load_digits

    scans = load_digits()
    pixels = np.rint(scans.images * (255 / 16)).astype(np.uint8)[:, None]
    return pixels, scans.target.astype(np.int64)
