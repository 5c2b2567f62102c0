"""A stage that really runs out of memory: named with its peak, and tried with smaller micro-batches where allowed."""

from __future__ import annotations

import copy
import json
import logging
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from experiment_cases import trial_of

from methods import Batch, Step
from methods.supervised import Supervised, SupervisedSettings
from orchestrator import Experiment
from orchestrator.dispatch import Outcome
from orchestrator.errors import OutOfMemoryError
from orchestrator.micro_batch import MicroBatches, lighter, memory_path
from orchestrator.plan import Point, Trial
from orchestrator.stage import StageRunner
from orchestrator.store import Store
from orchestrator.sweep import Sweep
from orchestrator.trial import TrialRunner, failure_path

ROOM_BYTES = 3 * 2**29
"""Address space that is left to the process beside what it has already."""
ROW_BYTES = 2**26
"""What each image takes in a step: a batch of 64 asks for 4 GiB, a quarter of it for one. It is never touched."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HungrySettings(SupervisedSettings):
    """Settings of ``hungry``."""


class Hungry(Supervised):
    """Learns from labels, and takes a lot of memory for each image of the micro-batch."""

    Settings = HungrySettings

    def forward(self, batch: Batch) -> Step:
        torch.empty(len(batch.labels), ROW_BYTES, dtype=torch.uint8)
        return super().forward(batch)


@contextmanager
def little_memory() -> Iterator[None]:
    """Scope in which this process may have ``ROOM_BYTES`` of address space more than it has."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM_BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def sweep_of(storage: Path, **train: Any) -> Sweep:
    experiment = Experiment(
        name="hungry",
        data={"dataset": "digits", "validation": 0.2},
        stages={"student": {"method": "hungry", "model": "tiny_mlp", "train": {"epochs": 1, **train}}},
        search={"objective": {"maximize": "student.top1"}},
        run={"storage": str(storage)},
        methods={"hungry": Hungry},
    )
    return experiment._sweep


def run(sweep: Sweep) -> tuple[Trial, Outcome]:
    """The only trial, in this process."""
    trial = sweep.planner.trial(Point({}), 0)
    spec = sweep.spec
    stages = StageRunner(sweep.store, spec.catalog, spec.run, lambda section: section.source.load())
    runner = TrialRunner(sweep.store, stages.execute, spec.search.objectives, "run")
    with little_memory():
        return trial, runner.run(trial, lambda row: None)


def test_running_out_of_memory_is_recorded_with_peak_and_device(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path)
    trial, outcome = run(sweep)
    assert outcome.status == "failed"
    assert "OutOfMemory: stage student" in outcome.reason
    assert "batch_size 64 in 1 micro-batch(es)" in outcome.reason
    failure = sweep.store.read_json(failure_path(trial.key))
    assert failure["kind"] == "OutOfMemoryError"
    assert failure["device"].startswith("cpu")
    assert 2**26 < failure["peak_memory_bytes"] < 2**36
    assert sweep.store.read_json(memory_path(trial.key)) is None


def test_it_is_tried_in_smaller_micro_batches_where_allowed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sweep = sweep_of(tmp_path, min_micro_batch=8)
    with caplog.at_level(logging.WARNING):
        trial, outcome = run(sweep)
    assert outcome.status == "done", outcome.reason
    manifest = sweep.store.manifest(trial.key)
    accumulate = manifest["placement"]["accumulate"]
    assert accumulate == 4
    assert manifest["content"]["train"]["accumulate"] == 1
    assert manifest["content"]["train"]["min_micro_batch"] == 8
    assert "trying again in 4 micro-batches" in caplog.text
    known = sweep.store.read_json(memory_path(trial.key))
    assert [event["accumulate"] for event in known["events"]] == [1, 2]
    assert all(event["peak_memory_bytes"] > 2**26 for event in known["events"])
    assert sweep.store.read_json(failure_path(trial.key)) is None


def test_the_result_is_that_of_the_whole_batch(tmp_path: Path) -> None:
    """The network has no batch norm: only rounding differs."""
    sweep = sweep_of(tmp_path / "split", min_micro_batch=8)
    trial, _ = run(sweep)
    whole = sweep_of(tmp_path / "whole", batch_size=64, accumulate=1)
    key = whole.planner.trial(trial.point, 0).key
    stages = StageRunner(
        whole.store, whole.spec.catalog, whole.spec.run, lambda section: section.source.load()
    )
    stages.execute(whole.planner.trial(trial.point, 0).final, lambda row: None)
    losses = [
        json.loads(store.read(name, "history.json"))[-1]["train_loss"]
        for store, name in ((sweep.store, trial.key), (whole.store, key))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_it_ends_when_nothing_smaller_is_allowed(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, min_micro_batch=32)
    trial, outcome = run(sweep)
    assert outcome.status == "failed"
    assert "in 2 micro-batch(es)" in outcome.reason
    known = sweep.store.read_json(memory_path(trial.key))
    assert (known["accumulate"], len(known["events"])) == (2, 1)


def with_train(trial: Trial, **train: Any) -> Trial:
    final = trial.final
    spec = replace(final.spec, train=replace(final.spec.train, **train))
    return replace(trial, stages=(*trial.stages[:-1], replace(final, spec=spec)))


@pytest.mark.parametrize(
    ("batch_size", "accumulate", "least", "expected"),
    [(64, 1, 8, 2), (64, 4, 8, 8), (64, 8, 8, None), (64, 1, 0, None), (64, 1, 33, None), (64, 1, 32, 2)],
)
def test_halving_keeps_the_key_and_stops_at_the_bound(
    batch_size: int, accumulate: int, least: int, expected: int | None
) -> None:
    stage = with_train(trial_of(), batch_size=batch_size, accumulate=accumulate, min_micro_batch=least).final
    halved = lighter(stage)
    assert (halved and halved.spec.train.accumulate) == expected
    assert halved is None or (halved.key, halved.content) == (stage.key, stage.content)


def test_a_process_that_was_killed_is_followed_by_one_that_takes_less(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    trial = with_train(trial_of(), min_micro_batch=16, batch_size=64)
    for stage in trial.stages[:-1]:
        store.put(stage.key, {"weights": b"0"}, {})
    runner = TrialRunner(store, lambda stage, report: None, (), "run")
    assert runner.killed_for_memory(trial, "killed", 2**30)
    assert MicroBatches(store).adapted(trial.final).spec.train.accumulate == 2
    assert runner.killed_for_memory(trial, "killed", 2**30)
    assert MicroBatches(store).adapted(trial.final).spec.train.accumulate == 4
    assert store.read_json(failure_path(trial.key)) is None
    assert not runner.killed_for_memory(trial, "killed", 2**30)
    failure = store.read_json(failure_path(trial.key))
    assert (failure["kind"], failure["reason"], failure["peak_memory_bytes"]) == (
        "OutOfMemoryError",
        "killed",
        2**30,
    )


def test_the_error_travels_with_its_numbers() -> None:
    error = copy.copy(OutOfMemoryError("text", device="cpu", peak_memory_bytes=7))
    assert (str(error), error.device, error.peak_memory_bytes) == ("text", "cpu", 7)
