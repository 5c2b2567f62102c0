"""What stands in a lease file, and how one tells from it whether the holder is still there."""

from __future__ import annotations

import json
import os
import socket
import uuid
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from orchestrator.clock import Clock

__all__ = ["Record"]

MAX_CLOCK_DIFFERENCE_SECONDS = 300.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """Content of a lease file."""

    holder: str
    """Unique to this acquisition."""
    host: str
    machine: str
    """Boot and process-number space: pids compare only where it is equal. Empty where the system does not tell."""
    pid: int
    started: int
    """Start of the process in clock ticks since boot: tells it from a later one with the same pid. 0: unknown."""
    since: float
    time: float
    """Unix seconds of this heartbeat."""
    monotonic: float
    """The same on the monotonic clock of the machine."""
    beat: int = 0
    """Counts heartbeats."""
    released: bool = False
    progress: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of_this_process(cls, clock: Clock) -> Record:
        """A new acquisition."""
        pid = os.getpid()
        return cls(
            holder=uuid.uuid4().hex,
            host=socket.gethostname(),
            machine=_machine(),
            pid=pid,
            started=_start_time(pid) or 0,
            since=clock.time(),
            time=clock.time(),
            monotonic=clock.monotonic(),
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> Record:
        """The record; for unreadable bytes one of age 0, so that only a lack of change tells that its holder is gone."""
        try:
            values = json.loads(data)
            return cls(**{name: kind(values[name]) for name, kind in KINDS.items()})
        except (ValueError, KeyError, TypeError):
            return UNREADABLE

    def to_bytes(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    def age_seconds(self, clock: Clock) -> float:
        """Age of the heartbeat, less what the clocks of two machines may differ."""
        if self.host != socket.gethostname() or self.machine != _machine():
            return clock.time() - self.time - MAX_CLOCK_DIFFERENCE_SECONDS
        # Within one boot the monotonic clock is common to all processes, and neither jumps nor counts a suspension.
        return clock.monotonic() - self.monotonic if self.machine else clock.time() - self.time

    def is_of_this_machine(self) -> bool:
        """Whether the holder's process could be seen from here."""
        return bool(self.machine) and self.host == socket.gethostname() and self.machine == _machine()

    def process_is_gone(self) -> bool:
        """Whether the holder ran on this machine and certainly does not any more."""
        if not self.is_of_this_machine():
            return False
        found = _start_time(self.pid)
        return found is not None and found != self.started


KINDS: dict[str, Any] = {
    "holder": str,
    "host": str,
    "machine": str,
    "pid": int,
    "started": int,
    "since": float,
    "time": float,
    "monotonic": float,
    "beat": int,
    "released": bool,
    "progress": dict,
}
UNREADABLE = Record(
    holder="",
    host="unknown",
    machine="",
    pid=0,
    started=0,
    since=0.0,
    time=float("inf"),
    monotonic=float("inf"),
)


@cache
def _machine() -> str:
    """Boot identity and process-number namespace: containers may share a host name, never this."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _start_time(pid: int) -> int | None:
    """Clock ticks since boot at which a process started; 0 if there is none, or a zombie; None if we cannot tell."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return _is_absent(pid)
    # The name of the program stands in parentheses and may itself hold spaces and parentheses.
    values = text.rpartition(")")[2].split()
    return 0 if values[0] in "ZX" else int(values[19])


def _is_absent(pid: int) -> int | None:
    """0 if there is no such process; None if it is only hidden from us (another user's, mount option hidepid)."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return 0
    except OSError:
        return None
    return None
