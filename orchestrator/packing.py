"""Which trials may train side by side in one process, and how many. Pure.

Two stages may share a process when they ask for the same batches in the same order: the same method, data section,
batch size and seed, since order and augmentation follow from these. What a trial may differ in is everything else: the
method's settings, learning rate, length, even the network. It is worth while where they also share the frozen network
that they learn from, whatever heads, branches or noise each of them has on it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from orchestrator.keys import content_key
from orchestrator.placement import TOKEN, held_by_trial
from orchestrator.plan import PlannedStage, Trial
from orchestrator.spec import ExperimentSpec

__all__ = ["PackPolicy", "pack_signature", "stream_signature"]

MOST_TOGETHER = 8
"""Members of a pack under ``auto``: beyond that, the share of the teacher's pass that is left to save is small."""
USABLE_MEMORY = 0.8
"""Under ``auto``, the part of its memory that a pack is to fill at most, going by what its members took alone."""
LEAST_SECONDS = 30.0
"""Under ``auto``, stages shorter than this are not packed: each follower costs a process of its own."""


def stream_signature(stage: PlannedStage) -> str:
    """Equal for stages that train on the same batches in the same order."""
    return content_key({
        "method": stage.spec.method,
        "data": stage.content["data"],
        "seed": stage.seed,
        "batch_size": stage.spec.train.batch_size,
    })  # fmt: skip


def pack_signature(trial: Trial, stored: Callable[[str], bool]) -> str | None:
    """Equal for trials that may make a pack. None where the last stage learns from no network that could be shared, and
    where networks are compiled: each for its own stage.

    What they still lack are stages of the same names, each either the same one or on the same batches.
    """
    stages = {stage.key: stage for stage in trial.stages}
    if not trial.final.inputs or any(
        stage.spec.train.compile for stage in trial.stages if not stored(stage.key)
    ):
        return None
    networks = {role: _network(key, stages) for role, key in trial.final.inputs.items()}
    levels = [
        [stage.name, "" if stored(stage.key) else stream_signature(stage) if stage.inputs else stage.key]
        for stage in trial.stages
    ]
    return content_key({"networks": networks, "levels": levels})


def _network(key: str, stages: Mapping[str, PlannedStage]) -> str:
    """Key of the stage whose network the artifact ``key`` emits."""
    stage = stages[key]
    if stage.spec.model is not None or "teacher" not in stage.inputs:
        return key
    return _network(stage.inputs["teacher"], stages)


@dataclass(frozen=True, kw_only=True)
class PackPolicy:
    """How many trials make a pack: ``run.pack``, as far as the experiment allows it."""

    size: int | Literal["auto"]
    """At most so many; 1 turns packing off."""
    seconds: Callable[[PlannedStage], float | None] = lambda stage: None
    """What a stage of this kind has taken so far; None if that is not known yet."""
    memory_share: Callable[[PlannedStage], float | None] = lambda stage: None
    """Which part of its process's memory a stage of this kind has taken so far; None if that is not known."""
    records: bool = False
    """Whether what teaches is recorded where it can be: under ``auto`` there is no pass left to share then."""

    @classmethod
    def of(
        cls,
        spec: ExperimentSpec,
        seconds: Callable[[PlannedStage], float | None],
        memory_share: Callable[[PlannedStage], float | None] = lambda stage: None,
    ) -> PackPolicy:
        """That of an experiment. Where stages are trained by groups, or hold different things, nothing is packed.

        Nor where students are to learn from compressed signals: a pack learns from its teacher itself.
        """
        held = held_by_trial(spec.workers(spec.stage_names))
        is_alone = held == TOKEN or bool(spec.run.signal_format.content())
        size = 1 if is_alone else spec.run.pack_size
        return cls(size=size, seconds=seconds, memory_share=memory_share, records=spec.run.signals != "live")

    @property
    def is_off(self) -> bool:
        return self.size == 1

    def most(self, trial: Trial, num_ready: int, num_free_slots: int) -> int:
        """Members of a pack that ``trial`` leads, when so many trials are ready that could join, itself included.

        As many as leave no free slot without work. Under ``auto`` a pack waits until one stage of its kind has been
        measured, and takes no more members than fit into the memory by that measure.
        """
        if self.size != "auto":
            return min(self.size, num_ready)
        if self.records and trial.final.signals:
            return 1
        seconds = self.seconds(trial.final)
        if seconds is None or seconds < LEAST_SECONDS:
            return 1
        return min(self._num_fitting(trial), math.ceil(num_ready / max(1, num_free_slots)))

    def _num_fitting(self, trial: Trial) -> int:
        """Members that fit side by side. Each is counted as large as alone, the network that they share included."""
        share = self.memory_share(trial.final)
        return MOST_TOGETHER if not share else max(1, min(MOST_TOGETHER, int(USABLE_MEMORY / share)))
