"""Time as an argument: the store and its leases take a clock, so that tests and simulations bring their own."""

from __future__ import annotations

import time
from typing import Protocol

__all__ = ["SYSTEM_CLOCK", "Clock", "SystemClock"]


class Clock(Protocol):
    """Tells the time in two ways. Travels to other processes, so it must be picklable."""

    def time(self) -> float:
        """Unix seconds: comparable between processes of one host, roughly between hosts."""

    def monotonic(self) -> float:
        """Seconds that never run backwards: comparable only within this process."""


class SystemClock:
    """The clock of this machine."""

    def time(self) -> float:
        return time.time()

    def monotonic(self) -> float:
        return time.monotonic()


SYSTEM_CLOCK = SystemClock()
