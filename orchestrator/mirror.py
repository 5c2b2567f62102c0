"""Follows a journal from a background thread and hands it to a tracking server, through any outage.

Pure of MLflow: the server is a ``Target``, so that the retry rules are tested with a target that fails on purpose.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from enum import Enum
from pathlib import Path
from typing import Protocol

from orchestrator.journal import DAMAGED, Record, read_records
from orchestrator.secrecy import hide
from orchestrator.tracking_state import MirrorState, SingleSender

__all__ = ["Failure", "Follower", "Target", "grouped"]

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.25
RECORDS_PER_ROUND = 500
MAX_PAUSE_SECONDS = 60.0
SAVE_PAUSE = 20
"""How many times as long as the last saving of the state took, the next one is put off: it grows with the sweep."""
AWAY_SECONDS = 10.0
"""How long a server that is known to be away is waited for in the end."""
MAX_ATTEMPTS = 5
"""How often one record may fail for an unknown reason, while the server answers, before it is left out."""
DATA = frozenset({"params", "metrics", "tags"})
UPLOADS = frozenset({"artifact", "model"})


class Failure(Enum):
    """What an exception of a target asks for."""

    UNAVAILABLE = "the server is away or busy: the same again later, for ever"
    REJECTED = "the server will never take this record: leave it out"
    UNKNOWN = "neither is certain: again a few times, then leave it out"


class Target(Protocol):
    """The receiving end. Every call may be repeated with the same records and must then change nothing."""

    def send(self, group: Sequence[Record]) -> None:
        """Deliver records of one run: one of any kind, or several of params, metrics and tags."""

    def settle(self) -> None:
        """Called when everything is delivered: remove what an outage may have left twice."""

    def alive(self) -> bool:
        """Whether the server answers a harmless question now."""

    def classify(self, problem: Exception) -> Failure:
        """What ``problem``, raised by this target, asks for."""


class Follower:
    """One background thread per journal. Never raises into, and never delays, the process that it runs in."""

    def __init__(
        self,
        journal_path: Path,
        target_name: str,
        connect: Callable[[MirrorState], Target],
        *,
        retry_seconds: float = 5.0,
    ) -> None:
        """``connect`` is called in the thread, after every failure again. It may reset the state to start afresh."""
        self.journal_path = journal_path
        self.state = MirrorState.load(journal_path, target_name)
        self._target_name = target_name
        self._connect = connect
        self._retry_seconds = retry_seconds
        self._sender = SingleSender(journal_path)
        self._has_turn = False
        self._target: Target | None = None
        self._thread: threading.Thread | None = None
        self._stopping = threading.Event()
        self._hurry = threading.Event()
        self._idle = threading.Event()
        self._trouble: str | None = None
        self._attempts: dict[int, int] = {}
        self._left_out: set[int] = set()
        self._is_unsaved = False
        self._save_due = 0.0

    def start(self) -> None:
        """Start following. A second call changes nothing."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="stillhouse-mirror", daemon=True)
            self._thread.start()

    def waiting(self) -> int:
        """Number of journal records that the server does not have yet."""
        return sum(1 for _ in read_records(self.journal_path, self.state.offset))

    def drain(self, timeout_seconds: float) -> int:
        """Wait until everything written so far is delivered, at most this long; the number of records still waiting.

        A server that is away, and does not come back at once, is not worth the whole wait.
        """
        started = time.monotonic()
        deadline = started + timeout_seconds
        self._hurry.set()
        while self._thread is not None and self._thread.is_alive() and time.monotonic() < deadline:
            if self.state.offset >= _size(self.journal_path) and self._idle.is_set():
                break
            if self._trouble is not None and time.monotonic() - started > AWAY_SECONDS:
                break
            time.sleep(0.02)
        return self.waiting()

    def close(self, timeout_seconds: float = 10.0) -> int:
        """Drain, then stop the thread; the number of records left for a later process. Idempotent."""
        waiting = self.drain(timeout_seconds)
        self._stopping.set()
        self._hurry.set()
        if self._thread is not None:
            self._thread.join(timeout=1.0)
        return waiting

    def _work(self) -> None:
        pause_seconds = self._retry_seconds
        while not self._stopping.is_set():
            try:
                caught_up = self._advance()
            except Exception as problem:
                self._target = None
                self._fell_behind(problem)
                self._hurry.wait(pause_seconds)
                self._hurry.clear()
                pause_seconds = min(2 * pause_seconds, MAX_PAUSE_SECONDS)
            else:
                pause_seconds = self._retry_seconds
                self._caught_up()
                if caught_up:
                    self._stopping.wait(POLL_SECONDS)
        self._save_at_last()
        self._sender.release()

    def _advance(self) -> bool:
        """Deliver the next records; True when there is nothing to do for now."""
        if not self._take_turn():
            return True
        if self._target is None:
            self._target = self._connect(self.state)
        if _size(self.journal_path) < self.state.offset:
            logger.warning("%s became shorter: it is sent again from its start", self.journal_path)
            self.state.offset = 0
        batch = list(read_records(self.journal_path, self.state.offset, limit=RECORDS_PER_ROUND))
        if not batch:
            self._settle(self._target)
            self._save_if_due()
            self._idle.set()
            return True
        self._idle.clear()
        for group in grouped(batch):
            if self._stopping.is_set():  # whoever comes next sends the batch again
                return False
            self._deliver(self._target, group)
        self.state.offset = batch[-1][1]
        self._attempts.clear()
        self._left_out.clear()
        self._is_unsaved = True
        self._save_if_due()
        return False

    def _take_turn(self) -> bool:
        """Whether this process may send, which begins where the sender before it came to."""
        if not self._has_turn and self._sender.acquire():
            self.state = MirrorState.load(self.journal_path, self._target_name)
            self._has_turn = True
        return self._has_turn

    def _save_if_due(self) -> None:
        if self._is_unsaved and time.monotonic() >= self._save_due:
            started = time.monotonic()
            self.state.save(self.journal_path, self._target_name)
            self._is_unsaved = False
            self._save_due = time.monotonic() + SAVE_PAUSE * (time.monotonic() - started)

    def _save_at_last(self) -> None:
        try:
            if self._is_unsaved:
                self.state.save(self.journal_path, self._target_name)
        except OSError as failure:
            logger.debug("the mirror's state was not saved: %s", failure)

    def _deliver(self, target: Target, group: Sequence[tuple[Record, int]]) -> None:
        record, place = group[0]
        if place in self._left_out:
            return
        try:
            target.send([record for record, _ in group])
        except Exception as problem:
            if not self._hopeless(target, problem, record, place):
                raise
            self._left_out.add(place)
            self.state.num_rejected += len(group)
            logger.warning(
                "MLflow does not take %s of %s (%s); it is left out",
                record["op"],
                record["id"],
                _line(problem),
            )

    def _hopeless(self, target: Target, problem: Exception, record: Record, place: int) -> bool:
        failure = target.classify(problem)
        if failure is Failure.REJECTED:
            return True
        # An upload can time out for ever on a server that is otherwise well: the records behind it must not starve.
        if (failure is Failure.UNKNOWN or record["op"] in UPLOADS) and target.alive():
            self._attempts[place] = self._attempts.get(place, 0) + 1
        return self._attempts.get(place, 0) >= MAX_ATTEMPTS

    def _settle(self, target: Target) -> None:
        if self.state.uncertain:
            target.settle()
            self.state.save(self.journal_path, self._target_name)

    def _fell_behind(self, problem: Exception) -> None:
        """Say once per outage what is wrong, and keep what is known so far."""
        text = _line(problem)
        if self._trouble is None:
            logger.warning(
                "tracking waits: %s. Training goes on; what is to be logged is kept in %s and sent later",
                text,
                self.journal_path,
            )
        self._trouble = text
        logger.debug("tracking waits", exc_info=problem)
        try:
            self.state.save(self.journal_path, self._target_name)
        except OSError as failure:
            logger.debug("the mirror's state was not saved: %s", failure)

    def _caught_up(self) -> None:
        if self._trouble is not None:
            logger.warning("tracking is back: sending what has waited in %s", self.journal_path)
        self._trouble = None


def grouped(batch: Sequence[tuple[Record, int]]) -> list[list[tuple[Record, int]]]:
    """Merge params, metrics and tags of one run between its other records; the order within a run is kept."""
    groups: list[list[tuple[Record, int]]] = []
    open_groups: dict[str, list[tuple[Record, int]]] = {}
    for record, place in batch:
        if record["op"] == DAMAGED:
            continue
        if record["op"] in DATA:
            if record["id"] not in open_groups:
                open_groups[record["id"]] = []
                groups.append(open_groups[record["id"]])
            open_groups[record["id"]].append((record, place))
        else:
            open_groups.pop(record["id"], None)
            groups.append([(record, place)])
    return groups


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _line(problem: Exception) -> str:
    """The first line of an exception's text, short enough for a log line."""
    text = str(problem).strip() or type(problem).__name__
    return hide(text.splitlines()[0])[:300]
