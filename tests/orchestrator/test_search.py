"""Samplers: the same answers lead to the same points, whatever the order in which trials finish."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from experiment_cases import spec_of

from orchestrator.search import ListSampler, OptunaSampler, Sampler, known_points, make_sampler
from orchestrator.spec import SearchSettings

SPACE = {
    "views.margin": {"uniform": [0.05, 0.5]},
    "views.logit_inter_weight": {"loguniform": [0.05, 10]},
    "views.num_branches": {"randint": [1, 9]},
    "student.model": {"choice": ["mini_cnn", "resnet8"]},
}
TWO = [{"maximize": "student.top1"}, {"minimize": "student.num_parameters"}]

Worth = Callable[[int, dict[str, Any]], Sequence[float] | None]


def search(algorithm: str = "optuna", **changes: Any) -> SearchSettings:
    own = {"search/space": SPACE, "search/algorithm": algorithm, "search/num_samples": 24}
    return spec_of(own | {f"search/{name}": value for name, value in changes.items()}).search


def worth(index: int, point: dict[str, Any]) -> Sequence[float]:
    return [80 - 100 * (point["views.margin"] - 0.3) ** 2 + point["views.num_branches"]]


def simulate(sampler: Sampler, slots: int, worth: Worth, order: random.Random | None) -> list[dict[str, Any]]:
    """Run ``slots`` points at a time; the next to finish is the oldest, or any one drawn from ``order``."""
    points: list[dict[str, Any]] = []
    running: list[int] = []
    while True:
        while len(running) < slots and (point := sampler.ask()) is not None:
            running.append(len(points))
            points.append(point)
        if not running:
            assert sampler.exhausted
            return points
        index = running.pop(order.randrange(len(running)) if order else 0)
        sampler.tell(index, worth(index, points[index]))


@pytest.mark.parametrize("lag", [1, 3])
@pytest.mark.parametrize("objective", [TWO[0], TWO])
def test_points_do_not_depend_on_the_order_of_answers(lag: int, objective: Any) -> None:
    def value(index: int, point: dict[str, Any]) -> Sequence[float] | None:
        first = worth(index, point)
        return None if index % 7 == 3 else first if objective is TWO[0] else [*first, float(index % 5)]

    settings = search(objective=objective, num_ahead=lag)
    first = simulate(OptunaSampler(settings), lag, value, None)
    assert len(first) == 24
    for seed in range(3):
        assert simulate(OptunaSampler(settings), lag, value, random.Random(seed)) == first


def test_points_do_not_depend_on_how_many_run_at_a_time() -> None:
    """So the same command on another machine, or a look at the results without one, finds the same points."""
    alone, many = (simulate(OptunaSampler(search()), slots, worth, random.Random(1)) for slots in (1, 20))
    assert alone == many


def test_the_search_learns_and_its_seed_matters() -> None:
    points = simulate(OptunaSampler(search(num_ahead=1)), 1, worth, None)
    assert points != simulate(OptunaSampler(search(seed=1, num_ahead=1)), 1, worth, None)
    assert points != simulate(OptunaSampler(search(num_ahead=1)), 1, lambda i, p: [-worth(i, p)[0]], None)
    assert [set(point) for point in points] == [set(SPACE)] * 24
    for point in points:
        assert 0.05 <= point["views.margin"] <= 0.5
        assert isinstance(point["views.num_branches"], int)
        assert 1 <= point["views.num_branches"] < 9
        assert point["student.model"] in ("mini_cnn", "resnet8")


def test_nsga_for_two_objectives() -> None:
    sampler = OptunaSampler(search(objective=TWO))
    assert type(sampler._study.sampler).__name__ == "NSGAIISampler"
    assert [direction.name for direction in sampler._study.directions] == ["MAXIMIZE", "MINIMIZE"]
    assert type(OptunaSampler(search())._study.sampler).__name__ == "TPESampler"


def test_no_more_points_than_the_lag_are_out() -> None:
    sampler = OptunaSampler(search(num_ahead=3))
    assert [sampler.ask() is None for _ in range(5)] == [False, False, False, True, True]
    sampler.tell(1, [1.0])
    assert sampler.ask() is None  # the oldest answer is still out
    sampler.tell(0, [1.0])
    assert sampler.ask() is not None


@pytest.mark.parametrize("value", [None, [float("nan")], [float("inf")]])
def test_failed_points_do_not_stop_the_search(value: Sequence[float] | None) -> None:
    assert len(simulate(OptunaSampler(search()), 2, lambda index, point: value, None)) == 24


def test_random_points_follow_from_the_seed() -> None:
    points = known_points(search("random"))
    assert points is not None
    assert len(points) == 24
    assert points == known_points(search("random"))
    assert points != known_points(search("random", seed=1))
    longer = known_points(search("random", num_samples=30))
    assert longer is not None
    assert longer[:24] == points  # an extended search keeps its first points


def test_grid_takes_all_points_whatever_the_number_of_samples() -> None:
    space = {"views.margin": {"grid": [0.1, 0.2]}, "views.num_branches": {"grid": [1, 3]}}
    points = known_points(search("grid", space=space, num_samples=1))
    assert points == [
        {"views.margin": 0.1, "views.num_branches": 1}, {"views.margin": 0.1, "views.num_branches": 3},
        {"views.margin": 0.2, "views.num_branches": 1}, {"views.margin": 0.2, "views.num_branches": 3},
    ]  # fmt: skip


@pytest.mark.parametrize("algorithm", ["grid", "random", "optuna"])
def test_an_empty_space_is_one_point(algorithm: str) -> None:
    assert known_points(search(algorithm, space={})) == [{}]


@pytest.mark.parametrize(("algorithm", "kind"), [("random", ListSampler), ("optuna", OptunaSampler)])
def test_make_sampler(algorithm: str, kind: type) -> None:
    assert isinstance(make_sampler(search(algorithm)), kind)


def test_a_list_is_given_out_once() -> None:
    sampler = ListSampler([{"a": 1}, {"a": 2}])
    assert not sampler.exhausted
    assert [sampler.ask(), sampler.ask(), sampler.ask()] == [{"a": 1}, {"a": 2}, None]
    assert sampler.exhausted
