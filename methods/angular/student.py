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

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from methods.angular.settings import RELEASED_VIEW_WEIGHT, AngularViewsSettings
from methods.base import Batch, Loss, Task, Teacher
from methods.checks import check_learns
from methods.distil.settings import DistilledSettings
from methods.distil.student import DistilledStudent
from methods.distil.teaching import Outputs, Teaching, Weighting
from methods.losses import softened_kl
from methods.teachers import teacher_for


@dataclass(frozen=True, kw_only=True)
class AngularDistillationSettings(DistilledSettings):
    """Settings of ``angular_kd``. Symbols in brackets are those of the paper."""

    ce_weight: float = 0.1
    """Weight of the cross-entropy with the labels (alpha_ce). 0 turns it off."""
    view_weight: float = 1.0
    """Weight of each view beside the teacher's 1. 0 is plain distillation. Fixed at 0.8 by released views."""

    def __post_init__(self) -> None:
        DistilledSettings.__post_init__(self)
        check_learns(self, "kd_weight", "ce_weight")


class AngularDistillation(DistilledStudent):
    """Distils the ensemble of teacher and views. Losses ``ce`` and ``kd``; with joint heads those of the views."""

    Settings = AngularDistillationSettings
    inputs: ClassVar[Mapping[str, frozenset[str]]] = {"teacher": frozenset({"views"})}
    allows_many: ClassVar[frozenset[str]] = frozenset()
    settings: AngularDistillationSettings

    def __init__(
        self, settings: Any, *, task: Task, model: nn.Module | None, inputs: Mapping[str, Teacher]
    ) -> None:
        teacher = teacher_for(task, inputs, needs_views=True)
        self.head_settings: AngularViewsSettings = teacher.head_settings
        super().__init__(settings, task=task, model=model, inputs=inputs)

    def criterion(self, student: Outputs, teaching: Teaching, batch: Batch) -> dict[str, Loss]:
        temperature = self.head_settings.temperature
        # The mixture and not the target: rows of the release's sum to more than 1, and so do those of its loss.
        kd = softened_kl(student.logits, teaching.mixture(temperature), temperature)
        return {"kd": Loss(kd, self.settings.kd_weight)}

    def member_weighting(self) -> Weighting:
        """That of the settings; a view weight that released views would override is refused."""
        if self.head_settings.preset == "paper":
            return Weighting(view_weight=self.settings.view_weight)
        if self.settings.view_weight not in (1.0, RELEASED_VIEW_WEIGHT):
            raise ValueError(
                f"views of preset 'released' fix view_weight at {RELEASED_VIEW_WEIGHT}, "
                f"got {self.settings.view_weight!r}: leave it out, or grow the views with preset 'paper'"
            )
        return Weighting(view_weight=RELEASED_VIEW_WEIGHT, normalisation="length")
