"""CPU time of a process with all that it started, read from /proc (Linux)."""

from __future__ import annotations

import ctypes
import os
import threading
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

POLL_SECONDS = 0.1
TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
PR_SET_CHILD_SUBREAPER = 36


class Process(NamedTuple):
    """One line of /proc. A pid is used again sooner or later, so the start time belongs to its name."""

    pid: int
    started: int
    parent: int
    cpu_seconds: float
    resident_bytes: int


def processes() -> list[Process]:
    """All that are there now."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                text = (folder / "stat").read_text()
            except OSError:  # it has just ended
                continue
            fields = text.rpartition(")")[2].split()  # the name before may hold anything
            seconds = (int(fields[11]) + int(fields[12])) / TICKS_PER_SECOND
            resident = int(fields[21]) * os.sysconf("SC_PAGE_SIZE")
            found.append(Process(int(folder.name), int(fields[19]), int(fields[1]), seconds, resident))
    return found


def descendants(root: int) -> list[Process]:
    """Living processes that ``root`` started, directly or not."""
    children: dict[int, list[Process]] = {}
    for process in processes():
        children.setdefault(process.parent, []).append(process)
    found, waiting = [], [root]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += [process.pid for process in below]
    return found


def _adopt_orphans(is_on: bool) -> None:
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, int(is_on), 0, 0, 0)


class CpuMeter:
    """Adds up what processes below this one use, those that end meanwhile included.

    Looks ten times a second, so up to a tenth of a second of each process's end is missed. Orphans stay below this
    process, which asks for that.
    """

    def __init__(self) -> None:
        self._seen: dict[tuple[int, int], float] = {}
        self.peak_bytes = 0
        """Of the largest process."""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    @property
    def seconds(self) -> float:
        """Until now, or until the meter was left."""
        return sum(self._seen.values()) - self._before

    def __enter__(self) -> CpuMeter:
        _adopt_orphans(True)
        self._look()
        self._before = sum(self._seen.values())
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _adopt_orphans(False)  # else whoever waits for the end of one would wait for us to collect it
        self._ended.set()
        self._thread.join()
        self._look()

    def _watch(self) -> None:
        while not self._ended.wait(POLL_SECONDS):
            self._look()

    def _look(self) -> None:
        for process in descendants(os.getpid()):
            self._seen[process.pid, process.started] = process.cpu_seconds
            self.peak_bytes = max(self.peak_bytes, process.resident_bytes)
