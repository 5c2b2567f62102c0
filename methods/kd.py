"""Knowledge distillation: the student matches the softened probabilities of a frozen teacher.

Hinton, Vinyals, Dean: "Distilling the Knowledge in a Neural Network", arXiv 1503.02531.

    L = ce_weight * CE(z_S, y) + kd_weight * T^2 KL(p_T(z_teacher) || p_T(z_S))

Defaults (T = 4, 0.9, 0.1) are those of the CRD and mdistiller benchmarks. Expected top-1 on CIFAR-100, 240 epochs,
resnet32x4 -> resnet8x4: 73.33 +- 0.4 over three seeds; resnet56 -> resnet20: 70.66.

A teacher that has branches (an ``angular_views`` stage) is used through the mean of the probabilities of itself and
its views, by default with frozen branches. The weights are those of the settings here, divided by their sum, for
branches of preset ``released`` too: only ``angular_kd`` brings the release's own target. Several teachers
(``teacher: [$a, $b]``) are ensemble distillation: the plain mean of their probabilities.
"""

from __future__ import annotations

from dataclasses import dataclass

from methods.base import Batch, Loss
from methods.checks import check_learns
from methods.distil.settings import HeadTraining, TemperedSettings
from methods.distil.student import DistilledStudent
from methods.distil.teaching import Outputs, Teaching


@dataclass(frozen=True, kw_only=True)
class KnowledgeDistillationSettings(TemperedSettings):
    """Settings of ``kd``."""

    kd_weight: float = 0.9
    """Weight of the divergence from the teacher. 0 turns it off."""
    ce_weight: float = 0.1
    """Weight of the cross-entropy with the labels. 0 turns it off."""
    heads: HeadTraining = "frozen"
    """Branches as stage 1 left them (``frozen``), or trained on with the student (``joint``)."""

    def __post_init__(self) -> None:
        TemperedSettings.__post_init__(self)
        check_learns(self, "kd_weight", "ce_weight")


class KnowledgeDistillation(DistilledStudent):
    """Distils a frozen teacher, its views or noisy copies, or several teachers. Losses ``ce`` and ``kd``."""

    Settings = KnowledgeDistillationSettings
    settings: KnowledgeDistillationSettings

    def criterion(self, student: Outputs, teaching: Teaching, batch: Batch) -> dict[str, Loss]:
        return {"kd": self.softened_loss(student, teaching, batch, self.settings.temperature)}
