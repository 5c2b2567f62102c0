"""A trial: walk the chain of stages, using what is stored and making what is missing."""

from __future__ import annotations

import gc
import logging
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from orchestrator.dispatch import Outcome
from orchestrator.errors import (
    ConfigurationError,
    DamagedArtifactError,
    DivergedError,
    MissingArtifactError,
    OutOfMemoryError,
    StageFailedError,
    StorageError,
)
from orchestrator.lease import Lease
from orchestrator.loop import Row, StopTraining
from orchestrator.micro_batch import MicroBatches
from orchestrator.plan import PlannedStage, Trial
from orchestrator.secrecy import hide
from orchestrator.spec import Objective
from orchestrator.store import Store

__all__ = ["BusyElsewhereError", "TrialRunner", "failure_path", "objective_values", "stop_path"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

Execute = Callable[[PlannedStage, Callable[[Row], bool | None]], None]
"""Trains one stage and puts its artifact into the store."""

PAUSES_SECONDS = (1.0, 4.0, 15.0)
"""Before each repetition of a stage that met a passing trouble of the storage."""

NUM_REBUILDS = 3
"""How many damaged or missing artifacts one trial repairs before it gives up."""


class BusyElsewhereError(Exception):
    """Somebody else holds the lease of a stage that this trial needs."""


@dataclass(frozen=True)
class TrialRunner:
    """Walks trials. ``run_id`` names this run of the sweep: a failure is not repeated within it, and it can be stopped."""

    store: Store
    execute: Execute
    objectives: tuple[Objective, ...]
    run_id: str

    def run(self, trial: Trial, report: Callable[[Row], bool | None]) -> Outcome:
        """Make what ``trial`` lacks. Only the last stage's epochs are reported; ``report`` may raise to stop.

        A failure becomes an outcome with its reason, so that one broken trial never ends the sweep.
        """
        try:
            for repairs_left in reversed(range(NUM_REBUILDS + 1)):
                try:
                    return self._walk(trial, report)
                except (DamagedArtifactError, MissingArtifactError) as error:
                    if repairs_left == 0:
                        raise
                    self._set_aside_damaged(trial, error)
            raise AssertionError("unreachable: the last repair either returns or raises")
        except (BusyElsewhereError, StopTraining):
            return Outcome(status="deferred")
        except Exception as error:  # the outcome carries it: type, text and, in the store, the traceback
            return Outcome(
                status="failed", reason=hide(f"{type(error).__name__.removesuffix('Error')}: {error}")
            )

    def killed_for_memory(self, trial: Trial, reason: str, peak_memory_bytes: int = 0) -> bool:
        """Take in that the process that walked ``trial`` was killed for its memory. Gives whether it may use less.

        Called by whoever notices: the process itself is gone, and its stage with it.
        """
        stage = next((stage for stage in trial.stages if not self.store.has(stage.key)), None)
        if stage is None:  # it had just finished
            return True
        measured = {"device": "host memory", "peak_memory_bytes": peak_memory_bytes}
        micro_batches = MicroBatches(self.store)
        if micro_batches.shrink(micro_batches.adapted(stage), reason, **measured) is not None:
            return True
        error = OutOfMemoryError(reason, device="host memory", peak_memory_bytes=peak_memory_bytes)
        self.record_failure(stage, error)
        return False

    def _walk(self, trial: Trial, report: Callable[[Row], bool | None]) -> Outcome:
        for stage in () if self.store.has(trial.key) else trial.stages:
            if not self.store.has(stage.key):
                self.make(stage, report if stage is trial.final else None)
        metrics = self.store.manifest(trial.key)["metrics"]
        return Outcome(status="done", values=objective_values(metrics, trial, self.objectives))

    def make(self, stage: PlannedStage, report: Callable[[Row], bool | None] | None) -> None:
        """Make a stage under its lease, with every remedy that there is. What cannot be helped is recorded and raised."""
        self.refuse_known_failure(stage)
        lease = self._with_pauses(stage, lambda: self.store.lease(stage.key, watch=True))
        if lease is None:
            raise BusyElsewhereError
        with lease:
            if self.store.has(stage.key):  # finished between our look and our lease
                return
            started = time.time()
            try:
                self._execute_in_memory(stage, lease, report)
            except (StorageError, StopTraining, BusyElsewhereError):
                raise
            except Exception as error:
                self.record_failure(stage, error)
                raise
            self.store.delete_json(failure_path(stage.key))
            self.record_cost(stage, time.time() - started)

    def _execute_in_memory(
        self, stage: PlannedStage, lease: Lease, report: Callable[[Row], bool | None] | None
    ) -> None:
        """Train ``stage``; in smaller micro-batches if it runs out of memory and is allowed to."""
        micro_batches = MicroBatches(self.store)
        todo: PlannedStage | None = micro_batches.adapted(stage)
        while todo is not None:
            try:
                self._execute_with_pauses(todo, lease, report)
                return
            except OutOfMemoryError as error:
                measured = {"device": error.device, "peak_memory_bytes": error.peak_memory_bytes}
                todo = micro_batches.shrink(todo, str(error), **measured)
                if todo is None:
                    raise
                logger.warning("%s; trying again in %d micro-batches", error, todo.spec.train.accumulate)
            gc.collect()  # what the failed attempt held hangs together in cycles

    def _execute_with_pauses(
        self, stage: PlannedStage, lease: Lease, report: Callable[[Row], bool | None] | None
    ) -> None:
        rows: list[Row] = []
        stop_requested = self.stop_requested()

        def observe(row: Row) -> bool | None:
            if lease.lost:  # this process was suspended for so long that another one has taken over
                raise BusyElsewhereError
            rows.append(row)
            lease.update({"name": stage.name, "epoch": row["epoch"], "epochs": stage.epochs, "rows": rows})
            if report is not None and report(row):
                return True
            return stop_requested()

        def execute() -> None:
            rows.clear()
            self.execute(stage, observe)

        lease.update({"name": stage.name, "epoch": 0, "epochs": stage.epochs, "rows": rows})
        self._with_pauses(stage, execute)

    def stop_requested(self) -> Callable[[], bool]:
        """Tells, on being asked, whether this run of the sweep is to stop; the store is not bothered each time."""
        return _Throttled(lambda: self.store.read_json(stop_path(self.run_id)) is not None)

    def _with_pauses(self, stage: PlannedStage, action: Callable[[], T]) -> T:
        """``action``, repeated after pauses while the storage has passing trouble."""
        for pause in (*PAUSES_SECONDS, None):
            try:
                return action()
            except (DamagedArtifactError, MissingArtifactError):
                raise
            except StorageError as error:
                if pause is None:
                    raise
                logger.warning(
                    "stage %s (%s): %s; trying again in %.0f s", stage.name, stage.key[:8], error, pause
                )
                time.sleep(pause)
        raise AssertionError("unreachable: the last attempt either returns or raises")

    def refuse_known_failure(self, stage: PlannedStage) -> None:
        """Raise ``StageFailedError`` for a stage that has diverged, or failed in this run."""
        failure = self.store.read_json(failure_path(stage.key))
        if failure and (failure["kind"] == DivergedError.__name__ or failure["run"] == self.run_id):
            raise StageFailedError(f"stage {stage.name} ({stage.key[:8]}) failed: {failure['reason']}")

    def record_failure(self, stage: PlannedStage, error: Exception) -> None:
        """Keep the error that is being handled as the reason of the stage's failure."""
        if not isinstance(error, ConfigurationError | DivergedError | OutOfMemoryError):
            logger.warning("stage %s (%s) failed", stage.name, stage.key[:8], exc_info=error)
        record = {
            "name": stage.name,
            "kind": type(error).__name__,
            "reason": hide(str(error)),
            "run": self.run_id,
            **({"device": error.device, "peak_memory_bytes": error.peak_memory_bytes}
               if isinstance(error, OutOfMemoryError) else {}),
            "traceback": hide(traceback.format_exc()),
            "at": time.time(),
        }  # fmt: skip
        self.store.write_json(failure_path(stage.key), record)

    def record_cost(self, stage: PlannedStage, seconds: float, num_together: int = 1) -> None:
        """Remember what an epoch of this kind of stage took, whole stage included, and its memory, for later estimates.

        Of a pack of ``num_together`` stages, one's part.
        """
        path = f"costs/{stage.signature}.json"
        try:
            known = self.store.read_json(path) or {"seconds_per_epoch": []}
            per_epoch = seconds / max(1, stage.epochs)
            known["seconds_per_epoch"] = [*known["seconds_per_epoch"], per_epoch][-16:]
            cost = self.store.manifest(stage.key).get("cost", {})
            if cost.get("peak_memory_bytes") and cost.get("memory_share_bytes"):
                share = cost["peak_memory_bytes"] / num_together / cost["memory_share_bytes"]
                known["memory_share"] = [*known.get("memory_share", []), share][-16:]
            self.store.write_json(
                path, known, durable=False
            )  # an estimate is not worth two waits for the disk
        except StorageError as error:  # an estimate is a courtesy: the stage itself is finished and stored
            logger.warning(
                "the cost of stage %s (%s) is not remembered: %s", stage.name, stage.key[:8], error
            )

    def _set_aside_damaged(self, trial: Trial, error: StorageError) -> None:
        logger.warning("%s; it is built again", error)
        for stage in trial.stages:
            if self.store.has(stage.key):
                try:
                    self.store.verify(stage.key)
                except MissingArtifactError:  # another trial has just set it aside
                    continue
                except DamagedArtifactError as damage:
                    self.store.set_aside(stage.key, str(damage))


class _Throttled:
    """Asks at most once a second; in between, the last answer holds."""

    def __init__(self, ask: Callable[[], bool]) -> None:
        self._ask = ask
        self._asked = time.monotonic()
        self._answer = False

    def __call__(self) -> bool:
        if time.monotonic() - self._asked > 1.0:
            self._answer = self._ask()
            self._asked = time.monotonic()
        return self._answer


def stop_path(run_id: str) -> str:
    """The document whose presence asks every trial of a run to stop after its epoch."""
    return f"stops/{run_id}.json"


def failure_path(key: str) -> str:
    """The document that says why a stage failed."""
    return f"failures/{key}.json"


def objective_values(
    metrics: Mapping[str, Any], trial: Trial, objectives: tuple[Objective, ...]
) -> tuple[float, ...]:
    """The trial's worth, from the metrics of its finished last stage; NaN where no validation split was held out."""
    names = [objective.metric for objective in objectives]
    absent = [name for name in names if name not in metrics and f"test_{name}" not in metrics]
    if absent:
        raise ConfigurationError(
            f"stage {trial.final.name} ({trial.key[:8]}) reported no {', '.join(absent)}; it has {', '.join(sorted(metrics))}"
        )
    return tuple(float(metrics.get(name, "nan")) for name in names)
