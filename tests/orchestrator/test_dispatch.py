"""Which trial may start next: a whole sweep simulated with sets instead of a store."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
from experiment_cases import planner_of

from orchestrator.dispatch import Dispatcher, Outcome
from orchestrator.plan import Planner, Trial
from orchestrator.search import ListSampler, make_sampler

NO_BASELINE: dict[str, Any] = {"baselines": {}, "search/seeds": 1}


class RecordingSampler(ListSampler):
    """Notes what it is told."""

    def __init__(self, points: Sequence[Mapping[str, Any]]) -> None:
        super().__init__(points)
        self.told: list[tuple[int, Sequence[float] | None]] = []

    def tell(self, index: int, values: Sequence[float] | None) -> None:
        self.told.append((index, values))


class World:
    """A dispatcher, what is stored and busy around it, and how often it asked."""

    def __init__(
        self,
        points: Sequence[Mapping[str, Any]] | None = None,
        changes: Mapping[str, Any] | None = None,
        recall: Callable[[Trial], Outcome | None] = lambda trial: None,
    ) -> None:
        self.stored: set[str] = set()
        self.busy: set[str] = set()
        self.asked: Counter[str] = Counter()
        self.planner: Planner = planner_of(NO_BASELINE | dict(changes or {}))
        self.sampler = RecordingSampler(points or [])
        sampler = self.sampler if points is not None else make_sampler(self.planner.spec.search)
        self.dispatcher = Dispatcher(
            self.planner, sampler, stored=self._ask_stored, busy=self._ask_busy, recall=recall
        )

    def _ask_stored(self, key: str) -> bool:
        self.asked["stored"] += 1
        return key in self.stored

    def _ask_busy(self, key: str) -> bool:
        self.asked["busy"] += 1
        return key in self.busy

    def start(self) -> list[Trial]:
        """Everything that can start now."""
        started = []
        while (trial := self.dispatcher.next()) is not None:
            started.append(trial)
        return started

    def finish(self, trial: Trial, value: float = 50.0) -> None:
        self.stored.update(stage.key for stage in trial.stages)
        self.dispatcher.ended(trial, Outcome(status="done", values=(value,)))

    def run(self, slots: int, value: Callable[[Trial], float] = lambda trial: 50.0) -> list[Trial]:
        """Run everything, ``slots`` trials at a time, the oldest ending first. Gives the trials in order of start."""
        order: list[Trial] = []
        running: list[Trial] = []
        while not self.dispatcher.finished:
            while len(running) < slots and (trial := self.dispatcher.next()) is not None:
                assert not self._in_conflict(trial, running)
                running.append(trial)
                order.append(trial)
            assert running, "nothing runs, nothing can start, and it is not finished"
            ended = running.pop(0)
            self.finish(ended, value(ended))
        return order

    def _in_conflict(self, trial: Trial, running: Sequence[Trial]) -> bool:
        made = {stage.key for other in running for stage in other.stages} - self.stored
        return any(stage.key in made for stage in trial.stages)


def margins(*values: float) -> list[dict[str, float]]:
    return [{"views.margin": value} for value in values]


def teacher_of(trial: Trial) -> str:
    return trial.stages[0].key


def test_trials_wait_for_a_stage_that_another_one_makes() -> None:
    world = World(margins(0.1, 0.2, 0.3))
    (first,) = world.start()
    assert len(world.dispatcher.waiting) == 2
    world.stored.add(teacher_of(first))
    assert len(world.start()) == 2
    assert set(world.dispatcher.running) == set(world.dispatcher.trials)


def test_others_start_meanwhile() -> None:
    points = [
        {"views.margin": 0.1}, {"views.margin": 0.2},
        {"teacher.model.name": "tiny_mlp", "views.margin": 0.1}, {"teacher.model.name": "tiny_mlp", "views.margin": 0.2},
    ]  # fmt: skip
    started = World(points).start()
    assert [trial.point.values for trial in started] == [points[0], points[2]]


def test_seeds_of_a_point_wait_for_their_common_stages_only() -> None:
    world = World(margins(0.1), {"search/seeds": 3})
    (first,) = world.start()
    world.stored.update(stage.key for stage in first.stages[:-1])
    assert [trial.seed for trial in world.start()] == [1, 2]


def test_work_elsewhere_holds_back() -> None:
    world = World(margins(0.1, 0.2))
    world.busy.add(world.planner.trial(next(iter(world_points(0.1))), 0).stages[1].key)
    (started,) = world.start()
    assert started.values == {"views.margin": 0.2}
    world.busy.clear()
    world.stored.add(teacher_of(started))
    assert [trial.values for trial in world.start()] == [{"views.margin": 0.1}]


def world_points(*values: float) -> Any:
    from orchestrator.plan import Point

    return [Point(point) for point in margins(*values)]


def test_a_stored_key_is_free_even_while_its_holder_goes_on() -> None:
    world = World(margins(0.1))
    trial = world.planner.trial(world_points(0.1)[0], 0)
    world.stored.update(stage.key for stage in trial.stages[:-1])
    world.busy.update(stage.key for stage in trial.stages[:-1])
    assert len(world.start()) == 1


def test_a_deferred_trial_comes_back() -> None:
    world = World(margins(0.1, 0.2))
    (first,) = world.start()
    world.busy.add(teacher_of(first))
    world.dispatcher.ended(first, Outcome(status="deferred"))
    assert world.start() == []
    assert not world.dispatcher.finished
    assert not world.dispatcher.outcomes
    world.busy.clear()
    assert len(world.start()) == 1


def test_after_a_deferral_the_store_is_asked_again() -> None:
    """The stage that it met was set aside as damaged: what we knew to be stored is not any more."""
    world = World(margins(0.1))
    trial = world.planner.trial(world_points(0.1)[0], 0)
    world.stored.add(teacher_of(trial))
    (started,) = world.start()
    world.stored.clear()
    world.busy.add(teacher_of(trial))
    world.dispatcher.ended(started, Outcome(status="deferred"))
    assert world.start() == []


def test_a_recalled_outcome_is_not_run_again() -> None:
    points = margins(0.1, 0.2)
    known = World(points).start()[0].key

    def recall(trial: Trial) -> Outcome | None:
        return Outcome(status="done", values=(71.0,)) if trial.key == known else None

    world = World(points, recall=recall)
    assert [trial.values for trial in world.run(slots=1)] == [{"views.margin": 0.2}]
    assert world.sampler.told == [(0, (71.0,)), (1, (50.0,))]


def test_everything_recalled_is_finished_at_once() -> None:
    world = World(margins(0.1, 0.2), recall=lambda trial: Outcome(status="done", values=(1.0,)))
    assert world.dispatcher.finished
    assert world.dispatcher.next() is None
    assert len(world.dispatcher.outcomes) == 2


def test_a_point_is_worth_the_mean_of_its_seeds_told_once() -> None:
    world = World(margins(0.1, 0.2), {"search/seeds": 2})
    world.run(2, lambda trial: 70.0 + 4 * trial.seed + 100 * trial.values["views.margin"])
    assert world.sampler.told == [(0, (82.0,)), (1, (92.0,))]


def test_two_objectives_are_averaged_apart() -> None:
    world = World(margins(0.1), {"search/seeds": 2})
    for seed, outcome in enumerate([(1.0, 10.0), (2.0, 30.0)]):
        (trial,) = world.start()
        assert trial.seed == seed
        world.dispatcher.ended(trial, Outcome(status="done", values=outcome))
    assert world.sampler.told == [(0, (1.5, 20.0))]


def test_a_repeated_point_runs_once_and_shares_its_answer() -> None:
    world = World([*margins(0.1, 0.1), {"views.margin": 0.1, "student.train.power": 2.0}, *margins(0.2, 0.1)])
    assert len(world.run(slots=1)) == 2
    assert sorted(world.sampler.told) == [
        (0, (50.0,)),
        (1, (50.0,)),
        (2, (50.0,)),
        (3, (50.0,)),
        (4, (50.0,)),
    ]
    assert len(world.dispatcher.trials) == 2


def test_a_point_with_a_failed_seed_is_worth_nothing() -> None:
    world = World(margins(0.1), {"search/seeds": 2})
    (first,) = world.start()
    world.dispatcher.ended(first, Outcome(status="failed", reason="Diverged: x"))
    (second,) = world.start()
    assert world.sampler.told == []
    world.finish(second)
    assert world.sampler.told == [(0, None)]
    assert world.dispatcher.values(first.point_id) is None
    assert world.dispatcher.finished


def test_an_impossible_point_is_told_and_kept() -> None:
    world = World([{"views.dropout_low": 0.9}, *margins(0.1)])
    world.run(slots=1)
    ((point, reason),) = world.dispatcher.broken
    assert point.values == {"views.dropout_low": 0.9}
    assert "dropout must satisfy" in reason
    assert world.sampler.told == [(0, None), (1, (50.0,))]


def test_a_baseline_that_trains_what_a_point_does_is_one_trial() -> None:
    baselines = {"same": {"views": {"method": "angular_views", "teacher": "$teacher", "margin": 0.1}}}
    world = World(margins(0.1), {"baselines": baselines})
    (trial,) = world.run(slots=2)
    assert trial.point.label == "same"
    assert world.sampler.told == [(0, (50.0,))]


def test_points_that_fix_the_last_seed_share_trials_with_others() -> None:
    world = World([{"student.seed": "trial"}, {"student.seed": 1}], {"search/seeds": 2})
    assert len(world.run(1, lambda trial: float(trial.final.seed))) == 2
    assert world.sampler.told == [(0, (0.5,)), (1, (1.0,))]


CONFIRM = {
    "search/confirm": {"top": 2, "seeds": 3},
    "baselines": {"kd": {"student": {"method": "kd", "teacher": "$teacher"}}},
}


@pytest.mark.parametrize(("direction", "best"), [("maximize", {0.3, 0.4}), ("minimize", {0.1, 0.2})])
def test_the_best_points_and_the_baselines_get_more_seeds(direction: str, best: set[float]) -> None:
    world = World(margins(0.3, 0.1, 0.4, 0.2), {**CONFIRM, "search/objective": {direction: "student.top1"}})
    order = world.run(3, lambda trial: 100 * trial.values.get("views.margin", 0))
    seeds = Counter(trial.values.get("views.margin", trial.point.label) for trial in order)
    assert seeds == {"kd": 3, **{margin: 3 if margin in best else 1 for margin in (0.1, 0.2, 0.3, 0.4)}}
    assert all(trial.seed == 0 for trial in order[:4] if trial.point.label is None)
    assert len(world.sampler.told) == 4  # confirmation is no question of the search


def test_failed_stopped_and_endless_points_are_not_confirmed() -> None:
    world = World(margins(0.1, 0.2, 0.3, 0.4), {"search/confirm": {"top": 3, "seeds": 2}})
    outcomes = {
        0.1: Outcome(status="failed", reason="x"), 0.2: Outcome(status="stopped", values=(99.0,)),
        0.3: Outcome(status="done", values=(float("nan"),)), 0.4: Outcome(status="done", values=(1.0,)),
    }  # fmt: skip
    for _ in outcomes:
        (trial,) = world.start()
        world.dispatcher.ended(trial, outcomes[trial.values["views.margin"]])
    assert [(trial.values, trial.seed) for trial in world.start()] == [({"views.margin": 0.4}, 1)]


def test_confirmation_is_recalled_too() -> None:
    first = World(margins(0.1, 0.2), CONFIRM)
    first.run(1, lambda trial: trial.values.get("views.margin", 0))
    again = World(margins(0.1, 0.2), CONFIRM, recall=lambda trial: first.dispatcher.outcomes.get(trial.key))
    assert again.dispatcher.finished
    assert again.dispatcher.outcomes == first.dispatcher.outcomes


def test_after_a_cancellation_nothing_starts() -> None:
    world = World(margins(0.1, 0.2, 0.3), CONFIRM)
    (running,) = world.start()
    world.dispatcher.cancel_waiting()
    assert not world.dispatcher.finished
    world.dispatcher.ended(running, Outcome(status="deferred"))  # it stopped after its epoch
    assert world.start() == []
    assert world.dispatcher.finished
    assert world.dispatcher.waiting == ()


def test_a_cancelled_sweep_draws_no_more() -> None:
    world = World(None, {"search/algorithm": "optuna", "search/num_ahead": 1})
    (running,) = world.start()
    world.dispatcher.cancel_waiting()
    world.finish(running)
    assert world.start() == []
    assert world.dispatcher.finished
    assert len(world.dispatcher.trials) == 1


@pytest.mark.parametrize("slots", [1, 3, 20])
def test_optuna_runs_to_the_end_with_any_number_of_slots(slots: int) -> None:
    changes = {
        "search/algorithm": "optuna", "search/num_samples": 15, "search/num_ahead": 4, "search/seeds": 2,
        "search/space": {"views.margin": {"uniform": [0.1, 0.4]}, "views.num_branches": {"randint": [1, 4]}},
    }  # fmt: skip
    order = World(None, changes).run(slots, lambda trial: trial.values["views.margin"])
    assert len(order) == 30
    reference = World(None, changes).run(1, lambda trial: trial.values["views.margin"])
    assert {trial.key for trial in order} == {trial.key for trial in reference}


def test_a_sweep_of_two_thousand_trials_asks_little() -> None:
    """100 teachers of 20 students each. While most trials wait, they must not all be looked up again and again."""
    points = [
        {"teacher.label_smoothing": teacher / 200, "views.margin": 0.1 + student / 100}
        for teacher in range(100)
        for student in range(20)
    ]
    world = World(points)
    assert len(world.run(slots=8)) == 2000
    distinct = len({stage.key for trial in world.dispatcher.trials.values() for stage in trial.stages})
    assert distinct == 100 + 2000 + 2000
    assert world.asked["stored"] < 4 * distinct
    assert world.asked["busy"] < 4 * distinct


def test_waiting_costs_one_look_per_round() -> None:
    world = World(margins(*(0.1 + index / 1000 for index in range(300))))
    world.start()
    world.asked.clear()
    assert world.dispatcher.next() is None
    assert world.asked["stored"] == 1
    assert world.asked["busy"] == 0


def test_uses_of_stages_are_counted() -> None:
    world = World(margins(0.1, 0.2))
    (trial,) = world.start()
    assert world.dispatcher.tally.uses[teacher_of(trial)] == 2
