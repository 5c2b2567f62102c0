"""What a data set is to the rest: numpy arrays at rest, with class names and the statistics to normalise by.

Shape legend: n = samples, B = batch, C = channels, H, W = image sides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np

from methods.base import Task


class DataError(ValueError):
    """A data set that cannot be read as its settings say: absent, damaged, or of another layout."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Augment:
    """How training images are varied: pad with black, crop back at random, flip at random."""

    pad: int = 0
    """Black pixels added on each side before a crop of the original size is taken. 0: no crop."""
    flip: bool = False
    """Mirror left and right with probability one half."""

    def __post_init__(self) -> None:
        if self.pad < 0:
            raise ValueError(f"pad must be 0 or more pixels, got {self.pad}")


class PixelSource(Protocol):
    """Images that are decoded when they are asked for."""

    @property
    def shape(self) -> tuple[int, ...]:
        """``(n, C, H, W)``"""

    def __len__(self) -> int: ...

    def gather(self, indices: np.ndarray) -> np.ndarray:
        """The images at ``indices`` ``[B]``: a new uint8 array ``[B, C, H, W]``."""


@dataclass(frozen=True)
class Images:
    """One split: pixels and labels, in an order that never changes."""

    pixels: np.ndarray | PixelSource
    """uint8 ``[n, C, H, W]``, in memory (possibly read-only) or decoded on demand."""
    labels: np.ndarray
    """int64 ``[n]``"""

    def __post_init__(self) -> None:
        if len(self.pixels) != len(self.labels):
            raise DataError(
                f"{len(self.pixels)} images have {len(self.labels)} labels; every image needs one"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def gather(self, indices: np.ndarray) -> np.ndarray:
        """Pixels of the images at ``indices`` ``[B]``: a new uint8 array ``[B, C, H, W]``."""
        if isinstance(self.pixels, np.ndarray):
            return np.take(self.pixels, indices, axis=0)
        return self.pixels.gather(indices)


@dataclass(frozen=True)
class ImageData:
    """A loaded data set. Validation images are split off ``train`` by whoever trains."""

    train: Images
    test: Images
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    """Per channel, of pixels scaled to 0..1."""
    std: tuple[float, ...]
    """Per channel, of pixels scaled to 0..1."""

    def __post_init__(self) -> None:
        for split, images in (("train", self.train), ("test", self.test)):
            if len(images) == 0:
                raise DataError(f"the {split} split holds no image")
            low, high = int(images.labels.min()), int(images.labels.max())
            if low < 0 or high >= self.num_classes:
                raise DataError(
                    f"labels of the {split} split run from {low} to {high}; with {self.num_classes} classes they "
                    f"must lie in 0..{self.num_classes - 1}"
                )
        if self.train.pixels.shape[1:] != self.test.pixels.shape[1:]:
            raise DataError(
                f"train images are {self.train.pixels.shape[1:]} (C, H, W) but test images "
                f"{self.test.pixels.shape[1:]}: set image_size"
            )

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def task(self) -> Task:
        """What a network has to fit: classes, channels and image side."""
        _, channels, height, _ = self.train.pixels.shape
        return Task(num_classes=self.num_classes, in_channels=channels, image_size=height)


class DataSource(Protocol):
    """A data set that can be loaded. Implemented by frozen dataclasses whose fields are its YAML settings."""

    default_augment: ClassVar[Augment]
    """What training images get when the experiment says nothing."""

    def fingerprint(self) -> str:
        """Changes whenever the loaded content would, and never with the place where the files lie. Cheap."""

    def load(self) -> ImageData:
        """Read everything. Raises DataError."""


def channel_statistics(
    pixels: np.ndarray | PixelSource, *, max_images: int | None = None
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of pixels scaled to 0..1.

    With ``max_images``, only that many images, evenly spaced, are read. A channel of one single value gets the
    deviation 1, so that dividing by it is harmless.
    """
    images = Images(pixels, np.zeros(len(pixels), dtype=np.int64))
    num_images = min(len(images), max_images or len(images))
    chosen = np.linspace(0, len(images) - 1, num_images).round().astype(np.int64)
    counts = np.zeros((pixels.shape[1], 256), dtype=np.int64)
    for start in range(0, num_images, 1024):
        part = images.gather(chosen[start : start + 1024])
        for channel in range(part.shape[1]):
            counts[channel] += np.bincount(part[:, channel].ravel(), minlength=256)
    share = counts / counts.sum(axis=1, keepdims=True)
    values = np.arange(256) / 255.0
    mean = share @ values
    std = np.sqrt((share * (values - mean[:, None]) ** 2).sum(axis=1))
    std[std == 0.0] = 1.0
    return tuple(mean.tolist()), tuple(std.tolist())
