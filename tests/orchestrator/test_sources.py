"""Teacher sources and self-distillation through real stages: noise, several teachers, memories of several workers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from experiment_cases import planner_of
from loop_doubles import NUM_CLASSES, Killed, MemorySlot, assert_same_bits, make_stream
from torch import multiprocessing

from methods import BUILTIN, METHODS, ModelSettings, Task
from methods.distil.memory import gathered_rows
from orchestrator.checkpoint import from_bytes, to_bytes
from orchestrator.loop import train
from orchestrator.optimisation import TrainSettings
from orchestrator.plan import Point
from orchestrator.spec import RunSettings
from orchestrator.stage import StageRunner, load_source
from orchestrator.store import Store
from orchestrator.training import Training
from orchestrator.workers import SOLO, TorchWorkers, Workers

CPU = torch.device("cpu")
NUM_SAMPLES = 26
"""The last batch of seven has five, enough for two workers."""


def quick(method: str, **settings: Any) -> dict[str, Any]:
    return {"method": method, "train": {"epochs": 1, "batch_size": 256}, **settings}


STAGES: dict[str, Any] = {
    "teacher": quick("supervised", model="mini_cnn"),
    "second": quick("supervised", model="tiny_mlp"),
    "noise": {"method": "tekap", "teacher": "$teacher"},
    "first_student": quick("dist", model="mini_cnn", teacher="$noise"),
    "student": quick("mlkd", model="tiny_mlp", teacher=["$first_student", "$second"]),
}


def test_noise_and_several_teachers_through_real_stages(tmp_path: Path) -> None:
    planner = planner_of({"stages": STAGES, "baselines": {}, "search/space": {}})
    trial = planner.trial(Point(), 0)
    assert [stage.name for stage in trial.stages] == list(STAGES)
    store = Store(str(tmp_path))
    runner = StageRunner(store, BUILTIN, RunSettings(), lambda data: data.source.load())
    for stage in trial.stages:
        runner.execute(stage, lambda row: None)
    metrics = {stage.name: store.manifest(stage.key)["metrics"] for stage in trial.stages}
    assert metrics["noise"]["top1"] == metrics["teacher"]["top1"]
    assert metrics["noise"]["test_top1"] == metrics["teacher"]["test_top1"]
    assert metrics["first_student"]["train_effective_kd_weight"] == pytest.approx(2 * 3.4)
    assert metrics["student"]["train_effective_kd_weight"] == pytest.approx(0.9)
    source = load_source(store, trial.key, BUILTIN)
    assert set(source.inputs) == {"teacher.0", "teacher.1"}
    assert source.inputs["teacher.0"].inputs["teacher"].teacher().noise is not None


def progressive(workers: Workers, slot: MemorySlot | None = None, **settings: Any) -> Training:
    """PS-KD on random images, in a network without batch norm, so that any number of workers is the same sum."""
    task = Task(num_classes=NUM_CLASSES, image_size=4)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = BUILTIN.build_model(ModelSettings(name="tiny_mlp"), task)
    method = METHODS["pskd"](METHODS["pskd"].Settings(kd_weight=1.0), task=task, model=model, inputs={})
    stream = make_stream(NUM_SAMPLES, 7, rank=workers.rank, num_workers=workers.size)
    held_out = make_stream(8, 4, shuffle=False, rank=workers.rank, num_workers=workers.size)
    options = TrainSettings(**{"epochs": 3, "batch_size": 7, "learning_rate": 0.1, **settings})
    method.prepare(torch.from_numpy(stream.known_labels()), num_epochs=options.epochs)
    training = train(
        method, settings=options, training=stream, validation=held_out, seed=1, device=CPU, workers=workers,
        checkpoints=slot, checkpoint_seconds=0.0,
    )  # fmt: skip
    training.weights["remembered"] = method.predictions.rows
    return training


@pytest.mark.parametrize("num_steps", [5, 9])
def test_predictions_come_back_with_a_checkpoint_to_the_bit(num_steps: int) -> None:
    slot = MemorySlot(die_after=num_steps)
    with pytest.raises(Killed):
        progressive(SOLO, slot)
    slot.die_after = None
    assert_same_bits(progressive(SOLO, slot).weights, progressive(SOLO).weights)


def test_the_average_of_weights_leaves_the_predictions_alone() -> None:
    assert progressive(SOLO, ema_decay=0.5).history[-1]["train_soft_ce"] == pytest.approx(
        progressive(SOLO).history[-1]["train_soft_ce"], rel=1e-6
    )


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    workers = TorchWorkers.current(CPU)
    own = torch.arange(3.0 - rank)[:, None] + 10 * rank
    left: dict[str, Any] = {"rows": gathered_rows(own)[0], "plain": progressive(workers).weights}
    left["accumulated"] = progressive(workers, accumulate=2).weights
    for name, content in to_bytes(left).items():
        (Path(folder) / f"{rank}-{name}").write_bytes(content)
    dist.destroy_process_group()


def test_several_workers_remember_what_one_does(tmp_path: Path) -> None:
    multiprocessing.spawn(work, args=(str(tmp_path),), nprocs=2)
    files = list(to_bytes({}))
    left = [
        from_bytes({name: (tmp_path / f"{rank}-{name}").read_bytes() for name in files}) for rank in (0, 1)
    ]
    expected = progressive(SOLO).weights
    assert [worker["rows"].flatten().tolist() for worker in left] == [[0, 1, 2, 10, 11]] * 2
    for worker in left:
        for name in ("plain", "accumulated"):
            for key, tensor in expected.items():
                torch.testing.assert_close(worker[name][key], tensor, rtol=1e-4, atol=1e-5)
