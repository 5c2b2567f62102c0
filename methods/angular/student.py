"""Angular-KD, stage 2: distil a student from the mean of a frozen teacher and its views.

"Single-Teacher View Augmentation: Boosting Knowledge Distillation via Angular Diversity", NeurIPS 2025,
arXiv 2510.22480, in its logit-level form:

    L = ce_weight CE(z_S, y) + kd_weight T^2 KL(mean of members' p_T || p_T(z_S)) + L_aug

Temperature, margin and the weights inside L_aug are not settings here: one value is shared by both stages, the one
that the views were grown with (``teacher.head_settings``). Defaults follow the authors' code. Expected top-1 on
CIFAR-100, resnet32x4 -> resnet8x4, 240 epochs: 76.08 as published; compare with KD whose weight was tuned, since a
larger distillation weight alone explains part of the gain.

Differences from the release on purpose: the target is detached (there the heads are also pulled towards the
student), heads are really trained in this stage (there they are missing from the optimiser), and member weights
sum to 1. Views grown with preset ``released`` bring its target with them: view weight 0.8, divided by the length
of the weight vector, so that the effective weight is larger (``effective_kd_weight`` is logged).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from methods.angular.ensemble import Normalisation, ensemble_probs
from methods.angular.heads import with_views
from methods.angular.objective import branch_losses
from methods.angular.settings import RELEASED_VIEW_WEIGHT, AngularViewsSettings
from methods.base import Batch, Loss, Signals, Step, Task, Teacher
from methods.checks import check_choice, check_learns, check_weights
from methods.losses import cross_entropy, softened_kl
from methods.supervised import NetworkMethod
from methods.teachers import teacher_for

HeadTraining = Literal["joint", "frozen"]


@dataclass(frozen=True, kw_only=True, slots=True)
class AngularDistillationSettings:
    """Settings of ``angular_kd``. Symbols in brackets are those of the paper."""

    kd_weight: float = 1.0
    """Weight of the divergence from the ensemble (alpha_kd). 0 turns it off."""
    ce_weight: float = 0.1
    """Weight of the cross-entropy with the labels (alpha_ce). 0 turns it off."""
    view_weight: float = 1.0
    """Weight of each view beside the teacher's 1. 0 is plain distillation. Fixed at 0.8 by released views."""
    heads: HeadTraining = "joint"
    """``joint``: branches keep training with the student; ``frozen``: as stage 1 left them, in evaluation mode."""
    detach_target: bool = True
    """Keep the student's gradient out of the branches. False is what part of the release does."""

    def __post_init__(self) -> None:
        check_weights(self, "kd_weight", "ce_weight", "view_weight")
        check_learns(self, "kd_weight", "ce_weight")
        check_choice(self, heads=("joint", "frozen"))


class AngularDistillation(NetworkMethod):
    """Distils the ensemble of teacher and views. Losses ``ce`` and ``kd``; with joint heads those of the views."""

    Settings = AngularDistillationSettings
    inputs: ClassVar[Mapping[str, frozenset[str]]] = {"teacher": frozenset({"views"})}
    settings: AngularDistillationSettings

    def __init__(
        self, settings: Any, *, task: Task, model: nn.Module | None, inputs: Mapping[str, Teacher]
    ) -> None:
        super().__init__(settings, task=task, model=model, inputs=inputs)
        self.teacher = teacher_for(task, inputs, needs_views=True)
        self.head_settings: AngularViewsSettings = self.teacher.head_settings
        self.view_weight, self.normalisation = _member_weighting(settings, self.head_settings)
        self.heads: nn.Module | None = None
        if settings.heads == "joint":
            self.heads = copy.deepcopy(self.teacher.heads)
            assert self.heads is not None
            self.heads.requires_grad_(True).train()

    @classmethod
    def inactive(cls, settings: AngularDistillationSettings) -> frozenset[str]:
        names: set[str] = set()
        if settings.kd_weight == 0:
            names |= {"view_weight", "detach_target"}
        if settings.view_weight == 0 or settings.heads == "frozen":
            names |= {"detach_target"}
        return frozenset(names)

    def forward(self, batch: Batch) -> Step:
        signals = self._signals(batch.images)
        target_BC = self._target(signals)
        logits_BC, _ = self.model(batch.images)
        ce = cross_entropy(logits_BC, batch.labels)
        kd = softened_kl(logits_BC, target_BC, self.head_settings.temperature)
        losses = {"ce": Loss(ce, self.settings.ce_weight), "kd": Loss(kd, self.settings.kd_weight)}
        target_mass = target_BC.detach().sum(dim=-1).mean()
        metrics = {"effective_kd_weight": self.settings.kd_weight * target_mass}
        if self.heads is None:
            return Step(losses, metrics)
        branches = branch_losses(self.head_settings, signals, batch.labels)
        return Step({**losses, **branches.losses}, {**metrics, **branches.metrics})

    def _signals(self, images: Tensor) -> Signals:
        signals = self.teacher(images)
        if self.heads is not None:
            return with_views(signals, self.heads)
        assert self.teacher.heads is not None
        with torch.no_grad():
            return with_views(signals, self.teacher.heads)

    def _target(self, signals: Signals) -> Tensor:
        """What the student should match, ``[B, C]``."""
        assert signals.view_logits is not None
        target_BC = ensemble_probs(
            signals.logits,
            signals.view_logits,
            self.head_settings.temperature,
            view_weight=self.view_weight,
            normalisation=self.normalisation,
        )
        return target_BC.detach() if self.settings.detach_target else target_BC


def _member_weighting(
    settings: AngularDistillationSettings, head_settings: AngularViewsSettings
) -> tuple[float, Normalisation]:
    """View weight and normalisation; a view weight that released views would override is refused."""
    if head_settings.preset == "paper":
        return settings.view_weight, "sum"
    if settings.view_weight not in (1.0, RELEASED_VIEW_WEIGHT):
        raise ValueError(
            f"views of preset 'released' fix view_weight at {RELEASED_VIEW_WEIGHT}, got {settings.view_weight!r}: "
            "leave it out, or grow the views with preset 'paper'"
        )
    return RELEASED_VIEW_WEIGHT, "length"
