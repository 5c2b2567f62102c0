"""Trials that die under a sweep, by kind, on a real cluster of several raylets: node lost, process killed, memory."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from methods import Batch, Step
from methods.supervised import Supervised, SupervisedSettings
from orchestrator import ConfigurationError, Experiment, Result
from orchestrator.ray_tune import connect
from orchestrator.store import Store
from orchestrator.sweep import Sweep

pytestmark = [pytest.mark.ray, pytest.mark.slow]

QUICK_HEALTH_CHECKS = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 500,
    "health_check_failure_threshold": 6,
}
WAIT_SECONDS = 300.0


@dataclass(frozen=True, kw_only=True, slots=True)
class DoomedSettings(SupervisedSettings):
    """Settings of ``doomed``."""

    folder: str = ""
    """Where each process that trains leaves its number and the node it is on."""
    step_seconds: float = 0.0
    """How long each step sleeps before it learns."""


class Doomed(Supervised):
    """Learns from labels, slowly, and says in which process and on which node."""

    Settings = DoomedSettings
    settings: DoomedSettings

    def forward(self, batch: Batch) -> Step:
        node = ray.get_runtime_context().get_node_id()
        note = Path(self.settings.folder) / str(os.getpid())
        if not note.exists():  # once, and whole: this process may be killed at any moment
            note.with_suffix(".part").write_text(node)
            note.with_suffix(".part").rename(note)
        time.sleep(self.settings.step_seconds)
        return super().forward(batch)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head without CPUs, joined by this process. Tests add the nodes that they need."""
    sockets = tempfile.mkdtemp(prefix="sh-")  # a short path: sockets lie in it
    ray.shutdown()
    monkey = pytest.MonkeyPatch()
    monkey.setenv("RAY_TMPDIR", sockets)  # the note about the current cluster stays out of the way of others
    (Path(sockets) / "ray").mkdir()
    head = {
        "num_cpus": 0, "temp_dir": sockets, "include_dashboard": False, "_system_config": QUICK_HEALTH_CHECKS,
    }  # fmt: skip
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        monkey.setenv("RAY_ADDRESS", cluster.address)
        connect()
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()
        monkey.undo()
        shutil.rmtree(sockets, ignore_errors=True)


@pytest.fixture
def no_preflight(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a node that kills all work: asked first whether it is fit, it would be refused, and rightly so."""
    monkeypatch.setattr(Sweep, "_refuse_unfit_cluster", lambda self: None)


@contextlib.contextmanager
def node(cluster: Cluster, **options: Any) -> Iterator[Any]:
    """A node for the duration of a test, if it lives that long."""
    added = cluster.add_node(**{"num_cpus": 1, **options})
    try:
        yield added
    finally:
        if added in cluster.worker_nodes:
            cluster.remove_node(added, allow_graceful=False)


@dataclass
class Bench:
    """One experiment of a single stage, and what its processes left."""

    folder: Path

    def experiment(self, step_seconds: float = 0.05, train: Any = None, **run: Any) -> Experiment:
        (self.folder / "steps").mkdir(exist_ok=True)
        return Experiment(
            name="doomed",
            data={"dataset": "digits", "validation": 0.2},
            stages={
                "student": {
                    "method": "doomed", "model": "tiny_mlp", "folder": str(self.folder / "steps"),
                    "step_seconds": step_seconds, "train": {"epochs": 2, **(train or {})},
                }
            },
            search={"objective": {"maximize": "student.top1"}},
            run={"storage": str(self.folder / "runs"), "checkpoint_seconds": 0, "lease_seconds": 2, **run},
            methods={"doomed": Doomed},
        )  # fmt: skip

    def seen(self) -> dict[int, str]:
        """Process -> node, of all processes that have trained."""
        notes = [path for path in (self.folder / "steps").iterdir() if not path.suffix]
        return {int(path.name): path.read_text() for path in notes}

    def wait_for_new(self, known: set[int]) -> tuple[int, str]:
        deadline = time.monotonic() + WAIT_SECONDS
        while not (new := {pid: text for pid, text in self.seen().items() if pid not in known}):
            assert time.monotonic() < deadline, "no process began to train"
            time.sleep(0.1)
        return next(iter(new.items()))

    def run(self, experiment: Experiment, disturb: Callable[[], None]) -> Result:
        """Run it while ``disturb`` does its work beside."""
        thread = threading.Thread(target=disturb)
        thread.start()
        try:
            return experiment.run()
        finally:
            thread.join(WAIT_SECONDS)
            assert not thread.is_alive()


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_a_lost_node_is_not_counted(
    cluster: Cluster, bench: Bench, capfd: pytest.CaptureFixture[str]
) -> None:
    """Not even one failure is allowed; the node under the trial goes away, and another one has to take over."""
    with node(cluster) as first, node(cluster) as second:
        nodes = {added.node_id: added for added in (first, second)}

        def disturb() -> None:
            _, where = bench.wait_for_new(set())
            cluster.remove_node(nodes[where], allow_graceful=False)

        result = bench.run(bench.experiment(max_failures=0), disturb)
    assert [row.status for row in result.rows] == ["done"], result.rows
    assert len(set(bench.seen().values())) == 2
    told = capfd.readouterr().err
    assert "the trial's node was lost" in told
    assert "not counted as a failure" in told
    (key,) = Store(str(bench.folder / "runs")).keys()
    assert Store(str(bench.folder / "runs")).manifest(key)["cost"]["resumed_epochs"] >= 0


def test_a_process_may_die_a_few_times(
    cluster: Cluster, bench: Bench, capfd: pytest.CaptureFixture[str]
) -> None:
    """Killed as often as is allowed and once more: the trial has failed, with the reason."""

    def disturb() -> None:
        known: set[int] = set()
        for _ in range(2):
            pid, _ = bench.wait_for_new(known)
            known.add(pid)
            os.kill(pid, signal.SIGKILL)

    with node(cluster):
        result = bench.run(bench.experiment(max_failures=1), disturb)
    (row,) = result.rows
    assert row.status == "failed"
    assert "the trial's process died: The actor is dead because its worker process has died" in row.reason
    assert "failed 2 times, run.max_failures is 1" in row.reason
    assert len(bench.seen()) == 2
    assert "failure 1 of at most 1" in capfd.readouterr().err


@pytest.mark.usefixtures("no_preflight")
def test_what_ray_kills_for_its_memory_is_tried_with_less(
    cluster: Cluster, bench: Bench, capfd: pytest.CaptureFixture[str]
) -> None:
    """On a node that kills every process with work: in smaller micro-batches, and at the smallest it has failed."""
    always = {"RAY_memory_usage_threshold": "0.001", "RAY_memory_monitor_refresh_ms": "250"}
    with node(cluster, env_vars=always):
        result = bench.run(
            bench.experiment(step_seconds=1.0, train={"min_micro_batch": 32}, max_failures=0), lambda: None
        )
    (row,) = result.rows
    assert row.status == "failed"
    assert "killed for its use of memory" in row.reason
    told = capfd.readouterr().err
    assert "tried again with smaller micro-batches" in told
    store = Store(str(bench.folder / "runs"))
    (known,) = (store.read_json(path) for path in store.list_json("memory/"))
    assert known["accumulate"] == 2
    (failure,) = (store.read_json(path) for path in store.list_json("failures/"))
    assert (failure["kind"], failure["device"]) == ("OutOfMemoryError", "host memory")


def test_what_fits_on_no_node_is_refused_with_the_reason(cluster: Cluster, bench: Bench) -> None:
    """Two CPUs in all, but on two nodes."""
    with node(cluster), node(cluster):
        started = time.monotonic()
        with pytest.raises(ConfigurationError) as refusal:
            bench.experiment(cpus_per_worker=2, wait_for_resources_seconds=2).run(quiet=True)
    assert time.monotonic() - started < 30
    assert "stage student asks for 1 worker with 2 CPU; the cluster has 3 nodes" in str(refusal.value)
    assert "2 x (1 CPU)" in str(refusal.value)


def test_a_node_that_joins_late_is_waited_for_and_one_that_never_returns_is_not(
    cluster: Cluster, bench: Bench, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It begins when the first node has joined, and fails with the reason when that is gone for good."""
    added: list[Any] = []

    def disturb() -> None:
        time.sleep(2)
        added.append(cluster.add_node(num_cpus=1))
        bench.wait_for_new(set())
        cluster.remove_node(added[0], allow_graceful=False)

    with monkeypatch.context() as patch:
        # A node is added beside the main thread, where signals cannot be handled; it is ended by us anyway.
        patch.setattr(ray._private.utils, "set_sigterm_handler", lambda handler: None)
        result = bench.run(bench.experiment(wait_for_resources_seconds=15), disturb)
    (row,) = result.rows
    assert row.status == "failed"
    assert (
        "could not be placed: stage student asks for 1 worker with 1 CPU; the cluster has 1 node"
        in row.reason
    )
    assert "waiting for nodes: stage student asks for" in capfd.readouterr().err
