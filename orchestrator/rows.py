"""What each trial of a sweep came to, read from the store: the rows of the report."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, overload

from orchestrator.cost import NO_TIME, MachineTime
from orchestrator.dispatch import Outcome
from orchestrator.errors import MissingArtifactError, StorageError
from orchestrator.plan import PlannedStage, Trial
from orchestrator.report import TrialRow
from orchestrator.store import Store

__all__ = ["CostHistory", "Manifests", "StoredHistory", "trial_rows"]

KEPT = ("metrics", "epochs", "cost", "placement")
"""What of a manifest goes into rows."""


class Manifests:
    """What rows need of the manifests of a store: each is read once, and the rest of it is not kept in memory."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._known: dict[str, dict[str, Any]] = {}

    def __call__(self, key: str) -> dict[str, Any]:
        """Metrics, epochs, cost and placement of an artifact; empty where there is none (yet)."""
        found = self._known.get(key)
        if found is None:
            try:
                manifest = self._store.manifest(key)
            except MissingArtifactError:
                return {}
            found = self._known[key] = {name: manifest[name] for name in KEPT if name in manifest}
        return found


class StoredHistory(Sequence[dict[str, float]]):
    """The epochs of a finished stage, read from the store whenever they are looked at, and not kept.

    A report of thousands of trials draws a few of their curves.
    """

    def __init__(self, store: Store, key: str) -> None:
        self._store = store
        self._key = key

    def _rows(self) -> list[dict[str, float]]:
        rows: list[dict[str, float]] = json.loads(self._store.read(self._key, "history.json"))
        return rows

    def __len__(self) -> int:
        return len(self._rows())

    @overload
    def __getitem__(self, index: int) -> dict[str, float]: ...
    @overload
    def __getitem__(self, index: slice) -> list[dict[str, float]]: ...
    def __getitem__(self, index: int | slice) -> dict[str, float] | list[dict[str, float]]:
        return self._rows()[index]

    def __iter__(self) -> Iterator[dict[str, float]]:
        return iter(self._rows())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and self._rows() == list(other)

    __hash__ = None  # type: ignore[assignment]


def trial_rows(
    trials: Iterable[Trial],
    outcomes: Mapping[str, Outcome],
    store: Store,
    manifest: Callable[[str], dict[str, Any]] | None = None,
) -> list[TrialRow]:
    """One row per trial, in order. A shared stage is paid by the first trial that uses it."""
    manifest = manifest or Manifests(store)
    paid: set[str] = set()
    return [_row(trial, outcomes.get(trial.key), manifest, paid, store) for trial in trials]


def _row(
    trial: Trial,
    outcome: Outcome | None,
    manifest: Callable[[str], dict[str, Any]],
    paid: set[str],
    store: Store,
) -> TrialRow:
    metrics: dict[str, float] = {}
    for stage in trial.stages:
        found = manifest(stage.key).get("metrics", {})
        metrics |= {f"{stage.name}.{name}": value for name, value in found.items()}
    stopped = _stopped_rows(trial, outcome, store)
    if stopped:
        metrics |= {f"{trial.final.name}.{name}": value for name, value in stopped[-1].items()}
    final = manifest(trial.key)
    return TrialRow(
        point=trial.point_id,
        label=trial.point.label or "point",
        settings=dict(trial.values),
        seed=trial.seed,
        status="waiting" if outcome is None or outcome.status == "deferred" else outcome.status,
        reason=outcome.reason if outcome else "",
        metrics=metrics,
        num_parameters=int(final.get("metrics", {}).get("num_parameters", 0)),
        epochs=int(final.get("epochs", stopped[-1]["epoch"] if stopped else 0)),
        **_cost(trial, manifest, paid),
        history=StoredHistory(store, trial.key) if final else stopped,
        key=trial.key,
        stage=trial.final.name,
    )


def _cost(trial: Trial, manifest: Callable[[str], dict[str, Any]], paid: set[str]) -> dict[str, Any]:
    """Training time of the whole chain, and the part of it that is ``paid`` already. Pays for the rest."""
    seconds = shared_seconds = 0.0
    held = shared_held = NO_TIME
    for stage in trial.stages:
        found = manifest(stage.key)
        stage_seconds = float(found.get("cost", {}).get("seconds", 0.0))
        seconds += stage_seconds
        held += MachineTime.of_artifact(found)
        if stage.key in paid:
            shared_seconds += stage_seconds
            shared_held += MachineTime.of_artifact(found)
        paid.add(stage.key)
    return {"seconds": seconds, "shared_seconds": shared_seconds, "held": held, "shared_held": shared_held}


def stopped_path(key: str) -> str:
    """The document that keeps what a trial had reached when a scheduler stopped it."""
    return f"stopped/{key}.json"


def _stopped_rows(trial: Trial, outcome: Outcome | None, store: Store) -> list[dict[str, float]]:
    if outcome is None or outcome.status != "stopped":
        return []
    record = store.read_json(stopped_path(trial.key))
    return list(record["rows"]) if record else []


class CostHistory:
    """What a stage is expected to cost, from what stages of its kind did before: medians, read again now and then."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._known: dict[str, dict[str, Any]] = {}

    def forget(self) -> None:
        """Read the history again at the next question."""
        self._known.clear()

    def seconds(self, stage: PlannedStage) -> float | None:
        """Expected seconds; None where no stage of its kind has been measured."""
        per_epoch = self._median(stage, "seconds_per_epoch")
        return None if per_epoch is None else per_epoch * stage.epochs

    def memory_share(self, stage: PlannedStage) -> float | None:
        """Which part of the memory that goes with its cores or its GPU it takes; None where that was not measured."""
        return self._median(stage, "memory_share")

    def _median(self, stage: PlannedStage, name: str) -> float | None:
        if stage.signature not in self._known:
            record = self._read(stage.signature)
            if record is None:
                return None
            self._known[stage.signature] = record
        known = sorted(self._known[stage.signature].get(name, []))
        return known[len(known) // 2] if known else None

    def _read(self, signature: str) -> dict[str, Any] | None:
        try:
            record: dict[str, Any] | None = self._store.read_json(f"costs/{signature}.json")
        except StorageError:  # an estimate is a courtesy: without history there is none
            return None
        return record
