"""Small stand-ins for the tests of the training loop: a method, streams of random images, a checkpoint slot."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methods.base import Batch, Loss, Method, Source, Step, Task, Teacher
from methods.data.base import Augment, Images
from methods.data.stream import Stream
from orchestrator.checkpoint import from_bytes, to_bytes
from orchestrator.loop import Training, train
from orchestrator.optimisation import TrainSettings

CPU = torch.device("cpu")
NUM_CLASSES = 3


class Killed(BaseException):
    """The process died here."""


@dataclass(frozen=True, kw_only=True)
class TinySettings:
    hidden: int = 8
    batch_norm: bool = True
    dropout: float = 0.0
    poison: Callable[[Batch, Tensor], Tensor] | None = None
    """Changes the loss, to make it NaN somewhere."""


class Tiny(Method):
    """One hidden layer; loss ``ce``, a logged loss of weight zero, and a parameter that no loss reaches."""

    Settings = TinySettings
    evaluation_metrics = ("top1", "loss")

    def __init__(self, settings: TinySettings) -> None:
        super().__init__(settings, task=Task(num_classes=NUM_CLASSES), model=None, inputs={})
        norm = nn.BatchNorm1d(settings.hidden) if settings.batch_norm else nn.Identity()
        self.network = nn.Sequential(
            nn.Flatten(), nn.Linear(48, settings.hidden), norm, nn.ReLU(), nn.Dropout(settings.dropout),
            nn.Linear(settings.hidden, NUM_CLASSES),
        )  # fmt: skip
        self.unused = nn.Parameter(torch.ones(2))
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)

    def forward(self, batch: Batch) -> Step:
        logits = self.network(batch.images)
        ce = F.cross_entropy(logits.float() if logits.dtype != torch.float64 else logits, batch.labels)
        if self.settings.poison is not None:
            ce = self.settings.poison(batch, ce)
        accuracy = (logits.argmax(1) == batch.labels).float().mean() * 100
        return Step(
            losses={"ce": Loss(ce), "norm": Loss(logits.detach().norm(), 0.0)}, metrics={"top1": accuracy}
        )

    def statistics(self, batch: Batch) -> dict[str, Tensor]:
        logits = self.network(batch.images)
        return {
            "count": torch.tensor(len(batch.labels)),
            "top1": 100 * (logits.argmax(1) == batch.labels).sum(),
            "loss": F.cross_entropy(logits, batch.labels, reduction="sum"),
        }

    def artifact(self) -> nn.Module:
        return self.network

    @classmethod
    def emit(cls, source: Source) -> Teacher:
        raise NotImplementedError


def make_method(dtype: torch.dtype = torch.float32, **settings: Any) -> Tiny:
    """The same initial weights at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return Tiny(TinySettings(**settings)).to(dtype)


def make_stream(
    num_samples: int = 22,
    batch_size: int = 8,
    *,
    shuffle: bool = True,
    rank: int = 0,
    num_workers: int = 1,
    seed: int = 3,
) -> Stream:
    """Random images whose brightness tells the class a little."""
    random = np.random.default_rng(seed)
    labels = random.integers(NUM_CLASSES, size=num_samples).astype(np.int64)
    pixels = random.integers(0, 120, size=(num_samples, 3, 4, 4)) + 60 * labels[:, None, None, None]
    return Stream(
        Images(pixels.astype(np.uint8), labels),
        indices=np.arange(num_samples),
        batch_size=batch_size,
        seed=11,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        augment=Augment(pad=1, flip=True) if shuffle else None,
        shuffle=shuffle,
        device=CPU,
        rank=rank,
        num_workers=num_workers,
    )


class DoubleStream:
    """A stream whose images are float64, so that sums in another order agree closely."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.batch_size, self.num_batches, self.num_samples = (
            stream.batch_size,
            stream.num_batches,
            stream.num_samples,
        )

    def batches(self, epoch: int, start: int = 0) -> Any:
        for batch in self.stream.batches(epoch, start):
            yield batch._replace(images=batch.images.double())


class MemorySlot:
    """Keeps the latest checkpoint as bytes, as a store would, and may die right after the n-th one."""

    lag_seconds = 0.0

    def __init__(self, die_after: int | None = None) -> None:
        self.die_after = die_after
        self.files: dict[str, bytes] | None = None
        self.num_saves = 0

    def load(self) -> Mapping[str, Any] | None:
        return None if self.files is None else from_bytes(self.files)

    def save(self, tree: Mapping[str, Any]) -> None:
        self.files = to_bytes(tree)
        self.num_saves += 1
        if self.num_saves == self.die_after:
            raise Killed


def without_time(history: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{name: value for name, value in row.items() if name != "time"} for row in copy.deepcopy(history)]


def assert_same_bits(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def run(
    method: Tiny | None = None, *, validate: bool = True, training: Any = None, **arguments: Any
) -> Training:
    """Train with short settings; what is not an argument of ``train`` is a setting."""
    names = ("checkpoints", "observe", "checkpoint_seconds", "clock", "seed")
    own = {name: arguments.pop(name) for name in names if name in arguments}
    settings = TrainSettings(**{"epochs": 3, "batch_size": 8, **arguments})
    return train(
        make_method() if method is None else method,
        settings=settings,
        training=make_stream(batch_size=settings.batch_size) if training is None else training,
        validation=make_stream(13, shuffle=False, seed=5) if validate else None,
        device=CPU,
        **{"seed": 1, **own},
    )
