"""Fences: of all processes that ever began a stage, only the last ones may write its checkpoints and its artifact.

A lease protects a stage against other trials, but it is held by the trial's process, and what that process started
may outlive it: workers on a host that was cut off, or workers that were suspended. So whoever trains carries the
generation of the lease it works for and, where a group of workers may be started again under one lease, the name of
its group. Before each write it looks whether both are still the newest. What slips through between that look and the
write does no harm: checkpoints have names of their own, an artifact never changes, and equal keys are equal work.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from orchestrator.training import CheckpointSlot, StopTraining

if TYPE_CHECKING:
    from orchestrator.store import Store

__all__ = ["OPEN", "Fence", "FencedError", "FencedSlot", "LeaseFence"]


class FencedError(StopTraining):
    """Another process has taken over the stage: this one leaves without a trace."""


class Fence:
    """The right to write for a stage; this one is always given, to whoever trains outside of a sweep."""

    def check(self) -> None:
        """Raise ``FencedError`` if another process has taken over."""


OPEN = Fence()


@dataclass(frozen=True, kw_only=True)
class LeaseFence(Fence):
    """The right of the holder of a lease, and of the group of workers that was started last in its name."""

    store: Store
    key: str
    generation: int
    """That of the lease."""
    group: str = ""
    """Unique to each start of a group of workers; empty for the trial's own process."""

    def take(self) -> None:
        """Shut out all groups that were started earlier. Called by the first worker of a group when it begins."""
        self._check_generation()
        self.store.write_json(_path(self.key), self._mark, durable=False)

    def check(self) -> None:
        self._check_generation()
        if self.group and self.store.read_json(_path(self.key)) != self._mark:
            raise FencedError(
                f"stage {self.key[:8]}: another group of workers was started in place of this one"
            )

    def remove(self) -> None:
        """Shut out every group: the stage is finished, or left."""
        self.store.delete_json(_path(self.key))

    @property
    def _mark(self) -> dict[str, Any]:
        return {"generation": self.generation, "group": self.group}

    def _check_generation(self) -> None:
        newest = self.store.generation(self.key)
        if newest != self.generation:
            raise FencedError(
                f"stage {self.key[:8]}: its lease is that of generation {newest}, this process works for {self.generation}"
            )


@dataclass(frozen=True)
class FencedSlot:
    """A slot for checkpoints that takes none from a process whose stage was taken over."""

    slot: CheckpointSlot
    fence: Fence

    def load(self) -> Mapping[str, Any] | None:
        return self.slot.load()

    @property
    def lag_seconds(self) -> float:
        return self.slot.lag_seconds

    def save(self, tree: Mapping[str, Any]) -> None:
        self.fence.check()
        self.slot.save(tree)


def _path(key: str) -> str:
    return f"fences/{key}.json"
