"""What our sweep costs beyond plain Ray Tune: time of a sweep of short trials, and driver memory per trial.

Every sweep runs in a fresh process with a Ray of its own, so that imports and Ray's start count alike.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

CHILD = Path(__file__).with_name("sweep_child.py")
TIMEOUT_SECONDS = 600.0


@dataclass(frozen=True, kw_only=True)
class System:
    """One way to run the trials."""

    title: str
    arguments: tuple[str, ...]


OURS = System(title="Stillhouse", arguments=("ours",))
PLAIN = (
    System(title="Tune, function that sleeps, actors reused", arguments=("sleep",)),
    System(title="Tune, function that sleeps, as by default", arguments=("sleep", "--fresh-actors")),
    System(title="Tune, function that sleeps and trains, actors reused", arguments=("train",)),
)


@dataclass(frozen=True, kw_only=True)
class SweepRun:
    """One finished process."""

    seconds: float
    """From the start of the process to its end: what somebody waits who types the command."""
    ray_seconds: float
    """Of these, inside ``ray.init``."""
    before_ray_seconds: float
    """Of these, imports, and reading and planning the experiment."""
    body_seconds: float
    """Sum over the trials of what they were asked to do."""
    cpu_seconds: float
    """CPU time of the driver."""
    resident_bytes: int
    """Memory of the driver at its end."""
    peak_bytes: int

    @property
    def seconds_without_ray(self) -> float:
        return self.seconds - self.ray_seconds


def run_sweep(system: System, *, num_trials: int, trial_seconds: float) -> SweepRun:
    """Start the process and wait for it. Raises RuntimeError with its last words when it fails."""
    with tempfile.TemporaryDirectory(prefix="ovh-") as folder:  # short: Ray's sockets lie below it
        own = {"RAY_TMPDIR": folder, "OMP_NUM_THREADS": "1"}
        environment = {name: text for name, text in os.environ.items() if name != "RAY_ADDRESS"} | own
        command = [sys.executable, str(CHILD), *system.arguments]
        command += ["--trials", str(num_trials), "--trial-seconds", str(trial_seconds)]
        started = time.perf_counter()
        ended = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False
        )
        seconds = time.perf_counter() - started
    if ended.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with {ended.returncode}: {ended.stderr[-2000:]}")
    told = json.loads(ended.stdout.strip().splitlines()[-1])
    return SweepRun(**(told | {"seconds": seconds}))


@dataclass(frozen=True, kw_only=True)
class SweepCost:
    """One system and its runs, in turns with the others."""

    system: System
    runs: list[SweepRun] = field(default_factory=list)

    def median(self, name: str) -> float:
        """Median over the runs of an attribute of ``SweepRun``."""
        return median(float(getattr(run, name)) for run in self.runs)


def measure_time(num_trials: int, trial_seconds: float, num_rounds: int) -> list[SweepCost]:
    """Ours and every plain system in turns, ``num_rounds`` times; ours first in the list."""
    costs = [SweepCost(system=system) for system in (OURS, *PLAIN)]
    for _ in range(num_rounds):
        for cost in costs:
            cost.runs.append(run_sweep(cost.system, num_trials=num_trials, trial_seconds=trial_seconds))
    return costs


def ratio(ours: SweepCost, other: SweepCost, name: str) -> float:
    """Median over the rounds of ours over other."""
    pairs = zip(ours.runs, other.runs, strict=True)
    return median(float(getattr(mine, name)) / float(getattr(theirs, name)) for mine, theirs in pairs)


@dataclass(frozen=True, kw_only=True)
class MemoryCost:
    """Resident memory of the driver after sweeps of two sizes."""

    system: System
    few_bytes: int
    many_bytes: int
    num_more: int

    @property
    def kilobytes_per_trial(self) -> float:
        return (self.many_bytes - self.few_bytes) / self.num_more / 1000


def measure_memory(num_few: int, num_many: int, num_rounds: int) -> list[MemoryCost]:
    """Medians over the rounds, for ours and for plain Tune with reused actors."""
    costs = []
    for system in (OURS, PLAIN[0]):
        few, many = [], []
        for _ in range(num_rounds):
            few.append(run_sweep(system, num_trials=num_few, trial_seconds=0.0).resident_bytes)
            many.append(run_sweep(system, num_trials=num_many, trial_seconds=0.0).resident_bytes)
        costs.append(
            MemoryCost(
                system=system,
                few_bytes=int(median(few)),
                many_bytes=int(median(many)),
                num_more=num_many - num_few,
            )
        )
    return costs
