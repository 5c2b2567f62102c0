"""What one can see of a running sweep from outside: stages in work, stages finished, and who wrote what."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TAKEN = ("seconds", "latency_ms", "cpu_hours", "gpu_hours", "money")
"""Columns of the table that say what it took, and not what came out."""


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """A stage in work, as its lease and its checkpoints show it."""

    key: str
    name: str
    epoch: float
    row_times: tuple[float, ...]
    """When each reported epoch had ended, by the worker's clock. Checkpoints keep these times."""
    saved_at: float
    """When the newest complete checkpoint was written; 0 when there is none."""


@dataclass
class Watch:
    """Looks at the store of one sweep several times a second, and remembers what must not change any more."""

    storage: Path
    finished: dict[str, float] = field(default_factory=dict)
    """Key -> when its artifact was made."""
    broken: list[str] = field(default_factory=list)
    """What was seen that must never be: a finished stage made again, two writers of one checkpoint."""
    peak_driver_bytes: int = 0
    peak_work_bytes: int = 0
    """Most that unfinished stages had on the storage at a time."""
    _checkpoints: dict[tuple[str, str], str] = field(default_factory=dict)

    def look(self, driver: int | None = None) -> None:
        """Take in what is there now; ``driver`` is the number of the driver's process."""
        for folder in _below(_below([self.storage / "artifacts"])):
            created = _read(folder / "manifest.json").get("created")
            key = folder.name
            if created is not None and self.finished.setdefault(key, created) != created:
                self.broken.append(f"artifact {key} was made again")
        self._look_for_two_writers()
        if driver is not None:
            self.peak_driver_bytes = max(self.peak_driver_bytes, _resident_bytes(driver))

    def attempts(self, since: float = 0.0) -> list[Attempt]:
        """Stages that somebody has begun and not finished, with the epochs that were reported after ``since``."""
        found = []
        for folder in _below([self.storage / "leases"]):
            record = _newest_lease(folder)
            progress = record.get("progress", {})
            rows = progress.get("rows", [])
            if folder.name in self.finished or record.get("released", True) or not rows:
                continue
            found.append(
                Attempt(
                    key=folder.name, name=progress["name"], epoch=progress["epoch"],
                    row_times=tuple(row["time"] for row in rows if row["time"] > since),
                    saved_at=self._saved_at(folder.name),
                )
            )  # fmt: skip
        return found

    def _saved_at(self, key: str) -> float:
        folders = _below([self.storage / "work" / key])
        return max((_read(folder / "manifest.json").get("created", 0.0) for folder in folders), default=0.0)

    def _look_for_two_writers(self) -> None:
        """Checkpoints are numbered, and each has a name of its own: a number with two names had two writers."""
        size = 0
        for folder in _below(_below([self.storage / "work"])):
            key, (number, _, mark) = folder.parent.name, folder.name.partition("-")
            if self._checkpoints.setdefault((key, number), mark) != mark:
                self.broken.append(f"checkpoint {number} of {key} had two writers")
            size += sum(map(_size, _below([folder])))
        self.peak_work_bytes = max(self.peak_work_bytes, size)


def histories(storage: Path) -> dict[str, tuple[float, ...]]:
    """Key -> when each epoch that counts had ended, for every finished stage."""
    return {key: tuple(row["time"] for row in json.loads(text)) for key, text in _contents(storage, "history.json")}  # fmt: skip


def weights(storage: Path) -> dict[str, bytes]:
    """Key -> the bytes of its weights."""
    return dict(_contents(storage, "weights.safetensors"))


def table(storage: Path, name: str) -> list[list[str]]:
    """The final table without what it took, a list per line."""
    import csv

    lines = list(csv.reader((storage / "sweeps" / name / "report" / "table.csv").read_text().splitlines()))
    kept = [index for index, column in enumerate(lines[0]) if column.removeprefix("shared_") not in TAKEN]
    return [[line[index] for index in kept] for line in lines]


def leftovers(storage: Path) -> list[str]:
    """Checkpoints and stop signs: what only running stages have.

    Not the small documents by which workers speak to a trial: one that finishes a stage after its trial was killed
    leaves two of them behind.
    """
    folders = ("work", "stops")
    return [str(path) for name in folders for path in (storage / name).rglob("*") if path.is_file()]


def _contents(storage: Path, name: str) -> Iterator[tuple[str, bytes]]:
    from orchestrator.store import Store

    store = Store(str(storage))
    return ((key, store.read(key, name)) for key in sorted(store.keys()))


def _newest_lease(folder: Path) -> dict[str, Any]:
    names = sorted(path for path in _below([folder]) if path.stem.isdigit())
    return _read(names[-1]) if names else {}


def _below(folders: Iterable[Path]) -> list[Path]:
    """What lies in these folders, in any of which somebody may be writing or deleting."""
    found = []
    for folder in folders:
        with contextlib.suppress(OSError):
            found += [folder / name for name in os.listdir(folder)]
    return found


def _read(path: Path) -> dict[str, Any]:
    """A document that somebody may be writing or deleting."""
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _resident_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


def now() -> float:
    """The clock that rows and checkpoints are dated by: hosts of one machine share it."""
    return time.time()
