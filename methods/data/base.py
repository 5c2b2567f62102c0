"""What a data set is to the rest: numpy arrays at rest, with class names and the statistics to normalise by.

Shape legend: n = samples, B = batch, C = channels, H, W = image sides.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
import torch

from methods.base import AnyBatch, Task


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


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamSettings:
    """How the splits of a data set become batches, for one worker of one stage."""

    batch_size: int
    """Training samples of a batch, over all workers together."""
    evaluation_batch_size: int
    """The most samples of a batch that is only evaluated."""
    seed: int
    """Of order and augmentation."""
    augment: Augment
    """How training images are varied."""
    validation: float
    """Fraction of the training data held out, where the data set has no validation split of its own."""
    device: torch.device
    """Where batches are made."""
    split_seed: int = 0
    """Which validation split is drawn."""
    fraction: float = 1.0
    """Share of each class's training images that is used."""
    imbalance: float = 1.0
    """Largest class over smallest."""
    strong: bool = False
    """Whether training batches bring a strongly varied view of each image as well."""
    rank: int = 0
    """This worker, from 0."""
    num_workers: int = 1
    """Workers that share each batch."""


class SampleStream(Protocol):
    """This worker's share of the batches of one split. ``batch_size`` and ``num_samples`` count over all workers."""

    batch_size: int
    num_batches: int

    @property
    def num_samples(self) -> int: ...

    def known_labels(self) -> np.ndarray:
        """Label of each sample of the whole split by its index, int64; -1 for samples that do not come up here."""

    def batches(self, epoch: int, start: int = 0) -> Iterator[AnyBatch]:
        """Batches of ``epoch`` (from 0), from batch number ``start`` on: the same whenever they are asked for."""


@runtime_checkable
class ListedStream(SampleStream, Protocol):
    """A stream that tells beforehand which samples come up: what teachers say of its batches can be recorded."""

    seed: int
    """From which order and augmentation follow."""
    num_workers: int

    def sample_ids(self, epoch: int) -> list[np.ndarray]:
        """Which samples this worker's share of each batch of ``epoch`` holds, ``[B]`` each, in their order."""


class LoadedData(Protocol):
    """A data set in memory, of whatever kind."""

    def task(self) -> Any:
        """What a network has to fit: of the data source's ``task_type``."""

    def streams(self, settings: StreamSettings) -> Mapping[str, SampleStream]:
        """``training``, ``validation`` (possibly without samples) and ``test``."""

    def described(self) -> dict[str, Any]:
        """What the manifest says of the data, as plain values: all that using the network later takes."""


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

    def streams(self, settings: StreamSettings) -> Mapping[str, SampleStream]:
        """Training images are those that are neither held out, class by class, nor thinned away."""
        from methods.data.image_streams import image_streams

        return image_streams(self, settings)

    def described(self) -> dict[str, Any]:
        """Statistics to normalise by, and names of the classes."""
        normalisation = {"mean": list(self.mean), "std": list(self.std)}
        return {"normalisation": normalisation, "class_names": list(self.class_names)}


class DataSource(Protocol):
    """A data set that can be loaded. Implemented by frozen dataclasses whose fields are its YAML settings.

    Two things more that a source may have: ``task_type`` (see ``task_type_of``), and ``refusals(section)``, which gives
    reasons why settings of the data section (``fraction``, ``augment``, ...) do not fit it.
    """

    default_augment: ClassVar[Augment]
    """What training images get when the experiment says nothing."""

    def fingerprint(self) -> str:
        """Changes whenever the loaded content would, and never with the place where the files lie. Cheap."""

    def load(self) -> LoadedData:
        """Read everything. Raises DataError."""


def task_type_of(source: DataSource | type[DataSource]) -> type:
    """What networks for this data set have to fit: ``Task`` (classification) where the source names nothing else."""
    found: type = getattr(source, "task_type", Task)
    return found


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
