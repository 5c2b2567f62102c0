"""Which workers each stage asks for, and what the trial that runs a stage holds itself. Pure.

A trial never holds CPUs or GPUs that its own workers need. Where all stages that it lacks want the same single
worker, the trial's process is that worker and holds its resources. Otherwise the trial holds a token, and each of
its stages asks for its own workers when its turn comes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Literal

__all__ = ["TOKEN", "Placement", "StageWorkers", "WorkerSettings", "held_by_trial", "most_at_a_time"]

Placement = Literal["pack", "spread"]

TOKEN: Mapping[str, float] = {"memory": float(2**20)}
"""What a trial holds that leaves the work to workers of its own.

Tune refuses a trial that asks for nothing, and any fraction of a CPU could be the one that the workers lack.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerSettings:
    """The workers of one stage, overrides applied. Each field as in ``RunSettings``."""

    workers: int = 1
    cpus_per_worker: int = 1
    gpus_per_worker: float = 0.0
    placement: Placement = "pack"
    min_workers: int | None = None

    def __post_init__(self) -> None:
        for name in ("workers", "cpus_per_worker"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.gpus_per_worker < math.inf:
            raise ValueError(f"gpus_per_worker must be finite and not negative, got {self.gpus_per_worker}")
        if self.min_workers is not None and not 1 <= self.min_workers <= self.workers:
            raise ValueError(
                f"min_workers must lie between 1 and workers ({self.workers}), got {self.min_workers}"
            )

    @property
    def is_alone(self) -> bool:
        """Whether the stage is trained by one process, without a group of workers."""
        return self.workers == 1

    @property
    def is_elastic(self) -> bool:
        """Whether the number of workers may change while the stage trains."""
        return self.least_workers < self.workers

    @property
    def num_workers(self) -> int | tuple[int, int]:
        """How many workers there are: a number, or the least and the most of an elastic group."""
        return (self.least_workers, self.workers) if self.is_elastic else self.workers

    @property
    def least_workers(self) -> int:
        """How many workers the stage needs to begin."""
        return self.workers if self.min_workers is None else self.min_workers

    @property
    def resources(self) -> dict[str, float]:
        """What each worker holds, in Ray's names."""
        resources = {"CPU": float(self.cpus_per_worker)}
        return {**resources, "GPU": float(self.gpus_per_worker)} if self.gpus_per_worker else resources

    @property
    def least_resources(self) -> dict[str, float]:
        """What all workers hold together when there are as few as possible."""
        return {kind: amount * self.least_workers for kind, amount in self.resources.items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class StageWorkers:
    """What one stage wants otherwise than ``run`` says. What is not given stays as it is there."""

    workers: int | None = None
    """Workers of this stage. Where they are given, ``min_workers`` of ``run`` does not count for it."""
    cpus_per_worker: int | None = None
    """CPU cores of each of its workers."""
    gpus_per_worker: float | None = None
    """GPUs of each of its workers."""
    placement: Placement | None = None
    """Whether its workers lie close together or on different hosts."""
    min_workers: int | None = None
    """With how few workers it goes on."""

    def over(self, common: WorkerSettings) -> WorkerSettings:
        """These settings laid over those of all stages. ValueError where the two do not fit each other."""
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        given = {name: value for name, value in own.items() if value is not None}
        inherited = {field.name: getattr(common, field.name) for field in fields(common)}
        if self.workers is not None:
            inherited["min_workers"] = None
        return WorkerSettings(**{**inherited, **given})


def held_by_trial(stages: Iterable[WorkerSettings]) -> dict[str, float]:
    """What a trial holds that lacks ``stages``, in Ray's names: the resources of its one worker, or a token."""
    wanted = list(stages)
    alike = all(workers.resources == wanted[0].resources for workers in wanted)
    if not wanted or not alike or not all(workers.is_alone for workers in wanted):
        return dict(TOKEN)
    return wanted[0].resources


def most_at_a_time(stages: Iterable[WorkerSettings], cluster: Mapping[str, float]) -> int:
    """How many trials have work at a time on ``cluster``: as many as it has room for the smallest stage; 0 for none."""
    return max((_num_fitting(workers.least_resources, cluster) for workers in stages), default=0)


def _num_fitting(needs: Mapping[str, float], cluster: Mapping[str, float]) -> int:
    return min(int(cluster.get(kind, 0.0) / need + 1e-9) for kind, need in needs.items())
