"""Training on labels alone: how a teacher comes to be, and what every student is compared with.

Expected top-1 on CIFAR-100 with 240 epochs of the usual recipe: resnet32x4 79.42, resnet8x4 72.50, resnet20 69.06
(tables of the CRD and mdistiller benchmarks, mean of several seeds).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from methods.base import Batch, Loss, Method, Source, Step, Task, Teacher
from methods.losses import cross_entropy
from methods.measures import classification_sums
from methods.teachers import network_teacher


@dataclass(frozen=True, kw_only=True, slots=True)
class SupervisedSettings:
    """Settings of ``supervised``."""

    label_smoothing: float = 0.0
    """Share of each label that is spread evenly over all classes, at least 0 and below 1."""

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must be at least 0 and below 1, got {self.label_smoothing!r}")


class NetworkMethod(Method):
    """Base of methods that train one network, keep its weights and emit its logits and pooled feature."""

    emits: ClassVar[frozenset[str]] = frozenset({"logits", "pooled", "maps"})

    def __init__(
        self, settings: object, *, task: Task, model: nn.Module | None, inputs: Mapping[str, Teacher]
    ) -> None:
        super().__init__(settings, task=task, model=model, inputs=inputs)
        if model is None:
            raise ValueError(f"{type(self).__name__} trains a network: name a model in its stage")
        self.model = model

    @torch.no_grad()
    def statistics(self, batch: Batch) -> dict[str, Tensor]:
        logits_BC, _ = self.model(batch.images)
        return classification_sums(logits_BC, batch.labels)

    def artifact(self) -> nn.Module:
        """The network itself, without taps: its weights load in plain PyTorch or timm."""
        network: nn.Module = self.model.network  # type: ignore[assignment]
        return network

    @classmethod
    def emit(cls, source: Source) -> Teacher:
        return network_teacher(source)


class Supervised(NetworkMethod):
    """Cross-entropy with the labels. Loss ``ce``."""

    Settings = SupervisedSettings
    settings: SupervisedSettings

    def forward(self, batch: Batch) -> Step:
        logits_BC, _ = self.model(batch.images)
        smoothing = self.settings.label_smoothing
        return Step({"ce": Loss(cross_entropy(logits_BC, batch.labels, label_smoothing=smoothing))})
