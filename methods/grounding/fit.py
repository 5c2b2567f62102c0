"""How a stored picture comes into the square that networks see: stretched, or whole with a margin around it.

Shape legend: H, W = sides of the stored picture, S = side of the square.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from methods.grounding.annotation_masks import decode_mask
from methods.grounding.protocols import EvaluationProtocol

Fit = Literal["stretch", "letterbox"]
FITS = ("stretch", "letterbox")


class Frame(NamedTuple):
    """Where in the square the picture lies, in pixels."""

    top: int
    left: int
    height: int
    width: int


def frame_of(height: int, width: int, side: int, fit: Fit) -> Frame:
    """Stretched, a picture fills the square; letterboxed, it keeps its proportions and lies in the middle."""
    if fit == "stretch":
        return Frame(0, 0, side, side)
    scale = side / max(height, width)
    inside = max(1, round(height * scale)), max(1, round(width * scale))
    return Frame((side - inside[0]) // 2, (side - inside[1]) // 2, *inside)


def fitted_photo(pixels_HW3: np.ndarray, side: int, fit: Fit, margin: tuple[float, ...]) -> np.ndarray:
    """uint8 ``[3, S, S]``: stretched bilinearly, or letterboxed bicubically on a ``margin`` of that colour (0..1)."""
    height, width = pixels_HW3.shape[:2]
    frame = frame_of(height, width, side, fit)
    how = Image.Resampling.BILINEAR if fit == "stretch" else Image.Resampling.BICUBIC
    small = np.asarray(Image.fromarray(pixels_HW3).resize((frame.width, frame.height), how))
    if fit == "stretch":
        return small.transpose(2, 0, 1)
    square = np.empty((side, side, 3), dtype=np.uint8)
    square[:] = np.round(255 * np.array(margin))
    square[frame.top : frame.top + frame.height, frame.left : frame.left + frame.width] = small
    return square.transpose(2, 0, 1)


def fitted_mask(mask_HW: np.ndarray, side: int, fit: Fit) -> np.ndarray:
    """Bool ``[S, S]``: the mask as its picture is fitted, by the nearest pixel."""
    height, width = mask_HW.shape
    frame = frame_of(height, width, side, fit)
    small = Image.fromarray(mask_HW).resize((frame.width, frame.height), Image.Resampling.NEAREST)
    return _in_square(np.asarray(small, dtype=bool), frame, side)


def fitted_polygons(
    segmentation: Any, height: int, width: int, side: int, fit: Fit, rules: EvaluationProtocol
) -> np.ndarray:
    """Bool ``[S, S]``: polygons are scaled first and rasterised then; run lengths are decoded and scaled."""
    if not isinstance(segmentation, list):
        mask = decode_mask(segmentation, height, width, overlap=rules.overlap, rasteriser=rules.rasteriser)
        return fitted_mask(mask, side, fit)
    frame = frame_of(height, width, side, fit)
    scales = (frame.width / width, frame.height / height)
    scaled = [[value * scales[place % 2] for place, value in enumerate(polygon)] for polygon in segmentation]
    small = decode_mask(scaled, frame.height, frame.width, overlap=rules.overlap, rasteriser=rules.rasteriser)
    return _in_square(small, frame, side)


def fitted_box(
    box: tuple[float, ...], height: int, width: int, side: int, fit: Fit
) -> tuple[float, float, float, float]:
    """Centre, width and height of a box, in fractions of the picture, as fractions of the square."""
    x, y, w, h = box
    if fit == "stretch":
        return x, y, w, h
    frame = frame_of(height, width, side, fit)
    return (
        (x * frame.width + frame.left) / side,
        (y * frame.height + frame.top) / side,
        w * frame.width / side,
        h * frame.height / side,
    )


def picture_corners(corners_M4: Tensor, frame: Tensor, height: int, width: int) -> Tensor:
    """Corners in the square, in its pixels, as corners in the stored picture; clipped to it."""
    top, left, inner_height, inner_width = frame.double().unbind()
    shift = corners_M4.new_tensor([left, top, left, top])
    scale = corners_M4.new_tensor([width / inner_width, height / inner_height] * 2)
    limit = corners_M4.new_tensor([width, height, width, height])
    return ((corners_M4 - shift) * scale).clamp(min=0).minimum(limit)


def _in_square(small: np.ndarray, frame: Frame, side: int) -> np.ndarray:
    square = np.zeros((side, side), dtype=bool)
    square[frame.top : frame.top + frame.height, frame.left : frame.left + frame.width] = small
    return square
