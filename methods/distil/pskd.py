"""PS-KD: the student is its own teacher; targets are what it predicted for the same image in the epoch before.

Kim et al.: "Self-Knowledge Distillation with Progressive Refinement of Targets", ICCV 2021, arXiv 2006.12000.

    target = (1 - a) onehot(y) + a p of the previous epoch        a = kd_weight * epoch / num_epochs, epochs from 1
    L      = CE(z_S, target)

The prediction is that for the image as it was augmented then. It is remembered for every sample (n x C numbers, in every
checkpoint: 20 MB for CIFAR-100, too much for ImageNet) and shared by all workers. A sample whose batch was dropped keeps
its older prediction; before the first, the target is the label.

The default, 0.8, is the paper's. No source gives a number for the pairs of the other methods: compare with ``supervised``.

Shape legend: n = samples of the training split, B = batch, C = classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methods.base import Batch, Loss, Step, Task, Teacher
from methods.distil.memory import SampleMemory
from methods.losses import in_full_precision, soften
from methods.supervised import NetworkMethod


@dataclass(frozen=True, kw_only=True)
class ProgressiveSettings:
    """Settings of ``pskd``."""

    kd_weight: float = 0.8
    """Share of the target that the own earlier prediction has in the last epoch; it grows from 0. Between 0 and 1."""

    def __post_init__(self) -> None:
        if not 0 <= self.kd_weight <= 1:
            raise ValueError(f"kd_weight must lie between 0 and 1, got {self.kd_weight!r}")


@in_full_precision
def soft_cross_entropy(logits_BC: Tensor, target_BC: Tensor) -> Tensor:
    """Mean cross-entropy with a distribution for each sample, scalar."""
    return -(target_BC * F.log_softmax(logits_BC, dim=-1)).sum(dim=-1).mean()


class ProgressiveSelfDistillation(NetworkMethod):
    """Learns from its own predictions of the epoch before, without a teacher. Loss ``soft_ce``."""

    Settings = ProgressiveSettings
    ranges: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "kd_weight": {"uniform": [0.3, 0.9]},
    }
    settings: ProgressiveSettings

    def __init__(
        self, settings: Any, *, task: Task, model: nn.Module | None, inputs: Mapping[str, Teacher]
    ) -> None:
        super().__init__(settings, task=task, model=model, inputs=inputs)
        self.predictions = SampleMemory()
        self.num_epochs = 0

    def prepare(self, labels_n: Tensor, *, num_epochs: int) -> None:
        """Labels stand for the predictions that are not there yet."""
        self.num_epochs = num_epochs
        onehot_nC = F.one_hot(labels_n.clamp_min(0), self.task.num_classes)
        self.predictions.fill((onehot_nC * (labels_n >= 0)[:, None]).float())

    def forward(self, batch: Batch) -> Step:
        if not self.predictions.is_filled:
            raise RuntimeError("pskd was not told of the training set: call prepare before the first step")
        share = self.settings.kd_weight * min((batch.epoch + 1) / self.num_epochs, 1.0)
        onehot_BC = F.one_hot(batch.labels, self.task.num_classes)
        target_BC = (1 - share) * onehot_BC + share * self.predictions.read(batch.indices)
        logits_BC, _ = self.model(batch.images)
        self.predictions.write(batch.indices, soften(logits_BC, 1.0))
        effective = torch.full((), share, device=batch.images.device)
        return Step(
            {"soft_ce": Loss(soft_cross_entropy(logits_BC, target_BC))}, {"effective_kd_weight": effective}
        )
