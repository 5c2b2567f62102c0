"""What the leader of a pack and the trials that follow it tell each other: small documents in the store.

Works on any storage and from any host. The leader writes a follower's rows and, at last, its outcome. The driver asks for
the end of a stage whose trial is stopped early; a follower that was not stopped says so after the last epoch. That the
leader lives is seen by its lease on the pack's name.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

from orchestrator.dispatch import Outcome
from orchestrator.store import Store
from orchestrator.training import Row

__all__ = ["PackBoard", "Told"]


class Told(NamedTuple):
    """What the leader has told a follower so far."""

    rows: list[Row]
    """Of its last stage."""
    outcome: Outcome | None
    """None while it is in work."""


@dataclass(frozen=True)
class PackBoard:
    """The board of one pack. Trials are named by their keys."""

    store: Store
    pack: str

    def tell(self, trial_key: str, rows: Sequence[Row], outcome: Outcome | None = None) -> None:
        told = {"rows": list(rows), "outcome": None if outcome is None else asdict(outcome)}
        self.store.write_json(self._path(trial_key), told, durable=False)

    def told(self, trial_key: str) -> Told:
        told = self.store.read_json(self._path(trial_key)) or {"rows": [], "outcome": None}
        outcome = told["outcome"]
        return Told(told["rows"], None if outcome is None else Outcome.from_plain(outcome))

    def ask_to_stop(self, trial_key: str) -> None:
        self.store.write_json(self._stop_path(trial_key), {"at": time.time()}, durable=False)

    def is_asked_to_stop(self, trial_key: str) -> bool:
        return self.store.read_json(self._stop_path(trial_key)) is not None

    def say_heard(self, trial_key: str) -> None:
        """The follower has reported every epoch, and may go on to the end."""
        self.store.write_json(self._heard_path(trial_key), {"at": time.time()}, durable=False)

    def is_heard(self, trial_key: str) -> bool:
        return self.store.read_json(self._heard_path(trial_key)) is not None

    def wipe(self, trial_key: str) -> None:
        """Remove what was told and asked: somebody has read it, or nobody will."""
        for path in (self._path, self._stop_path, self._heard_path):
            self.store.delete_json(path(trial_key))

    def _path(self, trial_key: str) -> str:
        return f"packs/{self.pack}/{trial_key}.json"

    def _stop_path(self, trial_key: str) -> str:
        return f"packs/{self.pack}/{trial_key}.stop.json"

    def _heard_path(self, trial_key: str) -> str:
        return f"packs/{self.pack}/{trial_key}.heard.json"
