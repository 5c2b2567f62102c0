"""ReviewKD: every level of the student, reviewed together with the deeper ones, should match the teacher's level.

Chen et al.: "Distilling Knowledge via Knowledge Review", arXiv 2104.09044.

    L = ce_weight CE + review_weight * min(epoch / warmup_epochs, 1) * sum over levels of hcl(fused_S, f_T)

Levels are the stages and the pooled feature (as a map of 1x1), visited from deep to shallow; the student's maps are read
after their activation, the teacher's before it. Epochs are counted from 1. With branches or several members only the
pooled level becomes their mean: maps are those of the network itself.

Weights by pair are presets, as in the authors' release and mdistiller; expected top-1 on CIFAR-100, 240 epochs:
resnet32x4 -> resnet8x4 75.63, resnet56 -> resnet20 71.89, WRN-40-2 -> WRN-16-2 76.12. Batch norm in the fusion sees each
worker's own share of a batch.

Shape legend: B = batch, C = channels, H, W = sides of a map.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from methods.base import Batch, Loss, Task, Teacher
from methods.checks import check_weights
from methods.distil.adapters import ReviewFusion
from methods.distil.map_student import MapSettings, MapStudent
from methods.distil.settings import warmup_factor
from methods.distil.teaching import Outputs, Teaching
from methods.losses import in_full_precision
from methods.models import Activation

MAX_MID_CHANNELS = 512
POOLED_SIDES = (4, 2, 1)
"""Sides to which maps are averaged down in the loss."""


@dataclass(frozen=True, kw_only=True)
class ReviewSettings(MapSettings):
    """Settings of ``review``."""

    review_weight: float = 5.0
    """Weight of the levels' distances. 0 turns them off."""
    warmup_epochs: int = 20
    """Over how many epochs that weight grows to its full size. 0: full from the start."""

    def __post_init__(self) -> None:
        MapSettings.__post_init__(self)
        check_weights(self, "review_weight", "warmup_epochs")


class Review(MapStudent):
    """Matches every stage and the pooled feature through fusion modules. Losses ``ce``, ``kd``, ``review``."""

    Settings = ReviewSettings
    ranges: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        **MapStudent.ranges,
        "review_weight": {"loguniform": [0.5, 30]},
    }
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "resnet32x4-resnet8x4": {"review_weight": 5.0},
        "wrn": {"review_weight": 5.0},
        "resnet32x4-shuffle_v1": {"review_weight": 5.0},
        "resnet32x4-shuffle_v2": {"review_weight": 8.0},
        "resnet56-resnet20": {"review_weight": 0.6},
        "resnet110-resnet32": {"review_weight": 1.0},
        "resnet50-mobilenet_v2_half": {"review_weight": 30.0},
    }
    teacher_activation: ClassVar[Activation] = "before"
    settings: ReviewSettings

    def __init__(
        self, settings: Any, *, task: Task, model: nn.Module | None, inputs: Mapping[str, Teacher]
    ) -> None:
        super().__init__(settings, task=task, model=model, inputs=inputs)
        num_features: int = self.model.num_features  # type: ignore[assignment]
        student = [*self.student_shapes, (num_features, 1, 1)]
        teacher = [*self.teacher_shapes, (self.teacher.num_features, 1, 1)]
        middle = min(MAX_MID_CHANNELS, num_features)
        self.fusions = nn.ModuleList(
            ReviewFusion(mine[0], middle, theirs, mine[1:], is_deepest=level == len(student) - 1)
            for level, (mine, theirs) in enumerate(zip(student, teacher, strict=True))
        )

    @classmethod
    def inactive(cls, settings: Any) -> frozenset[str]:
        names = super().inactive(settings)
        return names | {"warmup_epochs"} if settings.review_weight == 0 else names

    def feature_losses(self, student: Outputs, teaching: Teaching, batch: Batch) -> dict[str, Loss]:
        reviewed = self.reviewed((*student.maps, student.pooled[:, :, None, None]))
        loss = levels_distance(reviewed[:-1], teaching.maps)
        for weight, pooled_BD in teaching.pooled_terms:
            loss = loss + weight * hierarchical_distance(reviewed[-1], pooled_BD[:, :, None, None])
        return {
            "review": Loss(
                loss, self.settings.review_weight * warmup_factor(batch.epoch, self.settings.warmup_epochs)
            )
        }

    def reviewed(self, levels: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Each level of the student joined with all deeper ones, in the shapes of the teacher."""
        results: list[Tensor] = []
        deeper: Tensor | None = None
        for level, fusion in zip(reversed(levels), reversed(self.fusions), strict=True):
            result, deeper = fusion(level, deeper)
            results.insert(0, result)
        return tuple(results)


def levels_distance(students: tuple[Tensor, ...], teachers: tuple[Tensor, ...]) -> Tensor:
    """Sum of the levels' hierarchical distances, scalar."""
    distances = [hierarchical_distance(mine, theirs) for mine, theirs in zip(students, teachers, strict=True)]
    return sum(distances[1:], distances[0])


@in_full_precision
def hierarchical_distance(student_BCHW: Tensor, teacher_BCHW: Tensor) -> Tensor:
    """Mean squared difference of maps at full size and averaged down to smaller ones, scalar (HCL).

    The weighted mean of all sizes: 1 for the full one, and half as much for each smaller one of 4x4, 2x2 and 1x1. A size that
    is not smaller than the map does not take part, as in the release: maps of 4x4 go on with one half for 2x2.
    """
    difference_BCHW = student_BCHW - teacher_BCHW
    total = difference_BCHW.square().mean()
    weight, weights = 1.0, 1.0
    for side in POOLED_SIDES:
        if side < difference_BCHW.shape[2]:
            weight /= 2
            weights += weight
            total = total + weight * F.adaptive_avg_pool2d(difference_BCHW, side).square().mean()
    return total / weights
