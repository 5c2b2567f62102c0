"""Settings that every grounding method has: mask losses, and the two optional heads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from methods.checks import check_positive, check_weights

RANGES: Mapping[str, Mapping[str, Any]] = {
    "mask_bce_weight": {"uniform": [0.5, 5]},
    "mask_dice_weight": {"uniform": [0, 2]},
    "encoder_lr_factor": {"loguniform": [0.05, 1]},
}


@dataclass(frozen=True, kw_only=True)
class GroundingSettings:
    """What all grounding methods share."""

    channels: int = 256
    """Width of the pixel decoder (C)."""
    mask_bias: float = -2.0
    """First bias of the mask logit. -2 says that about 0.12 of all pixels are named, which keeps the first steps calm."""
    encoder_lr_factor: float = 1.0
    """Factor on the learning rate of the encoder. Published weights are spoilt by the rate that a new decoder needs."""
    mask_bce_weight: float = 2.0
    """Weight of the cross-entropy of pixels. 0 turns it off."""
    mask_dice_weight: float = 0.5
    """Weight of the Dice loss. 0 turns it off."""
    box_head: bool = False
    """Regress a box beside the mask, instead of taking the box of the mask."""
    box_l1_weight: float = 5.0
    """Weight of the L1 distance of boxes. 0 turns it off."""
    box_giou_weight: float = 2.0
    """Weight of the generalised IoU loss of boxes. 0 turns it off."""
    empty_head: bool = False
    """Say when a sentence names nothing in its picture; needed for data with such sentences."""
    empty_weight: float = 0.2
    """Weight of the cross-entropy of that answer."""

    def __post_init__(self) -> None:
        check_weights(self, "mask_bce_weight", "mask_dice_weight", "box_l1_weight", "box_giou_weight")
        check_weights(self, "empty_weight")
        check_positive(self, "channels", "encoder_lr_factor")
        if self.mask_bce_weight == 0 == self.mask_dice_weight:
            raise ValueError("mask_bce_weight and mask_dice_weight are both 0: nothing would teach the mask")
        if self.box_head and self.box_l1_weight == 0 == self.box_giou_weight:
            raise ValueError("box_head is on, but box_l1_weight and box_giou_weight are both 0: turn it off")
        if self.empty_head and self.empty_weight == 0:
            raise ValueError("empty_head is on, but empty_weight is 0: turn it off, or raise the weight")


def without_effect(settings: GroundingSettings) -> frozenset[str]:
    """Names of the shared settings that change nothing at these values."""
    names: set[str] = set()
    if not settings.box_head:
        names |= {"box_l1_weight", "box_giou_weight"}
    if not settings.empty_head:
        names |= {"empty_weight"}
    return frozenset(names)
