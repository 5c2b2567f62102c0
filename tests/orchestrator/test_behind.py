"""Checkpoints written behind the training: nothing is lost, late, or silent."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.behind import BackgroundSlot
from orchestrator.checkpoint import Checkpoints
from orchestrator.clock import SYSTEM_CLOCK
from orchestrator.errors import StorageError
from orchestrator.fence import Fence, FencedError
from orchestrator.filesystem import open_files
from orchestrator.store import Store
from orchestrator.training import StopTraining

KEY = "ab" * 16
PATIENCE_SECONDS = 10.0


class Slow(Checkpoints):
    """Writes where it is told, after its gate was opened, and may then find the disk full."""

    def __init__(self, folder: Path, *, is_full: bool = False) -> None:
        super().__init__(open_files(str(folder)), KEY, SYSTEM_CLOCK)
        self.gate, self.is_full, self.num_begun, self.num_written = threading.Event(), is_full, 0, 0

    def write(self, contents: Mapping[str, bytes]) -> None:
        self.num_begun += 1
        assert self.gate.wait(PATIENCE_SECONDS)
        if self.is_full:
            raise StorageError("disk full")
        super().write(contents)
        self.num_written += 1


def opened(checkpoints: Slow) -> Slow:
    checkpoints.gate.set()
    return checkpoints


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    checkpoints, weights = Slow(tmp_path), torch.zeros(3)
    with BackgroundSlot(checkpoints) as slot:
        slot.save({"weights": weights})
        assert checkpoints.num_written == 0
        weights += 1
        checkpoints.gate.set()
    assert checkpoints.num_written == 1
    kept = checkpoints.load()
    assert kept is not None
    assert torch.equal(kept["weights"], torch.zeros(3))


def test_at_most_one_is_on_its_way(tmp_path: Path) -> None:
    checkpoints, is_back = Slow(tmp_path), threading.Event()
    with BackgroundSlot(checkpoints) as slot:
        slot.save({"epoch": 1})

        def save_again() -> None:
            slot.save({"epoch": 2})
            is_back.set()

        other = threading.Thread(target=save_again)
        other.start()
        assert not is_back.wait(0.1)
        assert checkpoints.num_begun <= 1
        checkpoints.gate.set()
        other.join(PATIENCE_SECONDS)
        assert is_back.is_set()
        assert slot.load() == {"epoch": 2}


def test_a_failed_write_is_told_at_the_next_save(tmp_path: Path) -> None:
    slot = BackgroundSlot(opened(Slow(tmp_path, is_full=True)))
    slot.save({"epoch": 1})
    with pytest.raises(StorageError, match="disk full"):
        slot.save({"epoch": 2})


def leave() -> None:
    """Nothing is raised."""


def stop() -> None:
    raise StopTraining("enough")


def crash() -> None:
    raise KeyError("bug")


def save_and_leave(checkpoints: Slow, end: Callable[[], None]) -> None:
    with BackgroundSlot(checkpoints) as slot:
        slot.save({"epoch": 1})
        end()


@pytest.mark.parametrize(
    ("end", "raised", "is_logged"), [(leave, StorageError, False), (stop, StorageError, False), (crash, KeyError, True)]
)  # fmt: skip
def test_a_failed_write_is_told_at_the_end(
    end: Callable[[], None], raised: type[Exception], is_logged: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:  # fmt: skip
    with caplog.at_level(logging.WARNING), pytest.raises(raised):
        save_and_leave(opened(Slow(tmp_path, is_full=True)), end)
    assert ("disk full" in caplog.text) == is_logged


def test_a_stop_leaves_a_checkpoint(tmp_path: Path) -> None:
    checkpoints = opened(Slow(tmp_path))
    with pytest.raises(StopTraining):
        save_and_leave(checkpoints, stop)
    assert checkpoints.load() == {"epoch": 1}


def test_who_was_taken_over_meanwhile_writes_nothing(tmp_path: Path) -> None:
    class Taken(Fence):
        def check(self) -> None:
            raise FencedError("taken over")

    checkpoints = Store(str(tmp_path)).checkpoints(KEY)
    slot = BackgroundSlot(checkpoints, Taken())
    slot.save({"epoch": 1})
    with pytest.raises(FencedError):
        slot.finish()
    assert checkpoints.load() is None


def test_what_cannot_be_kept_is_refused_at_once(tmp_path: Path) -> None:
    with BackgroundSlot(opened(Slow(tmp_path))) as slot, pytest.raises(TypeError, match=r"tree\['model'\]"):
        slot.save({"model": object()})


def test_lag_is_the_time_of_the_last_write(tmp_path: Path) -> None:
    ticks: list[Any] = [10.0, 12.5]
    with BackgroundSlot(opened(Slow(tmp_path)), clock=lambda: ticks.pop(0)) as slot:
        slot.save({"epoch": 1})
        slot.finish()
        assert slot.lag_seconds == 2.5
