"""The control runs of an Angular experiment: each differs from it in exactly one thing, on the same recipe."""

from __future__ import annotations

from typing import Any

import pytest
from experiment_cases import planner_of, problems_of, spec_of

from orchestrator.chain import StageSpec
from orchestrator.plan import Point

ON = {"controls": True}
LABELS = (
    *("control-kd-matched", "control-kd-2", "control-kd-4", "control-kd-8"),
    *("control-label-heads", "control-random-heads", "control-tekap"),
)


def stage(label: str, name: str = "student", changes: dict[str, Any] | None = None) -> StageSpec:
    return spec_of(ON | (changes or {})).chain(label, {})[name]


def test_one_line_adds_them_after_the_own_baselines() -> None:
    assert tuple(spec_of(ON).baselines) == ("kd", *LABELS)
    assert spec_of(ON).controls == LABELS
    assert spec_of().controls == ()


def test_every_control_keeps_recipe_network_and_seeds() -> None:
    ours = spec_of(ON).chain(None, {})["student"]
    for label in LABELS:
        other = stage(label)
        assert (other.model, other.train, other.seed, other.data) == (
            ours.model,
            ours.train,
            ours.seed,
            ours.data,
        )


@pytest.mark.parametrize(
    ("views", "weight"),
    [
        ({}, 1.5),
        ({"preset": "released", "num_branches": 5}, 1.5 * 2.440),
        ({"preset": "released", "num_branches": 1}, 1.5 * 1.406),
    ],
)
def test_the_matched_weight_is_the_one_in_effect(views: dict[str, Any], weight: float) -> None:
    changes = {f"stages/views/{key}": value for key, value in views.items()}
    changes |= {"stages/student/kd_weight": 1.5, "stages/views/temperature": 2.0}
    matched = stage("control-kd-matched", changes=changes)
    assert (matched.method, matched.inputs) == ("kd", {"teacher": "teacher"})
    assert matched.settings.kd_weight == pytest.approx(weight, abs=2e-3)
    assert (matched.settings.temperature, matched.settings.ce_weight) == (2.0, 0.1)
    assert stage("control-kd-4", changes=changes).settings.kd_weight == pytest.approx(4 * weight, abs=8e-3)


def test_heads_without_angular_losses_and_heads_without_training() -> None:
    labels = stage("control-label-heads", "views", {"stages/views/num_branches": 3})
    assert labels.settings.num_branches == 3
    weights = [getattr(labels.settings, name) for name in ("feature_inter_weight", "feature_intra_weight", "logit_inter_weight", "logit_intra_weight")]  # fmt: skip
    assert weights == [0, 0, 0, 0]
    assert labels.train == spec_of().chain(None, {})["views"].train
    assert stage("control-label-heads").settings == spec_of().chain(None, {})["student"].settings
    assert stage("control-random-heads", "views").train.epochs == 0
    assert stage("control-random-heads").settings.heads == "frozen"
    assert stage("control-tekap").inputs == {"teacher": "control_copies"}


def test_the_teacher_is_shared_with_the_experiment() -> None:
    planner = planner_of(ON)
    teachers = {planner.trial(Point(label=label), 0).stages[0].key for label in (None, *LABELS)}
    assert len(teachers) == 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"controls": "yes"}, "controls: expected true or false, got 'yes'"),
        (
            ON | {"stages/student": {"method": "kd", "model": "mini_cnn", "teacher": "$teacher"}},
            "controls: they belong to an experiment whose stage 'student' has an angular_views stage",
        ),
        (
            {"baselines/control-mine": {"student": {"method": "supervised"}}},
            "does not start with 'control-'",
        ),
    ],
)
def test_where_they_make_no_sense(changes: dict[str, Any], said: str) -> None:
    assert any(said in problem for problem in problems_of(changes))


def test_a_mistake_in_a_stage_is_told_once() -> None:
    problems = problems_of(ON | {"stages/student/kd_weigth": 1.0})
    assert (
        len([problem for problem in problems if "kd_weigth" in problem and "baselines" not in problem]) == 1
    )
