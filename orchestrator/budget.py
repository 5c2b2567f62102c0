"""The limits of a sweep: what it may hold and spend, and how far it is over. Pure rules."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from orchestrator.cost import HOUR_SECONDS, MachineTime, PriceSettings, amount

__all__ = ["BudgetSettings", "exceeded", "overshoot_text"]


@dataclass(frozen=True, kw_only=True, slots=True)
class BudgetSettings:
    """Limits at which a sweep stops cleanly. All of its runs count together, lost work included, but for ``hours``."""

    gpu_hours: float | None = None
    """GPUs x hours that all runs of this sweep may hold."""
    cpu_hours: float | None = None
    """CPU cores x hours that all runs of this sweep may hold."""
    money: float | None = None
    """What all runs of this sweep may cost, by ``run.prices``."""
    hours: float | None = None
    """How long this run may take by the clock."""

    def __post_init__(self) -> None:
        limits = {name: getattr(self, name) for name in ("gpu_hours", "cpu_hours", "money", "hours")}
        for name, limit in limits.items():
            if limit is not None and not 0 < limit < math.inf:
                raise ValueError(f"{name} must be finite and above 0, got {limit}")
        if all(limit is None for limit in limits.values()):
            raise ValueError(
                f"a budget limits something ({', '.join(limits)}); set one, or remove run.budget"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Level:
    """Where one limit stands."""

    name: str
    unit: str
    reached: float
    limit: float

    @property
    def text(self) -> str:
        return f"{amount(self.reached)} of {amount(self.limit)} {self.unit} (run.budget.{self.name})"


def exceeded(
    budget: BudgetSettings | None, prices: PriceSettings | None, spent: MachineTime, elapsed_seconds: float
) -> list[str]:
    """One text per limit that is reached: ``101 of 100 GPU-h (run.budget.gpu_hours)``. Empty: go on."""
    return [
        level.text
        for level in _levels(budget, prices, spent, elapsed_seconds)
        if level.reached >= level.limit
    ]


def overshoot_text(
    budget: BudgetSettings | None, prices: PriceSettings | None, spent: MachineTime, elapsed_seconds: float
) -> str:
    """By how much each reached limit was passed: ``1.02 of 1.00 CPU-h (run.budget.cpu_hours), 0.02 over``."""
    return "; ".join(
        f"{level.text}, {amount(level.reached - level.limit)} over"
        for level in _levels(budget, prices, spent, elapsed_seconds)
        if level.reached >= level.limit
    )


def _levels(
    budget: BudgetSettings | None, prices: PriceSettings | None, spent: MachineTime, elapsed_seconds: float
) -> Iterator[_Level]:
    if budget is None:
        return
    levels = [
        ("gpu_hours", "GPU-h", spent.gpu_hours),
        ("cpu_hours", "CPU-h", spent.cpu_hours),
        ("hours", "h", elapsed_seconds / HOUR_SECONDS),
    ]
    if prices is not None:
        levels.append(("money", prices.currency, spent.money(prices)))
    for name, unit, reached in levels:
        limit = getattr(budget, name)
        if limit is not None:
            yield _Level(name=name, unit=unit, reached=reached, limit=limit)
