"""Attention transfer: where a student looks should be where its teacher looks.

Zagoruyko, Komodakis: "Paying More Attention to Attention", arXiv 1612.03928.

    L = ce_weight CE + attention_weight * sum over stages of mean((A(f_S) - A(f_T))^2)

A(f) is the mean over channels of f^2, flattened, of length 1. Default weight as in the CRD and mdistiller benchmarks,
where maps have 8x8 to 32x32 places; on smaller maps it is too large (try 1 to 10 for 8x8 digits). The stem takes no part. Expected top-1 on CIFAR-100, 240 epochs: resnet32x4 -> resnet8x4 73.44, WRN-40-2 -> WRN-16-2 74.08.

Shape legend: B = batch, C = channels, H, W = sides of a map, P = H * W.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from methods.angular.losses import unit
from methods.base import Batch, Loss
from methods.checks import check_weights
from methods.distil.map_student import MapSettings, MapStudent
from methods.distil.teaching import Outputs, Teaching
from methods.losses import in_full_precision


@dataclass(frozen=True, kw_only=True)
class AttentionSettings(MapSettings):
    """Settings of ``attention``."""

    attention_weight: float = 1000.0
    """Weight of the distance between attention maps. 0 turns it off."""

    def __post_init__(self) -> None:
        MapSettings.__post_init__(self)
        check_weights(self, "attention_weight")


class AttentionTransfer(MapStudent):
    """Matches where stages are active, whatever their channels. Losses ``ce``, ``kd``, ``attention``."""

    Settings = AttentionSettings
    ranges: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        **MapStudent.ranges,
        "attention_weight": {"loguniform": [1, 10000]},
    }
    settings: AttentionSettings

    def feature_losses(self, student: Outputs, teaching: Teaching, batch: Batch) -> dict[str, Loss]:
        pairs = zip(student.maps, teaching.maps, strict=True)
        distances = [attention_distance(mine, theirs) for mine, theirs in pairs]
        return {"attention": Loss(sum(distances[1:], distances[0]), self.settings.attention_weight)}


@in_full_precision
def attention_distance(student_BCHW: Tensor, teacher_BCHW: Tensor) -> Tensor:
    """Mean squared difference of two attention maps, scalar. The larger map is averaged down to the smaller one."""
    height = min(student_BCHW.shape[2], teacher_BCHW.shape[2])
    width = min(student_BCHW.shape[3], teacher_BCHW.shape[3])
    student_BP = attention(F.adaptive_avg_pool2d(student_BCHW, (height, width)))
    teacher_BP = attention(F.adaptive_avg_pool2d(teacher_BCHW, (height, width)))
    return (student_BP - teacher_BP).square().mean()


def attention(maps_BCHW: Tensor) -> Tensor:
    """Where maps are active: mean square over channels, ``[B, P]``, of length 1 (0 where nothing is active)."""
    return unit(maps_BCHW.square().mean(dim=1).flatten(1))
