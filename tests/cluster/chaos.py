"""Break a sweep on a real cluster, again and again, at moments drawn from seeds; then look at what it came to.

A fault is drawn from its own seed: the moment, and which of the possible victims. It strikes when a stage is really
being trained and has shown an epoch and a checkpoint since the fault before, so each one finds work to destroy.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from chaos_cluster import HEAD, NODES, Cluster, Process
from chaos_watch import Attempt, Watch, histories, now

Kind = Literal["worker", "trial", "node", "tracking", "driver", "head"]
Phase = Literal["group", "single"]

NAME = "chaos"
GROUP_STAGES = ("teacher", "views")
NUM_STAGES = 24
CHECKPOINT_SECONDS = 0.5
LEASE_SECONDS = 8.0
TEACHER = """\
name: {name}
data: {{dataset: digits, validation: 0.2}}
stages:
  teacher: {{method: supervised, model: tiny_mlp, train: {{epochs: 120}}}}
"""
RUN = """\
run:
  storage: {storage}
  tracking: "{tracking}"
  checkpoint_seconds: {checkpoint_seconds}
  lease_seconds: {lease_seconds:g}
  max_failures: 10
  stages:
    teacher: {{workers: 2, placement: spread}}
"""
EXPERIMENT = (
    TEACHER
    + """\
  views: {{method: angular_views, teacher: $teacher, num_branches: 2, train: {{epochs: 50}}}}
  student: {{method: angular_kd, model: tiny_mlp, teacher: $views, train: {{epochs: 40}}}}
baselines:
  kd: {{student: {{method: kd, teacher: $teacher}}}}
search:
  space: {{student.kd_weight: {{grid: [0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0]}}}}
  objective: {{maximize: student.top1}}
  seeds: 2
"""
    + RUN
    + """\
    views: {{workers: 2, placement: spread}}
"""
)
"""A teacher and its views on two hosts, twenty students on one worker each and two baselines: 24 stages."""
BASELINE = (
    TEACHER
    + """\
  student: {{method: kd, model: tiny_mlp, teacher: $teacher, train: {{epochs: 40}}}}
search: {{objective: {{maximize: student.top1}}}}
"""
    + RUN
)
"""Two of these stages: the teacher on two hosts and a student."""

TITLES = {"worker": ("ray::RayTrainWorker", "ray::_train_alone"), "trial": ("ray::ImplicitFunc",)}
SLACK_SECONDS = 1.5
LOST_NODE_SECONDS = 15.0
STEPS_PER_EPOCH = 18
LATE_SECONDS = 2.5
"""After this long, epochs that have ended are seen: a stage tells of them about once a second."""
FINISH_SECONDS = 900.0
WAIT_SECONDS = 300.0


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One thing that happens, at a moment and to a victim drawn from ``seed``."""

    kind: Kind
    phase: Phase
    """While a stage on two hosts is trained, or one on a single worker."""
    seed: int


@dataclass(kw_only=True)
class Injected:
    """What was done, and what was in work then."""

    fault: Fault
    second: float
    """Since the sweep began."""
    at: float
    victim: str
    attempts: tuple[Attempt, ...]

    def __str__(self) -> str:
        work = ", ".join(f"{item.name} {item.key[:8]} at epoch {item.epoch:g}" for item in self.attempts)
        return f"{self.second:6.1f} s  seed {self.fault.seed:<3} {self.fault.kind:8} {self.victim:40} during {work}"


@dataclass(frozen=True, kw_only=True)
class Loss:
    """What an injection cost a stage that was in work then."""

    injected: Injected
    attempt: Attempt
    seconds: float
    """Between the newest checkpoint and the fault: what had to be trained again, if the fault hit this stage."""
    allowed_seconds: float
    num_epochs: int
    """Finished epochs that were trained again."""
    lost_checkpoint: bool
    """Whether an epoch was trained again although a checkpoint held it."""


def make_faults(kinds: Sequence[tuple[Kind, Phase]], first_seed: int) -> list[Fault]:
    return [
        Fault(kind=kind, phase=phase, seed=first_seed + index) for index, (kind, phase) in enumerate(kinds)
    ]


def write_experiment(cluster: Cluster, name: str, template: str) -> tuple[Path, Path]:
    """An experiment file and the storage that it names; tracked by the cluster's server."""
    path, storage = cluster.folder / f"{name}.yaml", cluster.folder / name
    text = template.format(
        name=name, storage=storage, tracking=cluster.tracking_uri,
        checkpoint_seconds=CHECKPOINT_SECONDS, lease_seconds=LEASE_SECONDS,
    )  # fmt: skip
    path.write_text(text)
    return path, storage


@dataclass
class Sweep:
    """One sweep on the cluster, with whatever happens to it."""

    cluster: Cluster
    name: str
    template: str = EXPERIMENT
    injected: list[Injected] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.experiment, self.storage = write_experiment(self.cluster, self.name, self.template)
        self.watch = Watch(self.storage)
        self.began = now()
        self.recovered = now()
        """Since when the last fault is over."""
        self._driver: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """The command that a user would type, the first time and again."""
        self._driver = self.cluster.drive(self.experiment)

    def inject(self, fault: Fault) -> Injected:
        """Wait until something is trained that a fault can hit, strike, and bring back what an operator would."""
        generator = random.Random(fault.seed)
        moment = generator.uniform(0.0, 1.0)
        while True:
            self.wait_for_work(fault.phase)
            self.wait(moment)
            attempts = self.in_work(fault.phase)
            if attempts and (victim := self._strike(fault.kind, generator)):
                break
        at = now()
        self.injected.append(
            Injected(fault=fault, second=at - self.began, at=at, victim=victim, attempts=tuple(attempts))
        )
        print(self.injected[-1], flush=True)
        self._recover(fault.kind, generator)
        self.recovered = now()
        return self.injected[-1]

    def in_work(self, phase: Phase) -> list[Attempt]:
        """What is trained now and has shown life, and a checkpoint, since the last fault. Empty if not of this phase."""
        found = [
            attempt
            for attempt in self.watch.attempts(self.recovered)
            if attempt.row_times and attempt.saved_at > self.recovered
        ]
        fitting = [attempt for attempt in found if (attempt.name in GROUP_STAGES) == (phase == "group")]
        return found if fitting else []

    def wait_for_work(self, phase: Phase) -> None:
        deadline = time.monotonic() + WAIT_SECONDS
        while not self.in_work(phase):
            assert time.monotonic() < deadline, f"no stage in work after {WAIT_SECONDS} s: {self.said()}"
            self.wait(0.05)

    def wait_for_progress(self) -> None:
        """Until a stage on two hosts goes on."""
        self.recovered = now()
        self.wait_for_work("group")

    def num_epochs(self) -> int:
        """How many epochs all stages together have reported, those of finished ones included."""
        unfinished = sum(len(attempt.row_times) for attempt in self.watch.attempts())
        return unfinished + sum(map(len, histories(self.storage).values()))

    def wait(self, seconds: float) -> None:
        """Watch for a while. The sweep must not end in it."""
        deadline = time.monotonic() + seconds
        while True:
            assert self._driver is not None
            if self._driver.poll() is None:
                self._look()
            else:
                raise AssertionError(f"the sweep ended by itself, {self._driver.poll()}: {self.said()}")
            if time.monotonic() >= deadline:
                return
            time.sleep(min(0.1, seconds))

    def finish(self) -> int:
        """Watch the sweep to its end; returns the command's exit code."""
        assert self._driver is not None
        deadline = time.monotonic() + FINISH_SECONDS
        while self._driver.poll() is None:
            assert time.monotonic() < deadline, f"the sweep does not end: {self.said()}"
            self._look()
            time.sleep(0.1)
        self.watch.look()
        return self._driver.returncode

    def run_to_end(self) -> None:
        """Start unless that was done, and see the command succeed."""
        if self._driver is None:
            self.start()
        assert self.finish() == 0, self.said()

    def stop(self) -> None:
        """End what is left of it, after a broken promise."""
        if self._driver is not None and self._driver.poll() is None:
            os.kill(self.cluster.hosts[HEAD].pid_of(self._driver), signal.SIGKILL)

    def losses(self) -> list[Loss]:
        """What each injection cost each stage that it may have hit."""
        times = histories(self.storage)
        return [_loss(injected, attempt, times[attempt.key]) for injected in self.injected for attempt in injected.attempts]  # fmt: skip

    def _look(self) -> None:
        self.cluster.tend()
        driver = self._driver_pid()
        self.watch.look(driver)

    def _driver_pid(self) -> int | None:
        assert self._driver is not None
        return self.cluster.hosts[HEAD].pid_of(self._driver) if self._driver.poll() is None else None

    def _strike(self, kind: Kind, generator: random.Random) -> str:
        """Do it. Returns what was hit, or nothing when there is nothing of this kind just now."""
        cluster = self.cluster
        if kind in ("worker", "trial"):
            process = self._draw_process(kind, generator)
            if process is None:
                return ""
            os.kill(process.pid, signal.SIGKILL)
            return f"{process.title.split()[0]} on {process.host}"
        if kind == "driver":
            pid = self._driver_pid()
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            return f"stillhouse run on {HEAD}"
        host = {"node": generator.choice(NODES), "tracking": "tracking", "head": HEAD}[kind]
        cluster.hosts[host].kill()
        return f"host {host}"

    def _draw_process(self, kind: Kind, generator: random.Random) -> Process | None:
        found = [process for process in self.cluster.processes() if process.title.startswith(TITLES[kind])]
        return generator.choice(sorted(found, key=lambda process: (process.host, process.pid)), ) if found else None  # fmt: skip

    def _recover(self, kind: Kind, generator: random.Random) -> None:
        cluster = self.cluster
        if kind == "node":
            self.wait(generator.uniform(0.0, 2.0))
            for name in NODES:
                if not cluster.hosts[name].is_up:
                    cluster.hosts[name].boot()  # and ``tend`` lets it join
        if kind == "tracking":
            cluster.hosts["tracking"].boot()
            threading.Timer(generator.uniform(0.0, 4.0), cluster.start_tracking).start()
        if kind in ("driver", "head"):
            assert self._driver is not None
            self._driver.wait(120)
        if kind == "head":
            cluster.hosts[HEAD].boot()
            cluster.start_head()
            cluster.leave_lost_cluster()
        if kind in ("driver", "head"):
            self.start()

    def said(self) -> str:
        return self.experiment.with_suffix(".txt").read_text()[-6000:]


def _loss(injected: Injected, attempt: Attempt, history: Sequence[float]) -> Loss:
    """Compare what a stage had reached when the fault came with what became of it."""
    kept = set(history)
    again = [moment for moment in attempt.row_times if moment not in kept]
    ends = attempt.row_times
    longest = max((after - before for before, after in itertools.pairwise(ends)), default=0.0)
    return Loss(
        injected=injected,
        attempt=attempt,
        seconds=injected.at - attempt.saved_at,
        allowed_seconds=CHECKPOINT_SECONDS + 2 * longest + SLACK_SECONDS,
        num_epochs=len(again),
        lost_checkpoint=any(moment <= attempt.saved_at for moment in again),
    )


def disturb_network(sweep: Sweep, milliseconds: float, seconds: float) -> None:
    """Run a sweep; while two hosts train a stage, slow one down, part the two, and lose one for longer than Ray waits."""
    hosts = sweep.cluster.hosts
    here, there = NODES
    sweep.start()
    sweep.wait_for_work("group")
    hosts.slow(there, milliseconds)
    sweep.wait(LATE_SECONDS)
    before = sweep.num_epochs()
    sweep.wait(5.0)
    most = 5.0 / (milliseconds / 1000) / STEPS_PER_EPOCH + 2
    assert sweep.num_epochs() - before <= most, "it was not slow"
    hosts.slow(there, 0)
    sweep.wait_for_progress()
    hosts.cut(here, there)
    sweep.wait(LATE_SECONDS)
    before = sweep.num_epochs()
    sweep.wait(seconds)
    assert sweep.num_epochs() == before, "hosts that do not hear each other went on with a stage of both"
    hosts.mend(here, there)
    sweep.wait_for_progress()
    lose_node(sweep, there)


def lose_node(sweep: Sweep, name: str) -> None:
    """Cut a node off for so long that Ray starts its work elsewhere, while its processes live and reach the storage."""
    sweep.wait_for_work("group")
    hosts, raylet = sweep.cluster.hosts, sweep.cluster.raylet(name)
    hosts.cut(name)
    sweep.wait(LOST_NODE_SECONDS)
    assert sweep.cluster.raylet(name) == raylet
    hosts.mend(name)
    deadline = time.monotonic() + 180
    while sweep.cluster.raylet(name) in (
        raylet,
        None,
    ):  # it learns that it was given up, ends, and joins again
        assert time.monotonic() < deadline, "the cluster did not miss a node that was cut off"
        sweep.wait(0.5)
    sweep.recovered = now()


def drawn_kinds(seed: int, num_faults: int) -> list[tuple[Kind, Phase]]:
    """A random list that ends with the driver and the head, the first third of it while hosts work together."""
    generator = random.Random(seed)
    kinds: list[Kind] = ["worker", "trial", "node", "tracking", "driver"]
    num_groups = num_faults // 3
    drawn: list[tuple[Kind, Phase]] = [
        (generator.choice(kinds), "group" if index < num_groups else "single")
        for index in range(num_faults - 2)
    ]
    return [*drawn, ("driver", "single"), ("head", "single")]
