"""Domains and the points drawn from them."""

from __future__ import annotations

import random
from typing import Any

import pytest

from orchestrator.settings import Problems
from orchestrator.space import (
    Domain,
    choice,
    grid,
    grid_points,
    loguniform,
    parse_domain,
    randint,
    random_point,
    uniform,
)

DOMAINS = [
    ({"grid": [1, "a", None]}, grid([1, "a", None])),
    ({"choice": [1, 2]}, choice([1, 2])),
    ({"uniform": [0, 1.5]}, uniform(0, 1.5)),
    ({"loguniform": [0.01, 1]}, loguniform(0.01, 1)),
    ({"randint": [1, 4]}, randint(1, 4)),
]


@pytest.mark.parametrize(("plain", "domain"), DOMAINS)
def test_yaml_and_python_give_the_same_domain(plain: dict[str, Any], domain: Domain) -> None:
    problems = Problems()
    assert parse_domain(plain, "x", problems) == domain == parse_domain(domain, "x", problems)
    assert domain.to_plain() == plain
    assert not problems


@pytest.mark.parametrize(
    ("plain", "expected"),
    [
        ({"grid": []}, "grid is empty"),
        ({"choice": []}, "choice is empty"),
        ({"uniform": [1]}, "needs two numbers"),
        ({"uniform": [0, "1"]}, "needs two numbers"),
        ({"uniform": [False, True]}, "needs two numbers"),
        ({"uniform": [1, 1]}, "low < high"),
        ({"uniform": [0, float("nan")]}, "low < high"),
        ({"loguniform": [0, 1]}, "0 < low"),
        ({"randint": [0, 1.5]}, "whole numbers"),
        ({"uniform": [0, float("inf")]}, "finite"),
        ({"randint": [0, float("inf")]}, "finite"),
        ({"uniform": [float("nan"), 1]}, "finite"),
        ({"grid": [1], "choice": [1]}, "expected one of grid"),
        ({}, "expected one of grid"),
        ({"gird": [1]}, "did you mean 'grid'?"),
        ({"grid": "abc"}, "needs a list"),
        ([1], "expected one of grid"),
    ],
)
def test_what_is_no_domain_is_refused(plain: Any, expected: str) -> None:
    problems = Problems()
    assert parse_domain(plain, "search.space.a.b", problems) is None
    (problem,) = problems
    assert problem.startswith("search.space.a.b: ")
    assert expected in problem


def test_a_grid_has_every_combination_with_the_last_axis_fastest() -> None:
    points = list(grid_points({"a": grid([1, 2]), "b": grid(["x", "y", "z"])}))
    assert [tuple(point.values()) for point in points] == [
        (1, "x"), (1, "y"), (1, "z"), (2, "x"), (2, "y"), (2, "z"),
    ]  # fmt: skip
    assert list(grid_points({})) == [{}]


def test_draws_stay_inside_and_reach_the_ends() -> None:
    space = {"u": uniform(-1, 2), "l": loguniform(0.01, 1), "r": randint(1, 4), "c": choice(["a", "b"])}
    generator = random.Random(0)
    points = [random_point(space, generator) for _ in range(2000)]
    assert {point["r"] for point in points} == {1, 2, 3}
    assert {point["c"] for point in points} == {"a", "b"}
    assert -1 <= min(point["u"] for point in points) < -0.9
    assert 1.9 < max(point["u"] for point in points) <= 2
    below = sum(point["l"] < 0.1 for point in points)
    assert 900 < below < 1100  # half of the decades


def test_draws_follow_from_the_seed() -> None:
    space = {"u": uniform(0, 1)}
    assert random_point(space, random.Random(3)) == random_point(space, random.Random(3))
    assert random_point(space, random.Random(3)) != random_point(space, random.Random(4))


@pytest.mark.parametrize(
    ("domain", "probes"), [(randint(1, 4), (1, 3)), (uniform(0, 1), (0, 1)), (grid([5, 6, 7]), (5, 6, 7))]
)
def test_probes(domain: Domain, probes: tuple[Any, ...]) -> None:
    assert domain.probes() == probes
