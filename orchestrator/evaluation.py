"""Metrics of a method over a whole split: exact sums, whoever saw which row."""

from __future__ import annotations

import torch
from torch import Tensor

from methods.base import AnyBatch, Method
from orchestrator.training import BatchStream
from orchestrator.workers import SOLO, Workers

__all__ = ["Evaluation", "evaluate"]


class Evaluation:
    """Sums under way. The method is in evaluation mode until ``metrics`` is called."""

    def __init__(self, method: Method, *, device: torch.device, workers: Workers = SOLO) -> None:
        self._method, self._workers = method, workers
        self._was_training = method.training
        self._totals: dict[str, Tensor] = {}
        method.to(device).eval()

    @torch.no_grad()
    def add(self, batch: AnyBatch) -> None:
        """Add this worker's share of one batch."""
        totals = self._totals
        for name, value in self._method.statistics(batch).items():
            totals[name] = totals[name] + value.double() if name in totals else value.double()

    @torch.no_grad()
    def metrics(self) -> dict[str, float]:
        """The metrics of all batches of all workers."""
        self._method.train(self._was_training)
        return self._method.summarise(self._workers.all_reduce_sum(self._totals))


def evaluate(
    method: Method, stream: BatchStream, *, device: torch.device, workers: Workers = SOLO
) -> dict[str, float]:
    """Metrics of ``method`` over the whole ``stream``, in evaluation mode."""
    evaluation = Evaluation(method, device=device, workers=workers)
    for batch in stream.batches(0):
        evaluation.add(batch)
    return evaluation.metrics()
