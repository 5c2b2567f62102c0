"""What tracking is told about a sweep: sweep > trial > stage, shared stages once and linked. Writes the journal only."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from functools import lru_cache
from pathlib import Path
from typing import Any

from orchestrator.cost import NO_TIME, MachineTime
from orchestrator.dispatch import Outcome
from orchestrator.journal import EndStatus, Journal
from orchestrator.keys import active_settings, active_train
from orchestrator.loop import Row
from orchestrator.pictures import PANEL, copy_panel
from orchestrator.plan import PlannedStage, Trial
from orchestrator.spec import ExperimentSpec
from orchestrator.store import Store

__all__ = ["SweepLog"]

NUM_MANIFESTS = 64
"""Manifests kept in memory: those of shared stages are asked for by one trial after the other."""

ENDINGS: Mapping[str, EndStatus] = {"done": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}


class SweepLog:
    """Turns what happens in a sweep into journal records with stable ids. Saying a thing twice changes nothing."""

    def __init__(self, journal: Journal, spec: ExperimentSpec, store: Store, code_version: str) -> None:
        self._journal = journal
        self._spec = spec
        self._store = store
        self._code_version = code_version
        self._logged_stages: set[str] = set()
        self._told: set[str] = set()
        """Runs whose settings were journaled by this process."""
        self._manifest: Callable[[str], dict[str, Any]] = lru_cache(NUM_MANIFESTS)(store.manifest)
        self._seen_epochs: dict[str, float] = {}
        self.sweep_id = f"sweep:{spec.name}"

    def sweep_started(self, document_text: str, data_fingerprint: str) -> None:
        search = self._spec.search
        self._journal.run(
            self.sweep_id,
            name=self._spec.name,
            parent=None,
            kind="sweep",
            tags={
                "stillhouse.dataset": self._spec.data.dataset,
                "stillhouse.data_fingerprint": data_fingerprint,
                "stillhouse.code_version": self._code_version,
                "stillhouse.storage": self._store.url,
                "mlflow.note.content": f"```yaml\n{document_text}\n```",
            },
        )
        objectives = ", ".join(
            f"{'max' if item.maximize else 'min'} {item.name}" for item in search.objectives
        )
        self._journal.tags(  # not params: an extended sweep may change them
            self.sweep_id,
            {"stillhouse.objective": objectives, "stillhouse.algorithm": search.algorithm,
             "stillhouse.scheduler": search.scheduler.name, "stillhouse.seeds": search.seeds,
             "stillhouse.validation": self._spec.data.validation},
        )  # fmt: skip

    def sweep_cost(self, numbers: Mapping[str, float]) -> None:
        """What the sweep has spent and will have spent, as a curve of the sweep's run."""
        self._journal.metrics(self.sweep_id, [dict(numbers)] if numbers else [])

    def knows(self, trial: Trial) -> bool:
        """Whether this trial's run is closed as finished, now or by an earlier run of the sweep."""
        return self._journal.has_finished(_trial_id(trial))

    def trial_started(self, trial: Trial) -> None:
        """Declare the trial's run, with the settings of its whole chain flattened and the swept ones by their path."""
        label = trial.point.label or "point"
        self._journal.run(
            _trial_id(trial),
            name=f"{label} {trial.point_id} seed {trial.seed}",
            parent=self.sweep_id,
            kind="trial",
            tags={
                "stillhouse.point": trial.point_id,
                "stillhouse.label": label,
                "stillhouse.seed": str(trial.seed),
                "stillhouse.key": trial.key,
                "stillhouse.dataset": self._spec.data.dataset,
                "stillhouse.code_version": self._code_version,
                **{f"stillhouse.key.{stage.name}": stage.key for stage in trial.stages},
            },
        )
        if _trial_id(trial) not in self._told:
            self._told.add(_trial_id(trial))
            self._journal.params(_trial_id(trial), self._flat_settings(trial))

    def _flat_settings(self, trial: Trial) -> dict[str, Any]:
        flat: dict[str, Any] = {"seed": trial.seed, "label": trial.point.label or "point"}
        for stage in trial.stages:
            flat[f"{stage.name}.method"] = stage.spec.method
            if stage.spec.model is not None:
                flat[f"{stage.name}.model"] = stage.spec.model.name
            for name, value in active_settings(stage.spec, self._spec.catalog).items():
                flat[f"{stage.name}.{name}"] = value
            for name, value in active_train(stage.spec.train).items():
                flat[f"{stage.name}.train.{name}"] = value
        return flat

    def stage_started(self, stage: PlannedStage, trial: Trial, *, shared: bool) -> None:
        """Declare a stage's run: below the sweep when several trials use it, else below its trial."""
        stage_id = f"stage:{stage.key}"
        self._journal.run(
            stage_id,
            name=f"{stage.name} {stage.key[:8]}",
            parent=self.sweep_id if shared else _trial_id(trial),
            kind="stage",
            tags={
                "stillhouse.key": stage.key,
                "stillhouse.stage": stage.name,
                "stillhouse.shared": str(shared).lower(),
                "stillhouse.seed": str(stage.seed),
                "stillhouse.dataset": stage.data.dataset,
            },
        )
        if stage_id in self._told:
            return
        self._told.add(stage_id)
        settings = {"method": stage.spec.method, **active_settings(stage.spec, self._spec.catalog)}
        if stage.spec.model is not None:
            settings["model"] = stage.spec.model.name
        self._journal.params(
            stage_id, settings | {f"train.{k}": v for k, v in active_train(stage.spec.train).items()}
        )

    def stage_row(self, stage: PlannedStage, row: Row) -> None:
        """One epoch of a running stage; a row seen before is left out."""
        if row["epoch"] > self._seen_epochs.get(stage.key, 0):
            self._seen_epochs[stage.key] = row["epoch"]
            self._journal.metrics(f"stage:{stage.key}", [row])

    def stage_finished(self, stage: PlannedStage) -> None:
        """Everything about a finished stage, from its artifact: rows that were missed live, cost, device, versions."""
        if stage.key in self._logged_stages:
            return
        stage_id = f"stage:{stage.key}"
        manifest = self._manifest(stage.key)
        rows = self._history(stage.key)
        self._logged_stages.add(stage.key)
        seen = self._seen_epochs.get(stage.key, 0)
        self._journal.metrics(stage_id, [row for row in rows if row["epoch"] > seen])
        final = {f"final_{name}": value for name, value in manifest["metrics"].items()}
        cost = {f"cost_{name}": value for name, value in manifest["cost"].items()}
        self._journal.metrics(
            stage_id, [{**final, **cost, "time": manifest["finished"], "epoch": manifest["epochs"]}]
        )
        self._journal.tags(
            stage_id,
            {f"stillhouse.{name}": value for name, value in manifest["placement"].items()}
            | {f"stillhouse.version.{name}": value for name, value in manifest["versions"].items()},
        )
        self._log_panel(stage_id, stage, manifest)
        self._journal.end(stage_id, "FINISHED", manifest["finished"])

    def _log_panel(self, id: str, stage: PlannedStage, manifest: Mapping[str, Any]) -> None:
        """Attach the pictures that a stage has left, through a copy beside the journal: tracking reads it later."""
        path = self._journal.path.parent / "panels" / f"{stage.name}-{stage.key[:8]}" / PANEL
        if trouble := copy_panel(self._store, stage.key, manifest, path):
            self._journal.tags(id, {"stillhouse.panel": trouble})
        elif PANEL in manifest["files"]:
            self._journal.artifact(id, path)

    def trial_ended(
        self, trial: Trial, outcome: Outcome, *, shared: Mapping[str, bool], stored: AbstractSet[str],
        paid: AbstractSet[str],
    ) -> None:  # fmt: skip
        """Close a trial's run: its curve, its final numbers, links to its stages, what it cost and sharing saved.

        ``stored`` are the keys of its stages that have an artifact, ``paid`` those that another trial had made before.
        """
        trial_id = _trial_id(trial)
        for stage in trial.stages:
            if stage.key in stored:
                self.stage_started(stage, trial, shared=shared[stage.key])
                self.stage_finished(stage)
                self._journal.link(trial_id, stage.name, f"stage:{stage.key}")
            elif stage is trial.final and self._seen_epochs.get(stage.key):
                self._journal.end(f"stage:{stage.key}", ENDINGS[outcome.status])
        if outcome.status == "done":
            self._log_final(trial, paid)
        self._journal.tags(
            trial_id, {"stillhouse.status": outcome.status, "stillhouse.reason": outcome.reason or "-"}
        )
        self._journal.end(trial_id, ENDINGS[outcome.status])

    def _log_final(self, trial: Trial, paid: AbstractSet[str]) -> None:
        name = trial.final.name
        manifest = self._manifest(trial.key)
        rows = self._history(trial.key)
        curve = [
            {key if key in ("epoch", "time") else f"{name}.{key}": value for key, value in row.items()}
            for row in rows
        ]
        final = {f"{name}.final_{key}": value for key, value in manifest["metrics"].items()}
        for stage in trial.stages[:-1]:
            metrics = self._manifest(stage.key)["metrics"]
            final |= {f"{stage.name}.final_{key}": value for key, value in metrics.items()}
        final |= {
            **self._cost(trial, paid),
            "epoch": manifest["epochs"],
            "time": manifest["finished"],
        }
        self._journal.metrics(_trial_id(trial), [*curve, final])
        self._log_panel(_trial_id(trial), trial.final, manifest)

    def _cost(self, trial: Trial, paid: AbstractSet[str]) -> dict[str, float]:
        """What the trial's chain costs alone, and what of that sharing saved."""
        manifests = {stage.key: self._manifest(stage.key) for stage in trial.stages}
        held = sum(map(MachineTime.of_artifact, manifests.values()), NO_TIME)
        saved = sum((MachineTime.of_artifact(manifests[key]) for key in paid), NO_TIME)
        prices = self._spec.run.prices
        return {
            "saved_by_sharing_seconds": sum(float(manifests[key]["cost"]["seconds"]) for key in paid),
            **held.numbers(prices, "cost_"),
            **saved.numbers(prices, "saved_by_sharing_"),
        }

    def _history(self, key: str) -> list[Row]:
        rows: list[Row] = json.loads(self._store.read(key, "history.json", self._manifest(key)))
        return rows

    def sweep_ended(
        self, status: EndStatus, *, report: Path | None, best_trial: Trial | None, bundle: Path | None,
        numbers: Mapping[str, float],
    ) -> None:  # fmt: skip
        """Attach report and plots, the best student as a model, and close the sweep's run."""
        if numbers:
            self._journal.metrics(self.sweep_id, [dict(numbers)])
        if report is not None:
            self._journal.artifact(self.sweep_id, report, "report")
        if best_trial is not None:
            self._journal.tags(
                self.sweep_id, {"stillhouse.best": best_trial.point_id, "stillhouse.best_key": best_trial.key}
            )
            if bundle is not None:
                self._journal.model(_trial_id(best_trial), bundle)
        self._journal.end(self.sweep_id, status)


def _trial_id(trial: Trial) -> str:
    return f"trial:{trial.key}"
