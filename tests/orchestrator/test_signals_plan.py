"""Which stages want the same recording, what the plan says about it, and when signals are part of a key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from experiment_cases import ABSENT, document, key_of, planner_of, problems_of, trial_of

from orchestrator.errors import ConfigurationError
from orchestrator.plan import Plan, Point, make_plan
from orchestrator.search import known_points
from orchestrator.signals_plan import Uses, shared_recordings

KD: dict[str, Any] = {"stages/student/method": "kd", "stages/student/teacher": "$teacher", "stages/views": ABSENT, "search/space": {}, "baselines": {}}  # fmt: skip
FLAT: dict[str, Any] = {"search/space": {}, "baselines": {}}
STREAM = {"data/stream_seed": 1}
FIXED = {"data/augment": {"pad": 0}}


def recording(changes: Mapping[str, Any] | None = None, seed: int = 0, stage: str = "student") -> str:
    """Name of what the stage would read."""
    found = {planned.name: planned.signals for planned in trial_of(changes, seed).stages}[stage]
    (name,) = found.values()
    return name


def plan_of(changes: Mapping[str, Any] | None = None, stored: tuple[str, ...] = ()) -> Plan:
    planner = planner_of(changes)
    points = known_points(planner.spec.search)
    labels = [Point(label=label) for label in planner.spec.baselines]
    done = {stage.key for stage in trial_of(changes).stages if stage.name in stored}
    return make_plan(
        planner, [*labels, *map(Point, points or [])], has=done.__contains__, cost=lambda stage: None,
        num_undrawn=0 if points is not None else planner.spec.search.num_samples,
    )  # fmt: skip


EQUAL: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("settings of the criterion", {}, {"stages/student/kd_weight": 0.5}),
    ("network of the student", {}, {"stages/student/model": "resnet8"}),
    ("its epochs and learning rate", {}, {"stages/student/train": {"epochs": 3, "learning_rate": 0.2}}),
    ("branches on the teacher", {}, {"stages/views/num_branches": 3}),
    ("compression", {}, {"run/signals_precision": "float16"}),
    ("views or none, one stream", STREAM, {**KD, **STREAM}),
    ("criteria, one stream", {**KD, **STREAM}, {**KD, **STREAM, "stages/student/method": "dkd"}),
    ("criteria, fixed images", {**KD, **FIXED}, {**KD, **FIXED, "stages/student/method": "dkd"}),
]


@pytest.mark.parametrize(("before", "after"), [case[1:] for case in EQUAL], ids=[case[0] for case in EQUAL])
def test_these_share_a_recording(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert recording(before) == recording(after)


@pytest.mark.parametrize(
    "changes",
    [
        {"stages/teacher/train": {"epochs": 1}}, {"stages/teacher/model": "tiny_mlp"}, {"data/fraction": 0.5},
        {"data/augment": {"pad": 2}}, {"data/split_seed": 1}, {"stages/student/seed": 7}, KD, STREAM, FIXED,
        *({"stages/student/train": {"epochs": 20, name: value}} for name, value in
          {"batch_size": 32, "accumulate": 2, "precision": "bf16"}.items()),
        {"run/workers": 2},
    ],
)  # fmt: skip
def test_these_do_not(changes: dict[str, Any]) -> None:
    assert recording(changes) != recording()


def test_seeds_share_what_does_not_depend_on_them() -> None:
    assert recording(seed=1) != recording()
    assert recording(STREAM, seed=1) == recording(STREAM)
    assert recording(FIXED, seed=1) == recording(FIXED)


def test_a_probe_of_a_teacher_is_another_network() -> None:
    probed = {**KD, "stages/probe": {"method": "linear_probe", "teacher": "$teacher"}, "stages/student/teacher": "$probe"}  # fmt: skip
    stages = document(probed)["stages"]
    ordered = {name: stages[name] for name in ("teacher", "probe", "student")}
    assert recording({**FLAT, "stages": ordered}) != recording(KD)


def test_uses_are_counted_over_what_has_to_run() -> None:
    uses = Uses.of(plan_of())
    assert uses.by_recording[recording()] == uses.by_recording[recording(seed=1)] == 10
    assert uses.by_recording[recording(stage="views")] == 10
    assert shared_recordings(plan_of()) == {recording(), recording(seed=1), recording(stage="views")}
    assert len(shared_recordings(plan_of(STREAM))) == 1
    assert Uses.of(plan_of(STREAM)).by_recording[recording(STREAM)] == 10 + 20 + 2


def test_points_that_will_be_drawn_are_expected() -> None:
    drawn = {"search/algorithm": "optuna", "search/num_samples": 16, "search/space": {"student.kd_weight": {"uniform": [0, 1]}}}  # fmt: skip
    uses = Uses.of(plan_of(drawn))
    assert uses.by_recording[recording()] == uses.by_recording[recording(seed=1)] == 16
    assert uses.by_recording[recording(stage="views")] == 0
    vary = {**drawn, "search/space": {"views.margin": {"uniform": [0.1, 0.5]}}}
    assert Uses.of(plan_of(vary)).by_recording[recording(stage="views")] == 32


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({}, "20 student stages (angular_kd) read from 2 recordings, 10 stages from each, if they fit into run.signals_gigabytes and the teacher is not quicker than the disk."),
        ({}, "2 student stages (kd) computed live: no other stage wants the same ones."),
        (STREAM, "2 student stages (kd) read from 1 recording, 32 stages from each"),
        ({"run/signals": "record"}, "2 student stages (kd) recorded in 2 recordings, as run.signals says."),
        ({"baselines/fitnet": {"student": {"method": "fitnet", "teacher": "$teacher"}}},
         "2 student stages (fitnet) computed live: fitnet compares feature maps, which are not recorded."),
    ],
)  # fmt: skip
def test_the_plan_says_why(changes: dict[str, Any], line: str) -> None:
    assert f"Teacher signals: {line}" in str(plan_of(changes))


def test_a_plan_with_live_signals_says_nothing_of_them() -> None:
    assert "Teacher signals" not in str(plan_of({"run/signals": "live"}))


def test_feature_maps_cannot_be_recorded() -> None:
    changes = {**KD, "stages/student/method": "fitnet", "run/signals": "record"}
    with pytest.raises(ConfigurationError, match=r"stages.student: run.signals is 'record', but fitnet compares feature maps, which are not recorded; use run.signals: auto"):  # fmt: skip
        trial_of(changes)


@pytest.mark.parametrize("changes", [{"run/signals": "record"}, {"run/signals": "live"}, {"run/signals_gigabytes": 1, "run/signals_dir": "/x"}])  # fmt: skip
def test_recording_changes_no_key(changes: dict[str, Any]) -> None:
    assert key_of("student", changes) == key_of("student")


@pytest.mark.parametrize("changes", [{"run/signals_precision": "float16"}, {"run/signals_top_k": 3}])
def test_compression_changes_the_key_of_what_learns_from_it(changes: dict[str, Any]) -> None:
    assert key_of("teacher", changes) == key_of("teacher")
    assert key_of("views", changes) != key_of("views")
    assert key_of("student", {**KD, **changes}) != key_of("student", KD)
    maps = {**KD, "stages/student/method": "fitnet"}
    assert key_of("student", {**maps, **changes}) == key_of("student", maps)


def test_one_stream_for_all_seeds_is_in_every_key() -> None:
    assert key_of("teacher", STREAM) != key_of("teacher")
    assert key_of("student", STREAM, seed=1) != key_of("student", STREAM)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"run/signals": "recorded"}, "run.signals: got 'recorded', expected one of auto, record, live"),
        ({"run/signals_precision": "int8"}, "run.signals_precision: got 'int8', expected one of float32, float16"),
        ({"run/signals_top_k": 0}, "run.signals_top_k: signals_top_k must be at least 1, got 0"),
        ({"run/signals_gigabytes": 0}, "run.signals_gigabytes: signals_gigabytes must be finite and above 0, got 0.0"),
        ({"run/signals": "live", "run/signals_precision": "float16"}, "run.signals: signals must be 'auto' or 'record' where signals_precision or signals_top_k compress them, got 'live'"),
        ({"run/signals_dir": "there"}, "run.signals_dir: signals_dir must be an absolute path, the same on each node, got 'there'"),
        ({"data/stream_seed": -1}, "data.stream_seed: stream_seed must be a whole number from 0, got -1"),
    ],
)  # fmt: skip
def test_mistakes_are_told(changes: dict[str, Any], problem: str) -> None:
    assert problem in problems_of(changes)
