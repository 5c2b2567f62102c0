"""Workers per stage: overrides, what a trial holds, how many trials fit, and the linear rule for batches."""

from __future__ import annotations

from typing import Any

import pytest
from experiment_cases import key_of, planner_of, problems_of, spec_of, trial_of

from orchestrator.dispatch import Dispatcher
from orchestrator.errors import ConfigurationError
from orchestrator.placement import TOKEN, StageWorkers, WorkerSettings, held_by_trial, most_at_a_time
from orchestrator.plan import Point, make_plan
from orchestrator.search import make_sampler
from orchestrator.spec import RunSettings

GPU = {"gpus_per_worker": 1.0, "cpus_per_worker": 4}


@pytest.mark.parametrize(
    ("run", "own", "expected"),
    [
        ({}, {}, {}),
        ({"workers": 2}, {}, {"workers": 2}),
        ({"workers": 2, **GPU}, {"workers": 1, "gpus_per_worker": 0}, {"workers": 1, "cpus_per_worker": 4}),
        ({}, {"workers": 4, "placement": "spread"}, {"workers": 4, "placement": "spread"}),
        ({"workers": 4, "min_workers": 2}, {}, {"workers": 4, "min_workers": 2}),
        ({"workers": 4, "min_workers": 2}, {"workers": 1}, {"workers": 1}),
        ({"workers": 4, "min_workers": 2}, {"cpus_per_worker": 2}, {"workers": 4, "min_workers": 2, "cpus_per_worker": 2}),
        ({"workers": 4, "min_workers": 2}, {"workers": 8, "min_workers": 3}, {"workers": 8, "min_workers": 3}),
    ],
)  # fmt: skip
def test_overrides(run: dict[str, Any], own: dict[str, Any], expected: dict[str, Any]) -> None:
    settings = RunSettings(**run, stages={"teacher": StageWorkers(**own)})
    assert settings.for_stage("teacher") == WorkerSettings(**expected)
    assert settings.for_stage("student") == RunSettings(**run).for_stage("teacher")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"run/min_workers": 2}, "min_workers must lie between 1 and workers (1), got 2"),
        ({"run/workers": 2, "run/min_workers": 0}, "min_workers must lie between 1 and workers (2), got 0"),
        ({"run/placement": "scatter"}, "run.placement: got 'scatter', expected one of pack, spread"),
        ({"run/batch": "scaled"}, "run.batch: got 'scaled', expected one of keep, scale"),
        ({"run/workers": 2, "run/min_workers": 1, "run/batch": "scale"}, "batch must be 'keep' where min_workers is set"),
        ({"run/batch": "scale", "run/stages": {"teacher": {"workers": 2, "min_workers": 1}}}, "batch must be 'keep' where min_workers is set"),
        ({"run/stages": {"techer": {"workers": 2}}}, "run.stages.techer: 'techer' is not a stage; did you mean 'teacher'?"),
        ({"run/stages": {"teacher": {"worker": 2}}}, "run.stages.teacher.worker: 'worker' is not a setting of StageWorkers; did you mean 'workers'?"),
        ({"run/stages": {"teacher": {"workers": 0}}}, "stages.teacher.workers must be at least 1, got 0"),
        ({"run/stages": {"teacher": {"min_workers": 3}}}, "stages.teacher.min_workers must lie between 1 and workers (1), got 3"),
        ({"run/stages": {"teacher": {"gpus_per_worker": -1}}}, "stages.teacher.gpus_per_worker must be finite and not negative, got -1.0"),
    ],
)  # fmt: skip
def test_impossible_workers_are_refused(changes: dict[str, Any], problem: str) -> None:
    (found,) = problems_of(changes)
    assert problem in found


def test_a_stage_of_a_baseline_may_be_named() -> None:
    baseline = {
        "big": {"method": "supervised", "model": "tiny_cnn"},
        "student": {"method": "kd", "teacher": "$big"},
    }
    changes = {"baselines/large": baseline, "run/stages": {"big": {"workers": 2}}}
    assert problems_of(changes) == []
    assert spec_of(changes).stage_names == ("teacher", "views", "student", "big")


ALONE = WorkerSettings()
GROUP = WorkerSettings(workers=2)
ELASTIC = WorkerSettings(workers=4, min_workers=2)
ON_GPU = WorkerSettings(cpus_per_worker=2, gpus_per_worker=0.5)


@pytest.mark.parametrize(
    ("lacking", "held"),
    [
        ([ALONE], {"CPU": 1.0}),
        ([ALONE, ALONE], {"CPU": 1.0}),
        ([ON_GPU], {"CPU": 2.0, "GPU": 0.5}),
        ([GROUP], TOKEN),
        ([GROUP, ALONE], TOKEN),
        ([ON_GPU, ALONE], TOKEN),
        ([ELASTIC], TOKEN),
        ([], TOKEN),
    ],
)
def test_a_trial_never_holds_what_its_workers_need(
    lacking: list[WorkerSettings], held: dict[str, float]
) -> None:
    assert held_by_trial(lacking) == held


@pytest.mark.parametrize(
    ("stages", "cluster", "most"),
    [
        ([ALONE], {"CPU": 8.0}, 8),
        ([GROUP], {"CPU": 8.0}, 4),
        ([GROUP, ALONE], {"CPU": 8.0}, 8),
        ([ELASTIC], {"CPU": 5.0}, 2),
        ([ELASTIC], {"CPU": 1.0}, 0),
        ([ON_GPU], {"CPU": 64.0, "GPU": 2.0}, 4),
        ([ON_GPU], {"CPU": 64.0}, 0),
        ([WorkerSettings(gpus_per_worker=0.1)], {"CPU": 64.0, "GPU": 0.3}, 3),
    ],
)
def test_how_many_trials_have_work(
    stages: list[WorkerSettings], cluster: dict[str, float], most: int
) -> None:
    assert most_at_a_time(stages, cluster) == most


def test_num_workers() -> None:
    assert (GROUP.num_workers, ELASTIC.num_workers, WorkerSettings(workers=2, min_workers=2).num_workers) == (
        2,
        (2, 4),
        2,
    )


WORKERS = {"run/workers": 2, "run/placement": "spread", "run/stages": {"views": {"workers": 3}}}


def test_workers_are_in_no_key_unless_the_batch_is_scaled() -> None:
    for stage in ("teacher", "views", "student"):
        assert key_of(stage, WORKERS) == key_of(stage)
        assert key_of(stage, {**WORKERS, "run/batch": "scale"}) != key_of(stage)
    assert key_of("teacher", {"run/batch": "scale"}) == key_of("teacher")


def test_the_linear_rule_is_that_of_the_settings_it_stands_for() -> None:
    train = {"epochs": 20, "batch_size": 32, "learning_rate": 0.1}
    by_hand = {**train, "batch_size": 64, "learning_rate": 0.2}
    scaled = {"stages/teacher/train": train, "run/batch": "scale", "run/stages": {"teacher": {"workers": 2}}}
    assert key_of("teacher", scaled) == key_of("teacher", {"stages/teacher/train": by_hand})
    stages = {stage.name: stage.spec for stage in trial_of(scaled).stages}
    assert [stages[name].batch_scale for name in ("teacher", "views", "student")] == [2, 1, 1]


def test_a_plan_says_what_was_scaled() -> None:
    changes = {"run/batch": "scale", "run/stages": {"teacher": {"workers": 2}}, "stages/teacher/train": {"batch_size": 32, "learning_rate": 0.1}}  # fmt: skip
    planner = planner_of(changes)
    text = str(make_plan(planner, [Point()], has=lambda key: False, cost=lambda stage: None))
    line = (
        "run.batch scale: teacher trains with batch_size 64 (2 workers x 32) and learning_rate 0.2 (2 x 0.1)."
    )
    assert text.count("run.batch scale") == 1
    assert line in text
    kept = make_plan(planner_of(WORKERS), [Point()], has=lambda key: False, cost=lambda stage: None)
    assert "run.batch" not in str(kept)


def test_what_a_started_trial_lacks() -> None:
    planner = planner_of({"search/seeds": 1, "baselines": {}})
    kept: set[str] = set()
    dispatcher = Dispatcher(
        planner, make_sampler(planner.spec.search), stored=kept.__contains__, busy=lambda key: False,
        recall=lambda trial: None,
    )  # fmt: skip
    trial = dispatcher.next()
    assert trial is not None
    assert dispatcher.missing(trial) == trial.stages
    kept.add(trial.stages[0].key)
    assert dispatcher.missing(trial) == trial.stages[1:]
    kept.add(trial.key)
    assert dispatcher.missing(trial) == ()


def test_a_cluster_without_room_for_one_stage_is_refused() -> None:
    from orchestrator.ray_tune import trial_slots

    spec = spec_of({"run/stages": {"teacher": {"workers": 4, "gpus_per_worker": 1}}})
    with pytest.raises(
        ConfigurationError, match=r"stage teacher needs 4 CPU, 4 GPU .* the cluster has 8 CPU, 2 GPU"
    ):
        trial_slots(spec, {"CPU": 8.0, "GPU": 2.0})
    assert trial_slots(spec, {"CPU": 8.0, "GPU": 4.0}) == 8
    limited = spec_of({"run/concurrent_trials": 3})
    assert trial_slots(limited, {"CPU": 8.0}) == 3
