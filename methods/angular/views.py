"""Angular-KD, stage 1: grow diverse branches on a frozen teacher.

"Single-Teacher View Augmentation: Boosting Knowledge Distillation via Angular Diversity", NeurIPS 2025,
arXiv 2510.22480. Each of N heads maps the teacher's pooled feature to a *view*: a new feature and new logits.

    L_aug = lambda_Fi (L_con + L_div)(features)      + lambda_Fa L_intra(features)
          + lambda_Zi (L_con + L_div)(probabilities) + lambda_Za L_intra(probabilities) + lambda_gt sum_i CE(z_i, y)

Defaults are those of the authors' code, latest revision. Expected: an ensemble a little better than its teacher.
On a toy task heads trained with labels alone gained as much, and at the feature level the gate of L_div never
opened: read ``feature_gate_open_fraction`` before concluding anything about the diversity weight.

Preset ``paper`` differs from the authors' release on purpose: cosines over the feature axis and between
probabilities of unit length (the release normalises over branches, or not at all), one orthogonal matrix per
branch, dropout 0.2 to 0.4, one branch is allowed (the release divides 0 by 0), and the optimiser holds each
parameter once (in the release every step is applied twice). ``released`` restores the losses, initialisation,
dropout and target weights of the release; the doubled step is not restored, nor the framework's first value of
the bias before batch norm, which batch norm removes.

Contrast uses the other samples of the same process: do not compare proximity weights across batch sizes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from methods.angular.diversity import (
    disagreement,
    label_ambiguity,
    member_log_probs,
    mixture_divergence,
    mixture_log_probs,
    view_cosines,
)
from methods.angular.heads import build_heads, with_views
from methods.angular.objective import branch_losses
from methods.angular.settings import AngularViewsSettings
from methods.base import Batch, InputStage, Method, Signals, Source, Step, Task, Teacher
from methods.distil.refusals import plain_only
from methods.losses import soften
from methods.measures import classification_sums, ranks
from methods.teachers import freeze, teacher_for


class AngularViews(Method):
    """Trains the branches; teacher frozen, no student. Keeps the branches alone.

    Losses: ``feature_contrast``, ``feature_diversity``, ``feature_intra``, the same of ``logit``, and ``label``.
    """

    Settings = AngularViewsSettings
    ranges: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "num_branches": {"grid": [1, 2, 3, 5, 8]},
        "feature_inter_weight": {"loguniform": [0.01, 5]},
        "feature_intra_weight": {"loguniform": [0.05, 10]},
        "logit_inter_weight": {"loguniform": [0.05, 10]},
        "logit_intra_weight": {"loguniform": [0.05, 10]},
        "label_weight": {"loguniform": [0.2, 2]},
        "margin": {"uniform": [0.05, 0.5]},
        "contrast_temperature": {"loguniform": [0.03, 0.5]},
        "constraint": {"choice": ["contrastive", "hinge"]},
        "temperature": {"loguniform": [1, 8]},
    }
    inputs: ClassVar[Mapping[str, frozenset[str]]] = {"teacher": frozenset({"logits", "pooled"})}
    emits: ClassVar[frozenset[str]] = frozenset({"logits", "pooled", "maps", "views"})
    needs_model: ClassVar[bool] = False
    train_defaults: ClassVar[Mapping[str, Any]] = {
        "epochs": 30,
        "batch_size": 64,
        "optimizer": "sgd",
        "learning_rate": 0.1,
        "momentum": 0.9,
        "weight_decay": 5e-4,
        "schedule": "step",
        "milestones": (1 / 3, 2 / 3),
        "decay": 0.1,
    }
    evaluation_metrics: ClassVar[tuple[str, ...]] = (
        *("top1", "top5", "loss", "teacher_top1", "head_top1"),
        *("feature_gate_open_fraction", "feature_own_cosine", "feature_pair_cosine", "feature_offset_cosine"),
        *("logit_gate_open_fraction", "logit_own_cosine", "logit_pair_cosine", "logit_offset_cosine"),
        *("diversity", "mixture_kl", "disagreement"),
    )
    settings: AngularViewsSettings

    def __init__(
        self, settings: Any, *, task: Task, model: nn.Module | None, inputs: Mapping[str, Teacher]
    ) -> None:
        super().__init__(settings, task=task, model=model, inputs=inputs)
        self.teacher = teacher_for(task, inputs)
        self.heads = build_heads(
            settings, num_features=self.teacher.num_features, num_classes=self.teacher.num_classes
        )
        self.heads.initialise(settings.weight_init, settings.bn_init)

    @classmethod
    def inactive(cls, settings: AngularViewsSettings) -> frozenset[str]:
        return settings.inactive()

    @classmethod
    def refusals(cls, settings: Any, inputs: Mapping[str, InputStage]) -> Iterable[str]:
        return plain_only(inputs, "branches grow on")

    def forward(self, batch: Batch) -> Step:
        signals = with_views(self.teacher(batch.images), self.heads)
        return branch_losses(self.settings, signals, batch.labels)

    @torch.no_grad()
    def statistics(self, batch: Batch) -> dict[str, Tensor]:
        """Sums of the ensemble's accuracy and loss, of each member's accuracy, and of what tells views apart.

        The ensemble is the plain mean of probabilities at temperature 1, whatever the preset. ``disagreement``
        is in percent, like accuracies.
        """
        signals = with_views(self.teacher(batch.images), self.heads)
        assert signals.view_logits is not None
        members_BMC = member_log_probs(signals.logits, signals.view_logits)
        return {
            **classification_sums(mixture_log_probs(members_BMC), batch.labels),
            **_member_accuracies(members_BMC, batch.labels),
            **self._cosine_sums(signals),
            "diversity": label_ambiguity(members_BMC, batch.labels).sum(),
            "mixture_kl": mixture_divergence(members_BMC).sum(),
            "disagreement": 100 * disagreement(members_BMC).sum(),
        }

    def _cosine_sums(self, signals: Signals) -> dict[str, Tensor]:
        assert signals.view_logits is not None
        assert signals.view_pooled is not None
        temperature, margin = self.settings.temperature, self.settings.margin
        levels = {
            "feature": view_cosines(signals.pooled, signals.view_pooled, margin=margin),
            "logit": view_cosines(
                soften(signals.logits, temperature), soften(signals.view_logits, temperature), margin=margin
            ),
        }
        sums: dict[str, Tensor] = {}
        for level, cosines in levels.items():
            sums[f"{level}_gate_open_fraction"] = cosines.gate.sum()
            sums[f"{level}_own_cosine"] = cosines.own.sum()
            sums[f"{level}_pair_cosine"] = cosines.pair.sum()
            sums[f"{level}_offset_cosine"] = cosines.offset.sum()
        return sums

    def artifact(self) -> nn.Module:
        return self.heads

    @classmethod
    def emit(cls, source: Source) -> Teacher:
        """The input's teacher with these branches on top, everything frozen."""
        teacher = source.inputs["teacher"].teacher()
        heads = build_heads(
            source.settings, num_features=teacher.num_features, num_classes=teacher.num_classes
        )
        heads.load_state_dict(dict(source.weights), strict=True)
        return replace(teacher, key=source.key, heads=freeze(heads), head_settings=source.settings)


def _member_accuracies(members_BMC: Tensor, labels_B: Tensor) -> dict[str, Tensor]:
    """Summed top-1 (100 per hit) of the teacher, of each head, and of the heads on average."""
    ranks_BM = ranks(members_BMC, labels_B[:, None].expand(members_BMC.shape[:2]))
    hits_M = 100 * (ranks_BM == 0).sum(dim=0, dtype=members_BMC.dtype)
    return {
        "teacher_top1": hits_M[0],
        "head_top1": hits_M[1:].mean(),
        **{f"head_{branch}_top1": hits for branch, hits in enumerate(hits_M[1:])},
    }
