"""Pixels of a COCO annotation: polygons, lists of run lengths, or compressed run lengths.

Shape legend: H, W = sides of the stored picture.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from methods.data.base import DataError
from methods.grounding.protocols import Overlap, Rasteriser

MIN_COORDINATES = 6
"""Three points: fewer enclose nothing."""


def check_segmentation(segmentation: Any, height: int, width: int, where: str) -> int:
    """Refuse what cannot be turned into a mask of this size; gives how many polygons are too short and left out.

    Raises:
        DataError: Run lengths are of another size than the picture, no polygon has three points, or the spelling is unknown.
    """
    if isinstance(segmentation, Mapping):
        size = tuple(segmentation.get("size", ()))
        if "counts" not in segmentation or size != (height, width):
            raise DataError(
                f"{where}: its mask is of size {size} (height, width), but the picture of {(height, width)}: "
                "both must be of the same, stored size"
            )
        return 0
    if not isinstance(segmentation, Sequence) or isinstance(segmentation, str):
        raise DataError(
            f"{where}: its segmentation is neither polygons nor run lengths: {segmentation!r:.80}"
        )
    short = sum(len(polygon) < MIN_COORDINATES for polygon in segmentation)
    if short == len(segmentation):
        raise DataError(f"{where}: none of its {short} polygons has three points: it encloses nothing")
    odd = [polygon for polygon in segmentation if len(polygon) % 2]
    if odd:
        raise DataError(f"{where}: a polygon has {len(odd[0])} coordinates, expected pairs of x and y")
    return short


def decode_mask(
    segmentation: Any,
    height: int,
    width: int,
    *,
    overlap: Overlap = "union",
    rasteriser: Rasteriser = "coco",
) -> np.ndarray:
    """Bool ``[H, W]``. Polygons of fewer than three points add nothing.

    Args:
        segmentation: As in the annotation file; already checked.
        height: Of the stored picture.
        width: Of the stored picture.
        overlap: ``sum_is_one`` loses pixels where polygons overlap, as two popular loaders do.
        rasteriser: ``pil`` draws the outline too and cuts coordinates to whole numbers, as PhraseCut does.
    """
    if isinstance(segmentation, Mapping):
        return _decoded(_compressed(segmentation, height, width))
    polygons = [polygon for polygon in segmentation if len(polygon) >= MIN_COORDINATES]
    draw = _pil_polygon if rasteriser == "pil" else _coco_polygon
    parts = [draw(polygon, height, width) for polygon in polygons]
    if overlap == "union":
        return union(parts, height, width)
    return np.asarray(np.sum(parts, axis=0) == 1)


def encode_mask(mask_HW: np.ndarray) -> dict[str, Any]:
    """COCO's compressed run lengths of a bool mask: ``size`` (height, width) and ``counts`` as text."""
    encoded = _coco().encode(np.asfortranarray(mask_HW, dtype=np.uint8))
    return {"size": [int(side) for side in encoded["size"]], "counts": encoded["counts"].decode("ascii")}


def union(masks: Iterable[np.ndarray], height: int, width: int) -> np.ndarray:
    """Pixels of any of the masks; of none, an empty mask."""
    total = np.zeros((height, width), dtype=bool)
    for mask in masks:
        total |= mask
    return total


def _compressed(segmentation: Mapping[str, Any], height: int, width: int) -> Any:
    if isinstance(segmentation["counts"], list):
        return _coco().frPyObjects(dict(segmentation), height, width)
    return segmentation


def _decoded(run_lengths: Any) -> np.ndarray:
    return np.asarray(_coco().decode(run_lengths), dtype=bool)


def _coco_polygon(polygon: list[float], height: int, width: int) -> np.ndarray:
    return _decoded(_coco().frPyObjects([polygon], height, width)[0])


def _pil_polygon(polygon: list[float], height: int, width: int) -> np.ndarray:
    canvas = Image.new("1", (width, height))
    points = [(int(x), int(y)) for x, y in zip(polygon[::2], polygon[1::2], strict=True)]
    ImageDraw.Draw(canvas).polygon(points, outline=1, fill=1)
    return np.asarray(canvas, dtype=bool)


def _coco() -> Any:
    try:
        from pycocotools import mask
    except ImportError as error:
        raise DataError(
            "masks of COCO annotations need pycocotools, which is not installed: pip install 'stillhouse[grounding]'"
        ) from error
    return mask
