"""What a running sweep has spent and will have spent, in words for the display and numbers for tracking."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from orchestrator.account import Account
from orchestrator.budget import exceeded, overshoot_text
from orchestrator.cost import MachineTime, Spent, cost_text, stage_resources
from orchestrator.plan import PlannedStage, Trial
from orchestrator.spec import RunSettings

__all__ = ["Spending"]


class Spending:
    """Books what running trials hold, and holds it against the budget."""

    def __init__(
        self, account: Account, run: RunSettings, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._account = account
        self._run = run
        self._clock = clock
        self._started = clock()
        self._at: dict[str, PlannedStage] = {}
        """Trial with a place -> the stage that it was last seen at."""

    @property
    def spent(self) -> Spent:
        return self._account.spent

    @property
    def elapsed_seconds(self) -> float:
        """Of this run, by the clock."""
        return self._clock() - self._started

    def placed(self, trial: Trial) -> None:
        self._at[trial.key] = trial.stages[0]
        self._account.placed(trial.key)

    def at(self, trial: Trial, stage: PlannedStage) -> None:
        """``trial`` is seen at ``stage``."""
        if trial.key in self._at:
            self._at[trial.key] = stage
            self._account.hold(trial.key, stage.key, stage_resources(self._run, stage.name))

    def left(self, trial_key: str) -> None:
        """A trial has ended, or is put back: book its last moments."""
        stage = self._at.pop(trial_key, None)
        if stage is not None:
            self._account.hold(trial_key, stage.key, stage_resources(self._run, stage.name))
            self._account.left(trial_key)

    def leave_all_but(self, running: Iterable[str]) -> None:
        """Book out trials that ended without a word."""
        for key in self._at.keys() - set(running):
            self.left(key)

    def finished(self, stage_key: str) -> None:
        self._account.finished(stage_key)

    def write(self, *, now: bool = False) -> None:
        self._account.write(now=now)

    def exceeded(self) -> list[str]:
        """The limits of the budget that are reached."""
        return exceeded(self._run.budget, self._run.prices, self.spent.total, self.elapsed_seconds)

    def overshoot(self) -> str:
        """By how much they were passed."""
        return overshoot_text(self._run.budget, self._run.prices, self.spent.total, self.elapsed_seconds)

    def expected(self, left: Iterable[tuple[PlannedStage, float]] | None) -> MachineTime | None:
        """What the whole sweep will have held, given stages with the seconds that they still need; None: unknown."""
        if left is None:
            return None
        times = (stage_resources(self._run, stage.name).over(seconds) for stage, seconds in left)
        return sum(times, self.spent.total)

    def text(self, expected: MachineTime | None) -> str:
        """``spent 0.52 CPU-h of about 1.34 CPU-h``."""
        prices = self._run.prices
        spent = cost_text(self.spent.total, prices)
        return spent if expected is None else f"{spent} of about {cost_text(expected, prices)}"

    def numbers(self, expected: MachineTime | None) -> dict[str, float]:
        """For tracking: ``spent_cpu_hours`` and so on, and the same with ``expected_``."""
        numbers = self.spent.total.numbers(self._run.prices, "spent_")
        return numbers if expected is None else numbers | expected.numbers(self._run.prices, "expected_")
