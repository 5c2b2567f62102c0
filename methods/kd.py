"""Knowledge distillation: the student matches the softened probabilities of a frozen teacher.

Hinton, Vinyals, Dean: "Distilling the Knowledge in a Neural Network", arXiv 1503.02531.

    L = ce_weight * CE(z_S, y) + kd_weight * T^2 KL(p_T(z_teacher) || p_T(z_S))

Defaults (T = 4, 0.9, 0.1) are those of the CRD and mdistiller benchmarks. Expected top-1 on CIFAR-100, 240 epochs,
resnet32x4 -> resnet8x4: 73.33 +- 0.4 over three seeds; resnet56 -> resnet20: 70.66.

A teacher that has branches (an ``angular_views`` stage) is used through the plain mean of the probabilities of
itself and its views, with frozen branches: a target must be a distribution, so this holds for branches of the
``released`` preset too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from methods.angular.ensemble import ensemble_probs
from methods.base import Batch, Loss, Step, Task, Teacher
from methods.checks import check_learns, check_positive, check_weights
from methods.losses import cross_entropy, soften, softened_kl
from methods.supervised import NetworkMethod
from methods.teachers import teacher_for


@dataclass(frozen=True, kw_only=True, slots=True)
class KnowledgeDistillationSettings:
    """Settings of ``kd``."""

    temperature: float = 4.0
    """T: divides the logits of teacher and student."""
    kd_weight: float = 0.9
    """Weight of the divergence from the teacher. 0 turns it off."""
    ce_weight: float = 0.1
    """Weight of the cross-entropy with the labels. 0 turns it off."""

    def __post_init__(self) -> None:
        check_positive(self, "temperature")
        check_weights(self, "kd_weight", "ce_weight")
        check_learns(self, "kd_weight", "ce_weight")


class KnowledgeDistillation(NetworkMethod):
    """Distils a frozen teacher, or the mean of a teacher and its frozen views. Losses ``ce`` and ``kd``."""

    Settings = KnowledgeDistillationSettings
    inputs: ClassVar[Mapping[str, frozenset[str]]] = {"teacher": frozenset({"logits"})}
    settings: KnowledgeDistillationSettings

    def __init__(
        self, settings: Any, *, task: Task, model: nn.Module | None, inputs: Mapping[str, Teacher]
    ) -> None:
        super().__init__(settings, task=task, model=model, inputs=inputs)
        self.teacher = teacher_for(task, inputs)

    @classmethod
    def inactive(cls, settings: KnowledgeDistillationSettings) -> frozenset[str]:
        return frozenset({"temperature"}) if settings.kd_weight == 0 else frozenset()

    def forward(self, batch: Batch) -> Step:
        logits_BC, _ = self.model(batch.images)
        kd = softened_kl(logits_BC, self._target(batch.images), self.settings.temperature)
        ce = cross_entropy(logits_BC, batch.labels)
        return Step({"ce": Loss(ce, self.settings.ce_weight), "kd": Loss(kd, self.settings.kd_weight)})

    @torch.no_grad()
    def _target(self, images: Tensor) -> Tensor:
        """What the student should match, ``[B, C]``; rows sum to 1."""
        signals = self.teacher(images)
        if self.teacher.heads is None:
            return soften(signals.logits, self.settings.temperature)
        _, view_logits_BNC = self.teacher.heads(signals.pooled)
        return ensemble_probs(signals.logits, view_logits_BNC, self.settings.temperature)
