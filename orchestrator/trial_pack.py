"""Trials that share a process: one leads, that is, trains the stages of all; the others follow what it tells.

For the scheduler each of them is a trial of its own. Whatever needs another attempt (a damaged input, smaller
micro-batches, a storage that failed) is left to the trial when it runs alone: it is handed back as deferred.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from orchestrator.dispatch import Outcome
from orchestrator.errors import OutOfMemoryError, StorageError
from orchestrator.lease import Lease
from orchestrator.micro_batch import MicroBatches
from orchestrator.pack_board import PackBoard
from orchestrator.plan import PlannedStage, Trial
from orchestrator.secrecy import hide
from orchestrator.store import Store
from orchestrator.training import Observer, Row, StopTraining
from orchestrator.trial import BusyElsewhereError, TrialRunner, failure_path, objective_values

__all__ = ["ExecuteAll", "PackRunner", "StageReport"]

logger = logging.getLogger(__name__)

LOOK_SECONDS = 0.4
LOOKS_BETWEEN_SIGNS = 8
"""A follower looks for news often, and whether its leader lives now and then."""
ANSWER_SECONDS = 60.0
"""How long a leader waits, before it finishes a stage, for the trial that may have been stopped meanwhile."""
LEADER_BEGINS_SECONDS = 60.0
"""How long a follower waits for the first sign of its leader, which has its process already."""

StageReport = tuple[PlannedStage, Observer]
"""A stage, and who observes it."""
ExecuteAll = Callable[[Sequence[StageReport]], list[Exception | None]]
"""Trains stages side by side; gives for each why it is not finished, or None."""


@dataclass(frozen=True)
class PackRunner(TrialRunner):
    """Walks trials alone, and as members of a pack."""

    execute_all: ExecuteAll | None = None
    is_scheduled: bool = False
    """Whether trials may be stopped early: then a stage is finished only when its trial has got past all its epochs."""

    def lead(self, pack: str, trials: Sequence[Trial], report: Observer) -> Outcome:
        """Walk ``trials`` side by side; gives the outcome of the first, whose epochs are reported as in ``run``.

        The other outcomes go to the board. If ``report`` raises to stop the first trial, the pack ends with it: the
        others keep checkpoints and are deferred.
        """
        lease = self.store.lease(pack)
        if lease is None:
            return Outcome(status="deferred")
        with lease:
            return _Pack(self, PackBoard(self.store, pack), trials, report).run()

    def follow(
        self, pack: str, trial: Trial, report: Observer, pause: Callable[[float], None] = time.sleep
    ) -> Outcome:
        """Report what the leader of the pack tells of ``trial``, until it tells the outcome or is gone."""
        board, leader = PackBoard(self.store, pack), _Leader(self.store, pack)
        last_epoch = 0.0
        while True:
            is_gone = leader.is_gone()
            told = board.told(trial.key)  # after the look at the leader, who writes before it leaves
            for row in told.rows:
                if row["epoch"] > last_epoch:
                    last_epoch = row["epoch"]
                    report(row)
                    if self.is_scheduled and last_epoch >= trial.final.epochs:
                        board.say_heard(trial.key)
            if told.outcome is not None or is_gone:
                board.wipe(trial.key)
                return told.outcome or Outcome(status="deferred")
            pause(LOOK_SECONDS)

    def stop_follower(self, pack: str, trial: Trial) -> None:
        """The scheduler has stopped ``trial``: its stage is not to be finished. Called where that is known first."""
        try:
            PackBoard(self.store, pack).ask_to_stop(trial.key)
        except StorageError as error:  # one stage too many does less harm than the end of the sweep
            logger.warning("trial %s was stopped, but its stage may be finished: %s", trial.key[:8], error)

    def failed(self, error: Exception) -> Outcome:
        """The outcome of a trial that met ``error`` in a pack."""
        if isinstance(error, StopTraining | BusyElsewhereError):
            return Outcome(status="deferred")
        if isinstance(error, StorageError | OutOfMemoryError):
            return Outcome(status="deferred", alone=True)
        return Outcome(status="failed", reason=hide(f"{type(error).__name__.removesuffix('Error')}: {error}"))


class _Leader:
    """Whether the leader of a pack lives, as a follower sees it."""

    def __init__(self, store: Store, pack: str) -> None:
        self._store, self._pack = store, pack
        self._looks = 0
        self._began = False
        self._waiting_since = time.monotonic()

    def is_gone(self) -> bool:
        """Looks at the first call, and then at some."""
        self._looks += 1
        if self._looks % LOOKS_BETWEEN_SIGNS != 1:
            return False
        is_there = self._store.holder(self._pack) is not None
        self._began = self._began or is_there
        waited_seconds = time.monotonic() - self._waiting_since
        return not is_there and (self._began or waited_seconds > LEADER_BEGINS_SECONDS)


class _Pack:
    """A pack under way, in the process of its leader."""

    def __init__(
        self, runner: PackRunner, board: PackBoard, trials: Sequence[Trial], report: Observer
    ) -> None:
        self._runner, self._store, self._board = runner, runner.store, board
        self._trials, self._report = trials, report
        self._outcomes: dict[str, Outcome] = {}
        self._rows: dict[str, list[Row]] = {trial.key: [] for trial in trials}

    def run(self) -> Outcome:
        try:
            for position in range(len(self._trials[0].stages)):
                self._make_level(position)
            for trial in self._open():
                self._settle(trial, self._worth(trial))
        finally:
            for trial in self._open():
                self._settle(trial, Outcome(status="deferred"))
        return self._outcomes[self._trials[0].key]

    def _open(self) -> list[Trial]:
        return [trial for trial in self._trials if trial.key not in self._outcomes]

    def _settle(self, trial: Trial, outcome: Outcome) -> None:
        self._outcomes[trial.key] = outcome
        if trial is self._trials[0]:
            return
        if self._board.is_asked_to_stop(trial.key):
            self._board.wipe(trial.key)
        else:
            self._board.tell(trial.key, self._rows[trial.key], outcome)

    def _settle_users(self, stage: PlannedStage, error: Exception) -> None:
        """Every trial that needs ``stage`` ends with ``error``."""
        for trial in self._open():
            if any(stage.key == other.key for other in trial.stages):
                self._settle(trial, self._runner.failed(error))

    def _worth(self, trial: Trial) -> Outcome:
        try:
            metrics = self._store.manifest(trial.key)["metrics"]
            values = objective_values(metrics, trial, self._runner.objectives)
        except Exception as error:  # as in a trial that runs alone: it becomes the outcome
            return self._runner.failed(error)
        return Outcome(status="done", values=values)

    def _make_level(self, position: int) -> None:
        """Make the stages at this position of the chains: side by side, or as always where there is one."""
        stages = {trial.stages[position].key: trial.stages[position] for trial in self._open()}
        missing = [stage for stage in stages.values() if not self._store.has(stage.key)]
        if len(missing) > 1:
            self._make_together(missing)
        for stage in missing if len(missing) == 1 else []:
            try:
                self._runner.make(stage, self._observer(stage))
            except Exception as error:
                self._settle_users(stage, error)

    def _make_together(self, stages: Sequence[PlannedStage]) -> None:
        with ExitStack() as held:
            reports: list[StageReport] = []
            for stage in stages:
                try:
                    lease = self._begin(stage)
                except Exception as error:
                    self._settle_users(stage, error)
                    continue
                held.enter_context(lease)
                if not self._store.has(stage.key):  # finished between our look and our lease
                    reports.append((stage, self._observer(stage, lease)))
            if not reports:
                return
            started = time.time()
            failures = self._together(reports)
            seconds = (time.time() - started) / len(reports)
            for (stage, _), failure in zip(reports, failures, strict=True):
                self._take_in(stage, failure, seconds, len(reports))

    def _together(self, reports: Sequence[StageReport]) -> list[Exception | None]:
        """Trouble of the pack as a whole is no stage's own failure: each is left to itself."""
        assert self._runner.execute_all is not None
        try:
            return self._runner.execute_all(reports)
        except StopTraining as stopped:
            return [stopped] * len(reports)
        except Exception as error:
            logger.warning("a pack of %d trials cannot be trained", len(reports), exc_info=error)
            return [StorageError(f"its pack could not be trained: {error}")] * len(reports)

    def _begin(self, stage: PlannedStage) -> Lease:
        """The lease of a stage that may be trained beside others; raises where it may not."""
        self._runner.refuse_known_failure(stage)
        if MicroBatches(self._store).adapted(stage) is not stage:
            raise OutOfMemoryError(f"stage {stage.name} ({stage.key[:8]}) has run out of memory before")
        lease = self._store.lease(stage.key, watch=True)
        if lease is None:
            raise BusyElsewhereError
        return lease

    def _take_in(
        self, stage: PlannedStage, error: Exception | None, seconds: float, num_together: int
    ) -> None:
        if error is None:
            self._store.delete_json(failure_path(stage.key))
            self._runner.record_cost(stage, seconds, num_together)
            return
        if self._runner.failed(error).status == "failed":
            self._record(stage, error)
        self._settle_users(stage, error)

    def _record(self, stage: PlannedStage, error: Exception) -> None:
        try:
            raise error
        except Exception as raised:  # so that the record finds where it came from
            self._runner.record_failure(stage, raised)

    def _observer(self, stage: PlannedStage, lease: Lease | None = None) -> Observer:
        """Passes each new row on to whom it belongs, and says whether the stage is to stop."""
        trial = next((trial for trial in self._trials if trial.final.key == stage.key), None)
        rows: list[Row] = [] if trial is None else self._rows[trial.key]
        stop_requested = self._runner.stop_requested()

        def observe(row: Row) -> bool:
            if lease is not None and lease.lost:
                raise BusyElsewhereError
            if rows and row["epoch"] <= rows[-1]["epoch"]:  # a pack that was split shows some rows twice
                return False
            rows.append(row)
            if lease is not None:
                progress = {"name": stage.name, "epoch": row["epoch"], "epochs": stage.epochs, "rows": rows}
                lease.update(progress)
            return (trial is not None and self._pass_on(trial, row)) or stop_requested()

        return observe

    def _pass_on(self, trial: Trial, row: Row) -> bool:
        if trial is self._trials[0]:
            return bool(self._report(row))
        is_last = row["epoch"] >= trial.final.epochs
        if not (is_stopped := self._board.is_asked_to_stop(trial.key)):
            self._board.tell(trial.key, self._rows[trial.key])
            is_stopped = is_last and self._runner.is_scheduled and self._is_stopped_late(trial)
        if is_stopped and is_last:  # training has ended anyway; what must not come into being is the artifact
            raise StopTraining("its trial was stopped early")
        return is_stopped

    def _is_stopped_late(self, trial: Trial) -> bool:
        """Whether ``trial``, whose epochs are trained, is stopped at one of them; its process is waited for."""
        stop_requested = self._runner.stop_requested()
        until = time.monotonic() + ANSWER_SECONDS
        while time.monotonic() < until:
            if self._board.is_asked_to_stop(trial.key):
                return True
            if self._board.is_heard(trial.key) or stop_requested():
                return False
            time.sleep(LOOK_SECONDS / 4)
        logger.warning("trial %s does not say whether it was stopped; its stage is finished", trial.key[:8])
        return False
