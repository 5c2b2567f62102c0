"""Groups of workers under Ray Train on two nodes: placement, crashes, lost nodes, a trial that dies, parity with one."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
import torch.distributed as dist
from ray.cluster_utils import Cluster
from ray.util import placement_group, placement_group_table, remove_placement_group
from safetensors.torch import load

from methods import Batch, Loss, Step
from methods.losses import cross_entropy
from methods.supervised import NetworkMethod
from orchestrator import Experiment, grid
from orchestrator.errors import DivergedError
from orchestrator.plan import PlannedStage, Point
from orchestrator.ray_reservations import give_up_reservations_of_the_dead
from orchestrator.ray_train import StageExecute
from orchestrator.ray_tune import connect, ship_by_value
from orchestrator.result import Result
from orchestrator.stage import StageRunner
from orchestrator.store import Store

pytestmark = [pytest.mark.ray, pytest.mark.slow]

EPOCHS = 4


class Fragile(NetworkMethod):
    """Trains slowly enough to be disturbed. Its second worker kills itself in the second epoch, once for each request."""

    @dataclass(frozen=True, kw_only=True)
    class Settings:
        request: str = ""
        """The file that asks for it."""

    def forward(self, batch: Batch) -> Step:
        time.sleep(0.05)
        request = Path(self.settings.request)
        if batch.epoch == 1 and dist.is_initialized() and dist.get_rank() == 1 and request.is_file():
            request.unlink()
            os._exit(1)
        logits, _ = self.model(batch.images)
        by_loopback = torch.tensor(float(os.environ.get("GLOO_SOCKET_IFNAME") == "lo"))
        return Step({"ce": Loss(cross_entropy(logits, batch.labels))}, {"by_loopback": by_loopback})


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Two nodes of one CPU each: real raylets on this machine."""
    quickly = {
        "health_check_initial_delay_ms": 0,
        "health_check_period_ms": 500,
        "health_check_failure_threshold": 3,
    }
    ray.shutdown()
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "_system_config": quickly})
    nodes.add_node(num_cpus=1)
    nodes.wait_for_nodes()
    monkey = pytest.MonkeyPatch()
    monkey.setenv("RAY_ADDRESS", nodes.address)
    connect()
    try:
        yield nodes
    finally:
        ray.shutdown()
        nodes.shutdown()
        monkey.undo()


def fragile(folder: Path, run: dict[str, Any], **settings: Any) -> Experiment:
    return Experiment(
        name="fragile",
        data={"dataset": "digits", "validation": 0.2},
        stages={"student": {"method": "fragile", "model": "tiny_mlp", "train": {"epochs": EPOCHS}, **settings}},
        search={"objective": {"maximize": "student.top1"}},
        run={"storage": str(folder / "runs"), "checkpoint_seconds": 0, "lease_seconds": 5, **run},
        methods={"fragile": Fragile},
    )  # fmt: skip


def prepared(experiment: Experiment) -> tuple[StageExecute, PlannedStage, Store]:
    sweep = experiment._sweep
    ship_by_value(sweep.spec.catalog)
    runner = StageRunner(
        sweep.store, sweep.spec.catalog, sweep.spec.run, lambda section: section.source.load()
    )
    return StageExecute(runner), sweep.planner.trial(Point(), 0).final, sweep.store


def wait_for(what: Callable[[], Any], seconds: float = 60.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline, f"not within {seconds:g} s"
        time.sleep(0.1)
    return found


def rows_of(store: Store, key: str) -> list[dict[str, float]]:
    told = [store.read_json(path) or {} for path in store.list_json(f"progress/{key}/")]
    return [row for document in told for row in document.get("rows", [])]


def free_cpus() -> float:
    return ray.available_resources().get("CPU", 0.0)


def no_group_is_left() -> bool:
    return all(group["state"] == "REMOVED" for group in placement_group_table().values())


@ray.remote(num_cpus=0)
class Attempt:
    """What a trial's process does with a stage."""

    def pid(self) -> int:
        return os.getpid()

    def run(self, execute: StageExecute, stage: PlannedStage) -> list[dict[str, float]]:
        seen: list[dict[str, float]] = []
        lease = wait_for(lambda: execute.stages.store.lease(stage.key))
        with lease:
            execute(stage, seen.append)
        return seen


def test_lost_node_shrinks_an_elastic_group(cluster: Cluster, tmp_path: Path) -> None:
    """Half of the cluster goes away: the stage goes on with one worker, and that counts as no failure of its own.

    The first test of this cluster: for three minutes Ray keeps room for the elastic groups of controllers that were killed.
    """
    run = {"workers": 2, "min_workers": 1, "max_failures": 0, "placement": "spread"}
    execute, stage, store = prepared(fragile(tmp_path, run))
    rows: list[dict[str, float]] = []
    started = time.monotonic()

    def watch(row: dict[str, float]) -> None:
        rows.append(row)
        print(f"epoch {row['epoch']:g} after {time.monotonic() - started:.1f} s")
        if row["epoch"] == 1:
            (other,) = cluster.worker_nodes
            cluster.remove_node(other, allow_graceful=False)

    execute(stage, watch)
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]
    manifest = store.manifest(stage.key)
    assert manifest["placement"]["workers"] == 1
    assert manifest["placement"]["batch_per_worker"] == stage.spec.train.batch_size
    history = json.loads(store.read(stage.key, "history.json"))
    assert [row["epoch"] for row in history] == [1, 2, 3, 4]
    cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()


def test_dead_trial_and_crashed_worker(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trial's process is killed in the middle, then a worker of the next attempt: nothing is left over or twice."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    request = tmp_path / "request"
    run = {"workers": 2, "max_failures": 1, "placement": "spread"}
    execute, stage, store = prepared(fragile(tmp_path, run, request=str(request)))
    first = Attempt.options(max_concurrency=2).remote()
    pid = ray.get(first.pid.remote())
    attempt = first.run.remote(execute, stage)
    wait_for(lambda: rows_of(store, stage.key))
    os.kill(pid, signal.SIGKILL)
    killed = time.monotonic()
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(attempt)
    wait_for(lambda: free_cpus() == 2.0 and no_group_is_left(), 30)
    print(f"workers of a killed trial were gone after {time.monotonic() - killed:.1f} s")

    request.touch()
    rows = ray.get(Attempt.remote().run.remote(execute, stage), timeout=300)
    assert not request.exists()
    epochs = [row["epoch"] for row in rows]
    assert epochs == sorted(set(epochs))
    assert epochs[-1] == EPOCHS
    history = json.loads(store.read(stage.key, "history.json"))
    assert [row["epoch"] for row in history] == [1, 2, 3, 4]
    assert {row["train_by_loopback"] for row in history} == {
        1.0
    }  # on both workers: the user's choice arrived
    manifest = store.manifest(stage.key)
    assert manifest["placement"]["workers"] == 2
    assert manifest["cost"]["resumed_epochs"] >= 1
    assert store.list_json("progress/") == store.list_json("fences/") == []
    wait_for(lambda: free_cpus() == 2.0 and no_group_is_left(), 30)


def test_mixed_trial(cluster: Cluster, tmp_path: Path) -> None:
    """A teacher on two nodes, its student as a task; both as if trained alone, since the global batch is the same."""

    def sweep(name: str, **run: Any) -> tuple[Result, Store]:
        experiment = Experiment(
            name=name,
            data={"dataset": "digits", "validation": 0.2},
            stages={"teacher": {"method": "supervised", "model": "tiny_mlp", "train": {"epochs": 1}},
                    "student": {"method": "kd", "model": "tiny_mlp", "teacher": "$teacher", "train": {"epochs": 1}}},
            search={"objective": {"maximize": "student.top1"}, "space": {"student.temperature": grid([2.0, 4.0])}},
            run={"storage": str(tmp_path / name), **run},
        )  # fmt: skip
        return experiment.run(quiet=True), Store(str(tmp_path / name))

    mixed, store = sweep("mixed", stages={"teacher": {"workers": 2, "placement": "spread"}})
    _, reference = sweep("alone")
    assert [row.status for row in mixed.rows] == ["done", "done"]
    manifests = {key: store.manifest(key) for key in list(store.keys())}
    workers = sorted((made["name"], made["placement"]["workers"]) for made in manifests.values())
    assert workers == [("student", 1), ("student", 1), ("teacher", 2)]
    (teacher,) = (made["cost"] for made in manifests.values() if made["name"] == "teacher")
    assert teacher["held_cpu_seconds"] == pytest.approx(2 * teacher["seconds"])
    assert mixed.spent.finished.cpu_seconds > sum(
        made["cost"]["held_cpu_seconds"] for made in manifests.values()
    )
    assert sorted(reference.keys()) == sorted(manifests)
    for key in manifests:
        ours, theirs = (load(kept.read(key, "weights.safetensors")) for kept in (store, reference))
        for name, tensor in theirs.items():
            assert (tensor - ours[name]).abs().max() < 1e-3, name
    assert free_cpus() == 2.0


def test_a_grounder_on_two_nodes_trains_as_on_one(cluster: Cluster, tmp_path: Path) -> None:
    """Its contrast sees the rows of both workers, and each of the five validation pictures is judged once.

    Batches of 7, 7 and 5 rows are 4 + 3 and 3 + 2 on two workers.
    """

    def grounder(name: str, workers: int) -> Experiment:
        return Experiment(
            name=name,
            data={"dataset": "shapes_ref", "num_train": 19, "num_validation": 5, "num_test": 3, "image_size": 24},
            stages={"grounder": {
                "method": "latent_vg", "patch_size": 6, "width": 16, "num_layers": 2, "num_heads": 2, "channels": 8,
                "num_concepts": 8, "pyramid": False, "drop_path": 0.0, "contrast_weight": 1.0, "contrast_temperature": 0.5,
                "train": {"epochs": 2, "batch_size": 7, "learning_rate": 0.05, "momentum": 0.0},
            }},
            search={"objective": {"maximize": "grounder.miou"}},
            run={"storage": str(tmp_path / name), "workers": workers, "placement": "spread"},
        )  # fmt: skip

    execute, stage, store = prepared(grounder("together", 2))
    alone, same_stage, reference = prepared(grounder("alone", 1))
    assert stage.key == same_stage.key
    execute(stage, lambda row: None)
    alone.stages.execute(same_stage, lambda row: None)
    assert store.manifest(stage.key)["placement"]["workers"] == 2
    ours, theirs = (load(kept.read(stage.key, "weights.safetensors")) for kept in (store, reference))
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=1e-5, msg=name)
    rows, expected = (json.loads(kept.read(stage.key, "history.json")) for kept in (store, reference))
    judged = ("miou", "oiou", "pr50", "miou_rolled", "language_gap", "train_contrast", "train_loss")
    for row, other in zip(rows, expected, strict=True):
        assert {name: row[name] for name in judged} == pytest.approx({name: other[name] for name in judged}, rel=1e-4, abs=1e-3)  # fmt: skip
    tests = [{name: value for name, value in kept.manifest(stage.key)["metrics"].items() if name.startswith("test_")} for kept in (store, reference)]  # fmt: skip
    assert tests[0] == pytest.approx(tests[1], rel=1e-4, abs=1e-3, nan_ok=True)


def test_a_stopped_trial_gives_its_workers_back(cluster: Cluster, tmp_path: Path) -> None:
    experiment = Experiment(
        name="stopped",
        data={"dataset": "digits", "validation": 0.2},
        stages={"student": {"method": "fragile", "model": "tiny_mlp", "train": {"epochs": 3}}},
        search={"objective": {"maximize": "student.top1"},
                "space": {"student.train.learning_rate": grid([0.05, 1e-9])},
                "scheduler": {"name": "asha", "grace_epochs": 1, "reduction_factor": 2}},
        run={"storage": str(tmp_path / "runs"), "workers": 2},
        methods={"fragile": Fragile},
    )  # fmt: skip
    result = experiment.run(quiet=True)
    assert sorted(row.status for row in result.rows) == ["done", "stopped"]
    store = Store(str(tmp_path / "runs"))
    assert len(list(store.keys())) == 1
    assert all(store.holder(row.key) is None for row in result.rows)
    wait_for(lambda: free_cpus() == 2.0 and no_group_is_left(), 30)


def test_diverged_on_two_workers_is_told_once(cluster: Cluster, tmp_path: Path) -> None:
    """What every worker meets alike ends the stage at the first start, with the worker's own words."""
    execute, stage, store = prepared(
        fragile(tmp_path, {"workers": 2, "max_failures": 5}, train={"epochs": 2, "learning_rate": 1e30})
    )
    with pytest.raises(DivergedError, match="training diverged in epoch 1"):
        execute(stage, lambda row: None)
    assert not store.has(stage.key)


@ray.remote(num_cpus=0)
class Reserver:
    """Reserves a CPU, as the controller of a group does, and may die before it uses it."""

    def reserve(self) -> str:
        group = placement_group([{"CPU": 1.0}])
        assert group.wait(120)
        return str(group.id.hex())

    def reserve_when(self, sign: Path) -> None:
        sign.with_suffix(".waits").touch()
        deadline = time.monotonic() + 120
        while not sign.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        placement_group([{"CPU": 1.0}], name="late")
        time.sleep(120)


def test_reservations_of_the_dead_are_given_up(cluster: Cluster) -> None:
    """Ray keeps them until the whole job ends: a killed controller would take its CPUs out of the sweep."""
    living, doomed = Reserver.remote(), Reserver.remote()
    kept, lost = ray.get([living.reserve.remote(), doomed.reserve.remote()])
    own = placement_group([{"memory": 1.0}])
    assert own.wait(120)
    assert give_up_reservations_of_the_dead() == 0
    ray.kill(doomed)
    assert wait_for(give_up_reservations_of_the_dead) == 1
    wait_for(lambda: placement_group_table()[lost]["state"] == "REMOVED")
    assert [placement_group_table()[id]["state"] for id in (kept, own.id.hex())] == ["CREATED", "CREATED"]
    ray.kill(living)
    assert wait_for(give_up_reservations_of_the_dead) == 1
    remove_placement_group(own)
    wait_for(lambda: free_cpus() == 2.0)


def test_what_an_actor_reserves_after_its_death_is_given_up(cluster: Cluster, tmp_path: Path) -> None:
    """A node that the cluster takes for dead while its processes live: their requests are still served."""
    far = cluster.add_node(num_cpus=0, resources={"far": 1.0})
    reserver = Reserver.options(resources={"far": 1.0}).remote()
    sign = tmp_path / "sign"
    reserver.reserve_when.remote(sign)
    wait_for(sign.with_suffix(".waits").exists, 120)
    raylet = far.all_processes["raylet"][0].process
    os.kill(raylet.pid, signal.SIGSTOP)
    try:
        wait_for(lambda: sum(node["Alive"] for node in ray.nodes()) == 2, 180)
        sign.touch()
        wait_for(lambda: late_reservation() == "CREATED", 180)
        assert wait_for(give_up_reservations_of_the_dead, 180) == 1
        wait_for(lambda: late_reservation() == "REMOVED" and free_cpus() == 2.0, 180)
    finally:
        os.kill(raylet.pid, signal.SIGCONT)
        cluster.remove_node(far, allow_graceful=False)


def late_reservation() -> str:
    states = [group["state"] for group in placement_group_table().values() if group["name"] == "late"]
    return states[0] if states else "none"
