"""From points to the graph of stages: counts, sharing, what is stored, cost, and the printed plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from experiment_cases import FACTS, planner_of

from methods import BUILTIN
from orchestrator.cost import MachineTime
from orchestrator.document import read_document
from orchestrator.errors import ConfigurationError
from orchestrator.plan import Plan, PlannedStage, Planner, Point, make_plan
from orchestrator.plan_text import duration
from orchestrator.reader import parse_experiment
from orchestrator.search import known_points

SECONDS = {"teacher": 100.0, "views": 10.0, "student": 50.0}


def plan_of(
    changes: Mapping[str, Any] | None = None,
    stored: frozenset[str] = frozenset(),
    costs: Mapping[str, float] | None = None,
    **options: int,
) -> Plan:
    planner = planner_of(changes)
    return make_plan(
        planner,
        [
            *(Point(label=label) for label in planner.spec.baselines),
            *map(Point, known_points(planner.spec.search) or []),
        ],
        has=stored.__contains__,
        cost=lambda stage: (costs or {}).get(stage.name),
        **options,
    )


def counts(plan: Plan, column: str = "all") -> dict[str, int]:
    return {name: row[column] for name, row in plan.counts().items()}


def keys_of(plan: Plan, *names: str) -> frozenset[str]:
    return frozenset(key for key, stage in plan.stages.items() if stage.name in names)


def test_the_quickstart_shares_its_stages() -> None:
    path = Path(__file__).parents[2] / "configs" / "angular_digits.yaml"
    planner = Planner(parse_experiment(read_document(path), BUILTIN), FACTS)
    points = [Point(label="kd"), *map(Point, known_points(planner.spec.search) or [])]
    plan = make_plan(planner, points, has=lambda key: False, cost=lambda stage: None)
    assert counts(plan) == {"teacher": 1, "views": 10, "student": 22}
    assert len(plan.trials) == 22


def test_uses_count_the_trials_of_each_stage() -> None:
    plan = plan_of()
    uses = plan.uses()
    by_name = {name: sorted(uses[key] for key in keys_of(plan, name)) for name in SECONDS}
    assert by_name == {"teacher": [22], "views": [2] * 10, "student": [1] * 22}


def test_points_that_train_the_same_become_one() -> None:
    """With one branch the offsets of branches have no weight: 3 x 2 x 2 values are 10 points."""
    points = {trial.point_id: dict(trial.values) for trial in plan_of().trials if trial.point.label is None}
    assert len(points) == 10
    single = [values for values in points.values() if values["views.num_branches"] == 1]
    assert single == [
        {"views.num_branches": 1, "views.margin": 0.1},
        {"views.num_branches": 1, "views.margin": 0.2},
    ]


def test_seeds_of_points_and_baselines() -> None:
    plan = plan_of({"search/seeds": 3})
    seeds = {point_id: [t.seed for t in plan.trials if t.point_id == point_id] for point_id in {t.point_id for t in plan.trials}}  # fmt: skip
    assert all(found == [0, 1, 2] for found in seeds.values())


def test_a_fixed_seed_of_the_last_stage_makes_one_trial_of_all_seeds() -> None:
    assert counts(plan_of({"stages/student/seed": 0, "baselines": {}}))["student"] == 10


def test_baselines_have_the_seeds_of_confirmed_points() -> None:
    plan = plan_of({"search/seeds": 1, "search/confirm": {"top": 2, "seeds": 3}})
    assert sum(trial.point.label == "kd" for trial in plan.trials) == 3
    assert sum(trial.point.label is None for trial in plan.trials) == 10
    assert plan.num_confirming == 4
    assert "(1 x kd, 10 points, up to 4 trials more to confirm the best)" in str(plan)
    assert plan_of({"search/seeds": 3, "search/confirm": {"top": 2, "seeds": 2}}).num_confirming == 0


def test_stored_stages_do_not_run() -> None:
    plan = plan_of()
    again = plan_of(stored=keys_of(plan, "teacher", "views"))
    assert counts(again, "to_run") == {"teacher": 0, "views": 0, "student": 22}
    assert counts(again, "stored") == {"teacher": 1, "views": 10, "student": 0}


def test_a_finished_trial_needs_none_of_its_stages() -> None:
    plan = plan_of()
    assert plan_of(stored=keys_of(plan, "student")).missing == {}
    last = plan.trials[-1]
    partly = plan_of(stored=keys_of(plan, "student") - {last.key})
    assert set(partly.missing) == {stage.key for stage in last.stages}


@pytest.mark.parametrize(
    ("stored", "expected", "line"),
    [
        ((), 100 + 10 * 10 + 22 * 50, "Without sharing stages it would be 58 min 20 s (2.69 x)."),
        (("teacher",), 10 * 10 + 22 * 50, "Without sharing stages it would be 21 min 40 s (1.08 x)."),
        (("teacher", "views"), 22 * 50, ""),
    ],
)
def test_cost_with_and_without_sharing(stored: tuple[str, ...], expected: float, line: str) -> None:
    plan = plan_of(stored=keys_of(plan_of(), *stored), costs=SECONDS, slots=2)
    assert plan.seconds(plan.missing.values()) == expected
    text = str(plan)
    assert (
        f"Expected cost: {duration(expected)} of training, about {duration(expected / 2)} with 2 trials at a time."
        in text
    )
    assert line in text
    assert ("Without sharing" in text) == bool(line)


def test_an_unknown_cost_is_unknown() -> None:
    plan = plan_of(costs={"teacher": 100.0, "student": 50.0})
    assert plan.seconds(plan.missing.values()) is None
    assert "Expected cost: no history yet for views; known after the first one has run." in str(plan)
    free = plan_of(costs={**SECONDS, "views": 0.0})
    assert free.seconds(free.missing.values()) == 1200


SNAPSHOT = """\
angular-digits: 22 trials (1 x kd, 10 points)

stage        method          model     distinct  stored  to run  used by    expected     cost
───────────  ──────────────  ────────  ────────  ──────  ──────  ─────────  ───────────  ───────────
teacher      supervised      tiny_cnn  1         1       0       22 trials  \u2013            \u2013
└ views      angular_views   \u2013         10        0       10      20 trials  1 min 40 s   0.028 CPU-h
  └ student  angular_kd, kd  mini_cnn  22        0       22      22 trials  18 min 20 s  0.31 CPU-h

Teacher signals: 2 student stages (kd) computed live: no other stage wants the same ones.
Teacher signals: 10 views stages (angular_views) read from 1 recording, 10 stages from each, if they fit into run.signals_gigabytes and the teacher is not quicker than the disk.
Teacher signals: 20 student stages (angular_kd) read from 2 recordings, 10 stages from each, if they fit into run.signals_gigabytes and the teacher is not quicker than the disk.
To run: 10 views stages, 22 student stages.
Expected cost: 20 min 00 s of training, about 20 min 00 s with 1 trial at a time.
It holds 0.33 CPU-h.
Without sharing stages it would be 21 min 40 s (1.08 x)."""


def test_the_printed_plan() -> None:
    assert str(plan_of(stored=keys_of(plan_of(), "teacher"), costs=SECONDS)) == SNAPSHOT


MACHINES = {"run/workers": 2, "run/cpus_per_worker": 3, "run/gpus_per_worker": 0.5}
PRICES = {"run/prices": {"gpu_hour": 2.5, "cpu_hour": 0.04, "currency": "CHF"}}


def test_the_plan_counts_workers_and_tells_money() -> None:
    """1300 s x 2 workers x 3 cores are 2.17 CPU-hours, x half a GPU 0.36 GPU-hours: 0.99 francs."""
    plan = plan_of(MACHINES | PRICES, costs=SECONDS)
    held = plan.machine_time(plan.missing.values())
    assert held == MachineTime(cpu_seconds=1300 * 6, gpu_seconds=1300)
    assert "It holds 0.36 GPU-h, 2.17 CPU-h, 0.99 CHF." in str(plan)


@pytest.mark.parametrize(
    ("budget", "warning"),
    [
        ({"gpu_hours": 0.3}, "0.36 of 0.30 GPU-h (run.budget.gpu_hours)"),
        ({"cpu_hours": 2.2}, ""),
        ({"money": 0.9, "hours": 100}, "0.99 of 0.90 CHF (run.budget.money)"),
        ({"hours": 0.1}, "0.36 of 0.10 h (run.budget.hours)"),
    ],
)
def test_the_plan_warns_of_the_budget(budget: dict[str, float], warning: str) -> None:
    text = str(plan_of({**MACHINES, **PRICES, "run/budget": budget}, costs=SECONDS))
    assert ("Warning: this needs more than the budget" in text) == bool(warning)
    assert warning in text


def test_what_was_spent_before_counts() -> None:
    plan = plan_of({**MACHINES, "run/budget": {"cpu_hours": 3}}, costs=SECONDS)
    assert "Warning" not in str(plan)
    again = str(replace(plan, spent=MachineTime(cpu_seconds=3600.0)))
    assert "Earlier runs of this sweep held 1.00 CPU-h." in again
    assert "3.17 of 3.00 CPU-h (run.budget.cpu_hours)" in again


def test_the_printed_plan_when_nothing_is_left() -> None:
    stored = frozenset(plan_of().stages)
    assert str(plan_of(stored=stored)).endswith("Everything is in the store; nothing will be trained.")
    text = str(plan_of(stored=stored, num_undrawn=5))
    assert text.endswith("The points known now are in the store.")
    assert "up to 5 points drawn while it runs" in text


def test_baselines_that_order_stages_differently_can_be_printed() -> None:
    kd = {"method": "kd", "model": "mini_cnn"}
    changes = {
        "baselines/one": {"x": {**kd, "teacher": "$teacher"}, "y": {**kd, "teacher": "$x"}, "student": {**kd, "teacher": "$y"}},
        "baselines/two": {"y": {**kd, "teacher": "$teacher"}, "x": {**kd, "teacher": "$y"}, "student": {**kd, "teacher": "$x"}},
    }  # fmt: skip
    assert "x" in counts(plan_of(changes))
    assert "y" in str(plan_of(changes))


def test_a_combination_that_is_impossible_only_at_a_point_is_told_with_the_point() -> None:
    space = {"views.dropout_low": {"grid": [0.1, 0.3]}, "views.dropout_high": {"grid": [0.35, 0.2]}}
    with pytest.raises(ConfigurationError) as refused:
        plan_of({"search/space": space, "search/seeds": 3})
    (problem,) = refused.value.problems
    assert problem.startswith(
        "point {'views.dropout_low': 0.3, 'views.dropout_high': 0.2}: stages.views: dropout must"
    )


def test_every_impossible_point_is_told() -> None:
    space = {"views.dropout_low": {"grid": [0.1, 0.3, 0.32]}, "views.dropout_high": {"grid": [0.35, 0.2]}}
    with pytest.raises(ConfigurationError) as refused:
        plan_of({"search/space": space})
    assert len(refused.value.problems) == 2


def test_values_without_effect_are_not_shown() -> None:
    planner = planner_of()
    values = {
        "views.margin": 0.1,
        "student.train.power": 3.0,
        "student.model.name": "resnet8",
        "student.seed": "trial",
    }
    trial = planner.trial(Point(values), 0)
    assert set(trial.values) == {"views.margin", "student.model.name", "student.seed"}
    swapped = planner.trial(
        Point({"student.method": "kd", "student.teacher": "$teacher", "views.margin": 0.1}), 0
    )
    assert set(swapped.values) == {"student.method", "student.teacher"}


def test_stages_come_with_inputs_first() -> None:
    seen: set[str] = set()
    stage: PlannedStage
    for stage in plan_of().stages.values():
        assert set(stage.inputs.values()) <= seen
        seen.add(stage.key)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "unknown"), (0.04, "0.0 s"), (9.94, "9.9 s"), (10, "10 s"), (59.4, "59 s"), (59.6, "1 min 00 s"),
        (75, "1 min 15 s"), (3599.7, "1 h 00 min"), (7380, "2 h 03 min"),
    ],
)  # fmt: skip
def test_durations(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text
