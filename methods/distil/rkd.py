"""RKD: samples should lie to each other in the student's feature space as they do in the teacher's.

Park et al.: "Relational Knowledge Distillation", arXiv 1904.05068, on pooled features:

    L = ce_weight CE + distance_weight * smooth_l1(distances) + angle_weight * smooth_l1(angles)

over all pairs and all triples of a batch. Weights as in the CRD benchmark. Expected top-1 on CIFAR-100, 240 epochs: resnet32x4
-> resnet8x4 71.90, resnet56 -> resnet20 69.61. Angles take B^3 numbers: 262 144 for a batch of 64, 134 million for 512.

With ``across_workers`` the batch is that of all workers together, so that the result does not depend on their number.

Shape legend: B = batch, D = pooled feature width (it may differ between student and teacher).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from methods.angular.losses import unit
from methods.base import Batch, Loss
from methods.checks import check_weights
from methods.distil.across import rows_of_all
from methods.distil.settings import TemperedSettings
from methods.distil.student import FeatureStudent
from methods.distil.teaching import Outputs, Teaching
from methods.losses import in_full_precision

SMALLEST_SQUARE = 1e-12
"""Squared distances are raised to this before the root, whose slope at 0 is infinite."""


@dataclass(frozen=True, kw_only=True)
class RelationalSettings(TemperedSettings):
    """Settings of ``rkd``."""

    kd_weight: float = 0.0
    """Weight of the divergence from the teacher's probabilities, added to the relations of features."""
    distance_weight: float = 25.0
    """Weight of the distances of pairs. 0 turns them off."""
    angle_weight: float = 50.0
    """Weight of the angles of triples. 0 turns them off."""
    across_workers: bool = True
    """Relate the samples of all workers; False: only those of the worker's own share of a batch."""

    def __post_init__(self) -> None:
        TemperedSettings.__post_init__(self)
        check_weights(self, "distance_weight", "angle_weight")


class RelationalDistillation(FeatureStudent):
    """Matches distances and angles between the samples of a batch. Losses ``ce``, ``kd``, ``distance``, ``angle``."""

    Settings = RelationalSettings
    ranges: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        **FeatureStudent.ranges,
        "distance_weight": {"loguniform": [2.5, 250]},
        "angle_weight": {"loguniform": [5, 500]},
    }
    settings: RelationalSettings

    def feature_losses(self, student: Outputs, teaching: Teaching, batch: Batch) -> dict[str, Loss]:
        is_across = self.settings.across_workers
        pooled_BD = rows_of_all(student.pooled) if is_across else student.pooled
        distance = angle = torch.zeros((), device=pooled_BD.device)
        for weight, own_BD in teaching.pooled_terms:
            target_BD = rows_of_all(own_BD) if is_across else own_BD
            distance = distance + weight * distance_loss(pooled_BD, target_BD)
            angle = angle + weight * angle_loss(pooled_BD, target_BD)
        return {
            "distance": Loss(distance, self.settings.distance_weight),
            "angle": Loss(angle, self.settings.angle_weight),
        }


@in_full_precision
def distance_loss(student_BD: Tensor, teacher_BD: Tensor) -> Tensor:
    """Smooth L1 between the distances of all pairs, each side in units of its own mean distance. 0 for one sample."""
    return F.smooth_l1_loss(relative_distances(student_BD), relative_distances(teacher_BD))


@in_full_precision
def angle_loss(student_BD: Tensor, teacher_BD: Tensor) -> Tensor:
    """Smooth L1 between the cosines at every sample of every two others. 0 for fewer than three samples that differ."""
    return F.smooth_l1_loss(angles(student_BD), angles(teacher_BD))


def relative_distances(features_BD: Tensor) -> Tensor:
    """Euclidean distances ``[B, B]`` divided by their mean over pairs; 0 on the diagonal."""
    num_rows = len(features_BD)
    squares_B = features_BD.square().sum(dim=1)
    squared_BB = squares_B[:, None] + squares_B[None] - 2 * features_BD @ features_BD.T
    distances_BB = squared_BB.clamp_min(SMALLEST_SQUARE).sqrt()
    on_diagonal_BB = torch.eye(num_rows, dtype=torch.bool, device=features_BD.device)
    distances_BB = distances_BB.masked_fill(on_diagonal_BB, 0.0)
    mean = distances_BB.sum() / max(num_rows * (num_rows - 1), 1)
    return distances_BB / mean.clamp_min(SMALLEST_SQUARE)


def angles(features_BD: Tensor) -> Tensor:
    """Cosines ``[B, B, B]``: at sample i, between the directions to j and to k."""
    directions_BBD = unit(features_BD[None] - features_BD[:, None])
    return directions_BBD @ directions_BBD.transpose(1, 2)
