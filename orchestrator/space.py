"""What may vary: the domains of a search space and the points drawn from them. Pure."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from orchestrator.settings import Problems, nearest

__all__ = [
    "Domain",
    "choice",
    "grid",
    "grid_points",
    "loguniform",
    "parse_domain",
    "randint",
    "random_point",
    "uniform",
]

Kind = Literal["grid", "choice", "uniform", "loguniform", "randint"]
KINDS: tuple[Kind, ...] = ("grid", "choice", "uniform", "loguniform", "randint")


@dataclass(frozen=True, slots=True)
class Domain:
    """The values that one setting may take: a list for grid and choice, else the two ends of a range."""

    kind: Kind
    values: tuple[Any, ...]

    def __post_init__(self) -> None:
        if not self.values:
            raise ValueError(f"{self.kind} is empty: list at least one value")
        if self.kind in ("grid", "choice"):
            return
        if len(self.values) != 2 or not all(_is_number(value) for value in self.values):
            raise ValueError(f"{self.kind} needs two numbers [low, high], got {list(self.values)!r}")
        low, high = self.values
        if not -math.inf < low < high < math.inf:
            raise ValueError(f"{self.kind} needs finite numbers with low < high, got {list(self.values)!r}")
        if self.kind == "loguniform" and low <= 0:
            raise ValueError(f"loguniform needs 0 < low, got {list(self.values)!r}")
        if self.kind == "randint" and not all(float(value).is_integer() for value in self.values):
            raise ValueError(f"randint needs whole numbers, got {list(self.values)!r}")

    @property
    def is_list(self) -> bool:
        return self.kind in ("grid", "choice")

    def probes(self) -> tuple[Any, ...]:
        """Values with which a setting is checked before anything starts: all of a list, the ends of a range."""
        if self.kind == "randint":
            return (int(self.values[0]), int(self.values[1]) - 1)
        return self.values

    def draw(self, generator: random.Random) -> Any:
        if self.is_list:
            return generator.choice(self.values)
        low, high = self.values
        if self.kind == "randint":
            return generator.randrange(int(low), int(high))
        if self.kind == "loguniform":
            return math.exp(generator.uniform(math.log(low), math.log(high)))
        return generator.uniform(low, high)

    def to_plain(self) -> dict[str, list[Any]]:
        return {self.kind: list(self.values)}


def grid(values: Sequence[Any]) -> Domain:
    """Every one of these values."""
    return Domain("grid", tuple(values))


def choice(values: Sequence[Any]) -> Domain:
    """One of these values, drawn."""
    return Domain("choice", tuple(values))


def uniform(low: float, high: float) -> Domain:
    """A number between ``low`` and ``high``."""
    return Domain("uniform", (low, high))


def loguniform(low: float, high: float) -> Domain:
    """A number between ``low`` and ``high``, its logarithm evenly spread."""
    return Domain("loguniform", (low, high))


def randint(low: int, high: int) -> Domain:
    """A whole number from ``low`` up to, not including, ``high`` (as in Ray Tune and NumPy)."""
    return Domain("randint", (low, high))


def parse_domain(value: Any, path: str, problems: Problems) -> Domain | None:
    """``{grid: [...]}`` and its like, or a ``Domain`` made in Python."""
    if isinstance(value, Domain):
        return value
    if not isinstance(value, Mapping) or len(value) != 1:
        problems.add(path, f"expected one of {', '.join(f'{kind}: [...]' for kind in KINDS)}; got {value!r}")
        return None
    kind, values = next(iter(value.items()))
    if kind not in KINDS:
        problems.add(path, f"{kind!r} is not a kind of domain{nearest(kind, KINDS)}")
        return None
    if not isinstance(values, list | tuple):
        problems.add(path, f"{kind} needs a list, got {values!r}")
        return None
    try:
        return Domain(kind, tuple(values))
    except ValueError as error:
        problems.add(path, str(error))
        return None


def grid_points(space: Mapping[str, Domain]) -> Iterator[dict[str, Any]]:
    """Every combination, the last axis fastest. An empty space has one point without values."""
    for values in itertools.product(*(domain.values for domain in space.values())):
        yield dict(zip(space, values, strict=True))


def random_point(space: Mapping[str, Domain], generator: random.Random) -> dict[str, Any]:
    return {name: domain.draw(generator) for name, domain in space.items()}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
