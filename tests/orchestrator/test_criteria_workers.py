"""Every criterion on two workers against one with the same global batch, and interrupted against uninterrupted.

Batch norm, in a network or beside it, sees each worker's own share of a batch: the networks here have none, and that of
adapters is taken out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from loop_doubles import CPU, DoubleStream, Killed, MemorySlot, assert_same_bits, without_time
from torch import Tensor, multiprocessing, nn

from methods import BUILTIN, METHODS
from methods.base import Method, ModelSettings, Source, Task
from methods.data.base import Augment, Images
from methods.data.stream import Stream
from methods.distil.student import DistilledStudent
from methods.models import MapTaps
from orchestrator.checkpoint import from_bytes, to_bytes
from orchestrator.loop import Training, train
from orchestrator.optimisation import TrainSettings
from orchestrator.workers import SOLO, TorchWorkers, Workers

TASK = Task(num_classes=4, in_channels=3, image_size=8)
NUM_SAMPLES = 26
"""Batches of 7, 7, 7 and 5 rows: 4 + 3 and 3 + 2 on two workers."""
SETTINGS = TrainSettings(epochs=2, batch_size=7, learning_rate=0.01)
SMALL: dict[str, dict[str, Any]] = {"crd": {"num_negatives": 9, "kd_weight": 1.0}}
STUDENTS = sorted(
    name for name, method in METHODS.items()
    if issubclass(method, DistilledStudent) and name != "angular_kd"  # needs branches, whose batch norm is local
)  # fmt: skip

BATCH_WISE = ["dist", "mlkd", "rkd", "similarity"]
"""Criteria that relate the samples of a batch to each other."""


class Plain(nn.Module):
    """Three convolutions without batch norm."""

    classifier_path = "classifier"
    map_taps = MapTaps(stages=("stages.1", "stages.3"), before_activation=("stages.0", "stages.2"))

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(in_channels, 4, 3, padding=1)
        self.stages = nn.Sequential(
            nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(6, 8, 3, padding=1), nn.ReLU()
        )
        self.classifier = nn.Linear(8, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.stages(self.stem(images).relu()).mean(dim=(2, 3)))
        return logits


CATALOG = BUILTIN.extended(models={"plain": Plain})


def build(name: str, **settings: Any) -> Method:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        network = CATALOG.build_model(ModelSettings(name="tiny_cnn"), TASK).network
        teacher = Source(
            key="teacher", method="supervised", settings=None, model=ModelSettings(name="tiny_cnn"), task=TASK,
            weights=network.state_dict(), inputs={}, catalog=CATALOG,
        ).teacher()  # fmt: skip
        method_class = METHODS[name]
        roles = {"teacher": teacher} if method_class.inputs else {}
        method = method_class(
            method_class.Settings(**{**SMALL.get(name, {}), **settings}),
            task=TASK,
            model=CATALOG.build_model(ModelSettings(name="plain"), TASK),
            inputs=roles,
        )
        method.prepare(torch.from_numpy(labels()), num_epochs=SETTINGS.epochs)
    without_batch_norm(method)
    for each in roles.values():
        each.network.double()
    return method.double()


def without_batch_norm(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, nn.Identity())
        else:
            without_batch_norm(child)


def labels() -> np.ndarray:
    return np.arange(NUM_SAMPLES) % TASK.num_classes


def make_stream(method: Method, workers: Workers) -> DoubleStream:
    pixels = np.random.default_rng(1).integers(0, 255, (NUM_SAMPLES, 3, 8, 8)).astype(np.uint8)
    options = {"strong": True} if getattr(type(method), "needs_strong", False) else {}
    stream = Stream(
        Images(pixels, labels()), indices=np.arange(NUM_SAMPLES), batch_size=SETTINGS.batch_size, seed=5,
        mean=(0.5,) * 3, std=(0.25,) * 3, augment=Augment(pad=1, flip=True), shuffle=True, device=CPU,
        rank=workers.rank, num_workers=workers.size, **options,
    )  # fmt: skip
    return DoubleStrong(stream)


class DoubleStrong(DoubleStream):
    """Raises the strong view to float64 as well."""

    def batches(self, epoch: int, start: int = 0) -> Any:
        for batch in super().batches(epoch, start):
            yield batch if batch.strong is None else batch._replace(strong=batch.strong.double())


def run(
    name: str, workers: Workers = SOLO, slot: MemorySlot | None = None, **settings: Any
) -> tuple[Training, Method]:
    method = build(name, **settings)
    training = train(
        method, settings=SETTINGS, training=make_stream(method, workers), validation=None, seed=1, device=CPU,
        workers=workers, checkpoints=slot, checkpoint_seconds=0.0,
    )  # fmt: skip
    return training, method


def tree_of(training: Training, method: Method) -> dict[str, Any]:
    return {"state": dict(method.state_dict()), "history": without_time(training.history)}


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    workers = TorchWorkers.current(CPU)
    left = {name: tree_of(*run(name, workers)) for name in STUDENTS}
    for name in BATCH_WISE:
        left[f"{name} apart"] = tree_of(*run(name, workers, across_workers=False))
    for file, content in to_bytes(left).items():
        (Path(folder) / f"{rank}-{file}").write_bytes(content)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two workers left of every criterion."""
    folder = tmp_path_factory.mktemp("criteria")
    multiprocessing.spawn(work, args=(str(folder),), nprocs=2)
    files = list(to_bytes({}))
    return [
        from_bytes({file: (folder / f"{rank}-{file}").read_bytes() for file in files}) for rank in range(2)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDENTS)
def test_two_workers_train_what_one_does(left: list[dict[str, Any]], name: str) -> None:
    alone = tree_of(*run(name))
    assert alone["state"].keys() == left[0][name]["state"].keys()
    differences = [
        float((left[0][name]["state"][key].double() - value.double()).abs().max())
        for key, value in alone["state"].items()
        if value.numel()
    ]
    assert max(differences) < 1e-9
    for found, expected in zip(left[0][name]["history"], alone["history"], strict=True):
        assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDENTS)
def test_workers_end_with_the_same_state(left: list[dict[str, Any]], name: str) -> None:
    """What is remembered per sample included: any worker's checkpoint is that of all."""
    assert_same_bits(left[1][name]["state"], left[0][name]["state"])


@pytest.mark.parametrize("die_after", [2, 5])
@pytest.mark.parametrize("name", ["crd", "review", "fitnet", "rkd"])
def test_an_interrupted_run_ends_with_the_bits_of_an_uninterrupted_one(name: str, die_after: int) -> None:
    whole = tree_of(*run(name))
    slot = MemorySlot(die_after)
    with pytest.raises(Killed):
        run(name, slot=slot)
    resumed = tree_of(*run(name, slot=slot))
    assert_same_bits(resumed["state"], whole["state"])
    assert resumed["history"] == whole["history"]


@pytest.mark.slow
@pytest.mark.parametrize("name", BATCH_WISE)
def test_shares_that_are_not_joined_give_another_result(left: list[dict[str, Any]], name: str) -> None:
    """So the agreement above is not for want of a difference."""
    joined, apart = left[0][name]["history"][-1], left[0][f"{name} apart"]["history"][-1]
    assert joined.keys() == apart.keys()
    assert abs(joined["train_loss"] - apart["train_loss"]) > 1e-4 * joined["train_loss"]
