"""From a score map to boxes: shift and scale, cut at fractions of the maximum, and take the connected parts.

Shape legend: H, W = sides of a map, T = thresholds, M = boxes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

NO_BOXES = np.zeros((1, 4), dtype=np.int64)
"""Nothing is above the threshold: one box without area."""
_CORNERS_TOUCH = np.ones((3, 3), dtype=bool)


def scaled_scores(map_HW: np.ndarray) -> np.ndarray:
    """Shifted and scaled to 0..1, float64. A map that is constant, or holds a NaN, says nothing: zeros."""
    scores = np.asarray(map_HW, dtype=np.float64)
    low, high = scores.min(), scores.max()
    if not np.isfinite([low, high]).all() or low == high:
        return np.zeros_like(scores)
    scaled: np.ndarray = (scores - low) / (high - low)
    return scaled


def resized_scores(map_HW: np.ndarray, height: int, width: int) -> np.ndarray:
    """The map at the size where boxes are compared, bicubic, ``[height, width]``. Before scaling: bicubic overshoots."""
    scores = torch.as_tensor(np.asarray(map_HW, dtype=np.float64))
    if scores.shape == (height, width):
        return scores.numpy()
    return F.interpolate(scores[None, None], (height, width), mode="bicubic", align_corners=False)[0, 0].numpy()  # fmt: skip


class Parts(NamedTuple):
    """Connected parts of a mask, in the order of their first pixels."""

    boxes: np.ndarray
    """Half open ``x0 y0 x1 y1``, ``[M, 4]`` int64; one box of zeros where there is no part."""
    largest: int
    """Which has the most pixels; the first of several."""


def parts_of(mask_HW: np.ndarray) -> Parts:
    """Parts of a mask; pixels that touch at a corner belong together."""
    from scipy.ndimage import find_objects, label

    numbers, num_parts = label(mask_HW, structure=_CORNERS_TOUCH)
    if num_parts == 0:
        return Parts(NO_BOXES, 0)
    sizes = np.bincount(numbers.ravel(), minlength=num_parts + 1)[1:]
    boxes = [(x.start, y.start, x.stop, y.stop) for y, x in find_objects(numbers)]
    return Parts(np.array(boxes, dtype=np.int64), int(sizes.argmax()))


def parts_by_threshold(scores_HW: np.ndarray, thresholds_T: np.ndarray, *, quantised: bool) -> list[Parts]:
    """Parts of what is above each fraction of the maximum.

    Args:
        scores_HW: Scores in 0..1.
        thresholds_T: Fractions in ascending order, ``[T]``.
        quantised: Cut scores to 8 bits and thresholds to whole numbers first, as the published benchmark does.
    """
    levels = (scores_HW * 255).astype(np.uint8) if quantised else scores_HW
    cuts = thresholds_T * levels.max()
    if quantised:
        cuts = cuts.astype(np.int64)
    counts = levels.size - np.searchsorted(np.sort(levels, axis=None), cuts, side="right")
    found: dict[int, Parts] = {}
    for cut, count in zip(cuts, counts.tolist(), strict=True):
        if (
            count not in found
        ):  # masks of ascending thresholds lie within each other: as many pixels, the same mask
            found[count] = parts_of(levels > cut)
    return [found[count] for count in counts.tolist()]
