"""The driver's eyes: looks at the store while trials run, tells tracking and the display what it sees."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence

from orchestrator.dispatch import Dispatcher, Outcome
from orchestrator.ending import Endings
from orchestrator.errors import DamagedArtifactError, StorageError
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
        self._current: dict[str, tuple[PlannedStage, RunningStage]] = {}
        """Running trial -> the stage that it was last seen at, and how far that was."""
        self._best: tuple[float, str] | None = None
        self._waiting_for = ""

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

    def trial_returned(self, trial: Trial, text: str) -> None:
        self._current.pop(trial.key, None)
        self._spending.left(trial.key)
        self._display.event(f"again    {trial.point_id} seed {trial.seed}: {text}")

    def waiting(self, text: str) -> None:
        if text and not self._waiting_for:
            self._display.event(f"waiting for nodes: {text}")
        self._waiting_for = text

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
        uses = self._dispatcher.tally.uses
        shared = {stage.key: uses[stage.key] > 1 for stage in trial.stages}
        stored = {stage.key for stage in trial.stages if self._store.has(stage.key)}
        self._log.trial_started(trial)
        self._log.trial_ended(trial, outcome, shared=shared, stored=stored, paid=stored & self._done)
        for stage in trial.stages:
            if stage.key in stored:
                self._note_done(stage)

    def _note_done(self, stage: PlannedStage) -> None:
        self._done.add(stage.key)
        self._dispatcher.tally.end(stage, "done")
        self._spending.finished(stage.key)

    def tick(self) -> None:
        now = time.monotonic()
        if now - self._looked < LOOK_SECONDS:
            return
        self._looked = now
        running = self._dispatcher.running
        for trial in running.values():
            self._spending.at(trial, self._look_at(trial))
        self._spending.leave_all_but(running)
        self._spending.write()
        status = self.status()
        self._log_cost(status)
        if not self._stopper.cause and (limits := self._spending.exceeded()):
            self._stopper.budget_reached(limits)
        self._display.show(status)

    def _log_cost(self, status: Status) -> None:
        elapsed = status.elapsed_seconds
        if elapsed - self._cost_logged >= max(LOG_COST_SECONDS, elapsed / 100):
            self._cost_logged = elapsed
            self._log.sweep_cost(status.cost)

    def _look_at(self, trial: Trial) -> PlannedStage:
        """The stage that a running trial is at. Logs what it and its finished predecessors have to tell."""
        uses = self._dispatcher.tally.uses
        for stage in trial.stages:
            if stage.key in self._done:
                continue
            if self._store.has(stage.key):
                if stage is not trial.final:
                    self._log.stage_started(stage, trial, shared=uses[stage.key] > 1)
                    try:
                        self._log.stage_finished(stage)
                    except DamagedArtifactError:  # the trial meets it too, says so, and has it built again
                        return stage
                    self._note_done(stage)
                continue
            holder = self._store.holder(stage.key)
            if holder is None:
                return stage
            progress = holder.progress
            self._log.stage_started(stage, trial, shared=uses[stage.key] > 1)
            for row in progress.get("rows", []):
                self._log.stage_row(stage, row)
            self._current[trial.key] = stage, RunningStage(
                name=stage.name, key=stage.key, epoch=progress.get("epoch", 0), epochs=stage.epochs,
                note=self._note(progress.get("rows", [])),
            )  # fmt: skip
            return stage
        return trial.final

    def _note(self, rows: list[Row]) -> str:
        metric = self._objective.metric
        return f"{metric} {rows[-1][metric]:.2f}" if rows and metric in rows[-1] else ""

    def status(self) -> Status:
        """One look at the sweep, at a price that does not grow with its trials."""
        current = [self._current[key] for key in self._dispatcher.running if key in self._current]
        left = self._left(current)
        expected = self._spending.expected(left)
        return Status(
            name=self._name,
            trials=len(self._dispatcher.trials),
            trials_ended=len(self._dispatcher.outcomes),
            trials_failed=self._dispatcher.num_failed,
            counts=self._counts(current),
            running=tuple(shown for _, shown in current),
            best=self._best[1] if self._best else "",
            seconds_left=None if left is None else sum(seconds for _, seconds in left) / self._slots,
            elapsed_seconds=self._spending.elapsed_seconds,
            spent=self._spending.text(expected),
            cost=self._spending.numbers(expected),
            waiting_for=self._waiting_for,
        )

    def _counts(self, current: Sequence[tuple[PlannedStage, RunningStage]]) -> dict[str, StageCount]:
        tally = self._dispatcher.tally
        at_work = {stage.key: stage.name for stage, _ in current if not tally.has_ended(stage.key)}
        running = Counter(at_work.values())
        return {
            name: StageCount(
                done=count.num_done,
                running=running[name],
                shared=count.num_shared,
                waiting=count.num_open - running[name],
            )
            for name, count in tally.names.items()
        }

    def _left(
        self, current: Sequence[tuple[PlannedStage, RunningStage]]
    ) -> list[tuple[PlannedStage, float]] | None:
        """A stage of each kind with the seconds of all that have not ended, less what running ones have behind them.

        None when a kind of stage has no history.
        """
        tally = self._dispatcher.tally
        shares = [(example, float(number)) for example, number in tally.left()]
        shares += [
            (stage, -shown.epoch / max(shown.epochs, 1))
            for stage, shown in current
            if not tally.has_ended(stage.key)
        ]
        left = []
        for stage, share in shares:
            seconds = self._costs.seconds(stage)
            if seconds is None:
                return None
            left.append((stage, seconds * share))
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
