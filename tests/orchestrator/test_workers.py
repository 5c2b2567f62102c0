"""Two worker processes on loopback against one process. They run all scenarios once; the tests look at what they left."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from loop_doubles import (
    CPU,
    DoubleStream,
    MemorySlot,
    assert_same_bits,
    make_method,
    make_stream,
    without_time,
)
from measure_sums import judged_by
from torch import Tensor, multiprocessing

from methods.base import Batch
from orchestrator import loop
from orchestrator.checkpoint import from_bytes, to_bytes
from orchestrator.errors import DivergedError, StillhouseError
from orchestrator.loop import StopTraining, Training, evaluate, train
from orchestrator.optimisation import TrainSettings
from orchestrator.workers import SOLO, TorchWorkers, Workers

SETTINGS = TrainSettings(epochs=3, batch_size=7)
NUM_SAMPLES = 26
"""Batches of 7, 7, 7 and 5 rows: 4 + 3 and 3 + 2 on two workers."""


class Slot(MemorySlot):
    """Keeps every checkpoint, and hands out the one it was given."""

    def __init__(self, files: dict[str, bytes] | None = None) -> None:
        super().__init__()
        self.files, self.kept = files, []

    def save(self, tree: Mapping[str, Any]) -> None:
        super().save(tree)
        self.kept.append(self.files)


def run(
    workers: Workers,
    *,
    settings: TrainSettings = SETTINGS,
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> Training:
    """Train on this worker's share; options are those of the method, and ``slot`` and ``observe``."""
    own = {"checkpoints": options.pop("slot", None), "observe": options.pop("observe", loop.ignore)}
    method = options.pop("method", None) or make_method(dtype, **{"batch_norm": False, **options})
    training = make_stream(NUM_SAMPLES, 7, rank=workers.rank, num_workers=workers.size)
    validation = make_stream(13, 4, shuffle=False, rank=workers.rank, num_workers=workers.size)
    double = dtype == torch.float64
    return train(
        method,
        settings=settings,
        training=DoubleStream(training) if double else training,
        validation=DoubleStream(validation) if double else validation,
        seed=1,
        device=CPU,
        workers=workers,
        checkpoint_seconds=0.0,
        **own,
    )


def as_tree(training: Training) -> dict[str, Any]:
    times = [training.seconds, training.worker_seconds, training.cpu_seconds]
    return {
        "weights": training.weights,
        "history": training.history,
        "metrics": training.metrics,
        "times": times,
    }


def caught(action: Callable[[], Any]) -> str:
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def resumed_everywhere(workers: Workers, folder: Path) -> list[dict[str, Any]]:
    """An uninterrupted run, then one from each of its checkpoints."""
    options = {"dtype": torch.float32, "dropout": 0.5, "batch_norm": True}
    settings = replace(SETTINGS, ema_decay=0.5, accumulate=2)
    slot = Slot()
    results = [as_tree(run(workers, settings=settings, slot=slot, **options))]
    if workers.rank == 0:
        for number, files in enumerate(slot.kept):
            (folder / f"{number}.tree").write_bytes(
                to_bytes({"files": {n: list(b) for n, b in files.items()}})["tree.json"]
            )
    workers.barrier()
    for path in sorted(folder.glob("*.tree")):
        empty = to_bytes({})
        tree = from_bytes({**empty, "tree.json": path.read_bytes()})
        files = {name: bytes(content) for name, content in tree["files"].items()}
        results.append(as_tree(run(workers, settings=settings, slot=Slot(files), **options)))
    return results


def refuse(row: dict[str, float]) -> None:
    raise KeyError("refused")


def poison_of(rank: int) -> Callable[[Batch, Tensor], Tensor]:
    """NaN in epoch 2, in the share of the last worker only."""
    return lambda batch, loss: loss * (math.nan if rank == 1 and batch.epoch == 1 else 1.0)


def scenarios(workers: Workers, folder: Path) -> dict[str, Any]:
    rank = workers.rank
    stream = make_stream(13, 4, shuffle=False, rank=rank, num_workers=workers.size)
    lonely = make_stream(1, 4, shuffle=False, rank=rank, num_workers=workers.size)
    broadcast = torch.full((2,), float(rank))
    workers.broadcast_tensors([broadcast])
    poisoned = make_method(torch.float64, poison=poison_of(rank), batch_norm=False)
    solo_slot = Slot(to_bytes({"epoch": 1, "position": 0})) if rank == 0 else Slot()
    norm = run(workers, dtype=torch.float32, batch_norm=True)
    started = time.process_time()
    return {
        "plain": as_tree(run(workers)),
        "own_cpu_seconds": time.process_time() - started,
        "accumulated": as_tree(run(workers, settings=replace(SETTINGS, accumulate=2, clip_norm=0.5))),
        "batch_norm": as_tree(norm),
        "evaluated": evaluate(make_method(), stream, device=CPU, workers=workers),
        "lonely": evaluate(make_method(), lonely, device=CPU, workers=workers),
        "broadcast": broadcast,
        "gathered": workers.gather(torch.tensor([rank, 7])),
        "flags": [workers.broadcast_flag(rank == 0), workers.broadcast_flag(rank == 1)],
        "all_true": [
            bool(workers.all_true(torch.tensor(flag))) for flag in (True, rank == 0, rank == 1, False)
        ],
        "sums": workers.all_reduce_sum({"a": torch.tensor(1.5), "b": torch.arange(3)}),
        "judged": judged_by(workers),
        "stopped": caught(lambda: run(workers, observe=lambda row: row["epoch"] == 2)),
        "raised": caught(lambda: run(workers, observe=refuse)),
        "diverged": caught(lambda: run(workers, method=poisoned)),
        "finite": all(bool(parameter.isfinite().all()) for parameter in poisoned.parameters()),
        "discord": caught(lambda: run(workers, slot=solo_slot)),
        "resumed": resumed_everywhere(workers, folder),
    }


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    loop.STEPS_BETWEEN_LOOKS = 1
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    left = scenarios(TorchWorkers.current(CPU), Path(folder))
    for name, content in to_bytes(left).items():
        (Path(folder) / f"{rank}-{name}").write_bytes(content)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each worker left."""
    folder = tmp_path_factory.mktemp("workers")
    multiprocessing.spawn(work, args=(str(folder),), nprocs=2)
    names = list(to_bytes({}))
    return [
        from_bytes({name: (folder / f"{rank}-{name}").read_bytes() for name in names}) for rank in range(2)
    ]


@pytest.mark.parametrize(
    ("scenario", "settings"),
    [("plain", SETTINGS), ("accumulated", replace(SETTINGS, accumulate=2, clip_norm=0.5))],
)
def test_two_workers_train_what_one_does(
    left: list[dict[str, Any]], scenario: str, settings: TrainSettings
) -> None:
    alone = run(SOLO, settings=settings)
    for worker in left:
        found = worker[scenario]
        for name, tensor in alone.weights.items():
            torch.testing.assert_close(found["weights"][name], tensor, rtol=1e-9, atol=1e-11)
        for row, expected in zip(without_time(found["history"]), without_time(alone.history), strict=True):
            same = {name for name in row if name != "train_norm"}  # a norm over rows is no mean over rows
            assert {name: row[name] for name in same} == pytest.approx(
                {name: expected[name] for name in same}
            )
            assert row["top1"] == expected["top1"]


def test_workers_leave_with_the_same_weights_and_metrics(left: list[dict[str, Any]]) -> None:
    for scenario in ("plain", "batch_norm"):
        first, second = (worker[scenario] for worker in left)
        assert_same_bits(second["weights"], first["weights"])
        assert without_time(second["history"]) == without_time(first["history"])
        assert second["metrics"] == first["metrics"]


def test_time_of_all_workers_counts(left: list[dict[str, Any]]) -> None:
    own = [worker["own_cpu_seconds"] for worker in left]
    for worker in left:
        seconds, worker_seconds, cpu_seconds = worker["plain"]["times"]
        assert worker_seconds == 2 * seconds
        assert cpu_seconds == left[0]["plain"]["times"][2]
        assert max(own) < cpu_seconds <= sum(own)


def test_evaluation_is_exact_over_uneven_shares(left: list[dict[str, Any]]) -> None:
    for name, num_samples in (("evaluated", 13), ("lonely", 1)):
        expected = evaluate(make_method(), make_stream(num_samples, 4, shuffle=False), device=CPU)
        assert left[0][name] == left[1][name] == pytest.approx(expected, rel=1e-6)
        assert left[0][name]["top1"] == expected["top1"]


def test_every_family_of_metrics_has_the_digits_of_one_worker(left: list[dict[str, Any]]) -> None:
    alone = judged_by(SOLO)
    assert sum(map(len, alone.values())) > 20
    assert left[0]["judged"] == left[1]["judged"] == alone


def test_collectives(left: list[dict[str, Any]]) -> None:
    for worker in left:
        assert worker["broadcast"].tolist() == [0.0, 0.0]
        assert worker["gathered"].tolist() == [[0, 7], [1, 7]]
        assert worker["flags"] == [True, False]
        assert worker["all_true"] == [True, False, False, False]
        assert {name: total.tolist() for name, total in worker["sums"].items()} == {
            "a": 3.0,
            "b": [0.0, 2.0, 4.0],
        }


def test_all_workers_leave_together(left: list[dict[str, Any]]) -> None:
    assert [worker["stopped"] for worker in left] == [
        "StopTraining: stopped after epoch 2 of 3: the observer said so"
    ] * 2
    assert left[0]["raised"] == "KeyError: 'refused'"
    assert left[1]["raised"].startswith(StopTraining.__name__)
    for worker in left:
        assert worker["diverged"].startswith(
            f"{DivergedError.__name__}: training diverged in epoch 2, at step 1"
        )
        assert worker["finite"]
        assert worker["discord"].startswith(
            f"{StillhouseError.__name__}: workers found checkpoints at different places"
        )


def test_resumed_workers_have_the_same_bits(left: list[dict[str, Any]]) -> None:
    for worker in left:
        whole, *resumed = worker["resumed"]
        assert len(resumed) == 3 * 4 - 1
        for other in resumed:
            assert_same_bits(other["weights"], whole["weights"])
            assert without_time(other["history"]) == without_time(whole["history"])


@pytest.mark.parametrize("num_batches_done", [2, 4, 5])
def test_one_process_continues_what_two_began(num_batches_done: int) -> None:
    """Sums of the epoch go on although the number of workers has changed."""
    whole, slot = run(SOLO), Slot()
    run(SOLO, slot=slot)
    tree = from_bytes(slot.kept[num_batches_done - 1])
    for name in ("sums", "num_rows"):
        if tree[name] is not None:
            tree[name] = torch.cat([tree[name] // 4, tree[name] - tree[name] // 4])
    tree["random"] = tree["random"].repeat(2, 1)
    continued = run(SOLO, slot=Slot(to_bytes(tree)))
    assert_same_bits(continued.weights, whole.weights)
    for row, expected in zip(without_time(continued.history), without_time(whole.history), strict=True):
        assert row == pytest.approx(expected)


def test_workers_need_a_process_group() -> None:
    with pytest.raises(RuntimeError, match="init_process_group first"):
        TorchWorkers.current(CPU)
