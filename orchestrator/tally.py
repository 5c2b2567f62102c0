"""How many stages of each name there are, are done, or have failed: counted as things happen, read at any time. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from orchestrator.plan import PlannedStage, Trial

__all__ = ["Kind", "NameCount", "StageTally"]

Ending = Literal["done", "failed"]


@dataclass(frozen=True, slots=True)
class Kind:
    """Stages that are expected to cost the same."""

    name: str
    signature: str
    epochs: int


@dataclass(kw_only=True, slots=True)
class NameCount:
    """Distinct stages of one name."""

    num_all: int = 0
    num_done: int = 0
    num_failed: int = 0
    num_uses: int = 0
    """By trials: as many stages would run if none were shared."""

    @property
    def num_open(self) -> int:
        """Those that have not ended."""
        return self.num_all - self.num_done - self.num_failed

    @property
    def num_shared(self) -> int:
        """Stage runs that sharing saves."""
        return self.num_uses - self.num_all


@dataclass
class StageTally:
    """The distinct stages of a sweep. Everything is constant work per stage of a trial, however many trials there are."""

    uses: Counter[str] = field(default_factory=Counter)
    """Key -> number of trials that need it."""
    names: dict[str, NameCount] = field(default_factory=dict)
    """Name of a stage -> counts, in the order in which they were met."""
    _open: dict[Kind, tuple[PlannedStage, int]] = field(default_factory=dict)
    """Kind -> one of its stages, and how many have not ended."""
    _ended: dict[str, Ending] = field(default_factory=dict)

    def add(self, trial: Trial) -> None:
        """Count a new trial of the sweep."""
        for stage in trial.stages:
            count = self.names.setdefault(stage.name, NameCount())
            count.num_uses += 1
            if stage.key not in self.uses:
                count.num_all += 1
                self._change_open(stage, 1)
            self.uses[stage.key] += 1

    def end(self, stage: PlannedStage, ending: Ending) -> None:
        """A stage has its artifact, or will have none. Once done it stays done; saying it twice changes nothing."""
        before = self._ended.get(stage.key)
        if stage.key not in self.uses or before in (ending, "done"):
            return
        count = self.names[stage.name]
        if before is None:
            self._change_open(stage, -1)
        else:
            count.num_failed -= 1
        self._ended[stage.key] = ending
        if ending == "done":
            count.num_done += 1
        else:
            count.num_failed += 1

    def has_ended(self, key: str) -> bool:
        return key in self._ended

    def left(self) -> Iterator[tuple[PlannedStage, int]]:
        """One stage of each kind, and how many of its kind have not ended."""
        return iter(self._open.values())

    def _change_open(self, stage: PlannedStage, change: int) -> None:
        kind = Kind(stage.name, stage.signature, stage.epochs)
        example, number = self._open.pop(kind, (stage, 0))
        if number + change > 0:
            self._open[kind] = (example, number + change)
