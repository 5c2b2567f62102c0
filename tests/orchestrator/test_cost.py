"""Machine time, prices and limits: arithmetic, texts, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from experiment_cases import problems_of, spec_of

from orchestrator.budget import BudgetSettings, exceeded, overshoot_text
from orchestrator.cost import (
    NO_TIME,
    MachineTime,
    PriceSettings,
    amount,
    cost_text,
    stage_resources,
)
from orchestrator.spec import RunSettings

PRICES = PriceSettings(gpu_hour=2.0, cpu_hour=0.25)
HOUR = 3600.0


@pytest.mark.parametrize(
    ("run", "seconds", "expected"),
    [
        ({}, 10.0, MachineTime(cpu_seconds=10.0)),
        ({"workers": 3, "cpus_per_worker": 2}, 10.0, MachineTime(cpu_seconds=60.0)),
        ({"workers": 2, "gpus_per_worker": 0.25}, 8.0, MachineTime(cpu_seconds=16.0, gpu_seconds=4.0)),
    ],
)
def test_a_stage_holds_what_all_of_its_workers_hold(
    run: dict[str, Any], seconds: float, expected: MachineTime
) -> None:
    assert stage_resources(RunSettings(**run), "student").over(seconds) == expected


@pytest.mark.parametrize(
    ("manifest", "expected"),
    [
        ({"cost": {"seconds": 5.0, "held_cpu_seconds": 20.0, "gpu_seconds": 10.0}}, MachineTime(cpu_seconds=20.0, gpu_seconds=10.0)),
        ({"cost": {"seconds": 5.0, "gpu_seconds": 0.0}, "placement": {"workers": 2}}, MachineTime(cpu_seconds=10.0)),
        ({}, NO_TIME),
    ],
)  # fmt: skip
def test_an_artifact_tells_what_it_held(manifest: dict[str, Any], expected: MachineTime) -> None:
    assert MachineTime.of_artifact(manifest) == expected


def test_money() -> None:
    held = MachineTime(cpu_seconds=4 * HOUR, gpu_seconds=HOUR)
    assert held.money(PRICES) == 3.0
    assert (held + held - held).numbers(PRICES, "x_") == {
        "x_cpu_hours": 4.0,
        "x_gpu_hours": 1.0,
        "x_money": 3.0,
    }
    assert cost_text(held, PRICES) == "1.00 GPU-h, 4.00 CPU-h, 3.00 EUR"
    assert cost_text(MachineTime(cpu_seconds=HOUR / 1000), None) == "0.001 CPU-h"
    assert cost_text(None, PRICES) == "unknown"


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0.00"), (0.0123, "0.012"), (1.005, "1.00"), (99.99, "99.99"), (1234.5, "1234")]
)
def test_amounts(value: float, text: str) -> None:
    assert amount(value) == text


@pytest.mark.parametrize(
    ("section", "problem"),
    [
        ({"prices": {"gpu_hour": -1}}, "run.prices.gpu_hour: gpu_hour must be finite and not negative, got -1"),
        ({"prices": {"cpu_hour": ".inf"}}, "run.prices.cpu_hour: expected float, got '.inf'"),
        ({"prices": {}}, "run.prices.gpu_hour: gpu_hour and cpu_hour are both 0"),
        ({"prices": {"gpu_hour": 1, "currency": " "}}, "run.prices.currency: currency must not be empty"),
        ({"prices": {"gpu_hours": 1}}, "run.prices.gpu_hours: 'gpu_hours' is not a setting of PriceSettings; did you mean 'gpu_hour'?"),
        ({"budget": {}}, "run.budget: a budget limits something"),
        ({"budget": {"hours": 0}}, "run.budget.hours: hours must be finite and above 0, got 0"),
        ({"budget": {"money": 200}}, "run: budget.money is 200, but run.prices is missing: set both"),
    ],
)  # fmt: skip
def test_impossible_values_are_refused(section: dict[str, Any], problem: str) -> None:
    (found,) = problems_of({f"run/{name}": value for name, value in section.items()})
    assert found.startswith(problem)


def test_the_settings_as_a_user_writes_them() -> None:
    run = spec_of(
        {
            "run/prices": {"gpu_hour": 2.5, "cpu_hour": 0.04, "currency": "CHF"},
            "run/budget": {"gpu_hours": 100, "money": 200, "hours": 12},
        }
    ).run
    assert run.prices == PriceSettings(gpu_hour=2.5, cpu_hour=0.04, currency="CHF")
    assert run.budget == BudgetSettings(gpu_hours=100.0, money=200.0, hours=12.0)


SPENT = MachineTime(cpu_seconds=8 * HOUR, gpu_seconds=2 * HOUR)


@pytest.mark.parametrize(
    ("budget", "limits"),
    [
        (None, []),
        (BudgetSettings(gpu_hours=2.5, cpu_hours=9, hours=1.5), []),
        (BudgetSettings(gpu_hours=2.0), ["2.00 of 2.00 GPU-h (run.budget.gpu_hours)"]),
        (BudgetSettings(gpu_hours=3, cpu_hours=7), ["8.00 of 7.00 CPU-h (run.budget.cpu_hours)"]),
        (BudgetSettings(money=5, hours=0.5), ["1.00 of 0.50 h (run.budget.hours)", "6.00 of 5.00 EUR (run.budget.money)"]),
    ],
)  # fmt: skip
def test_limits_that_are_reached(budget: BudgetSettings | None, limits: list[str]) -> None:
    assert exceeded(budget, PRICES, SPENT, elapsed_seconds=HOUR) == limits


def test_the_overshoot_is_told() -> None:
    budget = BudgetSettings(gpu_hours=1.5, cpu_hours=100)
    assert overshoot_text(budget, None, SPENT, 0.0) == "2.00 of 1.50 GPU-h (run.budget.gpu_hours), 0.50 over"
