"""Similarity-preserving distillation: samples that are alike to the teacher should be alike to the student.

Tung, Mori: "Similarity-Preserving Knowledge Distillation", arXiv 1907.09682, here on pooled features as every relational
criterion of the family (the paper takes the last map):

    L = ce_weight CE + similarity_weight * |G_S - G_T|^2 / B^2,   G = rows of F F^T, each of length 1

Weight as in the CRD benchmark. With ``across_workers`` the batch is that of all workers together.

Shape legend: B = batch, D = pooled feature width (it may differ between student and teacher).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from methods.angular.losses import unit
from methods.base import Batch, Loss
from methods.checks import check_weights
from methods.distil.across import rows_of_all
from methods.distil.settings import TemperedSettings
from methods.distil.student import FeatureStudent
from methods.distil.teaching import Outputs, Teaching
from methods.losses import in_full_precision


@dataclass(frozen=True, kw_only=True)
class SimilaritySettings(TemperedSettings):
    """Settings of ``similarity``."""

    kd_weight: float = 0.0
    """Weight of the divergence from the teacher's probabilities, added to the similarities of features."""
    similarity_weight: float = 3000.0
    """Weight of the distance between similarities. 0 turns it off."""
    across_workers: bool = True
    """Compare the samples of all workers; False: only those of the worker's own share of a batch."""

    def __post_init__(self) -> None:
        TemperedSettings.__post_init__(self)
        check_weights(self, "similarity_weight")


class SimilarityPreserving(FeatureStudent):
    """Matches which samples of a batch are alike. Losses ``ce``, ``kd``, ``similarity``."""

    Settings = SimilaritySettings
    ranges: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        **FeatureStudent.ranges,
        "similarity_weight": {"loguniform": [300, 30000]},
    }
    settings: SimilaritySettings

    def feature_losses(self, student: Outputs, teaching: Teaching, batch: Batch) -> dict[str, Loss]:
        is_across = self.settings.across_workers
        pooled_BD = rows_of_all(student.pooled) if is_across else student.pooled
        total = torch.zeros((), device=pooled_BD.device)
        for weight, own_BD in teaching.pooled_terms:
            target_BD = rows_of_all(own_BD) if is_across else own_BD
            total = total + weight * similarity_distance(pooled_BD, target_BD)
        return {"similarity": Loss(total, self.settings.similarity_weight)}


@in_full_precision
def similarity_distance(student_BD: Tensor, teacher_BD: Tensor) -> Tensor:
    """Mean squared difference of two similarity matrices, scalar. 0 for one sample."""
    return (similarities(student_BD) - similarities(teacher_BD)).square().mean()


def similarities(features_BD: Tensor) -> Tensor:
    """Inner products of all pairs, ``[B, B]``, each row of length 1."""
    return unit(features_BD @ features_BD.T)
