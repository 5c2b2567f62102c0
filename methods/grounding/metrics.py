"""Metrics of referring segmentation as sums: exact whatever the batch size or the number of workers.

Mask metrics (``miou``, ``oiou``, ``pr50`` ... ``pr90``, ``rec50``) are over expressions that name something, generalised
ones (``giou``, ``ciou``, ``n_acc``, ``t_acc``) over all. Everything is in percent. Ratios are summed as multiples of
2**-32, because whole numbers add up to the same in any order.

Shape legend: B = batch, H, W = sides of masks at the size where they are compared.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from methods.grounding.boxes import box_iou, box_of_mask, corners
from methods.grounding.contracts import GroundingBatch, GroundingOutput
from methods.grounding.fit import picture_corners
from methods.grounding.protocols import EvaluationProtocol, protocol_named

TENTHS = (5, 6, 7, 8, 9)
"""Thresholds of precision, in tenths: whole numbers, so that a ratio of exactly one half is exactly that."""
_UNIT = 2.0**32


class Judged(NamedTuple):
    """What there is to know about each prediction: any metric follows from it."""

    intersections: Tensor
    """Pixels in prediction and truth, ``[B]`` int64."""
    unions: Tensor
    """Pixels in prediction or truth, ``[B]`` int64."""
    predicted: Tensor
    """Pixels of the prediction as the network gave it, ``[B]`` int64."""
    truth: Tensor
    """Pixels of the truth, ``[B]`` int64."""
    is_empty: Tensor
    """Nothing is named, ``[B]`` bool."""
    flags: Tensor
    """The network itself says that nothing is named, ``[B]`` bool; without such an output: its mask is empty."""
    box_ious: Tensor
    """Overlap of the predicted with the true box, ``[B]`` float64; 0 where either is missing."""


def grounding_sums(
    output: GroundingOutput,
    batch: GroundingBatch,
    *,
    rolled: GroundingOutput | None = None,
    protocol: str = "ours",
) -> dict[str, Tensor]:
    """Sums over a batch from which ``summarise_grounding`` makes metrics.

    Args:
        output: What the network says.
        batch: What is true; with ``original_masks`` where the protocol judges at the size of stored pictures.
        rolled: What the network says when each picture comes with a sentence about another (``batch.rolled()``).
        protocol: Name of the rules, from ``methods.grounding.protocols``.
    """
    rules = protocol_named(protocol)
    sums = sums_of(judge(output, batch, rules), rules)
    if rolled is not None:
        control = sums_of(judge(rolled, batch, rules, with_boxes=False), rules)
        sums["iou_rolled"] = control["iou"]
    return sums


def summarise_grounding(totals: Mapping[str, Tensor]) -> dict[str, float]:
    """Metrics in percent. NaN where nothing was counted, such as ``n_acc`` where every sentence names something."""
    sums = {name: float(total) for name, total in totals.items()}
    metrics = {
        "miou": _percent(sums["iou"], sums["targets"] * _UNIT),
        "oiou": _percent(sums["intersection"], sums["union"]),
        **{f"pr{10 * tenth}": _percent(sums[f"pr{10 * tenth}"], sums["targets"]) for tenth in TENTHS},
        "rec50": _percent(sums["rec50"], sums["targets"]),
        "giou": _percent(sums["generalised_iou"], sums["count"] * _UNIT),
        "ciou": _percent(sums["generalised_intersection"], sums["generalised_union"]),
        "n_acc": _percent(sums["true_none"], sums["true_none"] + sums["missed_none"]),
        "t_acc": _percent(sums["true_some"], sums["true_some"] + sums["missed_some"]),
    }
    if "iou_rolled" in sums:
        metrics["miou_rolled"] = _percent(sums["iou_rolled"], sums["targets"] * _UNIT)
        metrics["language_gap"] = metrics["miou"] - metrics["miou_rolled"]
    return metrics


GROUNDING_METRICS = (
    "miou", "oiou", *(f"pr{10 * tenth}" for tenth in TENTHS), "rec50", "giou", "ciou", "n_acc", "t_acc",
    "miou_rolled", "language_gap",
)  # fmt: skip
"""Names that ``summarise_grounding`` gives; the last two only where there is a control."""


@torch.no_grad()
def judge(
    output: GroundingOutput,
    batch: GroundingBatch,
    rules: EvaluationProtocol,
    *,
    with_boxes: bool = True,
) -> Judged:
    """Count pixels, at the size that ``rules`` ask for. Boxes are those of a box head, or of the largest part of a mask.

    Raises:
        ValueError: The truth at the size of stored pictures is wanted, but not in the batch.
    """
    truths = _truths(batch, rules)
    frames = batch.frames if rules.size == "original" else None
    masks = _masks(output.mask_logits, truths, frames, rules)
    counts = [_counts(mask, truth) for mask, truth in _stacked(masks, truths)]
    intersections, unions, predicted, areas = torch.cat(counts, dim=1)
    says_none = predicted == 0 if output.empty_logit is None else output.empty_logit > 0
    overlaps = _box_ious(output, masks, truths, frames) if with_boxes else torch.zeros(len(truths)).double()
    return Judged(
        intersections, unions, predicted, areas, batch.is_empty, says_none, overlaps.to(areas.device)
    )


def _masks(
    logits_B1HW: Tensor, truths: list[Tensor], frames_B4: Tensor | None, rules: EvaluationProtocol
) -> list[Tensor]:
    """Predicted pixels of each row at the size of its truth."""
    places = [None] * len(truths) if frames_B4 is None else frames_B4.tolist()
    return [
        picture_mask(row, place, truth.shape, rules)
        for row, place, truth in zip(logits_B1HW, places, truths, strict=True)
    ]


def picture_mask(
    logits_1SS: Tensor, frame: Sequence[int] | None, size: torch.Size, rules: EvaluationProtocol
) -> Tensor:
    """Predicted pixels of a picture of ``size``, bool ``[H, W]``: what lies around a letterboxed one is left out.

    ``frame`` is where in the square the picture lies (top, left, height, width); None where it fills it.
    """
    logits = logits_1SS.float()
    if frame is not None:
        top, left, height, width = frame
        logits = logits[:, top : top + height, left : left + width]
    return _resampled(logits, size, rules)[0]


def _resampled(logits_1HW: Tensor, sides: torch.Size, rules: EvaluationProtocol) -> Tensor:
    """Which pixels belong to the mask: logits or probabilities are brought to its size, never masks."""
    if logits_1HW.shape[1:] != sides and rules.resampling == "cubic_probabilities":
        probabilities = F.interpolate(logits_1HW[None].sigmoid(), sides, mode="bicubic", align_corners=False)
        return probabilities[0] > rules.threshold
    if logits_1HW.shape[1:] != sides:
        logits_1HW = F.interpolate(logits_1HW[None], sides, mode="bilinear", align_corners=False)[0]
    return logits_1HW > math.log(rules.threshold / (1 - rules.threshold))


def _stacked(masks: list[Tensor], truths: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """All rows in one piece where they are of one size, else row by row: ``[b, H, W]`` twice."""
    if len({truth.shape for truth in truths}) == 1:
        return [(torch.stack(masks), torch.stack(truths))]
    return [(mask[None], truth[None]) for mask, truth in zip(masks, truths, strict=True)]


def _counts(mask: Tensor, truth: Tensor) -> Tensor:
    """Intersection, union, prediction and truth in pixels, ``[4, b]``."""
    pieces = (mask & truth, mask | truth, mask, truth)
    return torch.stack([piece.flatten(1).sum(dim=1) for piece in pieces])


def _truths(batch: GroundingBatch, rules: EvaluationProtocol) -> list[Tensor]:
    if rules.size == "original" and batch.original_masks:
        return [mask.bool() for mask in batch.original_masks]
    masks = batch.masks[:, 0] > 0.5
    height, width = masks.shape[-2:]
    sizes = batch.original_sizes
    if rules.size == "original" and bool(((sizes[:, 0] != height) | (sizes[:, 1] != width)).any()):
        raise ValueError(
            f"protocol {rules.name!r} judges at the size of the stored pictures, but the batch has masks of "
            f"{height}x{width} only: let the data bring original_masks, or choose a protocol of size 'model'"
        )
    return list(masks)


def _box_ious(
    output: GroundingOutput, masks: list[Tensor], truths: list[Tensor], frames_B4: Tensor | None
) -> Tensor:
    """Overlap of predicted and true box, ``[B]`` float64."""
    overlaps = []
    for row, (mask, truth) in enumerate(zip(masks, truths, strict=True)):
        wanted = box_of_mask(truth.cpu().numpy())
        if output.boxes is None:
            found = np.array([box_of_mask(mask.cpu().numpy(), largest_component=True)])
        elif frames_B4 is None:
            found = corners(output.boxes[row : row + 1], *truth.shape).cpu().numpy()
        else:
            inside = corners(output.boxes[row : row + 1], *output.mask_logits.shape[-2:])
            found = picture_corners(inside, frames_B4[row], *truth.shape).cpu().numpy()
        overlaps.append(float(box_iou(found, np.array([wanted]))[0, 0]))
    return torch.tensor(overlaps, dtype=torch.float64)


def sums_of(judged: Judged, rules: EvaluationProtocol) -> dict[str, Tensor]:
    """Whole numbers that add up over batches and workers."""
    says_none, cleared = _says_none(judged, rules)
    zero = torch.zeros_like(judged.unions)
    intersections = torch.where(cleared, zero, judged.intersections)
    unions = torch.where(cleared, judged.truth, judged.unions)
    ratios = _ratios(intersections, unions, rules)
    has_target = ~judged.is_empty
    targets = has_target.long()
    sums = {
        "count": torch.ones_like(targets).sum(),
        "targets": targets.sum(),
        "iou": _fixed(ratios * targets),
        "intersection": (intersections * targets).sum(),
        "union": (unions * targets).sum(),
        "rec50": ((judged.box_ious >= 0.5) & has_target).sum(),
    }
    for tenth in TENTHS:
        sums[f"pr{10 * tenth}"] = (_reaches(intersections, unions, ratios, tenth, rules) & has_target).sum()
    earns = has_target & (~says_none | rules.rejected_keeps_mask)
    clean = judged.is_empty & says_none
    counted_union = torch.where(has_target, unions, torch.where(clean, zero, judged.predicted))
    return sums | {
        "generalised_iou": _fixed(ratios * earns + clean),
        "generalised_intersection": (intersections * earns).sum(),
        "generalised_union": counted_union.sum(),
        "true_none": clean.sum(),
        "missed_none": (judged.is_empty & ~says_none).sum(),
        "true_some": (has_target & ~says_none).sum(),
        "missed_some": (has_target & says_none).sum(),
    }


def _says_none(judged: Judged, rules: EvaluationProtocol) -> tuple[Tensor, Tensor]:
    """Whether each prediction says that nothing is named, and whether its mask is emptied for that."""
    if rules.none_rule == "area":
        small = judged.predicted < max(1, rules.min_area)
        return small, small
    return judged.flags, judged.flags & (rules.none_rule == "flag_clears_mask")


def judged_ious(judged: Judged, rules: EvaluationProtocol) -> Tensor:
    """Overlap of each prediction with its truth as ``sums_of`` counts it, 0..1, ``[B]`` float64."""
    _, cleared = _says_none(judged, rules)
    intersections = torch.where(cleared, torch.zeros_like(judged.unions), judged.intersections)
    return _ratios(intersections, torch.where(cleared, judged.truth, judged.unions), rules)


def judged_none(judged: Judged, rules: EvaluationProtocol) -> Tensor:
    """Whether each prediction counts as saying that nothing is named, ``[B]`` bool."""
    return _says_none(judged, rules)[0]


def _ratios(intersections: Tensor, unions: Tensor, rules: EvaluationProtocol) -> Tensor:
    ratios = intersections.double() / (unions.double() + rules.epsilon)
    return torch.where(unions == 0, torch.full_like(ratios, rules.empty_union_iou), ratios)


def _reaches(
    intersections: Tensor, unions: Tensor, ratios: Tensor, tenth: int, rules: EvaluationProtocol
) -> Tensor:
    if rules.comparison == "above_float32":
        return ratios > float(np.float32(tenth / 10))
    if rules.epsilon:
        return ratios >= tenth / 10 if rules.comparison == "at_least" else ratios > tenth / 10
    left, right = 10 * intersections, tenth * unions
    reached = left >= right if rules.comparison == "at_least" else left > right
    return torch.where(unions == 0, ratios >= tenth / 10, reached)


def _fixed(values: Tensor) -> Tensor:
    return (values * _UNIT).round().long().sum()


def _percent(part: float, whole: float) -> float:
    return 100 * part / whole if whole else math.nan
