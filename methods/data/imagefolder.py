"""One folder per class: ``root/train/CLASS/*.jpg`` and ``root/test/CLASS/*.jpg`` (or ``val``)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, get_args

import numpy as np

from methods.data.base import Augment, DataError, ImageData, Images, channel_statistics
from methods.data.decode import check_image_settings, decode, fill
from methods.data.files import combined_digest, content_digest, folder, listing

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
MEMORY_BYTES = 1 << 30
"""``in_memory: auto`` keeps a split of up to this many decoded bytes in memory."""
DIGEST_BYTES = 256 << 20
"""Up to this many bytes of files, the fingerprint covers all of them; beyond, names and sizes."""
STATISTICS_IMAGES = 1024
"""Mean and deviation come from this many training images, evenly spaced."""

InMemory = Literal["auto", "always", "never"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageFolder:
    """The settings of ``imagefolder``. Classes are the folder names of ``train`` in alphabetical order."""

    root: str
    """Folder that holds ``train`` and ``test`` (``val`` where there is no ``test``)."""
    image_size: int = 224
    """Shorter sides are scaled to this, and the centre square is kept."""
    channels: int = 3
    """3 converts every image to RGB, 1 to grey."""
    in_memory: InMemory = "auto"
    """Whether to decode everything once, or each batch when it is needed; auto decides by size."""

    default_augment: ClassVar[Augment] = Augment()

    def __post_init__(self) -> None:
        check_image_settings(self.image_size, self.channels)
        if self.in_memory not in get_args(InMemory):
            raise ValueError(
                f"in_memory must be one of {', '.join(get_args(InMemory))}, got {self.in_memory!r}"
            )

    def fingerprint(self) -> str:
        """Covers class and file names, sizes, and the bytes of the files while they are ``DIGEST_BYTES`` at most.

        In a larger folder, an image replaced by another of equal size is not noticed.
        """
        listed: list[object] = [self.image_size, self.channels]
        for split in self._splits():
            files = [file for files in _classes(split).values() for file in files]
            sizes = [file.stat().st_size for file in files]
            listed += [
                (file.relative_to(split).as_posix(), size) for file, size in zip(files, sizes, strict=True)
            ]
            listed.append(content_digest(files) if sum(sizes) <= DIGEST_BYTES else "sizes only")
        return combined_digest("imagefolder", *listed)

    def load(self) -> ImageData:
        train_folder, test_folder = self._splits()
        train_files, test_files = _classes(train_folder), _classes(test_folder)
        if train_files.keys() != test_files.keys():
            different = ", ".join(sorted(train_files.keys() ^ test_files.keys())[:8])
            raise DataError(
                f"class count mismatch: {train_folder} holds {len(train_files)} classes and {test_folder} "
                f"{len(test_files)}; only one of them has {different}: both need the same class folders"
            )
        train, test = self._images(train_files), self._images(test_files)
        mean, std = channel_statistics(train.pixels, max_images=STATISTICS_IMAGES)
        return ImageData(train=train, test=test, class_names=tuple(train_files), mean=mean, std=std)

    def reads_while_used(self) -> bool:
        """Whether images are read from their files in every batch, so that each machine that trains needs the files."""
        splits = (_classes(split).values() for split in self._splits())
        return not all(self._fits(sum(len(files) for files in split)) for split in splits)

    def _fits(self, num_images: int) -> bool:
        """Whether a split of so many images is decoded once and kept."""
        size = num_images * self.channels * self.image_size**2
        return self.in_memory == "always" or (self.in_memory == "auto" and size <= MEMORY_BYTES)

    def _splits(self) -> tuple[Path, Path]:
        root = folder(self.root)
        test = next((root / name for name in ("test", "val") if (root / name).is_dir()), None)
        if not (root / "train").is_dir() or test is None:
            raise DataError(f"{root} needs a folder train and a folder test or val; it holds {listing(root)}")
        return root / "train", test

    def _images(self, classes: dict[str, list[Path]]) -> Images:
        labels = np.repeat(np.arange(len(classes)), [len(files) for files in classes.values()])
        files = tuple(file for files in classes.values() for file in files)
        source = FolderPixels(files, self.image_size, self.channels)
        if self._fits(len(files)):
            return Images(source.gather(np.arange(len(files))), labels)
        return Images(source, labels)


@dataclass(frozen=True, slots=True)
class FolderPixels:
    """Image files that are decoded when they are asked for. Holds names only, so it travels cheaply."""

    files: tuple[Path, ...]
    image_size: int
    channels: int

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self.files), self.channels, self.image_size, self.image_size

    def __len__(self) -> int:
        return len(self.files)

    def gather(self, indices: np.ndarray) -> np.ndarray:
        """The images at ``indices``, uint8 ``[B, C, H, W]``. Raises DataError for a file that cannot be decoded."""
        pixels = np.empty((len(indices), *self.shape[1:]), dtype=np.uint8)
        fill(pixels, [self.files[index] for index in indices], self._decode)
        return pixels

    def _decode(self, position: int, file: Path) -> np.ndarray:
        return decode(file, channels=self.channels, image_size=self.image_size, where=str(file))


def _classes(split: Path) -> dict[str, list[Path]]:
    """Class name -> its image files, both sorted."""
    folders = sorted(entry for entry in split.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not folders:
        raise DataError(f"{split} holds no class folders, but {listing(split)}: expected {split}/CLASS/*.jpg")
    classes = {}
    for entry in folders:
        files = sorted(
            file for file in entry.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file()
        )
        if not files:
            raise DataError(f"class folder {entry} holds no image but {listing(entry)}: fill or remove it")
        classes[entry.name] = files
    return classes
