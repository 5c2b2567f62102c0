"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009), from the official archive or from parquet files.

The official batches are pickles. torchvision reads them only after their MD5 sums agree with its own table, which is
also why that table alone identifies their content.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from methods.data.base import Augment, DataError, ImageData, Images
from methods.data.files import combined_digest, folder, listing
from methods.data.parquet import Parquet


@dataclass(frozen=True, kw_only=True, slots=True)
class _Cifar:
    """The settings of ``cifar10`` and ``cifar100``."""

    root: str
    """Folder with the official archive unpacked, or with ``train*.parquet`` and ``test*.parquet``."""
    download: bool = False
    """Fetch the official archive into ``root`` when it holds neither."""

    default_augment: ClassVar[Augment] = Augment(pad=4, flip=True)
    official: ClassVar[str]
    """Name of torchvision's class."""
    columns: ClassVar[tuple[str, str]]
    """Image and label column of the parquet files."""
    mean: ClassVar[tuple[float, ...]]
    std: ClassVar[tuple[float, ...]]

    def fingerprint(self) -> str:
        parquet = self._parquet()
        if parquet is not None:
            return combined_digest(self.official, parquet.fingerprint())
        reader = self._reader()
        self._require(reader)
        return combined_digest(self.official, reader.train_list, reader.test_list, reader.meta["md5"])

    def load(self) -> ImageData:
        parquet = self._parquet()
        if parquet is not None:
            return replace(parquet.load(), mean=self.mean, std=self.std)
        reader = self._reader()
        self._require(reader)
        train, _ = self._read(reader, train=True)
        test, names = self._read(reader, train=False)
        return ImageData(train=train, test=test, class_names=names, mean=self.mean, std=self.std)

    def _parquet(self) -> Parquet | None:
        root = Path(self.root).expanduser()
        if not any(root.glob("*.parquet")):
            return None
        image_column, label_column = self.columns
        return Parquet(root=self.root, image_column=image_column, label_column=label_column)

    def _reader(self) -> Any:
        import torchvision.datasets

        return getattr(torchvision.datasets, self.official)

    def _require(self, reader: Any) -> None:
        if self.download:
            return
        root = folder(self.root)
        if not (root / reader.base_folder).is_dir():
            raise DataError(
                f"{root} holds neither the folder {reader.base_folder} (official archive) nor train*.parquet; it holds "
                f"{listing(root)}: set data.root, or download: true"
            )

    def _read(self, reader: Any, *, train: bool) -> tuple[Images, tuple[str, ...]]:
        root = Path(self.root).expanduser()
        try:
            split = reader(root, train=train, download=self.download)
        except (RuntimeError, OSError) as error:
            place = root / reader.base_folder
            remedy = (
                "check the network and try again"
                if self.download
                else "delete the folder and set download: true"
            )
            raise DataError(
                f"{place} is incomplete, or not the official release ({error}): {remedy}"
            ) from error
        pixels = np.ascontiguousarray(split.data.transpose(0, 3, 1, 2))
        return Images(pixels, np.asarray(split.targets, dtype=np.int64)), tuple(split.classes)


@dataclass(frozen=True, kw_only=True, slots=True)
class Cifar10(_Cifar):
    """50,000 training and 10,000 test images of 32x32 in 10 classes."""

    official: ClassVar[str] = "CIFAR10"
    columns: ClassVar[tuple[str, str]] = ("img", "label")
    mean: ClassVar[tuple[float, ...]] = (0.4914, 0.4822, 0.4465)
    std: ClassVar[tuple[float, ...]] = (0.2470, 0.2435, 0.2616)


@dataclass(frozen=True, kw_only=True, slots=True)
class Cifar100(_Cifar):
    """50,000 training and 10,000 test images of 32x32 in 100 (fine) classes."""

    official: ClassVar[str] = "CIFAR100"
    columns: ClassVar[tuple[str, str]] = ("image", "fine_label")
    mean: ClassVar[tuple[float, ...]] = (0.5071, 0.4867, 0.4408)
    std: ClassVar[tuple[float, ...]] = (0.2675, 0.2565, 0.2761)
