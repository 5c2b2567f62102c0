"""Processes that take turns: each runs its part of a round while the others wait, so that pairs can be compared."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

from processes import descendants


class Runner:
    """A process that answers each line it is sent with a line of JSON."""

    def __init__(self, arguments: list[str], environment: Mapping[str, str]) -> None:
        self._arguments = arguments
        self._process = subprocess.Popen(
            [sys.executable, *arguments], env=os.environ | environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def round(self) -> dict[str, Any]:
        """What the process measured. Raises RuntimeError when it died."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{' '.join(self._arguments)} ended with {self._process.wait()}")
        told: dict[str, Any] = json.loads(answer)
        return told

    def __enter__(self) -> Runner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def answer(measure: Callable[[], dict[str, Any]]) -> None:
    """What a runner's process does: measure and tell, once for each line it is sent."""
    for _ in sys.stdin:
        print(json.dumps(measure()), flush=True)


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds by the clock, and of CPU in this process and those it started."""
    started, used = time.perf_counter(), cpu_seconds()
    work()
    return time.perf_counter() - started, cpu_seconds() - used


def cpu_seconds() -> float:
    """CPU time of this process, its living children, and those that it has waited for."""
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    total = sum(used.ru_utime + used.ru_stime for used in map(resource.getrusage, kinds))
    return total + sum(child.cpu_seconds for child in descendants(os.getpid()))
