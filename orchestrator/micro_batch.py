"""Stages that ran out of memory: what is known about it, and the smaller micro-batches they are tried with next.

The global batch stays what it is; ``train.accumulate`` is doubled as long as ``train.min_micro_batch`` allows. What
was found is kept in the store, so that a process which is killed for its memory, and any later run of the sweep,
goes on with what worked; the manifest shows the number of micro-batches that was used.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

from orchestrator.plan import PlannedStage
from orchestrator.store import Store

__all__ = ["MicroBatches", "lighter", "memory_path"]


def lighter(stage: PlannedStage) -> PlannedStage | None:
    """``stage`` with twice as many micro-batches, under the same key; None where that is not allowed."""
    train = stage.spec.train
    accumulate = 2 * train.accumulate
    if not train.min_micro_batch or train.batch_size // accumulate < train.min_micro_batch:
        return None
    return _with_accumulate(stage, accumulate)


def _with_accumulate(stage: PlannedStage, accumulate: int) -> PlannedStage:
    return replace(stage, spec=replace(stage.spec, train=replace(stage.spec.train, accumulate=accumulate)))


def memory_path(key: str) -> str:
    """The document that says how a stage ran out of memory."""
    return f"memory/{key}.json"


@dataclass(frozen=True)
class MicroBatches:
    """What the store knows about stages that ran out of memory."""

    store: Store

    def adapted(self, stage: PlannedStage) -> PlannedStage:
        """``stage`` with as many micro-batches as earlier attempts have shown to be needed."""
        if not stage.spec.train.min_micro_batch:
            return stage
        known = self.store.read_json(memory_path(stage.key))
        return _with_accumulate(stage, known["accumulate"]) if known else stage

    def shrink(self, stage: PlannedStage, reason: str, **measured: Any) -> PlannedStage | None:
        """Note that ``stage`` ran out of memory. Gives what may be tried next, None when nothing smaller is allowed.

        Args:
            measured: What is known of the moment: ``device``, ``peak_memory_bytes``.
        """
        next_stage = lighter(stage)
        if next_stage is None:
            return None
        path = memory_path(stage.key)
        known = self.store.read_json(path) or {"name": stage.name, "events": []}
        event = {"accumulate": stage.spec.train.accumulate, "reason": reason, "at": time.time(), **measured}
        record = {
            **known,
            "accumulate": next_stage.spec.train.accumulate,
            "events": [*known["events"], event],
        }
        self.store.write_json(path, record)
        return next_stage
