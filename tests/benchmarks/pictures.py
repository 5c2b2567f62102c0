"""The images that the benchmarks train on: CIFAR-100 from parquet where it is at hand, else random pixels of its shape.

``CIFAR100`` names the folder that holds ``train*.parquet``.
"""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import ClassVar

import numpy as np

from methods.data.base import Augment, ImageData, Images
from methods.data.cifar import Cifar100

FOLDER = Path(os.environ.get("CIFAR100", Path(__file__).parents[2] / "../shared/data/cifar100"))
NUM_CLASSES = 100


def origin() -> str:
    """What ``images`` gives, for the table."""
    return "CIFAR-100" if _files() else "random pixels"


def images(number: int) -> Images:
    """The first ``number`` training images, from the start again where there are fewer."""
    known = _decoded(number) if _files() else _random(number)
    rows = np.arange(number) % len(known)
    return Images(known.gather(rows), known.labels[rows])


@dataclass(frozen=True, kw_only=True, slots=True)
class Pictures:
    """A data set of a few of these images, as a user would write one."""

    num_training: int
    """Training images besides those held out; 100 of all of them are tested on."""
    num_held_out: int = 10
    """Images for validation, if ``data.validation`` says this share."""

    default_augment: ClassVar[Augment] = Augment(pad=4, flip=True)

    @property
    def validation(self) -> float:
        """The share that is held out."""
        return self.num_held_out / (self.num_training + self.num_held_out)

    def fingerprint(self) -> str:
        return f"{origin()} {self.num_training} {self.num_held_out}"

    def load(self) -> ImageData:
        train = images(self.num_training + self.num_held_out)
        train = Images(
            train.pixels, train.labels % 10
        )  # every class has several images, however few there are
        test = Images(train.pixels[:100], train.labels[:100])
        names = tuple(map(str, range(NUM_CLASSES)))
        return ImageData(train=train, test=test, class_names=names, mean=Cifar100.mean, std=Cifar100.std)


def _files() -> list[Path]:
    return sorted(FOLDER.glob("train*.parquet"))


@cache
def _decoded(number: int) -> Images:
    import pyarrow.parquet as pq
    from PIL import Image

    rows = next(pq.ParquetFile(_files()[0]).iter_batches(number, columns=["image", "fine_label"])).to_pylist()
    pixels = [np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")) for row in rows]
    labels = np.array([row["fine_label"] for row in rows], dtype=np.int64)
    return Images(np.ascontiguousarray(np.stack(pixels).transpose(0, 3, 1, 2)), labels)


def _random(number: int) -> Images:
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (number, 3, 32, 32), dtype=np.uint8)
    return Images(pixels, generator.integers(0, NUM_CLASSES, number))
