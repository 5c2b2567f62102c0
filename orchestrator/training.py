"""What the training loop takes and gives: streams of batches, a slot for checkpoints, rows, and the result."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from methods.base import AnyBatch, Method
from orchestrator.errors import StillhouseError

__all__ = [
    "BatchStream",
    "CheckpointSlot",
    "Clock",
    "Observer",
    "Row",
    "StopTraining",
    "Training",
    "checkpoint_interval",
    "untrained",
]

Row = dict[str, float]
"""Numbers of one finished epoch: ``epoch`` (from 1), ``time``, ``learning_rate``, ``train_*`` and validation."""
Observer = Callable[[Row], bool | None]
"""Sees finished epochs; True stops the run."""
Clock = Callable[[], float]
"""Seconds that only grow."""


class StopTraining(StillhouseError):  # noqa: N818 - a decision, not an error
    """The observer asked to stop after an epoch. A checkpoint of that epoch is in the slot."""


class BatchStream(Protocol):
    """This worker's share of each batch. ``batch_size`` and ``num_samples`` count over all workers."""

    batch_size: int
    num_batches: int

    @property
    def num_samples(self) -> int: ...

    def batches(self, epoch: int, start: int = 0) -> Iterator[AnyBatch]:
        """Batches of ``epoch`` (from 0), from batch number ``start`` on: the same whenever they are asked for."""
        ...


class CheckpointSlot(Protocol):
    """Where the latest state of a run is kept: a tree of dicts, lists, tuples, numbers, text, None and tensors."""

    def load(self) -> Mapping[str, Any] | None:
        """The tree saved last, or None. Called once by every worker."""
        ...

    @property
    def lag_seconds(self) -> float:
        """How long after ``save`` has returned a tree may still get lost; 0 where ``save`` waits until it is kept."""
        ...

    def save(self, tree: Mapping[str, Any]) -> None:
        """Keep ``tree`` as the latest. Called by worker 0. The tensors are live: read them before returning."""
        ...


def checkpoint_interval(slot: CheckpointSlot | None, checkpoint_seconds: float) -> float:
    """Seconds from one ``save`` to the next, so that a tree is kept, not only begun, every ``checkpoint_seconds``.

    A slot that lags behind by more than half of that is not asked more often still. Without a slot, infinity.
    """
    if slot is None:
        return math.inf
    return max(checkpoint_seconds - slot.lag_seconds, checkpoint_seconds / 2)


@dataclass(frozen=True, kw_only=True)
class Training:
    """What a finished training leaves."""

    history: list[Row]
    """One row per epoch, those before an interruption included."""
    weights: dict[str, Tensor]
    """State of ``method.artifact()`` that is kept, on the CPU."""
    metrics: dict[str, float]
    """Metrics of the kept epoch."""
    seconds: float
    """Wall time, that of earlier attempts up to their last checkpoint included."""
    worker_seconds: float
    """Wall time times the number of workers, counted alike."""
    cpu_seconds: float
    """CPU time used by all workers' processes, counted alike."""
    peak_memory_bytes: int
    """Peak memory allocated on the GPU, or peak resident size of the whole process on the CPU."""
    resumed_epochs: int
    """Epochs that came from a checkpoint and were not trained now."""


def untrained(method: Method, metrics: Mapping[str, float]) -> Training:
    """What a method that learns nothing leaves: its state as it is, with these metrics."""
    return Training(
        history=[],
        weights={
            name: tensor.detach().cpu().clone() for name, tensor in method.artifact().state_dict().items()
        },
        metrics=dict(metrics),
        seconds=0.0,
        cpu_seconds=0.0,
        worker_seconds=0.0,
        peak_memory_bytes=0,
        resumed_epochs=0,
    )
