"""How trials ended before: answers of the store that spare a trial from being run again."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.dispatch import Outcome
from orchestrator.errors import DamagedArtifactError, DivergedError, MissingArtifactError
from orchestrator.keys import content_key
from orchestrator.loop import Row
from orchestrator.plan import Trial
from orchestrator.rows import stopped_path
from orchestrator.settings import to_plain
from orchestrator.spec import SearchSettings
from orchestrator.store import Store
from orchestrator.trial import failure_path, objective_values

__all__ = ["Endings"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Endings:
    """Recalls and records endings of one search."""

    store: Store
    search: SearchSettings
    manifest: Callable[[str], Mapping[str, Any]] | None = None
    """Reads, or remembers, at least the metrics of a manifest; empty where there is none. By default the store is read."""

    def recall(self, trial: Trial) -> Outcome | None:
        """The outcome that stands: finished, stopped early by the same scheduler, or diverged. None: run it."""
        return self._finished(trial) or self._stopped(trial) or self._failed(trial, only_diverged=True)

    def look_up(self, trial: Trial) -> Outcome | None:
        """As ``recall``, with every recorded failure: for reports."""
        return self._finished(trial) or self._stopped(trial) or self._failed(trial, only_diverged=False)

    def record_stopped(self, trial: Trial, outcome: Outcome, rows: list[Row]) -> None:
        """Keep what a trial had reached when the scheduler stopped it, so that it stays stopped."""
        record = {
            "scheduler": self._scheduler,
            "values": list(outcome.values),
            "reason": outcome.reason,
            "rows": rows,
            "at": time.time(),
        }
        self.store.write_json(stopped_path(trial.key), record)

    @property
    def _scheduler(self) -> str:
        return content_key({"scheduler": to_plain(self.search.scheduler), "seeds": self.search.seeds})

    def _finished(self, trial: Trial) -> Outcome | None:
        try:
            manifest = (self.manifest or self.store.manifest)(trial.key)
            if not manifest:
                return None
            values = objective_values(manifest["metrics"], trial, self.search.objectives)
            return Outcome(status="done", values=values)
        except MissingArtifactError:
            return None
        except DamagedArtifactError as damage:
            logger.warning("%s; it is built again", damage)
            self.store.set_aside(trial.key, str(damage))
            return None

    def _stopped(self, trial: Trial) -> Outcome | None:
        if self.search.scheduler.name == "none":
            return None
        record: Mapping[str, Any] | None = self.store.read_json(stopped_path(trial.key))
        if record is None or record["scheduler"] != self._scheduler:
            return None
        return Outcome(status="stopped", values=tuple(record["values"]), reason=record["reason"])

    def _failed(self, trial: Trial, *, only_diverged: bool) -> Outcome | None:
        for stage in trial.stages:
            if self.store.has(stage.key):
                continue
            failure = self.store.read_json(failure_path(stage.key))
            if failure and (not only_diverged or failure["kind"] == DivergedError.__name__):
                kind = failure["kind"].removesuffix("Error")
                return Outcome(
                    status="failed",
                    reason=f"{kind}: stage {stage.name} ({stage.key[:8]}): {failure['reason']}",
                )
        return None
