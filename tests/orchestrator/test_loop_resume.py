"""The training loop interrupted everywhere, and watched: the bits of a run that nothing disturbed."""

from __future__ import annotations

from itertools import count
from typing import Any

import pytest
import torch
from loop_doubles import (
    Killed,
    MemorySlot,
    assert_same_bits,
    make_method,
    run,
    without_time,
)  # fmt: skip

from orchestrator.loop import StopTraining
from orchestrator.run_state import Held

RESUMED = [
    {},
    {"batch_norm": False, "dropout": 0.5},
    {
        "dropout": 0.3,
        "accumulate": 3,
        "ema_decay": 0.8,
        "clip_norm": 0.5,
        "schedule": "cosine",
        "warmup": 0.4,
    },
    {"optimizer": "adamw", "schedule": "poly", "evaluate_every": 2, "dropout": 0.2},
    {"keep": "best", "objective": "loss", "objective_mode": "min", "learning_rate": 0.5, "ema_decay": 0.5},
    {"optimizer": "timm/lamb", "learning_rate": 0.01, "dropout": 0.2},
    {"precision": "bf16", "dropout": 0.2},
    {"precision": "fp16", "dropout": 0.2, "ema_decay": 0.5},
]


@pytest.mark.parametrize(
    "settings", RESUMED, ids=lambda settings: "-".join(map(str, settings.values())) or "plain"
)
def test_resumed_run_has_the_same_bits_wherever_it_was_interrupted(settings: dict[str, Any]) -> None:
    settings = dict(settings)
    tiny = {name: settings.pop(name) for name in ("batch_norm", "dropout") if name in settings}
    whole_slot = MemorySlot()
    whole = run(make_method(**tiny), checkpoints=whole_slot, checkpoint_seconds=0.0, **settings)
    assert_same_bits(run(make_method(**tiny), **settings).weights, whole.weights)
    assert whole_slot.num_saves == 3 * 3 - 1, "after each batch but the very last"
    for place in range(1, whole_slot.num_saves + 1):
        slot = MemorySlot(die_after=place)
        with pytest.raises(Killed):
            run(make_method(**tiny), checkpoints=slot, checkpoint_seconds=0.0, **settings)
        torch.manual_seed(place)  # a new process has another random state
        torch.rand(place)
        resumed = run(make_method(**tiny), checkpoints=slot, **settings)
        assert_same_bits(resumed.weights, whole.weights)
        assert without_time(resumed.history) == without_time(whole.history), place
        assert resumed.metrics == whole.metrics
        assert resumed.resumed_epochs == place // 3


def test_interrupted_again_and_again() -> None:
    """A process that dies at every second checkpoint arrives all the same."""
    whole, slot = run(make_method(dropout=0.5)), MemorySlot()
    for attempt in range(20):  # noqa: B007
        slot.die_after = slot.num_saves + 2
        try:
            resumed = run(make_method(dropout=0.5), checkpoints=slot, checkpoint_seconds=0.0)
        except Killed:
            continue
        break
    assert attempt >= 3
    assert_same_bits(resumed.weights, whole.weights)
    assert without_time(resumed.history) == without_time(whole.history)


def test_checkpoints_come_when_the_clock_says_so() -> None:
    ticks = count()
    slot = MemorySlot()
    training = run(checkpoints=slot, checkpoint_seconds=1e6, clock=lambda: float(next(ticks)))
    assert slot.num_saves == 0
    assert training.seconds > 0
    run(checkpoints=slot, checkpoint_seconds=6.0, clock=lambda: float(next(ticks)))
    assert 1 <= slot.num_saves <= 3


@pytest.mark.parametrize(("lag", "num_saves"), [(0.0, 1), (4.0, 2), (1000.0, 2)])
def test_a_slot_that_lags_behind_is_asked_earlier(lag: float, num_saves: int) -> None:
    """So that one is kept every 8 ticks: asked for every 4 when a write takes 4 ticks, and never more often."""
    slot, ticks = MemorySlot(), count()
    slot.lag_seconds = lag
    run(checkpoints=slot, checkpoint_seconds=8.0, clock=lambda: float(next(ticks)))
    assert slot.num_saves == num_saves


def test_time_of_earlier_attempts_is_added() -> None:
    slot = MemorySlot(die_after=4)
    with pytest.raises(Killed):
        run(checkpoints=slot, checkpoint_seconds=0.0, clock=count(0, 100).__next__)
    tree = slot.load()
    assert tree is not None
    earlier, worker_seconds, earlier_cpu = tree["seconds"]
    assert worker_seconds == earlier
    assert earlier > 100
    training = run(checkpoints=slot, clock=lambda: 0.0)
    assert training.seconds == training.worker_seconds == earlier
    assert training.cpu_seconds > earlier_cpu
    assert training.history[0]["time"] == tree["history"][0]["time"]
    assert training.peak_memory_bytes > 1e6


def test_a_checkpoint_of_an_older_version_tells_its_time() -> None:
    assert Held.from_tuple((10.0, 7.0)) == Held(seconds=10.0, worker_seconds=10.0, cpu_seconds=7.0)


def test_observer_sees_each_epoch_once_and_after_a_resume_the_last_one_again() -> None:
    slot, seen = MemorySlot(die_after=3), []
    with pytest.raises(Killed):
        run(checkpoints=slot, checkpoint_seconds=0.0, observe=lambda row: seen.append(row["epoch"]))
    assert seen == [], "died between the checkpoint of epoch 1 and its observer"
    run(checkpoints=slot, observe=lambda row: seen.append(row["epoch"]))
    assert seen == [1, 2, 3]


def test_observer_stops_the_run_and_it_continues_later() -> None:
    slot = MemorySlot()
    with pytest.raises(StopTraining, match="epoch 2 of 3"):
        run(checkpoints=slot, observe=lambda row: row["epoch"] == 2)
    resumed = run(checkpoints=slot)
    assert resumed.resumed_epochs == 2
    assert_same_bits(resumed.weights, run().weights)


def test_stop_after_the_last_epoch_is_a_finished_run() -> None:
    assert len(run(observe=lambda row: row["epoch"] == 3).history) == 3


def test_observer_may_raise() -> None:
    def refuse(row: dict[str, float]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(observe=refuse)
