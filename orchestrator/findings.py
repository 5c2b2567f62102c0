"""What a check found: shared by ``doctor``, which looks at this machine, and ``preflight``, which looks at every node."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from orchestrator.secrecy import hide

__all__ = ["Finding", "Level"]

Level = Literal["good", "note", "wrong"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    level: Level
    """``wrong`` keeps a sweep from working; ``note`` is worth knowing."""
    text: str
    """What was found, where, and what to do about it."""
    host: str = ""
    """The node that it was found on; empty where only one machine is looked at."""

    def __str__(self) -> str:
        host = f"{self.host}: " if self.host else ""
        return f"{self.level:6} {hide(host + self.text)}"
