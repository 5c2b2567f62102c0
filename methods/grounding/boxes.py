"""Boxes: of a mask, between corners and centres, how far two overlap, and which of several match.

Boxes are half open, ``x0 y0 x1 y1`` in pixels unless said otherwise: the box of one pixel has area 1.
Shape legend: H, W = sides of a mask, M = boxes, K = predicted boxes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

NO_BOX = (0, 0, 0, 0)


def box_of_mask(mask_HW: np.ndarray, *, largest_component: bool = False) -> tuple[int, int, int, int]:
    """The tight box of a boolean mask, or of its largest 8-connected part; zeros where it is empty.

    Stray pixels ruin a tight box, so boxes of *predicted* masks are better taken of the largest part.
    """
    if largest_component:
        mask_HW = _largest(mask_HW)
    rows, columns = np.flatnonzero(mask_HW.any(axis=1)), np.flatnonzero(mask_HW.any(axis=0))
    if not len(rows):
        return NO_BOX
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _largest(mask_HW: np.ndarray) -> np.ndarray:
    from scipy.ndimage import label

    parts, num_parts = label(mask_HW, structure=np.ones((3, 3), dtype=bool))
    if num_parts < 2:
        return mask_HW
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    found: np.ndarray = parts == sizes.argmax()
    return found


def centred(box: tuple[float, ...], height: int, width: int) -> tuple[float, float, float, float]:
    """Corners in pixels to centre x, centre y, width, height in [0, 1]."""
    x0, y0, x1, y1 = box
    return (x0 + x1) / 2 / width, (y0 + y1) / 2 / height, (x1 - x0) / width, (y1 - y0) / height


def corners(centred_M4: Tensor, height: int, width: int) -> Tensor:
    """Centre and sides in [0, 1] to corners in pixels, clipped to the picture, ``[M, 4]`` float64."""
    x, y, w, h = centred_M4.double().unbind(-1)
    boxes = torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], dim=-1).clamp(0, 1)
    return boxes * torch.tensor([width, height, width, height], dtype=torch.float64, device=boxes.device)


def box_iou(first_M4: np.ndarray, second_K4: np.ndarray, *, generalised: bool = False) -> np.ndarray:
    """Overlap of each pair, ``[M, K]`` float64: areas without "+1"; two empty boxes have 0.

    With ``generalised``, the share of their common hull that neither covers is subtracted (never more than IoU).
    """
    first, second = np.asarray(first_M4, float)[:, None], np.asarray(second_K4, float)[None]
    low, high = np.maximum(first[..., :2], second[..., :2]), np.minimum(first[..., 2:], second[..., 2:])
    intersection = np.clip(high - low, 0, None).prod(axis=-1)
    union = _area(first) + _area(second) - intersection
    iou = _share(intersection, union)
    if not generalised:
        return iou
    outer = np.maximum(first[..., 2:], second[..., 2:]) - np.minimum(first[..., :2], second[..., :2])
    hull = outer.prod(axis=-1)
    difference: np.ndarray = iou - _share(hull - union, hull)
    return difference


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    share: np.ndarray = np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)
    return share


def _area(boxes: np.ndarray) -> np.ndarray:
    sides: np.ndarray = boxes[..., 2:] - boxes[..., :2]
    area: np.ndarray = sides[..., 0] * sides[..., 1]
    return area


class BoxMatch(NamedTuple):
    """How well a set of boxes was found (generalised expressions)."""

    f1: float
    says_none: bool
    """No box was kept."""


def match_boxes(
    truth_M4: np.ndarray, boxes_K4: np.ndarray, scores_K: np.ndarray, *,
    score_threshold: float = 0.7, iou_threshold: float = 0.5, generalised: bool = False,
) -> BoxMatch:  # fmt: skip
    """F1 of the boxes whose score is high enough, matched greedily by overlap; 1 where nothing was to be found and none was.

    An expression counts as found when F1 is 1. The published evaluator uses the generalised overlap, its paper the
    plain one.
    """
    kept = np.asarray(boxes_K4, float).reshape(-1, 4)[np.asarray(scores_K) >= score_threshold]
    truth = np.asarray(truth_M4, float).reshape(-1, 4)
    if not len(truth) or not len(kept):
        return BoxMatch(float(len(truth) == len(kept)), not len(kept))
    overlaps = box_iou(truth, kept, generalised=generalised)
    num_hits = 0
    while overlaps.size and overlaps.max() >= iou_threshold:
        row, column = np.unravel_index(overlaps.argmax(), overlaps.shape)
        overlaps = np.delete(np.delete(overlaps, row, axis=0), column, axis=1)
        num_hits += 1
    return BoxMatch(2 * num_hits / (len(kept) + len(truth)), False)


def summarise_boxes(matches: Sequence[BoxMatch], is_empty: Sequence[bool]) -> dict[str, float]:
    """Percent of expressions whose boxes were all found and no other (``grec_precision``), with ``n_acc`` and ``t_acc``.

    Always quote all three: a network that never answers has an ``n_acc`` of 100.
    """
    right = [match.f1 >= 1 for match in matches]
    silent = [match.says_none for match, empty in zip(matches, is_empty, strict=True) if empty]
    spoken = [not match.says_none for match, empty in zip(matches, is_empty, strict=True) if not empty]
    names = ("grec_precision", "n_acc", "t_acc")
    return {
        name: 100 * sum(hits) / len(hits) if hits else math.nan
        for name, hits in zip(names, (right, silent, spoken), strict=True)
    }
