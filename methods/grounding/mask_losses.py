"""Losses that all grounding methods share: pixels, boxes, and "no such object".

Shape legend: B = batch, H, W = image sides. Boxes are centre x, centre y, width, height in [0, 1].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from methods.losses import in_full_precision

DICE_SMOOTHING = 1.0
"""Added above and below: an empty prediction of an empty target then costs about nothing."""


@in_full_precision
def mask_bce(mask_logits_B1HW: Tensor, masks_B1HW: Tensor) -> Tensor:
    """Mean cross-entropy of pixels, scalar. Targets are in [0, 1] and as large as the logits."""
    return F.binary_cross_entropy_with_logits(mask_logits_B1HW, masks_B1HW)


@in_full_precision
def mask_dice(mask_logits_B1HW: Tensor, masks_B1HW: Tensor) -> Tensor:
    """One minus the smoothed Dice overlap of each sample, averaged over the batch, scalar."""
    probabilities_BP = mask_logits_B1HW.sigmoid().flatten(1)
    masks_BP = masks_B1HW.flatten(1)
    overlap_B = (probabilities_BP * masks_BP).sum(dim=1)
    total_B = probabilities_BP.sum(dim=1) + masks_BP.sum(dim=1)
    return (1 - (2 * overlap_B + DICE_SMOOTHING) / (total_B + DICE_SMOOTHING)).mean()


@in_full_precision
def box_l1(boxes_B4: Tensor, target_boxes_B4: Tensor, is_empty_B: Tensor) -> Tensor:
    """Sum of the four coordinate distances, averaged over the samples that have a target; 0 without any."""
    distances_B = (boxes_B4 - target_boxes_B4).abs().sum(dim=1)
    return _mean_of_targets(distances_B, is_empty_B)


@in_full_precision
def box_giou(boxes_B4: Tensor, target_boxes_B4: Tensor, is_empty_B: Tensor) -> Tensor:
    """One minus the generalised IoU (Rezatofighi et al., arXiv 1902.09630), averaged over the samples with a target.

    A box of no area counts as an IoU of 0; the loss stays finite.
    """
    own_B4, target_B4 = corners(boxes_B4), corners(target_boxes_B4)
    overlap_B = _area(torch.maximum(own_B4, target_B4)[:, :2], torch.minimum(own_B4, target_B4)[:, 2:])
    hull_B = _area(torch.minimum(own_B4, target_B4)[:, :2], torch.maximum(own_B4, target_B4)[:, 2:])
    union_B = _area(own_B4[:, :2], own_B4[:, 2:]) + _area(target_B4[:, :2], target_B4[:, 2:]) - overlap_B
    tiny = torch.finfo(union_B.dtype).eps
    giou_B = overlap_B / union_B.clamp_min(tiny) - (hull_B - union_B) / hull_B.clamp_min(tiny)
    return _mean_of_targets(1 - giou_B, is_empty_B)


@in_full_precision
def empty_bce(empty_logit_B: Tensor, is_empty_B: Tensor) -> Tensor:
    """Cross-entropy of the answer "no such object", scalar."""
    return F.binary_cross_entropy_with_logits(empty_logit_B, is_empty_B.to(empty_logit_B.dtype))


def corners(boxes_B4: Tensor) -> Tensor:
    """Centre and size to left, top, right, bottom, ``[B, 4]``."""
    centres_B2, halves_B2 = boxes_B4[:, :2], boxes_B4[:, 2:] / 2
    return torch.cat([centres_B2 - halves_B2, centres_B2 + halves_B2], dim=1)


def average_of_probabilities(logits_BNhw: Tensor) -> Tensor:
    """The logit of the mean probability over N maps, ``[B, 1, h, w]`` float32.

    Not the mean of the logits: for logits 4, -6 and 1 the mean probability is 0.572, that of the mean logit 0.417.
    Probabilities are kept within 1e-6 of 0 and 1.
    """
    return logits_BNhw.float().sigmoid().mean(dim=1, keepdim=True).clamp(1e-6, 1 - 1e-6).logit()


def _area(low_B2: Tensor, high_B2: Tensor) -> Tensor:
    sides_B2 = (high_B2 - low_B2).clamp_min(0)
    return sides_B2[:, 0] * sides_B2[:, 1]


def _mean_of_targets(values_B: Tensor, is_empty_B: Tensor) -> Tensor:
    has_target_B = ~is_empty_B
    return (values_B * has_target_B).sum() / has_target_B.sum().clamp_min(1)
