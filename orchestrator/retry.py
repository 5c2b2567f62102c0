"""Which failures are tried again, by kind: one table, and the counting that goes with it. Pure.

A lost node says nothing about the trial that ran there, so it is not counted, only paced: the pause doubles up to
five minutes, and a trial that has lost its node for a day without end is given up. A crash of the process may well be
the trial's own fault and is counted against ``run.max_failures``. What training itself says (diverged, wrong
configuration) is a result, and another attempt would say the same.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

__all__ = ["RULES", "Attempts", "Decision", "Kind", "Rule", "death_text", "kind_of_death"]

Kind = Literal["node", "process", "memory", "diverged", "configuration", "storage", "other"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """What happens to a trial after a failure of one kind."""

    retried: bool
    """Whether the trial is tried again at all."""
    counted: bool = False
    """Whether ``run.max_failures`` bounds how often."""
    first_pause_seconds: float = 0.0
    """Pause before the first repetition; it doubles with each further one."""


RULES: Mapping[Kind, Rule] = {
    "node": Rule(retried=True, first_pause_seconds=2.0),
    "process": Rule(retried=True, counted=True, first_pause_seconds=1.0),
    "memory": Rule(retried=False),
    "storage": Rule(retried=False),
    "diverged": Rule(retried=False),
    "configuration": Rule(retried=False),
    "other": Rule(retried=False),
}
"""Of memory and storage, the trial's own process has tried what may be tried: a smaller micro-batch, a few pauses.

The driver adds to it where a process was killed for its memory: see ``Attempts.decide``.
"""

LONGEST_PAUSE_SECONDS = 300.0
NODE_LOSSES_SECONDS = 24 * 3600.0
"""A trial that did nothing but lose its node for this long is given up."""

DEATHS: tuple[tuple[str, Kind], ...] = (
    (r"node running low on memory|OOM kill reason", "memory"),
    (r"its node has died|node was terminated|was preempted|local raylet died", "node"),
    (
        r"The actor .{0,200}is unavailable|placement group .{0,80}removed|OwnerDiedError|owner has died",
        "node",
    ),
)
"""What Ray says when a trial's process is gone, first match wins. Anything else is the process itself."""


HEADS: Mapping[Kind, str] = {
    "node": "the trial's node was lost",
    "memory": "the trial's process was killed for its use of memory",
}


def kind_of_death(text: str) -> Kind:
    """Why a trial's process ended without telling: from the text of Ray's error."""
    return next((kind for pattern, kind in DEATHS if re.search(pattern, text, re.DOTALL)), "process")


def death_text(text: str) -> tuple[str, int]:
    """One sentence for the reader out of Ray's error, and the peak memory in bytes where it tells (else 0)."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    telling = [line for line in lines if any(re.search(pattern, line) for pattern, _ in DEATHS)]
    last = (telling or lines or ["no reason given"])[0 if telling else -1]
    used = re.search(r"actual memory used=([\d.]+)GB", text)
    head = HEADS.get(kind_of_death(text), "the trial's process died")
    return f"{head}: {last}", int(float(used.group(1)) * 2**30) if used else 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """Whether a trial is tried again, and what the reader is told."""

    again: bool
    pause_seconds: float = 0.0
    text: str = ""


@dataclass
class Attempts:
    """What went wrong with the trials of one run so far.

    Args:
        max_failures: How many counted failures of a trial are followed by another attempt.
    """

    max_failures: int
    _counts: Counter[tuple[str, Kind]] = field(default_factory=Counter)
    _node_lost_since: dict[str, float] = field(default_factory=dict)

    def decide(self, trial: str, kind: Kind, now: float, *, is_lighter: bool = False) -> Decision:
        """Count a failure of ``trial`` and say what follows.

        Args:
            now: Seconds that only grow.
            is_lighter: The next attempt asks for less memory, so that a failure of kind ``memory`` may not repeat.
        """
        rule = RULES[kind]
        self._counts[trial, kind] += 1
        number = self._counts[trial, kind]
        if kind == "memory" and is_lighter:
            return Decision(again=True, text="tried again with smaller micro-batches")
        if not rule.retried:
            return Decision(again=False)
        if rule.counted and number > self.max_failures:
            return Decision(
                again=False, text=f"failed {number} times, run.max_failures is {self.max_failures}"
            )
        if kind == "node":
            since = self._node_lost_since.setdefault(trial, now)
            if now - since > NODE_LOSSES_SECONDS:
                hours = NODE_LOSSES_SECONDS / 3600
                return Decision(again=False, text=f"lost its node {number} times in {hours:.0f} hours")
        pause = min(rule.first_pause_seconds * 2 ** min(number - 1, 20), LONGEST_PAUSE_SECONDS)
        counted = (
            f"failure {number} of at most {self.max_failures}" if rule.counted else "not counted as a failure"
        )
        return Decision(again=True, pause_seconds=pause, text=f"tried again in {pause:.0f} s ({counted})")

    def progressed(self, trial: str) -> None:
        """The trial has got somewhere: losses of nodes are paced from the beginning again."""
        self._counts.pop((trial, "node"), None)
        self._node_lost_since.pop(trial, None)
