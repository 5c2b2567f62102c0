"""Stages side by side through a real store: the artifacts of stages that run alone, with one network loaded."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from experiment_cases import planner_of

from methods import BUILTIN
from methods.models.tapped import Tapped
from orchestrator.checkpoint import Checkpoints
from orchestrator.errors import DivergedError, OutOfMemoryError
from orchestrator.plan import PlannedStage, Planner, Point
from orchestrator.spec import RunSettings
from orchestrator.stage import StageRunner
from orchestrator.stage_pack import StageJob, StagePack
from orchestrator.store import Store
from orchestrator.training import StopTraining

SHORT = {"epochs": 2, "batch_size": 128}
STAGES: dict[str, Any] = {
    "teacher": {"method": "supervised", "model": "mini_cnn", "train": {"epochs": 1, "batch_size": 128}},
    "views": {"method": "angular_views", "teacher": "$teacher", "train": SHORT},
    "student": {"method": "angular_kd", "model": "tiny_mlp", "teacher": "$views", "train": SHORT},
}
MARGINS = (0.1, 0.2, 0.4)


@pytest.fixture
def planner() -> Planner:
    changes = {"stages": STAGES, "baselines": {}, "search/space": {}, "data/fraction": 0.3}
    return planner_of(changes)


def stages_of(planner: Planner, values: Mapping[str, Any]) -> dict[str, PlannedStage]:
    return {stage.name: stage for stage in planner.trial(Point(values), 0).stages}


def runner_in(path: Path) -> StageRunner:
    return StageRunner(Store(str(path)), BUILTIN, RunSettings(), lambda data: data.source.load())


def contents(
    runner: StageRunner, stage: PlannedStage
) -> tuple[bytes, list[dict[str, float]], dict[str, Any]]:
    history = json.loads(runner.store.read(stage.key, "history.json"))
    metrics = runner.store.manifest(stage.key)["metrics"]
    measured = ("seconds", "latency_ms")
    return (
        runner.store.read(stage.key, "weights.safetensors"),
        [{name: value for name, value in row.items() if name != "time"} for row in history],
        {name: value for name, value in metrics.items() if name not in measured},
    )


def test_artifacts_equal_those_of_stages_alone(
    planner: Planner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chains = [stages_of(planner, {"views.margin": margin}) for margin in MARGINS]
    alone, together = runner_in(tmp_path / "alone"), runner_in(tmp_path / "together")
    for runner in (alone, together):
        runner.execute(chains[0]["teacher"], lambda row: None)
    for chain in chains:
        alone.execute(chain["views"], lambda row: None)
        alone.execute(chain["student"], lambda row: None)
    remembering: list[Tapped] = []
    original = Tapped.remember_passes
    monkeypatch.setattr(Tapped, "remember_passes", lambda self: (remembering.append(self), original(self))[1])
    rows: list[tuple[int, float]] = []
    for name in ("views", "student"):
        rows.clear()
        jobs = [
            StageJob(stage=chain[name], report=lambda row, number=number: rows.append((number, row["epoch"])))
            for number, chain in enumerate(chains)
        ]
        assert StagePack.of(together).execute_all(jobs) == [None] * 3
        assert rows == [(number, epoch) for epoch in (1, 2) for number in range(3)]
        for chain in chains:
            assert contents(together, chain[name]) == contents(alone, chain[name])
            assert together.store.checkpoints(chain[name].key).load() is None
    assert len(remembering) == 2  # students on three views stages have one network to ask
    held = [together.store.manifest(chain["student"].key)["cost"] for chain in chains]
    assert sum(cost["held_cpu_seconds"] for cost in held) <= 1.2 * max(cost["seconds"] for cost in held)


def test_failures_are_told_apart(planner: Planner, tmp_path: Path) -> None:
    runner = runner_in(tmp_path)
    rates = (0.05, 1e30, 0.01)
    chains = [stages_of(planner, {"views.train.learning_rate": rate}) for rate in rates]
    runner.execute(chains[0]["teacher"], lambda row: None)

    def exhaust(row: Any) -> None:
        raise MemoryError

    reports = [lambda row: None, lambda row: None, exhaust]
    jobs = [
        StageJob(stage=chain["views"], report=report) for chain, report in zip(chains, reports, strict=True)
    ]
    fine, diverged, large = StagePack.of(runner).execute_all(jobs)
    assert fine is None
    assert runner.store.has(chains[0]["views"].key)
    assert isinstance(diverged, DivergedError)
    assert isinstance(large, OutOfMemoryError)
    assert f"stage views ({chains[2]['views'].key[:8]}) ran out of memory" in str(large)


def test_checkpoints_are_written_behind_and_none_outlives_its_stage(
    planner: Planner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = replace(runner_in(tmp_path), run=RunSettings(checkpoint_seconds=0))
    chains = [stages_of(planner, {"views.margin": margin}) for margin in MARGINS[:2]]
    runner.execute(chains[0]["teacher"], lambda row: None)
    writers: list[str] = []
    write = Checkpoints.write

    def slow_write(self: Checkpoints, contents: Any) -> None:
        writers.append(threading.current_thread().name)
        time.sleep(0.02)
        write(self, contents)

    monkeypatch.setattr(Checkpoints, "write", slow_write)
    views = [chain["views"] for chain in chains]
    jobs = [
        StageJob(stage=stage, report=lambda row, stage=stage: stage is views[1] and row["epoch"] == 1)
        for stage in views
    ]
    done, stopped = StagePack.of(runner).execute_all(jobs)
    assert done is None
    assert isinstance(stopped, StopTraining)
    assert writers
    assert all(name.startswith("checkpoint") for name in writers)
    assert runner.store.checkpoints(views[0].key).load() is None
    kept = runner.store.checkpoints(views[1].key).load()
    assert kept is not None
    assert kept["epoch"] == 1


def test_a_pack_that_outgrows_the_memory_leaves_the_artifacts_of_stages_alone(
    planner: Planner, tmp_path: Path
) -> None:
    alone, together = runner_in(tmp_path / "alone"), runner_in(tmp_path / "together")
    chains = [stages_of(planner, {"views.margin": margin}) for margin in MARGINS]
    for runner in (alone, together):
        runner.execute(chains[0]["teacher"], lambda row: None)
    for chain in chains:
        alone.execute(chain["views"], lambda row: None)
    fullness = iter([MemoryError("all three")])

    def exhaust_once(row: Any) -> None:
        for error in fullness:
            raise error

    reports = [lambda row: None, exhaust_once, lambda row: None]
    jobs = [
        StageJob(stage=chain["views"], report=report) for chain, report in zip(chains, reports, strict=True)
    ]
    assert StagePack.of(together).execute_all(jobs) == [None] * 3
    for chain in chains:
        assert contents(together, chain["views"]) == contents(alone, chain["views"])


def test_stages_on_other_batches_are_refused(planner: Planner, tmp_path: Path) -> None:
    runner = runner_in(tmp_path)
    jobs = [
        StageJob(stage=stages_of(planner, {"views.train.batch_size": size})["views"], report=lambda row: None)
        for size in (64, 128)
    ]
    with pytest.raises(ValueError, match="different batches"):
        StagePack.of(runner).execute_all(jobs)
