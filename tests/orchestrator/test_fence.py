"""Of all processes that ever began a stage, only the last ones may write for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.fence import OPEN, FencedError, FencedSlot, LeaseFence
from orchestrator.loop import StopTraining
from orchestrator.store import Store

KEY = "0123456789abcdef"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path), lease_seconds=30)


def fence_of(store: Store, group: str = "") -> LeaseFence:
    return LeaseFence(store=store, key=KEY, generation=store.generation(KEY), group=group)


def test_a_lease_fences_its_predecessors_off(store: Store) -> None:
    first_lease = store.lease(KEY)
    assert first_lease is not None
    first = fence_of(store)
    first.check()
    first_lease.release()
    first.check()  # nobody has taken over yet
    second_lease = store.lease(KEY)
    assert second_lease is not None
    second = fence_of(store)
    assert second.generation > first.generation
    with pytest.raises(
        FencedError, match=f"generation {second.generation}, this process works for {first.generation}"
    ):
        first.check()
    second.check()
    second_lease.release()


def test_only_the_group_started_last_may_write(store: Store) -> None:
    lease = store.lease(KEY)
    assert lease is not None
    with lease:
        old, new = fence_of(store, "old"), fence_of(store, "new")
        old.take()
        old.check()
        new.take()
        with pytest.raises(FencedError, match="another group"):
            old.check()
        new.check()
        new.remove()
        for group in (old, new):  # the trial has left the stage: its workers may be there, and must not write
            with pytest.raises(FencedError):
                group.check()
        late = replace(old, generation=old.generation - 1)
        with pytest.raises(FencedError):
            late.take()
        assert store.list_json("fences/") == []


def test_a_fenced_slot_takes_no_checkpoint(store: Store) -> None:
    lease = store.lease(KEY)
    assert lease is not None
    old = FencedSlot(store.checkpoints(KEY), fence_of(store, "old"))
    old.fence.take()  # type: ignore[attr-defined]
    old.save({"epoch": 1})
    new = FencedSlot(store.checkpoints(KEY), fence_of(store, "new"))
    new.fence.take()  # type: ignore[attr-defined]
    assert new.load() == {"epoch": 1}
    with pytest.raises(FencedError):
        old.save({"epoch": 2})
    assert new.load() == {"epoch": 1}
    new.save({"epoch": 3})
    assert old.load() == {"epoch": 3}
    lease.release()


def test_open_lets_everybody_write() -> None:
    class Kept:
        tree: Mapping[str, Any] | None = None
        lag_seconds = 0.0

        def load(self) -> Mapping[str, Any] | None:
            return self.tree

        def save(self, tree: Mapping[str, Any]) -> None:
            self.tree = tree

    slot = FencedSlot(Kept(), OPEN)
    slot.save({"epoch": 1})
    assert slot.load() == {"epoch": 1}


def test_whoever_is_fenced_off_leaves_as_if_stopped() -> None:
    """So that the trial is tried again, and no failure of the stage is recorded."""
    assert issubclass(FencedError, StopTraining)
