"""Latent-VG on two workers: its contrast sees the whole batch, so that it trains as on one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from loop_doubles import without_time
from torch import multiprocessing

from methods import METHODS
from methods.data.base import Augment, StreamSettings
from methods.grounding.gather import gathered_with_gradient
from methods.grounding.shapes_ref import ShapesRef
from orchestrator.checkpoint import from_bytes, to_bytes
from orchestrator.loop import Training, train
from orchestrator.optimisation import TrainSettings
from orchestrator.workers import SOLO, TorchWorkers, Workers

CPU = torch.device("cpu")
SETTINGS = TrainSettings(epochs=2, batch_size=7, learning_rate=0.05, momentum=0.0)
TINY: dict[str, Any] = {
    "patch_size": 6, "width": 16, "num_layers": 2, "num_heads": 2, "channels": 8, "num_concepts": 8,
    "pyramid": False, "drop_path": 0.0, "contrast_weight": 1.0, "contrast_temperature": 0.5, "encoder_lr_factor": 0.5,
}  # fmt: skip


def trained(workers: Workers) -> Training:
    """Batches of 7, 7 and 5 rows: 4 + 3 and 3 + 2 on two workers."""
    data = ShapesRef(num_train=19, num_validation=6, num_test=2, image_size=24).load()
    streams = data.streams(StreamSettings(
        batch_size=7, evaluation_batch_size=4, seed=1, augment=Augment(flip=False), validation=0.1, device=CPU,
        rank=workers.rank, num_workers=workers.size,
    ))  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        latent = METHODS["latent_vg"]
        method = latent(latent.Settings(**TINY), task=data.task(), model=None, inputs={})
    return train(
        method, settings=SETTINGS, training=streams["training"], validation=streams["validation"], seed=1,
        device=CPU, workers=workers,
    )  # fmt: skip


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    rows = torch.arange(3.0 - rank).requires_grad_()
    everyone, first = gathered_with_gradient(rows)
    ((rank + 1) * everyone.square()).sum().backward()
    assert rows.grad is not None
    training = trained(TorchWorkers.current(CPU))
    left = {
        "gathered": everyone.tolist(), "first": first, "gradient": rows.grad.tolist(),
        "weights": training.weights, "history": without_time(training.history),
    }  # fmt: skip
    for name, content in to_bytes(left).items():
        (Path(folder) / f"{rank}-{name}").write_bytes(content)
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_workers_train_as_one(tmp_path: Path) -> None:
    multiprocessing.spawn(work, args=(str(tmp_path),), nprocs=2)
    first, second = (
        from_bytes({name: (tmp_path / f"{rank}-{name}").read_bytes() for name in to_bytes({})}) for rank in (0, 1)
    )  # fmt: skip
    for found, start, gradient in ((first, 0, [0.0, 6.0, 12.0]), (second, 3, [0.0, 6.0])):
        assert found["gathered"] == [0.0, 1.0, 2.0, 0.0, 1.0]
        assert found["first"] == start
        assert found["gradient"] == gradient
    alone = trained(SOLO)
    for key, tensor in alone.weights.items():
        torch.testing.assert_close(first["weights"][key], tensor, rtol=1e-4, atol=1e-5)
    for row, expected in zip(first["history"], without_time(alone.history), strict=True):
        assert row["train_contrast"] == pytest.approx(expected["train_contrast"], rel=1e-4)
        assert row["miou"] == pytest.approx(expected["miou"], abs=0.5)
