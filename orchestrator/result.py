"""What a sweep came to: the table, the best point, the pictures, and the files that keep them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load as load_tensors

from orchestrator import report
from orchestrator.bundle import bundle_settings, write_bundle
from orchestrator.cost import NOTHING_SPENT, Spent
from orchestrator.errors import StorageError
from orchestrator.plan import Point, Trial
from orchestrator.report import Report, TrialRow
from orchestrator.secrecy import hide
from orchestrator.spec import ExperimentSpec
from orchestrator.store import Store

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Result"]


@dataclass(frozen=True, kw_only=True)
class Result:
    """Made by ``Experiment.run`` or ``Experiment.result``."""

    spec: ExperimentSpec
    rows: Sequence[TrialRow]
    """One per trial."""
    trials: Mapping[str, Trial]
    """Key of the last stage -> trial."""
    broken: Sequence[tuple[Point, str]] = field(default_factory=tuple)
    """Points that the search drew and that turned out to be impossible."""
    folder: Path
    store: Store
    command: str = ""
    tracking_command: str = ""
    """Opens the MLflow UI on this sweep."""
    interrupted: bool = False
    budget_reached: str = ""
    """Which limits of the budget ended the run before its time, and by how much they were passed; else empty."""
    spent: Spent = NOTHING_SPENT
    """What all runs of this sweep have held, lost work included."""

    def table(self) -> pd.DataFrame:
        """One row per point, the best validation mean first. See ``orchestrator.report.table`` for the columns."""
        return self._table.copy()

    @cached_property
    def _table(self) -> pd.DataFrame:
        search = self.spec.search
        return report.table(
            self.rows, search.objectives,
            baseline=self.baseline, prices=self.spec.run.prices, shown=search.shown_names,
        )  # fmt: skip

    @property
    def baseline(self) -> str | None:
        """Label of the first baseline: what the points are compared with."""
        return next(iter(self.spec.baselines), None)

    @property
    def best(self) -> pd.Series | None:
        """The row of the point with the best validation mean, baselines aside; None when nothing has finished."""
        table = self._table
        if table.empty:
            return None
        return report.best(table[~table["label"].isin(list(self.spec.baselines))])

    @property
    def best_trial(self) -> Trial | None:
        """The first finished trial of the best point."""
        best = self.best
        if best is None:
            return None
        done = [row for row in self.rows if row.point == best["point"] and row.status == "done"]
        return self.trials[done[0].key] if done else None

    @property
    def is_partial(self) -> bool:
        """Whether the run was stopped before everything had ended. The same command goes on."""
        return self.interrupted or bool(self.budget_reached)

    @property
    def num_failed(self) -> int:
        return sum(row.status == "failed" for row in self.rows) + len(self.broken)

    def numbers(self) -> dict[str, float]:
        """The sweep in a few numbers, for tracking."""
        cost = report.cost(self.rows)
        numbers = {
            "trials": float(len(self.rows)),
            "trials_failed": float(self.num_failed),
            "training_seconds": cost.paid_seconds,
            "saved_by_sharing_seconds": cost.shared_seconds,
            **self.spent.total.numbers(self.spec.run.prices, "spent_"),
            **cost.shared.numbers(self.spec.run.prices, "saved_by_sharing_"),
        }
        best = self.best
        if best is not None:
            numbers |= {f"best.{item.name}": float(best[item.name]) for item in self.spec.search.objectives}
        return numbers

    def text(self, width: int = 120) -> str:
        """The table for a terminal."""
        return report.to_text(self._table, width)

    def plot(self, folder: Path | str | None = None) -> list[Path]:
        """Draw metric against each swept setting, learning curves, and accuracy against cost, as PNG and SVG."""
        from orchestrator.plots import draw

        return draw(
            self.rows,
            self.spec.search.objectives,
            Path(folder or self.folder / "report"),
            baseline=self.baseline,
        )

    def write(self) -> Path:
        """Write ``table.csv``, ``costs.csv``, ``report.md`` and the pictures below the sweep's folder; returns the report."""
        try:
            return self._write(self.folder / "report")
        except OSError as error:
            raise StorageError(
                f"the report cannot be written: {error}; set run.storage to another place"
            ) from error

    def _write(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        table = self._table.to_csv(index=False)
        (folder / "table.csv").write_text(table, encoding="utf-8")
        report.cost_table(self.rows, self.spec.run.prices).to_csv(folder / "costs.csv", index=False)
        plots = self._plot_where_new(folder, table)
        path = folder / "report.md"
        text = report.to_markdown(self._report(folder, plots), self._table)
        path.write_text(hide(text), encoding="utf-8")
        return path

    def _plot_where_new(self, folder: Path, table: str) -> list[Path]:
        """The pictures; those that are there already where they show the same, since drawing takes seconds."""
        if not any(row.history for row in self.rows):
            return []
        shown = [version("stillhouse"), table, self.baseline, [(row.key, row.status) for row in self.rows]]
        digest = hashlib.sha256(json.dumps(shown).encode()).hexdigest()
        note = folder / "pictures.json"
        drawn = _read_note(note)
        if drawn.get("digest") == digest and all((folder / name).exists() for name in drawn["names"]):
            return [folder / name for name in drawn["names"]]
        note.unlink(missing_ok=True)
        paths = self.plot(folder)
        note.write_text(
            json.dumps({"digest": digest, "names": [path.name for path in paths]}), encoding="utf-8"
        )
        return paths

    def write_best(self, trial: Trial) -> Path | None:
        """Write the student of ``trial`` as a bundle: ``model.json`` and ``weights.safetensors``.

        None where its artifact is no network of the model table (branches, a grounder): that stays in the store.
        """
        manifest = self.store.manifest(trial.key)
        if not manifest["model"]:
            return None
        settings = bundle_settings(trial.key, manifest)
        weights = load_tensors(self.store.read(trial.key, "weights.safetensors"))
        return write_bundle(self.folder / "best", settings, weights)

    def _report(self, folder: Path, plots: Sequence[Path]) -> Report:
        return Report(
            name=self.spec.name,
            rows=self.rows,
            objectives=self.spec.search.objectives,
            shown=self.spec.search.shown_names,
            baseline=self.baseline,
            controls=self.spec.controls,
            baselines=list(self.spec.baselines),
            command=self.command,
            tracking_command=self.tracking_command,
            plots=[path for path in plots if path.suffix == ".png"],
            folder=folder,
            prices=self.spec.run.prices,
            spent=self.spent,
        )


def _read_note(path: Path) -> dict[str, Any]:
    """What the pictures beside ``path`` show; empty where that is not known."""
    try:
        note = json.loads(path.read_text(encoding="utf-8"))
        return {"digest": str(note["digest"]), "names": [str(name) for name in note["names"]]}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
