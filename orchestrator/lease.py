"""Leases: the right to work on a key, kept alive by a heartbeat and taken over when its holder is gone.

A lease is a file ``leases/<key>/<generation>.json``. The newest generation holds; it is never deleted, except by the
holder of a newer one, and a release only marks it. To acquire, one creates the next generation exclusively and then
looks whether it is the newest: so of any number of takers one wins, on every storage whose ``create`` has one winner
and whose listings are current (local disks, NFS with close-to-open caching, S3). A former holder that wakes up writes
to its own generation only, sees a newer one, and knows that the lease is lost; it can never harm its successor.

A holder counts as gone at once when it ran on this machine and its process is gone; when its heartbeat is older than
``lease_seconds`` by the clock that both share, being on one machine; and, on other machines, when the heartbeat did
not change for ``lease_seconds`` of our own clock, or is older than that plus five minutes, the largest difference
between the clocks of two machines that we allow for.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

from orchestrator.clock import Clock
from orchestrator.errors import StorageError
from orchestrator.filesystem import Files
from orchestrator.lease_record import Record

__all__ = ["Holder", "Lease", "Leases"]

logger = logging.getLogger(__name__)

UPDATE_SECONDS = 1.0
BEATS_PER_LEASE = 3
RETRIES_PER_LEASE = 10
RELEASE_ATTEMPTS = 3
LOOK_AGAIN_ATTEMPTS = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Holder:
    """Who works on a key, as others see it."""

    host: str
    """Name of the machine."""
    pid: int
    """Process number there."""
    since: float
    """Unix seconds at which the lease was acquired, by the holder's clock."""
    progress: dict[str, Any]
    """What the holder last reported."""


class Leases:
    """The leases of one store, as this process sees them."""

    def __init__(self, files: Files, clock: Clock, lease_seconds: float) -> None:
        if not lease_seconds > 0:
            raise ValueError(f"lease_seconds must be positive, got {lease_seconds}")
        self.files = files
        self.clock = clock
        self.lease_seconds = lease_seconds
        self._seen: dict[str, tuple[tuple[int, bytes], float]] = {}

    def acquire(self, key: str) -> Lease | None:
        """The lease, or None while somebody else, or another thread of this process, holds it."""
        newest = newest_generation(self.files, key)
        if newest and self._live_record(key, newest) is not None:
            return None
        generation = newest + 1
        record = Record.of_this_process(self.clock)
        if not self.files.create(lease_path(key, generation), record.to_bytes(), durable=False):
            return None
        if newest_generation(self.files, key) != generation:
            self.files.delete(lease_path(key, generation))
            return None
        self._forget(key, newest)
        return Lease(self, key, generation, record)

    def acquire_from_silent(self, key: str, pause: Callable[[float], None] = time.sleep) -> Lease | None:
        """As ``acquire``, after watching a holder on another machine until it beats, or has not for ``lease_seconds``.

        A process that has just begun cannot know how long a holder was silent before: without watching, each new one
        would take it for alive.
        """
        first = None
        while (lease := self.acquire(key)) is None:
            mark, _ = self._seen.get(key, (None, 0.0))
            beats = first is not None and mark != first
            if mark is None or beats or Record.from_bytes(mark[1]).is_of_this_machine():
                return None
            first = mark
            pause(self.lease_seconds / RETRIES_PER_LEASE)
        return lease

    def holder(self, key: str) -> Holder | None:
        """The live holder, or None."""
        for _ in range(LOOK_AGAIN_ATTEMPTS):
            newest = newest_generation(self.files, key)
            if not newest:
                return None
            record = self._live_record(key, newest)
            if record is not None:
                return Holder(host=record.host, pid=record.pid, since=record.since, progress=record.progress)
            if newest == newest_generation(self.files, key):
                return None
        return None

    def _live_record(self, key: str, generation: int) -> Record | None:
        """The record of this generation unless its holder is gone. Unreadable ones live until they stop changing."""
        data = self.files.read(lease_path(key, generation))
        if data is None:
            return None
        record = Record.from_bytes(data)
        if record.released or record.process_is_gone():
            return None
        if record.age_seconds(self.clock) > self.lease_seconds or self._unchanged(key, generation, data):
            return None
        return record

    def _unchanged(self, key: str, generation: int, data: bytes) -> bool:
        now = self.clock.monotonic()
        seen, since = self._seen.get(key, (None, now))
        if seen != (generation, data):
            self._seen[key] = ((generation, data), now)
            return False
        return now - since > self.lease_seconds

    def _forget(self, key: str, newest: int) -> None:
        """Remove the generations before ours."""
        self._seen.pop(key, None)
        for name in self.files.names(f"leases/{key}"):
            if 0 < _generation(name) <= newest:
                self.files.delete(f"leases/{key}/{name}")


class Lease:
    """A held lease. A daemon thread keeps it alive until ``release``; as a context manager it releases on exit."""

    def __init__(self, leases: Leases, key: str, generation: int, record: Record) -> None:
        self.key = key
        self._files = leases.files
        self._clock = leases.clock
        self._lease_seconds = leases.lease_seconds
        self._generation = generation
        self._record = record
        self._lost = False
        self._stopped = False
        self._failing = False
        self._dirty = False
        self._last_beat = (record.monotonic, record.time)
        self._last_try = self._last_beat[0]
        self._last_update = float("-inf")
        self._condition = threading.Condition()
        self._beating = threading.Lock()
        self._thread = threading.Thread(target=self._keep_alive, name=f"lease-{key[:12]}", daemon=True)
        self._thread.start()

    @property
    def lost(self) -> bool:
        """Whether the right is gone: taken over by another, or the storage unreachable for ``lease_seconds``.

        Looks at the storage if the last heartbeat is older than the lease, as after a suspended process wakes up.
        """
        if not self._lost and not self._stopped and self._overdue():
            self.refresh()
        return self._lost

    def update(self, progress: Mapping[str, Any]) -> None:
        """Publish a small JSON-able mapping: at once, but at most about once a second, and never blocking on storage."""
        copied = json.loads(json.dumps(progress))
        with self._condition:
            self._record = replace(self._record, progress=copied)
            self._dirty = True
            self._condition.notify_all()

    def refresh(self) -> bool:
        """Beat now. False if the lease is lost; a storage failure is logged and only then a loss when it lasts."""
        if not self._beating.acquire(timeout=self._lease_seconds / BEATS_PER_LEASE):
            self._note_failure(StorageError("the storage does not answer"))
            return not self._lost
        try:
            if not self._lost and not self._stopped:
                self._beat()
        except StorageError as error:
            self._note_failure(error)
        finally:
            self._beating.release()
        return not self._lost

    def release(self) -> None:
        """Give the lease back. Never raises for storage: a lease that cannot be released runs out by itself."""
        with self._condition:
            if self._stopped:
                return
            self._stopped = True
            self._condition.notify_all()
        if not self._beating.acquire(timeout=self._lease_seconds):
            logger.warning(
                "lease of %s is not released and will run out: the storage does not answer", self.key
            )
            return
        try:
            self._mark_released()
        finally:
            self._beating.release()

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _keep_alive(self) -> None:
        while True:
            with self._condition:
                while not self._stopped and (pause := self._due() - self._clock.monotonic()) > 0:
                    self._condition.wait(pause)
                if self._stopped or self._lost:
                    return
            if not self.refresh():
                return

    def _due(self) -> float:
        """Time of the next heartbeat on the monotonic clock."""
        if self._failing:
            return self._last_try + self._lease_seconds / RETRIES_PER_LEASE
        regular = self._last_beat[0] + self._lease_seconds / BEATS_PER_LEASE
        return min(regular, self._last_update + UPDATE_SECONDS) if self._dirty else regular

    def _beat(self) -> None:
        """One heartbeat: look first whether the lease is still ours, then write."""
        started, now = self._clock.monotonic(), self._clock.time()
        self._last_try = started
        if newest_generation(self._files, self.key) != self._generation:
            self._lose("another process took it over, or its file was removed")
            return
        with self._condition:
            self._record = replace(self._record, beat=self._record.beat + 1, time=now, monotonic=started)
            record, updated, self._dirty = self._record, self._dirty, False
        self._files.write(lease_path(self.key, self._generation), record.to_bytes(), durable=False)
        self._last_beat = (started, now)
        self._last_update = started if updated else self._last_update
        self._failing = False

    def _note_failure(self, error: StorageError) -> None:
        if self._clock.monotonic() - self._last_beat[0] > self._lease_seconds:
            self._lose(f"the storage failed for longer than the lease of {self._lease_seconds:g} s: {error}")
        elif not self._failing:
            logger.warning("heartbeat of the lease of %s failed, trying again: %s", self.key, error)
        self._failing = True

    def _lose(self, reason: str) -> None:
        self._lost = True
        logger.warning(
            "lease of %s is lost: %s. What it protected may be done twice, never damaged", self.key, reason
        )

    def _overdue(self) -> bool:
        monotonic, wall = self._last_beat
        return max(self._clock.monotonic() - monotonic, self._clock.time() - wall) > self._lease_seconds

    def _mark_released(self) -> None:
        record = replace(self._record, beat=self._record.beat + 1, released=True, progress={})
        for attempt in range(RELEASE_ATTEMPTS):
            try:
                if not self._lost and newest_generation(self._files, self.key) == self._generation:
                    self._files.write(
                        lease_path(self.key, self._generation), record.to_bytes(), durable=False
                    )
                return
            except StorageError as error:
                if attempt == RELEASE_ATTEMPTS - 1:
                    logger.warning("lease of %s is not released and will run out: %s", self.key, error)


def lease_path(key: str, generation: int) -> str:
    """Where a generation of a lease lies."""
    return f"leases/{key}/{generation:08d}.json"


def newest_generation(files: Files, key: str) -> int:
    """The generation that holds, or 0 if the key was never leased."""
    return max((_generation(name) for name in files.names(f"leases/{key}")), default=0)


def _generation(name: str) -> int:
    number = name.removesuffix(".json")
    return int(number) if number.isdigit() else 0
