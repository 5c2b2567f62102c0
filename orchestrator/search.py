"""Which points to try: every point of a grid, random draws, or Optuna's suggestions. Pure apart from Optuna's own state.

A sampler is asked for the next point and told what each point was worth. All of them are deterministic: the same
answers lead to the same points, whatever the order in which trials finish.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from orchestrator.space import Domain, grid_points, random_point
from orchestrator.spec import SearchSettings

__all__ = ["ListSampler", "OptunaSampler", "Sampler", "known_points", "make_sampler"]


class Sampler(Protocol):
    """Asked for points in order, told values in any order."""

    def ask(self) -> dict[str, Any] | None:
        """The next point; None when it first has to be told more, or when it is exhausted."""

    def tell(self, index: int, values: Sequence[float] | None) -> None:
        """What the ``index``-th point was worth, one number per objective; None when it failed."""

    @property
    def exhausted(self) -> bool:
        """Whether every point has been asked for."""


class ListSampler:
    """Points that are known from the start."""

    def __init__(self, points: Iterable[Mapping[str, Any]]) -> None:
        self._points = [dict(point) for point in points]
        self._next = 0

    def ask(self) -> dict[str, Any] | None:
        if self.exhausted:
            return None
        self._next += 1
        return self._points[self._next - 1]

    def tell(self, index: int, values: Sequence[float] | None) -> None:
        pass

    @property
    def exhausted(self) -> bool:
        return self._next >= len(self._points)


class OptunaSampler:
    """TPE for one objective, NSGA-II for two.

    Optuna's next suggestion depends on what it was told before. To be reproducible, answers are passed on in the
    order of the points, and the k-th point is drawn when exactly the answers up to k - ``num_ahead`` are known.
    """

    def __init__(self, search: SearchSettings) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._space = search.space
        self._num_points = search.num_samples
        self._num_ahead = search.num_ahead
        single = len(search.objectives) == 1
        self._study = optuna.create_study(
            directions=["maximize" if objective.maximize else "minimize" for objective in search.objectives],
            sampler=optuna.samplers.TPESampler(seed=search.seed, multivariate=False) if single
            else optuna.samplers.NSGAIISampler(seed=search.seed),
        )  # fmt: skip
        self._asked: list[Any] = []
        self._answers: dict[int, Sequence[float] | None] = {}
        self._num_told = 0

    def ask(self) -> dict[str, Any] | None:
        if self.exhausted or not self._catch_up(len(self._asked) - self._num_ahead + 1):
            return None
        trial = self._study.ask()
        self._asked.append(trial)
        return {name: _suggest(trial, name, domain) for name, domain in self._space.items()}

    def tell(self, index: int, values: Sequence[float] | None) -> None:
        self._answers[index] = values

    @property
    def exhausted(self) -> bool:
        return len(self._asked) >= self._num_points

    def _catch_up(self, num_needed: int) -> bool:
        """Pass on answers in order until ``num_needed`` are known to the study; False when one is still out."""
        from optuna.trial import TrialState

        while self._num_told < num_needed:
            if self._num_told not in self._answers:
                return False
            values = self._answers[self._num_told]
            trial = self._asked[self._num_told]
            if values is None or any(math.isnan(value) for value in values):
                self._study.tell(trial, state=TrialState.FAIL)
            else:
                self._study.tell(trial, list(values))
            self._num_told += 1
        return True


def _suggest(trial: Any, name: str, domain: Domain) -> Any:
    if domain.is_list:
        return domain.values[trial.suggest_categorical(name, range(len(domain.values)))]
    low, high = domain.values
    if domain.kind == "randint":
        return trial.suggest_int(name, int(low), int(high) - 1)
    return trial.suggest_float(name, low, high, log=domain.kind == "loguniform")


def known_points(search: SearchSettings) -> list[dict[str, Any]] | None:
    """All points of the search when they do not depend on results, else None."""
    if search.algorithm == "grid" or not search.space:
        return list(grid_points(search.space))
    if search.algorithm == "random":
        generator = random.Random(search.seed)
        return [random_point(search.space, generator) for _ in range(search.num_samples)]
    return None


def make_sampler(search: SearchSettings) -> Sampler:
    """The sampler of an experiment."""
    points = known_points(search)
    return ListSampler(points) if points is not None else OptunaSampler(search)
