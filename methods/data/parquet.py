"""Images in parquet files, as HuggingFace data sets store them: a struct {bytes, path} beside an integer label."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from methods.data.base import Augment, DataError, ImageData, Images, channel_statistics
from methods.data.decode import check_image_settings, decode, fill
from methods.data.files import combined_digest, content_digest, folder, listing
from methods.names import did_you_mean

_ROWS_AT_ONCE = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class Parquet:
    """The settings of ``parquet``. Everything is decoded into memory."""

    root: str
    """Folder that holds the files."""
    train: str = "train*.parquet"
    """Pattern of the training files under ``root``; rows come in the order of the sorted names."""
    test: str = "test*.parquet"
    """Pattern of the test files under ``root``."""
    image_column: str = "image"
    """Column of encoded images: a struct with ``bytes``, or plain binary."""
    label_column: str | None = None
    """Column of class indices from 0. Unset: ``label``, else the only integer column."""
    image_size: int | None = None
    """Side to which images are scaled and cropped. Unset: all must be squares of one size."""
    channels: int = 3
    """3 converts every image to RGB, 1 to grey."""

    default_augment: ClassVar[Augment] = Augment()

    def __post_init__(self) -> None:
        check_image_settings(self.image_size, self.channels)

    def fingerprint(self) -> str:
        train, test = self._files()
        columns = (self.image_column, self._label_column(train[0]))
        return combined_digest(
            "parquet", content_digest(train), content_digest(test), columns, self.image_size, self.channels
        )

    def load(self) -> ImageData:
        train_files, test_files = self._files()
        train, train_names = self._read(train_files)
        test, test_names = self._read(test_files)
        names = _agreed_names(train, train_names, test, test_names)
        mean, std = channel_statistics(train.pixels)
        return ImageData(train=train, test=test, class_names=names, mean=mean, std=std)

    def _files(self) -> tuple[list[Path], list[Path]]:
        root = folder(self.root)
        train, test = _matching(root, self.train, "train"), _matching(root, self.test, "test")
        both = sorted(set(train) & set(test))
        if both:
            raise DataError(
                f"{both[0]} matches both train={self.train!r} and test={self.test!r}: narrow one of them"
            )
        return train, test

    def _label_column(self, file: Path) -> str:
        schema = _open(file).schema_arrow
        for wanted in (self.image_column, self.label_column):
            if wanted is not None and wanted not in schema.names:
                hint = did_you_mean(wanted, schema.names)
                raise DataError(f"{file} has no column {wanted!r}{hint} (columns: {', '.join(schema.names)})")
        integer = [field.name for field in schema if pa.types.is_integer(field.type)]
        column = self.label_column or ("label" if "label" in schema.names else None)
        if column is None and len(integer) == 1:
            column = integer[0]
        if column is None:
            raise DataError(
                f"{file} has no column 'label' and {len(integer)} integer columns ({', '.join(integer) or 'none'}; all "
                f"columns: {', '.join(schema.names)}): name the labels with label_column"
            )
        if column not in integer:
            raise DataError(
                f"column {column!r} of {file} holds {schema.field(column).type}, expected class indices"
            )
        return column

    def _read(self, files: list[Path]) -> tuple[Images, tuple[str, ...] | None]:
        """All rows of the files, and the class names that their schema declares."""
        opened = [(file, _open(file), self._label_column(file)) for file in files]
        total = sum(content.metadata.num_rows for _, content, _ in opened)
        labels = np.empty(total, dtype=np.int64)
        pixels: np.ndarray | None = None
        row = 0
        for file, content, column in opened:
            first_row = row
            for images, part in _row_groups(file, content, self.image_column, column):
                where = f"{file}, row {row - first_row}"
                if pixels is None:
                    pixels = np.empty((total, *self._shape(images[0], where)), dtype=np.uint8)
                rows = slice(row, row + len(part))
                labels[rows] = _integers(part, column, where)
                self._decode(images, pixels[rows], file, row - first_row)
                row += len(part)
        if pixels is None:
            raise DataError(f"{', '.join(map(str, files))} hold no rows: export the data set again")
        return Images(pixels, labels), _declared_names(opened[0][1].schema_arrow, opened[0][2])

    def _shape(self, content: Any, where: str) -> tuple[int, ...]:
        shape = self._decode_one(content, where).shape
        if shape[1] != shape[2]:
            raise DataError(f"{where} is {shape[2]}x{shape[1]} pixels, not a square: set image_size")
        return shape

    def _decode(self, images: list[Any], into: np.ndarray, file: Path, first_row: int) -> None:
        def decode_one(position: int, content: Any) -> np.ndarray:
            where = f"{file}, row {first_row + position}"
            pixels = self._decode_one(content, where)
            if pixels.shape != into.shape[1:]:
                found, expected = pixels.shape[:0:-1], into.shape[:1:-1]
                raise DataError(
                    f"{where} is {_size(found)} pixels but others are {_size(expected)}: set image_size"
                )
            return pixels

        fill(into, images, decode_one)

    def _decode_one(self, content: Any, where: str) -> np.ndarray:
        if isinstance(content, Mapping):
            content = content.get("bytes")
        if not isinstance(content, bytes):
            raise DataError(
                f"{where}: column {self.image_column!r} holds no image bytes; store the encoded files in it"
            )
        return decode(content, channels=self.channels, image_size=self.image_size, where=where)


def _matching(root: Path, pattern: str, split: str) -> list[Path]:
    files = sorted(root.glob(pattern))
    if not files:
        raise DataError(f"no file in {root} matches {split}={pattern!r}; it holds {listing(root)}")
    return files


def _open(file: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(file)
    except (pa.ArrowException, OSError) as error:
        raise _damaged(file, error) from error


def _damaged(file: Path, error: Exception) -> DataError:
    return DataError(
        f"{file} ({file.stat().st_size} bytes) is not a complete parquet file; it was probably cut short while being "
        f"written or copied: copy or download it again ({error})"
    )


def _row_groups(file: Path, content: pq.ParquetFile, image_column: str, label_column: str) -> Any:
    """Yield a list of images and an arrow array of labels, a few thousand rows at a time."""
    try:
        for batch in content.iter_batches(_ROWS_AT_ONCE, columns=[image_column, label_column]):
            yield batch.column(image_column).to_pylist(), batch.column(label_column)
    except (pa.ArrowException, OSError) as error:
        raise _damaged(file, error) from error


def _integers(labels: pa.Array, column: str, where: str) -> np.ndarray:
    if labels.null_count:
        raise DataError(
            f"{where} or later: column {column!r} has {labels.null_count} empty labels: fill or drop the rows"
        )
    values: np.ndarray = labels.to_numpy(zero_copy_only=False).astype(np.int64)
    return values


def _declared_names(schema: pa.Schema, label_column: str) -> tuple[str, ...] | None:
    """Class names from the HuggingFace entry of the schema metadata, where there is one."""
    entry = (schema.metadata or {}).get(b"huggingface")
    if entry is None:
        return None
    feature = json.loads(entry).get("info", {}).get("features", {}).get(label_column, {})
    names = feature.get("names")
    return tuple(map(str, names)) if names else None


def _agreed_names(
    train: Images, train_names: tuple[str, ...] | None, test: Images, test_names: tuple[str, ...] | None
) -> tuple[str, ...]:
    if train_names is not None and test_names is not None and train_names != test_names:
        different = sorted(set(train_names) ^ set(test_names))[:5] or "the order"
        raise DataError(
            f"train files declare {len(train_names)} classes and test files {len(test_names)}; they differ in "
            f"{different}: export both splits with the same class names"
        )
    declared = train_names or test_names
    if declared is not None:
        return declared
    num_train, num_test = int(train.labels.max()) + 1, int(test.labels.max()) + 1
    if num_train != num_test:
        raise DataError(
            f"class count mismatch: train labels reach {num_train - 1} ({num_train} classes), test labels {num_test - 1} "
            f"({num_test} classes), and no class names are declared: check the label column, or declare the names"
        )
    return tuple(map(str, range(num_train)))


def _size(sides: tuple[int, ...]) -> str:
    return "x".join(map(str, sides))
