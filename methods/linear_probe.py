"""Linear probe: how far the features of a finished network carry over to other data.

The network is frozen, in evaluation mode; one linear layer on its pooled feature is trained on the probe's own data
(``stages.probe.data``), which may have other classes. The protocol of Tian, Krishnan, Isola: "Contrastive
Representation Distillation", arXiv 1910.10699, section 4.2. Published CIFAR-100 resnet32x4 -> resnet8x4 students on
STL-10 / Tiny-ImageNet: KD 68.01 / 31.17, TeKAP 68.71 / 31.54, Angular-KD 70.23 / 32.97.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from methods.base import Batch, Loss, Method, Source, Step, Task, Teacher
from methods.losses import cross_entropy
from methods.measures import classification_sums
from methods.teachers import freeze


@dataclass(frozen=True, kw_only=True)
class LinearProbeSettings:
    """Settings of ``linear_probe``: there are none besides those of training."""


class LinearProbe(Method):
    """Trains a classifier on a frozen feature. Loss ``ce``."""

    Settings = LinearProbeSettings
    inputs: ClassVar[Mapping[str, frozenset[str]]] = {"teacher": frozenset({"pooled"})}
    emits: ClassVar[frozenset[str]] = frozenset({"logits", "pooled"})
    needs_model: ClassVar[bool] = False
    same_classes: ClassVar[bool] = False
    train_defaults: ClassVar[Mapping[str, Any]] = {
        "epochs": 100,
        "learning_rate": 0.1,
        "weight_decay": 0.0,
        "schedule": "step",
        "milestones": (0.3, 0.6, 0.9),
        "decay": 0.1,
    }

    def __init__(
        self, settings: Any, *, task: Task, model: nn.Module | None, inputs: Mapping[str, Teacher]
    ) -> None:
        super().__init__(settings, task=task, model=model, inputs=inputs)
        self.teacher = inputs["teacher"]
        self.classifier = nn.Linear(self.teacher.num_features, task.num_classes)

    def forward(self, batch: Batch) -> Step:
        return Step({"ce": Loss(cross_entropy(self.model(batch.images)[0], batch.labels))})

    @torch.no_grad()
    def statistics(self, batch: Batch) -> dict[str, Tensor]:
        return classification_sums(self.model(batch.images)[0], batch.labels)

    def artifact(self) -> nn.Module:
        """The linear layer alone; the network below it is an artifact of its own."""
        return self.classifier

    def model(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the probe ``[B, C]`` and the frozen feature ``[B, D]``."""
        pooled_BD = self.teacher(images).pooled
        return self.classifier(pooled_BD), pooled_BD

    @classmethod
    def emit(cls, source: Source) -> Teacher:
        """The frozen network with the probe in the place of its classifier."""
        teacher = source.inputs["teacher"].teacher()
        classifier = nn.Linear(teacher.num_features, source.task.num_classes)
        classifier.load_state_dict(dict(source.weights), strict=True)
        network = freeze(_Probed(teacher.network, classifier))
        return replace(
            teacher, network=network, num_classes=source.task.num_classes, key=source.key,
            heads=None, head_settings=None, noise=None,
        )  # fmt: skip


class _Probed(nn.Module):
    def __init__(self, network: nn.Module, classifier: nn.Linear) -> None:
        super().__init__()
        self.network = network
        self.classifier = classifier

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        _, pooled_BD = self.network(images)
        return self.classifier(pooled_BD), pooled_BD
