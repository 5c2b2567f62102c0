"""What machine time is, what it costs, and how much of it a stage holds. Pure arithmetic.

Machine time is time for which a core or a GPU was *held*, busy or not: that is what a cluster bills.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orchestrator.spec import RunSettings

__all__ = [
    "HOUR_SECONDS",
    "NOTHING_SPENT",
    "NO_TIME",
    "MachineTime",
    "PriceSettings",
    "Resources",
    "Spent",
    "amount",
    "cost_text",
    "stage_resources",
]

HOUR_SECONDS = 3600.0


@dataclass(frozen=True, kw_only=True, slots=True)
class PriceSettings:
    """What machine time costs."""

    gpu_hour: float = 0.0
    """Price of one GPU for an hour."""
    cpu_hour: float = 0.0
    """Price of one CPU core for an hour; 0 where a GPU's price includes its cores."""
    currency: str = "EUR"
    """Only shown, never converted."""

    def __post_init__(self) -> None:
        for name in ("gpu_hour", "cpu_hour"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be finite and not negative, got {getattr(self, name)}")
        if self.gpu_hour == self.cpu_hour == 0:
            raise ValueError("gpu_hour and cpu_hour are both 0; give a price, or remove run.prices")
        if not self.currency.strip():
            raise ValueError(f"currency must not be empty, got {self.currency!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class MachineTime:
    """Time for which cores and GPUs were, or will be, held. Two cores for a minute are 120 CPU-seconds."""

    cpu_seconds: float = 0.0
    gpu_seconds: float = 0.0

    @classmethod
    def of_artifact(cls, manifest: Mapping[str, Any]) -> MachineTime:
        """What the training of a finished stage held. Manifests of older versions tell the workers only."""
        cost = manifest.get("cost", {})
        workers = manifest.get("placement", {}).get("workers", 1)
        return cls(
            cpu_seconds=float(cost.get("held_cpu_seconds", cost.get("seconds", 0.0) * workers)),
            gpu_seconds=float(cost.get("gpu_seconds", 0.0)),
        )

    def __add__(self, other: MachineTime) -> MachineTime:
        return MachineTime(
            cpu_seconds=self.cpu_seconds + other.cpu_seconds, gpu_seconds=self.gpu_seconds + other.gpu_seconds
        )

    def __sub__(self, other: MachineTime) -> MachineTime:
        return MachineTime(
            cpu_seconds=self.cpu_seconds - other.cpu_seconds, gpu_seconds=self.gpu_seconds - other.gpu_seconds
        )

    def __truediv__(self, count: float) -> MachineTime:
        return MachineTime(cpu_seconds=self.cpu_seconds / count, gpu_seconds=self.gpu_seconds / count)

    @property
    def cpu_hours(self) -> float:
        return self.cpu_seconds / HOUR_SECONDS

    @property
    def gpu_hours(self) -> float:
        return self.gpu_seconds / HOUR_SECONDS

    def money(self, prices: PriceSettings) -> float:
        return self.cpu_hours * prices.cpu_hour + self.gpu_hours * prices.gpu_hour

    def numbers(self, prices: PriceSettings | None, prefix: str = "") -> dict[str, float]:
        """``cpu_hours``, ``gpu_hours`` and, with prices, ``money``, for tables and tracking."""
        found = {f"{prefix}cpu_hours": self.cpu_hours, f"{prefix}gpu_hours": self.gpu_hours}
        return found if prices is None else {**found, f"{prefix}money": self.money(prices)}


NO_TIME = MachineTime()


@dataclass(frozen=True, kw_only=True, slots=True)
class Spent:
    """Machine time held by a sweep."""

    finished: MachineTime = NO_TIME
    """On stages that have an artifact now."""
    unfinished: MachineTime = NO_TIME
    """On stages that failed, were stopped early, or are not finished yet."""

    @property
    def total(self) -> MachineTime:
        return self.finished + self.unfinished

    def __add__(self, other: Spent) -> Spent:
        return Spent(finished=self.finished + other.finished, unfinished=self.unfinished + other.unfinished)


NOTHING_SPENT = Spent()


@dataclass(frozen=True, kw_only=True, slots=True)
class Resources:
    """What a stage holds from its start to its end."""

    workers: int
    cpus_per_worker: float
    gpus_per_worker: float

    def over(self, seconds: float) -> MachineTime:
        """The machine time of a stage that runs for ``seconds``."""
        return MachineTime(
            cpu_seconds=seconds * self.workers * self.cpus_per_worker,
            gpu_seconds=seconds * self.workers * self.gpus_per_worker,
        )


def stage_resources(run: RunSettings, stage_name: str) -> Resources:
    """What the stage ``stage_name`` holds while it runs. The one place that knows: plan, budget and reports ask here."""
    wanted = run.for_stage(stage_name)
    return Resources(
        workers=wanted.workers,
        cpus_per_worker=wanted.cpus_per_worker,
        gpus_per_worker=wanted.gpus_per_worker,
    )


def amount(value: float) -> str:
    """Hours or money: two decimals, whole from 100 on, two significant digits below 0.1."""
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.2f}" if value >= 0.1 or value == 0 else f"{value:.2g}"


def cost_text(time: MachineTime | None, prices: PriceSettings | None) -> str:
    """``1.20 GPU-h, 4.80 CPU-h, 3.19 EUR``: GPUs where any were held, money where prices are known."""
    if time is None:
        return "unknown"
    parts = [f"{amount(time.gpu_hours)} GPU-h"] if time.gpu_seconds else []
    parts.append(f"{amount(time.cpu_hours)} CPU-h")
    if prices is not None:
        parts.append(f"{amount(time.money(prices))} {prices.currency}")
    return ", ".join(parts)
