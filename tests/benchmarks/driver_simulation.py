"""The driver of a real sweep whose stages take no time: everything but Ray's processes and the training itself.

Planner, dispatcher, searcher, trial runner, leases, artifacts, journal, monitor, account and report are the product's
own, on a real local store. Only what would train puts a tiny artifact into the store at once, and what would send to
MLflow counts the records instead. Prints one JSON line when it is run as a script; ``many_trials`` does.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

import orchestrator.sweep as sweep_module
from orchestrator import Experiment
from orchestrator.capacity import WaitState
from orchestrator.journal import Record
from orchestrator.loop import Row
from orchestrator.mirror import Failure, Follower
from orchestrator.monitor import Monitor
from orchestrator.plan import PlannedStage
from orchestrator.ray_search import OBJECTIVE, OUTCOME, ROW, DispatchSearcher, Recovery
from orchestrator.retry import Attempts
from orchestrator.settings import to_plain
from orchestrator.store import Store
from orchestrator.sweep import Sweep
from orchestrator.tracking_state import MirrorState
from orchestrator.trial import TrialRunner

NUM_SLOTS = 8
NUM_EPOCHS = 3
WEIGHTS = save({"weight": torch.zeros(250)})
STUDENTS_PER_TEACHER = 100
"""Each of so many students learns from its own margin; a hundred of them share a teacher."""


@dataclass(frozen=True, kw_only=True)
class Simulated:
    """What a simulated sweep of so many trials took in this process."""

    num_trials: int
    num_executed: int
    """Stages that were run."""
    num_records: int
    """Journal records that the mirror was given."""
    plan_seconds: float
    """CPU time, like all that follow: what other work on the machine disturbs least."""
    drive_seconds: float
    """From the first trial to the last, less what the trials do in their own processes, with the mirror's thread."""
    trial_seconds: float
    """What the trials do around their training: leases, artifact, costs."""
    again_seconds: float
    """The same command again, in a new object: everything is recalled from the store, and the report written."""
    results_seconds: float
    """``stillhouse results``: the rows, the text table and the report with its pictures."""
    resident_bytes: int
    """Memory of this process after the run, less that before it."""
    peak_bytes: int


def document(num_trials: int, folder: Path, students: int = STUDENTS_PER_TEACHER) -> dict[str, Any]:
    """Teachers that differ in label smoothing, so many students of each that differ in temperature, one seed each."""
    students = min(num_trials, students)
    return {
        "name": "many",
        "data": {"dataset": "digits", "validation": 0.2},
        "stages": {
            "teacher": {"method": "supervised", "model": "tiny_cnn", "train": {"epochs": NUM_EPOCHS}},
            "student": {"method": "kd", "model": "tiny_mlp", "teacher": "$teacher", "train": {"epochs": NUM_EPOCHS}},
        },
        "search": {
            "space": {
                "teacher.label_smoothing": {"grid": [index / 1000 for index in range(num_trials // students)]},
                "student.temperature": {"grid": [1 + index / 100 for index in range(students)]},
            },
            "objective": {"maximize": "student.top1"},
        },
        "run": {"storage": str(folder / "runs")},
    }  # fmt: skip


@dataclass(frozen=True)
class StubStage:
    """In place of training: a few rows and a tiny artifact, as quickly as the store takes them."""

    store: Store
    executed: list[str]
    """Keys of the stages that were run, in order."""

    def __call__(self, stage: PlannedStage, report: Callable[[Row], bool | None]) -> None:
        self.executed.append(stage.key)
        value = int(stage.key[:6], 16) / 16**6 * 100
        rows = [{"epoch": float(epoch), "top1": value * epoch / NUM_EPOCHS, "loss": 1.0, "time": time.time()} for epoch in range(1, NUM_EPOCHS + 1)]  # fmt: skip
        for row in rows:
            report(row)
        files = {"weights.safetensors": WEIGHTS, "history.json": json.dumps(rows).encode()}
        self.store.put(stage.key, files, stub_manifest(stage, value))


def stub_manifest(stage: PlannedStage, value: float) -> dict[str, Any]:
    """As large as that of a real stage."""
    return {
        "name": stage.name, "content": dict(stage.content), "settings": to_plain(stage.spec.settings),
        "task": {"num_classes": 10, "in_channels": 1, "image_size": 8}, "normalisation": {"mean": [0.5], "std": [0.25]},
        "class_names": list("0123456789"), "model": to_plain(stage.spec.model), "train": to_plain(stage.spec.train), "dataset": stage.data.dataset,
        "seed": stage.seed, "inputs": dict(stage.inputs), "signature": stage.signature, "epochs": stage.epochs,
        "metrics": {"top1": value, "loss": 1.0, "test_top1": value - 1, "test_loss": 1.1, "best_top1": value,
                    "best_epoch": float(NUM_EPOCHS), "num_parameters": 1e4, "macs": 1e6, "latency_ms": 1.0, "seconds": 1.0},
        "cost": {"seconds": 1.0, "cpu_seconds": 1.0, "held_cpu_seconds": 1.0, "gpu_seconds": 0.0,
                 "peak_memory_bytes": 1e8, "resumed_epochs": 0},
        "placement": {"host": "here", "device": "cpu", "workers": 1, "batch_per_worker": 64, "accumulate": 1, "batch_scale": 1},
        "versions": {"torch": "2", "ray": "2", "numpy": "2"},
        "finished": time.time(),
    }  # fmt: skip


class CountingTarget:
    """In place of MLflow: takes everything, and remembers the runs as MLflow's mirror does."""

    def __init__(self, state: MirrorState) -> None:
        self._state = state
        self.num_records = 0

    def send(self, group: Sequence[Record]) -> None:
        self.num_records += len(group)
        if group[0]["op"] == "run":
            self._state.runs[group[0]["id"]] = f"{len(self._state.runs):032x}"

    def settle(self) -> None: ...

    def alive(self) -> bool:
        return True

    def classify(self, problem: Exception) -> Failure:
        return Failure.REJECTED


class CountingMirror:
    """The product's follower of the journal, with that target."""

    num_records = 0

    def __init__(self, journal_path: Path, tracking_uri: str, experiment: str) -> None:
        self._follower = Follower(journal_path, experiment, self._connect)

    def _connect(self, state: MirrorState) -> CountingTarget:
        self._target = CountingTarget(state)
        return self._target

    def check(self) -> None:
        return None

    def start(self) -> None:
        self._follower.start()

    def close(self, timeout_seconds: float) -> int:
        left = self._follower.close(timeout_seconds)
        CountingMirror.num_records += self._target.num_records
        return left


class RoomForAll:
    """Always as many slots."""

    def look(self, working: bool = False) -> WaitState:
        return WaitState(slots=NUM_SLOTS)


class SimulatedSweep(Sweep):
    """A sweep that asks no cluster."""

    trial_seconds = drive_seconds = 0.0
    executed: list[str]

    def _room(self, display: Any) -> Any:
        return RoomForAll()

    def _run_on_ray(self, run: Any, monitor: Monitor, run_id: str, room: Any) -> None:
        self.executed = []
        runner = TrialRunner(
            self.store, StubStage(self.store, self.executed), self.spec.search.objectives, run_id
        )
        recovery = Recovery(
            attempts=Attempts(0), room=room.look, lighten=lambda *_: False, stop_follower=lambda *_: None
        )
        started = time.process_time()
        self.trial_seconds = drive(DispatchSearcher(self.spec, run.dispatcher, monitor, recovery), runner)
        self.drive_seconds = time.process_time() - started - self.trial_seconds


def drive(searcher: DispatchSearcher, runner: TrialRunner) -> float:
    """What Tune's loop does: fill the slots, let the oldest trial run to its end, look around after every event.

    Gives the CPU seconds that the trials took, which would be spent in their own processes.
    """
    running: deque[str] = deque()
    number, trial_seconds = 0, 0.0
    while True:
        while len(running) < NUM_SLOTS:
            suggestion = searcher.suggest(str(number))
            if not isinstance(suggestion, dict):
                break
            searcher.placed(str(number))
            running.append(str(number))
            number += 1
        if not running:
            if suggestion is None:
                raise RuntimeError("nothing runs, and nothing can start")
            return trial_seconds
        trial_seconds += walk(searcher, runner, running.popleft())
        searcher.look_around()


def walk(searcher: DispatchSearcher, runner: TrialRunner, trial_id: str) -> float:
    """One trial, in this process, with the reports that Tune would pass on afterwards. Gives the trial's own seconds."""
    rows: list[Row] = []
    started = time.thread_time()
    outcome = runner.run(searcher._trials[trial_id], rows.append)
    seconds = time.thread_time() - started
    assert outcome.status == "done", outcome.reason
    for row in rows[:-1]:
        searcher.on_trial_result(
            trial_id, {ROW: json.dumps(row), OBJECTIVE: row["top1"], "epoch": row["epoch"]}
        )
    searcher._listener.tick()
    searcher.on_trial_complete(trial_id, {OUTCOME: json.dumps(asdict(outcome))})
    return seconds


def new_sweep(num_trials: int, folder: Path, students: int = STUDENTS_PER_TEACHER) -> SimulatedSweep:
    return SimulatedSweep(Experiment(**document(num_trials, folder, students))._sweep.spec)


def simulate(num_trials: int, folder: Path) -> Simulated:
    """Plan, run, run again and report a sweep of so many trials below ``folder``."""
    sweep_module.Mirror = CountingMirror  # type: ignore[assignment, misc]
    new_sweep(1, folder).facts  # noqa: B018 - the data set's fingerprint, and the imports it needs
    before = resident_bytes()
    sweep = new_sweep(num_trials, folder)
    seconds = {}
    with timed(seconds, "plan"):
        print(sweep.plan(), flush=True)
    result = sweep.run(quiet=True)
    resident = resident_bytes() - before
    if sum(row.status == "done" for row in result.rows) != num_trials:
        raise RuntimeError(
            f"not every trial is done: {[row.reason for row in result.rows if row.reason][:3]}"
        )
    ran, sweep = sweep, new_sweep(num_trials, folder)
    with timed(seconds, "again"):
        sweep.run(quiet=True)
    with timed(seconds, "results"):
        found = new_sweep(num_trials, folder).result()
        print(found.text(140))
        found.write()
    return Simulated(
        num_trials=num_trials, num_executed=len(ran.executed), num_records=CountingMirror.num_records,
        plan_seconds=seconds["plan"], drive_seconds=ran.drive_seconds, trial_seconds=ran.trial_seconds,
        again_seconds=seconds["again"], results_seconds=seconds["results"], resident_bytes=resident,
        peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )  # fmt: skip


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Note the CPU time of a block."""
    started = time.process_time()
    yield
    seconds[name] = time.process_time() - started


def resident_bytes() -> int:
    """What this process holds in memory now."""
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description="one simulated sweep")
    parser.add_argument("num_trials", type=int)
    parser.add_argument("--folder", default=None, help="where the store is made, below it")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="many-", dir=options.folder) as folder:
        print(json.dumps(asdict(simulate(options.num_trials, Path(folder)))))


if __name__ == "__main__":
    main()
