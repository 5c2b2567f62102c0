"""The step that all distilled students share: labels, a criterion, and whatever teaches."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from methods.angular.objective import branch_losses
from methods.base import Batch, InputStage, Loss, Signals, Step, Task, Teacher
from methods.distil.refusals import kind_of, teacher_refusals
from methods.distil.settings import DistilledSettings, without_effect
from methods.distil.teaching import Outputs, Teaching, Weighting, detached, member_signals
from methods.losses import cross_entropy, softened_kl
from methods.supervised import NetworkMethod
from methods.teachers import teachers_for


class DistilledStudent(NetworkMethod):
    """A student that learns from labels and, by its ``criterion``, from one or several frozen teachers.

    Losses: ``ce``, those of the criterion, and with ``heads: joint`` those of the branches, once per step. Every step
    logs ``effective_kd_weight``: the weight with which the student is really pulled to the target.
    """

    inputs: ClassVar[Mapping[str, frozenset[str]]] = {"teacher": frozenset({"logits"})}
    allows_many: ClassVar[frozenset[str]] = frozenset({"teacher"})
    settings: DistilledSettings
    ranges: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "kd_weight": {"loguniform": [0.5, 10]},
        "ce_weight": {"loguniform": [0.1, 1]},
        "temperature": {"loguniform": [1, 8]},
        "view_weight": {"uniform": [0.2, 1.5]},
        "heads": {"choice": ["joint", "frozen"]},
    }

    def __init__(
        self, settings: Any, *, task: Task, model: nn.Module | None, inputs: Mapping[str, Teacher]
    ) -> None:
        super().__init__(settings, task=task, model=model, inputs=inputs)
        self.teachers = teachers_for(task, inputs)
        self.teacher = self.teachers[0]
        self.weighting = self.member_weighting()
        self.heads: nn.Module | None = None
        if settings.heads == "joint" and len(self.teachers) == 1 and self.teacher.heads is not None:
            self.heads = copy.deepcopy(self.teacher.heads)
            self.heads.requires_grad_(True).train()

    @abstractmethod
    def criterion(self, student: Outputs, teaching: Teaching, batch: Batch) -> dict[str, Loss]:
        """What the student is pulled to the teaching by: named, weighted losses."""

    @classmethod
    def inactive(cls, settings: Any) -> frozenset[str]:
        """Without its criterion, a student on logits asks nothing of its views but their own losses."""
        names = without_effect(settings)
        return names | {"view_weight", "detach_target"} if settings.kd_weight == 0 else names

    @classmethod
    def inactive_for(cls, settings: Any, inputs: Mapping[str, InputStage]) -> frozenset[str]:
        only_views = frozenset({"view_weight", "heads", "detach_target"})
        return cls.inactive(settings) | (frozenset() if kind_of(inputs) == "views" else only_views)

    @classmethod
    def refusals(cls, settings: Any, inputs: Mapping[str, InputStage]) -> Iterable[str]:
        return teacher_refusals(inputs, cls.inputs["teacher"])

    def forward(self, batch: Batch) -> Step:
        signals = member_signals(self.teachers, self.heads, batch.images)
        teaching = self.weighed(signals)
        student = self.student(batch.images)
        ce = Loss(cross_entropy(student.logits, batch.labels), self.settings.ce_weight)
        losses = {"ce": ce, **self.criterion(student, teaching, batch)}
        effective = torch.full((), self.kd_weight(batch) * teaching.mass, device=batch.images.device)
        metrics = {"effective_kd_weight": effective}
        if self.heads is None:
            return Step(losses, metrics)
        own = branch_losses(self.teacher.head_settings, signals, batch.labels)
        return Step({**losses, **own.losses}, {**metrics, **own.metrics})

    def student(self, images: Tensor) -> Outputs:
        """What the student says about ``images``."""
        logits_BC, pooled_BD = self.model(images)
        return Outputs(logits_BC, pooled_BD)

    def teaching(self, images: Tensor) -> Teaching:
        """What teaches ``images``, for a criterion that looks at other images than the batch's own."""
        return self.weighed(member_signals(self.teachers, self.heads, images))

    def weighed(self, signals: Signals) -> Teaching:
        """The members' signals as the criterion sees them."""
        is_detached = self.settings.detach_target
        return Teaching(signals=detached(signals) if is_detached else signals, weighting=self.weighting)

    def kd_weight(self, batch: Batch) -> float:
        """Weight of what compares probabilities in this batch, before the mass of the target multiplies it."""
        return self.settings.kd_weight

    def member_weighting(self) -> Weighting:
        """How the members of this student's teacher are weighted."""
        if len(self.teachers) > 1:
            return Weighting()
        if self.teacher.noise is not None:
            return Weighting(
                view_weight=self.teacher.noise.view_weight,
                normalisation="none",
                pooled="each",
                pooled_weight=self.teacher.noise.feature_view_weight,
            )
        return Weighting(view_weight=self.settings.view_weight)

    def softened_loss(self, student: Outputs, teaching: Teaching, batch: Batch, temperature: float) -> Loss:
        """Plain distillation: the divergence of the student's softened probabilities from the target."""
        divergence = softened_kl(student.logits, teaching.target(temperature), temperature)
        return Loss(divergence, self.kd_weight(batch) * teaching.mass)


class FeatureStudent(DistilledStudent):
    """A student whose criterion compares features; plain distillation is added with ``kd_weight``. Loss ``kd``."""

    inputs: ClassVar[Mapping[str, frozenset[str]]] = {"teacher": frozenset({"logits", "pooled"})}

    @classmethod
    def inactive(cls, settings: Any) -> frozenset[str]:
        return without_effect(settings)

    @abstractmethod
    def feature_losses(self, student: Outputs, teaching: Teaching, batch: Batch) -> dict[str, Loss]:
        """What compares features: named, weighted losses. A sum over ``teaching.pooled_terms`` on pooled features."""

    def criterion(self, student: Outputs, teaching: Teaching, batch: Batch) -> dict[str, Loss]:
        temperature: float = self.settings.temperature  # type: ignore[attr-defined]
        kd = self.softened_loss(student, teaching, batch, temperature)
        return {"kd": kd, **self.feature_losses(student, teaching, batch)}
