"""From image files to uint8 arrays of one shape."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, ImageOps

from methods.data.base import DataError

T = TypeVar("T")
CHUNK = 64
"""Images per task of the thread pool: one task per image would cost more than decoding a small one."""
_MODES = {1: "L", 3: "RGB"}


def decode(content: bytes | Path, *, channels: int, image_size: int | None, where: str) -> np.ndarray:
    """One image as uint8 ``[C, H, W]``.

    It is turned as its EXIF entry says and converted to grey (1 channel) or RGB (3) from whatever mode it has. With
    ``image_size``, its shorter side is scaled to that (bilinear) and the centre square is kept.

    Raises:
        DataError: It cannot be decoded; ``where`` says which image that is.
    """
    try:
        with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as opened:
            image = ImageOps.exif_transpose(opened).convert(_MODES[channels])
    except Exception as error:  # each of Pillow's decoders fails in its own way
        raise DataError(f"{where} is not a readable image ({error}): replace or remove it") from error
    if image_size is not None and image.size != (image_size, image_size):
        image = ImageOps.fit(image, (image_size, image_size), Image.Resampling.BILINEAR)
    pixels = np.asarray(image)
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


def check_image_settings(image_size: int | None, channels: int) -> None:
    """Raise ValueError for settings that no image can have."""
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size must be at least 1 pixel, got {image_size}")
    if channels not in _MODES:
        raise ValueError(f"channels must be 1 (grey) or 3 (RGB), got {channels}")


def fill(into: np.ndarray, items: Sequence[T], decode_one: Callable[[int, T], np.ndarray]) -> None:
    """Write ``decode_one(position, item)`` to ``into[position]`` for every item, on several threads.

    The first error in the order of the items is raised, whichever thread was faster.
    """

    def fill_chunk(start: int) -> None:
        for position, item in enumerate(items[start : start + CHUNK], start):
            into[position] = decode_one(position, item)

    # list() waits for all, and raises what the first failing chunk raised.
    list(decode_threads().map(fill_chunk, range(0, len(items), CHUNK)))


@cache
def decode_threads() -> ThreadPoolExecutor:
    """The threads on which this process decodes images."""
    return ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="decode")
