"""The driver's eyes: looks at the store while trials run, tells tracking and the display what it sees."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence

from orchestrator.dispatch import Dispatcher, Outcome
from orchestrator.ending import Endings
from orchestrator.errors import StorageError
from orchestrator.loop import Row
from orchestrator.plan import PlannedStage, Trial
from orchestrator.plan_text import duration
from orchestrator.progress import Display, RunningStage, StageCount, Status
from orchestrator.rows import CostHistory
from orchestrator.spec import Objective
from orchestrator.spending import Spending
from orchestrator.stopping import Stopper
from orchestrator.store import Store
from orchestrator.sweep_log import SweepLog

__all__ = ["Monitor"]

LOOK_SECONDS = 0.5
LOG_COST_SECONDS = 30.0
"""How often tracking is told at most what has been spent."""


class Monitor:
    """Listens to the sweep in the driver's main thread. Remembers what each stage cost to estimate the rest."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        store: Store,
        log: SweepLog,
        display: Display,
        *,
        name: str,
        objective: Objective,
        endings: Endings,
        costs: CostHistory,
        slots: int,
        spending: Spending,
        stopper: Stopper,
    ) -> None:
        self._dispatcher = dispatcher
        self._store = store
        self._log = log
        self._display = display
        self._name = name
        self._objective = objective
        self._endings = endings
        self._costs = costs
        self._rows: dict[str, list[Row]] = {}
        self._slots = slots
        self._spending = spending
        self._stopper = stopper
        self._cost_logged = 0.0
        self._told: set[str] = set()
        """Trials whose end tracking was told in this run."""
        self._looked = float("-inf")
        self._done: set[str] = set()
        self._current: dict[str, RunningStage] = {}
        self._best: tuple[float, str] | None = None

    def trial_started(self, trial: Trial) -> None:
        self._log.trial_started(trial)

    def trial_placed(self, trial: Trial) -> None:
        self._spending.placed(trial)

    def trial_row(self, trial: Trial, row: Row) -> None:
        self._rows.setdefault(trial.key, []).append(row)

    def trial_ended(self, trial: Trial, outcome: Outcome) -> None:
        self._current.pop(trial.key, None)
        self._spending.left(trial.key)
        rows = self._rows.pop(trial.key, [])
        if outcome.status == "stopped":
            self._record_stopped(trial, outcome, rows)
        self._costs.forget()
        self.log_trial(trial, outcome)
        label = trial.point.label or " ".join(
            f"{path}={_short(value)}" for path, value in trial.values.items()
        )
        head = f"{trial.point_id} seed {trial.seed}  {label}"
        if outcome.status == "failed":
            self._display.event(
                f"failed   {head}: {outcome.reason.splitlines()[0] if outcome.reason else ''}"
            )
        elif outcome.values:
            self._display.event(f"{outcome.status:8} {head}: {self._objective.name} {outcome.values[0]:.2f}")
            if outcome.status == "done" and trial.point.label is None:
                self._remember_best(trial)

    def _record_stopped(self, trial: Trial, outcome: Outcome, rows: list[Row]) -> None:
        try:
            self._endings.record_stopped(trial, outcome, rows)
        except StorageError as error:
            self._display.event(
                f"warning: that {trial.point_id} was stopped early is not recorded, another run repeats it: {error}"
            )

    def log_recalled(self) -> None:
        """Tell tracking about trials that had ended before this run and that it does not know, as after a lost journal."""
        for key, outcome in self._dispatcher.outcomes.items():
            trial = self._dispatcher.trials[key]
            if key not in self._told and not self._log.knows(trial):
                self.log_trial(trial, outcome)

    def log_trial(self, trial: Trial, outcome: Outcome) -> None:
        """Tell tracking about a trial that has ended, in this run or before it."""
        self._told.add(trial.key)
        uses = self._dispatcher.stage_uses()
        shared = {stage.key: uses[stage.key] > 1 for stage in trial.stages}
        paid = {stage.key for stage in trial.stages if stage.key in self._done and self._store.has(stage.key)}
        self._log.trial_started(trial)
        self._log.trial_ended(trial, outcome, shared=shared, paid=paid)
        for stage in trial.stages:
            if self._store.has(stage.key):
                self._note_done(stage)

    def _note_done(self, stage: PlannedStage) -> None:
        self._done.add(stage.key)
        self._spending.finished(stage.key)

    def tick(self) -> None:
        now = time.monotonic()
        if now - self._looked < LOOK_SECONDS:
            return
        self._looked = now
        uses = self._dispatcher.stage_uses()
        running = self._dispatcher.running
        for trial in running.values():
            self._spending.at(trial, self._look_at(trial, uses))
        self._spending.leave_all_but(running)
        self._spending.write()
        status = self.status(uses)
        self._log_cost(status)
        if not self._stopper.cause and (limits := self._spending.exceeded()):
            self._stopper.budget_reached(limits)
        self._display.show(status)

    def _log_cost(self, status: Status) -> None:
        elapsed = status.elapsed_seconds
        if elapsed - self._cost_logged >= max(LOG_COST_SECONDS, elapsed / 100):
            self._cost_logged = elapsed
            self._log.sweep_cost(status.cost)

    def _look_at(self, trial: Trial, uses: Counter[str]) -> PlannedStage:
        """The stage that a running trial is at. Logs what it and its finished predecessors have to tell."""
        for stage in trial.stages:
            if stage.key in self._done:
                continue
            if self._store.has(stage.key):
                if stage is not trial.final:
                    self._note_done(stage)
                    self._log.stage_started(stage, trial, shared=uses[stage.key] > 1)
                    self._log.stage_finished(stage)
                continue
            holder = self._store.holder(stage.key)
            if holder is None:
                return stage
            progress = holder.progress
            self._log.stage_started(stage, trial, shared=uses[stage.key] > 1)
            for row in progress.get("rows", []):
                self._log.stage_row(stage, row)
            self._current[trial.key] = RunningStage(
                name=stage.name, key=stage.key, epoch=progress.get("epoch", 0), epochs=stage.epochs,
                note=self._note(progress.get("rows", [])),
            )  # fmt: skip
            return stage
        return trial.final

    def _note(self, rows: list[Row]) -> str:
        metric = self._objective.metric
        return f"{metric} {rows[-1][metric]:.2f}" if rows and metric in rows[-1] else ""

    def status(self, uses: Counter[str]) -> Status:
        trials = self._dispatcher.trials
        outcomes = self._dispatcher.outcomes
        current = [self._current[key] for key in self._dispatcher.running if key in self._current]
        in_work = {stage.key for stage in current}
        stages = {stage.key: stage for trial in trials.values() for stage in trial.stages}
        done = self._done | {key for key, outcome in outcomes.items() if outcome.status == "done"}
        failed = {key for key, outcome in outcomes.items() if outcome.status in ("failed", "stopped")}
        counts = {}
        for name in dict.fromkeys(stage.name for stage in stages.values()):
            keys = {key for key, stage in stages.items() if stage.name == name}
            counts[name] = StageCount(
                done=len(keys & done),
                running=len(keys & in_work),
                shared=sum(uses[key] - 1 for key in keys),
                waiting=len(keys - done - in_work - failed),
            )
        left = self._left(
            [stage for key, stage in stages.items() if key not in done | failed],
            {stage.key: stage for stage in current},
        )
        expected = self._spending.expected(left)
        return Status(
            name=self._name,
            trials=len(trials),
            trials_ended=len(outcomes),
            trials_failed=sum(outcome.status == "failed" for outcome in outcomes.values()),
            counts=counts,
            running=tuple(current),
            best=self._best[1] if self._best else "",
            seconds_left=None if left is None else sum(seconds for _, seconds in left) / self._slots,
            elapsed_seconds=self._spending.elapsed_seconds,
            spent=self._spending.text(expected),
            cost=self._spending.numbers(expected),
        )

    def _left(
        self, stages: Sequence[PlannedStage], current: dict[str, RunningStage]
    ) -> list[tuple[PlannedStage, float]] | None:
        """Unfinished stages with the seconds that they still need; None when a kind of stage has no history."""
        left = []
        for stage in stages:
            seconds = self._costs.seconds(stage)
            if seconds is None:
                return None
            running = current.get(stage.key)
            done = running.epoch / max(running.epochs, 1) if running else 0.0
            left.append((stage, seconds * (1 - done)))
        return left

    def _remember_best(self, trial: Trial) -> None:
        values = self._dispatcher.values(trial.point_id)
        if values is None:
            return
        sign = 1 if self._objective.maximize else -1
        if self._best is None or sign * values[0] > sign * self._best[0]:
            label = (
                " ".join(f"{path}={_short(value)}" for path, value in trial.values.items()) or trial.point_id
            )
            self._best = (values[0], f"{self._objective.name} {values[0]:.2f} at {label}")

    def closing_line(self) -> str:
        return f"{self._name}: {len(self._dispatcher.outcomes)} trials in {duration(self._spending.elapsed_seconds)}"


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
