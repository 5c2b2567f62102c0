"""DIST: the student's probabilities should correlate with the teacher's, within a sample and within a class.

Huang et al.: "Knowledge Distillation from A Stronger Teacher", NeurIPS 2022, arXiv 2205.10536.

    L = ce_weight CE + kd_weight T^2 (inter_weight inter + intra_weight intra)

inter is 1 - the mean Pearson correlation over the classes of a sample, intra the same over the samples of a class. Both are
0 when the student's probabilities are a rising affine function of the target's.

Defaults are the authors' (T = 4 and weight 2 on CIFAR-100; T = 1 is the preset ``imagenet``). Expected top-1 on
CIFAR-100, 240 epochs: resnet32x4 -> resnet8x4 76.31, resnet56 -> resnet20 71.75. ``intra`` correlates over the samples of
all workers (of one micro-batch), unless ``across_workers`` is off.

Shape legend: B = batch, C = classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from methods.base import Batch, Loss
from methods.checks import check_learns, check_weights
from methods.distil.across import rows_of_all
from methods.distil.settings import TemperedSettings
from methods.distil.student import DistilledStudent
from methods.distil.teaching import Outputs, Teaching
from methods.losses import in_full_precision, soften

SMALLEST_DENOMINATOR = 1e-8


@in_full_precision
def correlation_distance(student_BC: Tensor, target_BC: Tensor, *, dim: int) -> Tensor:
    """1 - the mean Pearson correlation along ``dim`` (-1: within samples, 0: within classes), scalar.

    What has no spread, as all columns of a batch of one, correlates with nothing: distance 1, gradient 0.
    """
    student = student_BC - student_BC.mean(dim=dim, keepdim=True)
    target = target_BC - target_BC.mean(dim=dim, keepdim=True)
    lengths = torch.linalg.vector_norm(student, dim=dim) * torch.linalg.vector_norm(target, dim=dim)
    correlation = (student * target).sum(dim=dim) / (lengths + SMALLEST_DENOMINATOR)
    distance: Tensor = 1 - correlation.mean()
    return distance


@dataclass(frozen=True, kw_only=True)
class CorrelationSettings(TemperedSettings):
    """Settings of ``dist``."""

    kd_weight: float = 2.0
    """Weight of both correlations together. 0 turns them off."""
    inter_weight: float = 1.0
    """Weight of the correlation within samples, on top of ``kd_weight``."""
    intra_weight: float = 1.0
    """Weight of the correlation within classes, on top of ``kd_weight``."""
    across_workers: bool = True
    """Correlate over the samples of all workers; False: only those of the worker's own share of a batch."""

    def __post_init__(self) -> None:
        TemperedSettings.__post_init__(self)
        check_weights(self, "inter_weight", "intra_weight")
        check_learns(self, "kd_weight", "ce_weight")


class CorrelationDistillation(DistilledStudent):
    """Matches correlations of probabilities instead of probabilities. Losses ``ce``, ``inter``, ``intra``."""

    Settings = CorrelationSettings
    ranges: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        **DistilledStudent.ranges,
        "inter_weight": {"loguniform": [0.25, 4]},
        "intra_weight": {"loguniform": [0.25, 4]},
    }
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"imagenet": {"temperature": 1.0}}
    settings: CorrelationSettings

    @classmethod
    def inactive(cls, settings: Any) -> frozenset[str]:
        names = super().inactive(settings)
        return (
            names | {"inter_weight", "intra_weight", "across_workers"} if settings.kd_weight == 0 else names
        )

    def criterion(self, student: Outputs, teaching: Teaching, batch: Batch) -> dict[str, Loss]:
        settings = self.settings
        student_BC = soften(student.logits, settings.temperature)
        target_BC = teaching.target(settings.temperature)
        weight = self.kd_weight(batch) * teaching.mass * settings.temperature**2
        inter = correlation_distance(student_BC, target_BC, dim=-1)
        if settings.across_workers:
            student_BC, target_BC = rows_of_all(student_BC), rows_of_all(target_BC)
        intra = correlation_distance(student_BC, target_BC, dim=0)
        return {
            "inter": Loss(inter, weight * settings.inter_weight),
            "intra": Loss(intra, weight * settings.intra_weight),
        }
