"""What a mirror remembers between processes: how far it got, and which MLflow run each of our ids became."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["MirrorState", "SingleSender", "state_path"]

logger = logging.getLogger(__name__)


@dataclass
class MirrorState:
    """Progress towards one tracking server. Losing it costs time, never correctness: runs are found by their tag."""

    offset: int = 0
    """Bytes of the journal that MLflow has."""
    experiment_id: str = ""
    experiment_created: int = 0
    """Creation time of the experiment in ms: tells a new database from the one that we know."""
    runs: dict[str, str] = field(default_factory=dict)
    """Our id -> MLflow run id."""
    complete: list[str] = field(default_factory=list)
    """Our ids whose run was finished by another sweep: nothing more is written to them."""
    uncertain: list[str] = field(default_factory=list)
    """Our ids whose creation got no answer: there may be a second, empty run."""
    num_rejected: int = 0
    """Values that MLflow refused."""

    @classmethod
    def load(cls, journal: Path, target: str) -> MirrorState:
        """The state for ``target`` (server and experiment), fresh when there is none or it cannot be read."""
        known = _read(state_path(journal)).get(_digest(target), {})
        names = {entry.name for entry in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in known.items() if name in names})

    def restart(self, experiment_id: str, experiment_created: int) -> None:
        """Forget everything: the server's experiment is not the one that was known."""
        fresh = MirrorState(experiment_id=experiment_id, experiment_created=experiment_created)
        for entry in dataclasses.fields(fresh):
            setattr(self, entry.name, getattr(fresh, entry.name))

    def save(self, journal: Path, target: str) -> None:
        """Replace the file as a whole; other targets in it are kept."""
        path = state_path(journal)
        own = {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self)}
        targets = _read(path) | {_digest(target): own}
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        try:
            with temporary.open("w") as file:
                json.dump({"targets": targets}, file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except OSError:  # a full disk, on which nothing of ours should stay behind
            temporary.unlink(missing_ok=True)
            raise


class SingleSender:
    """Lets one process at a time send a journal. Where the file system has no locks, nobody is kept out."""

    def __init__(self, journal: Path) -> None:
        self._path = journal.with_name(journal.name + ".lock")
        self._file: Any = None

    def acquire(self) -> bool:
        """True when this process may send. Cheap to ask again."""
        if self._file is not None:
            return True
        try:
            import fcntl
        except ImportError:
            return True
        file = self._path.open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return False
        except OSError as problem:
            logger.debug("%s cannot be locked (%s): going on without", self._path, problem)
        self._file = file
        return True

    def release(self) -> None:
        """Let another process send. Idempotent."""
        if self._file is not None:
            self._file.close()
        self._file = None


def state_path(journal: Path) -> Path:
    """The file beside ``journal`` that holds the state."""
    return journal.with_suffix(".mirror.json")


def _read(path: Path) -> dict[str, Any]:
    with contextlib.suppress(FileNotFoundError):
        try:
            targets = json.loads(path.read_text())["targets"]
            return targets if isinstance(targets, dict) else {}
        except (ValueError, KeyError, TypeError) as problem:
            logger.warning("%s cannot be read (%s): the journal is sent again from its start", path, problem)
    return {}


def _digest(target: str) -> str:
    """A name for the target that holds no password."""
    return hashlib.sha256(target.encode()).hexdigest()[:16]
