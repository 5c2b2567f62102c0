"""TeKAP: one teacher, several perspectives, by noise alone. A source of teacher signals for any criterion.

"Single Teacher, Multiple Perspectives: Teacher Knowledge Augmentation for Enhanced Knowledge Distillation", ICLR 2025.
A stage of this method trains nothing; a student that refers to it sees, anew at each step, noisy copies of what the
teacher says:

    z_k = (1 - noise_share) z + noise_share * logit_noise * N(0, 1)         k = 1 .. num_copies
    L   = ce_weight CE + kd_weight T^2 (KL_0 + view_weight sum_k KL_k)

The weights are not divided by their sum: with the defaults the teacher's side pulls 1 + 3 * 0.8 = 3.4 times as hard, so
that ``kd`` with its weight of 0.9 has an effective weight of 3.06. Compare it with ``kd`` of that weight. In logits the
noise itself is nearly void at the published size: softened at T = 4 its deviation is 0.025.

A criterion on pooled features becomes the sum of its value at the teacher's feature and at each copy, these with
``feature_view_weight``. Defaults are those of the paper and of the Angular-KD comparison (three copies, noise of
deviation 1). The authors' release differs at the feature level: one copy, a deviation of 0.1, and the half of CRD that
is anchored at the student counted twice. Expected top-1 on CIFAR-100, resnet32x4 -> resnet8x4, 240 epochs: 74.79 with
``kd``, 75.65 with CRD, 75.98 with both (ce_weight 1, kd_weight 1).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from methods.base import Batch, InputStage, Method, Source, Step, Task, Teacher
from methods.checks import check_weights
from methods.distil.refusals import plain_only
from methods.measures import classification_sums
from methods.teachers import teacher_for


@dataclass(frozen=True, kw_only=True)
class TekapSettings:
    """Settings of ``tekap``."""

    num_copies: int = 3
    """Noisy copies of the teacher's signal in each step (K)."""
    noise_share: float = 0.1
    """Share of a copy that is noise; the rest is the teacher's signal. Between 0 and 1."""
    logit_noise: float = 1.0
    """Standard deviation of the noise mixed into logits."""
    feature_noise: float = 1.0
    """Standard deviation of the noise mixed into pooled features."""
    view_weight: float = 0.8
    """Weight of each copy in the target, beside the teacher's 1; not divided by their sum."""
    feature_view_weight: float = 1.0
    """Weight of each copy's term in a criterion on pooled features, beside the teacher's 1."""

    def __post_init__(self) -> None:
        if self.num_copies < 1:
            raise ValueError(f"num_copies must be at least 1, got {self.num_copies!r}")
        if not 0 <= self.noise_share <= 1:
            raise ValueError(f"noise_share must lie between 0 and 1, got {self.noise_share!r}")
        check_weights(self, "logit_noise", "feature_noise", "view_weight", "feature_view_weight")


class Tekap(Method):
    """Makes noisy copies of a teacher's signals for the student that refers to it. Trains nothing."""

    Settings = TekapSettings
    ranges: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "num_copies": {"grid": [1, 3, 5]},
        "noise_share": {"uniform": [0.05, 0.5]},
        "logit_noise": {"loguniform": [0.5, 10]},
        "view_weight": {"uniform": [0.2, 1.0]},
    }
    inputs: ClassVar[Mapping[str, frozenset[str]]] = {"teacher": frozenset({"logits", "pooled"})}
    emits: ClassVar[frozenset[str]] = frozenset({"logits", "pooled", "maps", "copies"})
    needs_model: ClassVar[bool] = False
    trains: ClassVar[bool] = False
    train_defaults: ClassVar[Mapping[str, Any]] = {"epochs": 0}
    settings: TekapSettings

    def __init__(
        self, settings: Any, *, task: Task, model: nn.Module | None, inputs: Mapping[str, Teacher]
    ) -> None:
        super().__init__(settings, task=task, model=model, inputs=inputs)
        self.teacher = teacher_for(task, inputs)

    @classmethod
    def refusals(cls, settings: Any, inputs: Mapping[str, InputStage]) -> Iterable[str]:
        return plain_only(inputs, "tekap makes copies of")

    def forward(self, batch: Batch) -> Step:
        raise NotImplementedError("tekap trains nothing: its stage has no training steps")

    @torch.no_grad()
    def statistics(self, batch: Batch) -> dict[str, Tensor]:
        """Those of the teacher itself: the noise is made for each step of a student."""
        return classification_sums(self.teacher(batch.images).logits, batch.labels)

    def artifact(self) -> nn.Module:
        """Nothing: the settings say it all."""
        return nn.Identity()

    @classmethod
    def emit(cls, source: Source) -> Teacher:
        """The input's teacher, with the noise that students are to put on it."""
        return replace(source.inputs["teacher"].teacher(), key=source.key, noise=source.settings)
