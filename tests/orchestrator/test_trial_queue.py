"""Critical path: what most trials wait for is begun first, and what waits is not looked at again and again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from experiment_cases import planner_of

from orchestrator.plan import PlannedStage, Planner, Point, Trial
from orchestrator.tally import StageTally
from orchestrator.trial_queue import TrialQueue

PLANNER = planner_of({"baselines": {}, "search/seeds": 1})
SMALL, LARGE = {"teacher.model.name": "tiny_mlp"}, {"teacher.model.name": "tiny_cnn"}


class Line:
    """A queue with what is stored and in work around it."""

    def __init__(
        self,
        points: Sequence[Mapping[str, Any]],
        costs: Mapping[str, float] | None = None,
        planner: Planner = PLANNER,
    ) -> None:
        self.stored: set[str] = set()
        self.working: set[str] = set()
        self.costs = dict(costs or {})
        self.num_looks = 0
        self.tally = StageTally()
        self.queue = TrialQueue(self.tally.uses, self.stored.__contains__, self._seconds)
        self.trials = [planner.trial(Point(dict(point)), 0) for point in points]
        for trial in self.trials:
            self.tally.add(trial)
            self.queue.push(trial)

    def _seconds(self, stage: PlannedStage) -> float | None:
        model = stage.spec.model
        return self.costs.get(model.name if model else "views")

    def _holds(self, key: str) -> bool:
        self.num_looks += 1
        return key in self.working and key not in self.stored

    def take(self) -> Trial | None:
        """The next one, which then makes all it lacks."""
        trial = self.queue.take(
            held_by=lambda trial: next((stage.key for stage in trial.stages if self._holds(stage.key)), None),
            is_free=lambda key: not self._holds(key),
        )
        if trial is not None:
            self.working |= {stage.key for stage in trial.stages}
        return trial

    def order(self) -> list[dict[str, Any]]:
        """Points in order of their start, each trial ended before the next."""
        order = []
        while (trial := self.take()) is not None:
            order.append(dict(trial.point.values))
            self.stored |= {stage.key for stage in trial.stages}
            self.working.clear()
        return order


def points(teacher: Mapping[str, Any], *margins: float) -> list[dict[str, Any]]:
    return [{**teacher, "views.margin": margin} for margin in margins]


def test_what_most_wait_for_comes_first() -> None:
    few, many = points(SMALL, 0.1, 0.2), points(LARGE, 0.1, 0.2, 0.3)
    assert Line([*few, *many]).order() == [many[0], few[0], few[1], many[1], many[2]]


def test_a_long_stage_outweighs_a_number() -> None:
    few, many = points(LARGE, 0.1, 0.2), points(SMALL, 0.1, 0.2, 0.3)
    costs = {"tiny_cnn": 100.0, "tiny_mlp": 10.0, "mini_cnn": 1.0, "views": 1.0}
    assert Line([*many, *few], costs).order()[0] == few[0]
    assert Line([*many, *few], {**costs, "tiny_cnn": 12.0}).order()[0] == many[0]


def test_where_nothing_is_known_a_stage_costs_what_others_do() -> None:
    few, many = points(LARGE, 0.1, 0.2), points(SMALL, 0.1, 0.2, 0.3)
    assert Line([*few, *many], {"tiny_cnn": 100.0}).order()[0] == many[0]


def test_costs_that_become_known_change_the_order() -> None:
    few, many = points(LARGE, 0.1, 0.2), points(SMALL, 0.1, 0.2, 0.3)
    third = points({"teacher.label_smoothing": 0.1}, *(margin / 100 for margin in range(10, 15)))
    line = Line([*few, *many, *third])
    first = line.take()
    assert first is not None
    assert dict(first.point.values) == third[0]
    line.costs.update(tiny_cnn=100.0, tiny_mlp=1.0)
    line.queue.learn_costs()
    second = line.take()
    assert second is not None
    assert dict(second.point.values) == few[0]


def test_where_nobody_waits_the_first_comes_first() -> None:
    alone = [{"teacher.label_smoothing": index / 10, "views.margin": 0.1} for index in (3, 1, 2)]
    assert Line(alone).order() == alone


def test_all_come_back_when_what_held_them_is_stored() -> None:
    line = Line(points(SMALL, 0.1, 0.2, 0.3))
    first = line.take()
    assert first is not None
    assert line.take() is None
    assert len(line.queue) == 2
    assert list(line.queue) == line.trials[1:]
    line.stored.add(first.stages[0].key)
    assert [line.take(), line.take(), line.take()] == [*line.trials[1:], None]
    assert len(line.queue) == 0


def test_one_comes_back_when_its_maker_failed() -> None:
    """It makes the stage, or fails likewise; the others would only wait for it."""
    line = Line(points(SMALL, *(index / 100 for index in range(10, 40))))
    for trial in line.trials[:5]:
        assert line.take() is trial
        assert line.take() is None
        line.num_looks = 0
        line.working.clear()
    assert line.take() is line.trials[5]
    assert line.num_looks <= 8


@pytest.mark.parametrize("num_trials", [20, 80])
def test_a_look_costs_the_same_however_many_wait(num_trials: int) -> None:
    line = Line(points(SMALL, *(0.1 + index / 1000 for index in range(num_trials))))
    line.take()
    line.take()
    line.num_looks = 0
    assert line.take() is None
    assert line.num_looks == 1


def test_a_cleared_queue_is_empty() -> None:
    line = Line(points(SMALL, 0.1, 0.2))
    line.take()
    line.take()
    line.queue.clear()
    assert (len(line.queue), list(line.queue), line.take()) == (0, [], None)


def test_the_tally_counts_distinct_stages() -> None:
    tally, trials = StageTally(), Line(points(SMALL, 0.1, 0.2)).trials
    for trial in trials:
        tally.add(trial)
    teacher, students = tally.names["teacher"], tally.names["student"]
    assert (teacher.num_all, teacher.num_uses, teacher.num_shared) == (1, 2, 1)
    assert (students.num_all, students.num_shared) == (2, 0)
    assert sorted(number for _, number in tally.left()) == [1, 2, 2]
    tally.end(trials[0].stages[0], "done")
    tally.end(trials[0].stages[0], "failed")  # it stays done
    assert (teacher.num_done, teacher.num_failed, teacher.num_open) == (1, 0, 0)
    for ending in ("failed", "failed", "done"):
        tally.end(trials[0].final, ending)
    assert (students.num_done, students.num_failed, students.num_open) == (1, 0, 1)
    assert {stage.name: number for stage, number in tally.left()} == {"views": 2, "student": 1}
    assert tally.has_ended(trials[0].key)
    assert not tally.has_ended(trials[1].key)
