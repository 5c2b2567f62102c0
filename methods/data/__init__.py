"""The data sets an experiment may name."""

from __future__ import annotations

from methods.data.base import Augment, DataError, DataSource, ImageData, Images
from methods.data.cifar import Cifar10, Cifar100
from methods.data.digits import Digits
from methods.data.imagefolder import ImageFolder
from methods.data.parquet import Parquet
from methods.data.split import stratified_split
from methods.data.stream import Stream
from methods.grounding.refer import Refer
from methods.grounding.shapes_ref import ShapesRef

__all__ = [
    "DATASETS",
    "Augment",
    "DataError",
    "DataSource",
    "ImageData",
    "Images",
    "Stream",
    "stratified_split",
]

DATASETS: dict[str, type[DataSource]] = {
    "cifar10": Cifar10,
    "cifar100": Cifar100,
    "digits": Digits,
    "imagefolder": ImageFolder,
    "parquet": Parquet,
    "refer": Refer,
    "shapes_ref": ShapesRef,
}
"""Name -> class whose fields are the settings of the data set."""
