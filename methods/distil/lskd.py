"""LSKD: logits are standardised before they are softened, so that only their shape is learnt, not their size.

Sun et al.: "Logit Standardization in Knowledge Distillation", CVPR 2024, arXiv 2403.01427.

    z' = (z - mean_c z) / (1e-7 + std_c z)        for the student and for every member of the teaching
    L  = ce_weight CE(z_S, y) + kd_weight T^2 KL(p_T(z'_teacher) || p_T(z'_S))

Defaults (0.1, 9, T = 2) are the authors'; they tune both per pair (T 2 to 4, weight 1 to 18). The large weight does part of
the work: compare with ``kd`` of a tuned weight. The same step in front of another criterion is ``standardise: true`` in
``dkd`` and ``mlkd``. Expected top-1 on CIFAR-100, 240 epochs: resnet32x4 -> resnet8x4 76.62, resnet56 -> resnet20 71.43.

Shape legend: B = batch, C = classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from methods.base import Batch, Loss
from methods.checks import check_learns
from methods.distil.settings import TemperedSettings
from methods.distil.student import DistilledStudent
from methods.distil.teaching import Outputs, Teaching
from methods.losses import in_full_precision, soften, softened_kl

SMALLEST_DEVIATION = 1e-7


@in_full_precision
def standardised(logits: Tensor) -> Tensor:
    """Logits with mean 0 and unbiased deviation 1 over the classes. Equal logits become 0, with a gradient of 0."""
    centred = logits - logits.mean(dim=-1, keepdim=True)
    return centred / (SMALLEST_DEVIATION + logits.std(dim=-1, keepdim=True))


def standardised_soften(logits: Tensor, temperature: float) -> Tensor:
    """Softened probabilities of standardised logits."""
    return soften(standardised(logits), temperature)


@dataclass(frozen=True, kw_only=True)
class LogitStandardisationSettings(TemperedSettings):
    """Settings of ``lskd``."""

    kd_weight: float = 9.0
    """Weight of the divergence from the teacher. 0 turns it off."""
    ce_weight: float = 0.1
    """Weight of the cross-entropy with the labels. 0 turns it off."""
    temperature: float = 2.0
    """T: divides the standardised logits of teacher and student."""

    def __post_init__(self) -> None:
        TemperedSettings.__post_init__(self)
        check_learns(self, "kd_weight", "ce_weight")


class LogitStandardisation(DistilledStudent):
    """Distillation between standardised logits. Losses ``ce`` and ``kd``."""

    Settings = LogitStandardisationSettings
    ranges: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        **DistilledStudent.ranges,
        "kd_weight": {"loguniform": [1, 18]},
        "temperature": {"uniform": [2, 4]},
    }
    settings: LogitStandardisationSettings

    def criterion(self, student: Outputs, teaching: Teaching, batch: Batch) -> dict[str, Loss]:
        temperature = self.settings.temperature
        target_BC = teaching.target(temperature, standardised_soften)
        kd = softened_kl(standardised(student.logits), target_BC, temperature)
        return {"kd": Loss(kd, self.kd_weight(batch) * teaching.mass)}
