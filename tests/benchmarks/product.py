"""Our own training of a student, as a stage does it: stream, method and loop, without store and Ray."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from pictures import NUM_CLASSES, Pictures
from torch import nn

from methods import BUILTIN, ModelSettings
from methods.base import Batch, Method, Task, Teacher
from methods.data.base import Images
from methods.data.cifar import Cifar100
from methods.data.stream import Stream
from orchestrator.loop import train
from orchestrator.optimisation import TrainSettings

TASK = Task(num_classes=NUM_CLASSES)


def network(name: str, device: torch.device, *, channels_last: bool = True) -> nn.Module:
    """A new network that gives (logits, pooled); textbook loops take its ``network``."""
    torch.manual_seed(0)
    made = BUILTIN.build_model(ModelSettings(name=name), TASK).to(device)
    return made.to(memory_format=torch.channels_last) if channels_last else made


def method(student: nn.Module, teacher: nn.Module, **settings: float) -> Method:
    """Plain distillation of ``teacher``, frozen, into ``student``."""
    teacher.eval().requires_grad_(False)
    frozen = Teacher(network=teacher, num_features=teacher.num_features, num_classes=NUM_CLASSES)  # type: ignore[arg-type]
    kd = BUILTIN.method("kd")
    return kd(kd.Settings(**settings), task=TASK, model=student, inputs={"teacher": frozen})


def stream(images: Images, batch_size: int, device: torch.device) -> Stream:
    """One epoch over ``images`` per epoch, shuffled and augmented."""
    return Stream(
        images, indices=np.arange(len(images)), batch_size=batch_size, seed=0, mean=Cifar100.mean, std=Cifar100.std,
        augment=Pictures.default_augment, shuffle=True, device=device,
    )  # fmt: skip


class Repeated:
    """A stream whose batches are one and the same, so that making them costs nothing."""

    def __init__(self, source: Stream) -> None:
        self.batch_size, self.num_batches, self.num_samples = (
            source.batch_size, source.num_batches, source.num_samples,
        )  # fmt: skip
        self.batch = next(iter(source.batches(0)))

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        for _ in range(start, self.num_batches):
            yield self.batch


def run(taught: Method, training: Any, device: torch.device, precision: Any = "float32") -> None:
    """One epoch of our loop."""
    settings = TrainSettings(
        epochs=1, batch_size=training.batch_size, schedule="constant", precision=precision
    )
    train(taught, settings=settings, training=training, validation=None, seed=0, device=device)
