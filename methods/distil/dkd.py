"""DKD: the divergence from the teacher taken apart into the label's class and all other classes.

Zhao et al.: "Decoupled Knowledge Distillation", CVPR 2022, arXiv 2203.08679.

    L = ce_weight CE + kd_weight min(epoch / warmup_epochs, 1) (label_class_weight TCKD + other_classes_weight NCKD)

TCKD compares (p_y, 1 - p_y), NCKD the probabilities of the classes other than y, divided by their sum; both softened with T
and multiplied by T^2. Epochs are counted from 1. Plain KD is TCKD + (1 - p_y of the teacher) NCKD, per sample.

Defaults are those of resnet32x4 -> resnet8x4 (T = 4, 1, 8, 20 epochs); the other published weights are presets. Expected
top-1 on CIFAR-100, 240 epochs, resnet32x4 -> resnet8x4: 75.9 +- 0.4 over three seeds (published 76.32; independent users
report 75.8 to 76.2). In a short run set ``warmup_epochs``, else most of it is spent below the full weight.

Differences from the release on purpose: the binary part is computed from log-softmax (the release takes the logarithm of a
softmax, which underflows in half precision), and the label is left out exactly instead of by subtracting 1000.
``standardise: true`` is the DKD + LSKD of arXiv 2403.01427, see ``lskd``; its weights are the preset ``lskd``.

Shape legend: B = batch, C = classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from methods.base import Batch, Loss
from methods.checks import check_learns, check_weights
from methods.distil.lskd import standardised, standardised_soften
from methods.distil.settings import TemperedSettings, warmup_factor
from methods.distil.student import DistilledStudent
from methods.distil.teaching import Outputs, Teaching
from methods.losses import SMALLEST_PROBABILITY, in_full_precision, soften


class DecoupledLosses(NamedTuple):
    """The two parts, scalars."""

    label_class: Tensor
    """TCKD."""
    other_classes: Tensor
    """NCKD."""


@in_full_precision
def decoupled_losses(
    student_logits_BC: Tensor, target_BC: Tensor, labels_B: Tensor, temperature: float
) -> DecoupledLosses:
    """Divergence about the label's class, and among the other classes; each times ``T^2``, averaged over the batch.

    A label to which the target gives everything leaves the other classes without a say (0).

    Args:
        student_logits_BC: Logits at temperature 1.
        target_BC: Probabilities that are already softened with ``temperature``; rows sum to 1.
        labels_B: Class indices.
        temperature: ``T``, above 0.
    """
    is_label_BC = F.one_hot(labels_B, student_logits_BC.shape[-1]).bool()
    log_student_BC = F.log_softmax(student_logits_BC / temperature, dim=-1)
    log_label_B = log_student_BC.gather(1, labels_B[:, None]).squeeze(1)
    log_others_B = log_student_BC.masked_fill(is_label_BC, -torch.inf).logsumexp(dim=-1)
    label_B = target_BC.gather(1, labels_B[:, None]).squeeze(1)
    target_others_BC = target_BC.masked_fill(is_label_BC, 0.0)
    # Summed, not 1 - p_y: that would lose the digits of a confident teacher.
    others_B = target_others_BC.sum(dim=-1)
    binary_B = _divergence(label_B, log_label_B) + _divergence(others_B, log_others_B)
    among_BC = target_others_BC / others_B.clamp_min(SMALLEST_PROBABILITY)[:, None]
    log_among_BC = (log_student_BC - log_others_B[:, None]).masked_fill(is_label_BC, 0.0)
    among_B = _divergence(among_BC, log_among_BC).sum(dim=-1)
    return DecoupledLosses(temperature**2 * binary_B.mean(), temperature**2 * among_B.mean())


def _divergence(target: Tensor, log_student: Tensor) -> Tensor:
    return target * (target.clamp_min(SMALLEST_PROBABILITY).log() - log_student)


@dataclass(frozen=True, kw_only=True)
class DecoupledSettings(TemperedSettings):
    """Settings of ``dkd``. Symbols in brackets are those of the paper."""

    kd_weight: float = 1.0
    """Weight of both parts together, on top of their own. 0 turns them off."""
    label_class_weight: float = 1.0
    """Weight of the part about the label's class (alpha)."""
    other_classes_weight: float = 8.0
    """Weight of the part among the other classes (beta); published values by pair are presets."""
    warmup_epochs: int = 20
    """Over how many epochs both parts grow to their full weight. 0: full from the start."""
    standardise: bool = False
    """Standardise logits first, as ``lskd`` does."""

    def __post_init__(self) -> None:
        TemperedSettings.__post_init__(self)
        check_weights(self, "label_class_weight", "other_classes_weight", "warmup_epochs")
        check_learns(self, "kd_weight", "ce_weight")


class DecoupledDistillation(DistilledStudent):
    """Distils the label's class and the other classes apart. Losses ``ce``, ``label_class``, ``other_classes``."""

    Settings = DecoupledSettings
    ranges: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        **DistilledStudent.ranges,
        "label_class_weight": {"loguniform": [0.5, 4]},
        "other_classes_weight": {"grid": [0.5, 2, 6, 8]},
    }
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "resnet32x4-resnet8x4": {"other_classes_weight": 8.0},
        "resnet32x4-shuffle_v1": {"other_classes_weight": 8.0},
        "resnet32x4-shuffle_v2": {"other_classes_weight": 8.0},
        "wrn_40_2-shuffle_v1": {"other_classes_weight": 8.0},
        "resnet50-mobilenet_v2_half": {"other_classes_weight": 8.0},
        "wrn_40_2-wrn_16_2": {"other_classes_weight": 6.0},
        "wrn_40_2-wrn_40_1": {"other_classes_weight": 6.0},
        "vgg13-vgg8": {"other_classes_weight": 6.0},
        "vgg13-mobilenet_v2_half": {"other_classes_weight": 6.0},
        "resnet56-resnet20": {"other_classes_weight": 2.0},
        "resnet110-resnet32": {"other_classes_weight": 2.0},
        "imagenet-resnet34-resnet18": {"temperature": 1.0, "other_classes_weight": 0.5, "warmup_epochs": 1},
        "imagenet-resnet50-mobilenet_v1": {
            "temperature": 1.0,
            "other_classes_weight": 2.0,
            "warmup_epochs": 1,
        },
        "lskd": {"kd_weight": 9.0, "temperature": 2.0, "standardise": True},
    }
    settings: DecoupledSettings

    @classmethod
    def inactive(cls, settings: Any) -> frozenset[str]:
        names = super().inactive(settings)
        own = {"label_class_weight", "other_classes_weight", "warmup_epochs", "standardise"}
        return names | own if settings.kd_weight == 0 else names

    def kd_weight(self, batch: Batch) -> float:
        return self.settings.kd_weight * warmup_factor(batch.epoch, self.settings.warmup_epochs)

    def criterion(self, student: Outputs, teaching: Teaching, batch: Batch) -> dict[str, Loss]:
        settings = self.settings
        logits_BC = standardised(student.logits) if settings.standardise else student.logits
        transform = standardised_soften if settings.standardise else soften
        target_BC = teaching.target(settings.temperature, transform)
        label_class, other_classes = decoupled_losses(
            logits_BC, target_BC, batch.labels, settings.temperature
        )
        weight = self.kd_weight(batch) * teaching.mass
        return {
            "label_class": Loss(label_class, weight * settings.label_class_weight),
            "other_classes": Loss(other_classes, weight * settings.other_classes_weight),
        }
