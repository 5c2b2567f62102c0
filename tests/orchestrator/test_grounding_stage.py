"""Grounding through the same plan, loop, stage and store as classification."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from experiment_cases import planner_of, problems_of
from grounding_doubles import CATALOG, TinyGrounder
from loop_doubles import CPU, Killed, MemorySlot, assert_same_bits, without_time
from torch import multiprocessing

from methods import BUILTIN
from methods.data.base import Augment, StreamSettings
from methods.grounding.contracts import GroundingTask
from methods.grounding.shapes_ref import ShapesRef
from orchestrator.checkpoint import from_bytes, to_bytes
from orchestrator.loop import Training, evaluate, train
from orchestrator.optimisation import TrainSettings
from orchestrator.plan import Point
from orchestrator.spec import RunSettings
from orchestrator.stage import StageRunner, load_source
from orchestrator.store import Store
from orchestrator.workers import SOLO, TorchWorkers, Workers

SHAPES = {"dataset": "shapes_ref", "num_train": 22, "num_validation": 7, "num_test": 5, "image_size": 24}
STAGE: dict[str, Any] = {"method": "tiny_grounder", "train": {"epochs": 2, "batch_size": 8, "accumulate": 2}}
EXPERIMENT: dict[str, Any] = {
    "data": SHAPES, "stages": {"grounder": STAGE}, "baselines": {}, "search/space": {},
    "search/objective": {"maximize": "grounder.miou"},
}  # fmt: skip


def test_a_grounder_is_trained_judged_measured_and_stored(tmp_path: Path) -> None:
    trial = planner_of(EXPERIMENT, catalog=CATALOG).trial(Point(), 0)
    store = Store(str(tmp_path))
    rows: list[dict[str, float]] = []
    StageRunner(store, CATALOG, RunSettings(), lambda data: data.source.load()).execute(
        trial.final, rows.append
    )
    manifest = store.manifest(trial.key)
    assert [row["epoch"] for row in rows] == [1, 2]
    metrics = manifest["metrics"]
    assert metrics["test_miou"] >= 0
    assert metrics["language_gap"] == pytest.approx(metrics["miou"] - metrics["miou_rolled"])
    assert metrics["num_parameters"] == 3 * 16 * 25 + 16 + 16 * 16 + 16 + 34 * 16
    assert metrics["macs"] == 24 * 24 * (3 * 16 * 25 + 16 * 16 + 16)
    assert metrics["latency_ms"] > 0
    assert manifest["protocol"] == "ours"
    assert manifest["normalisation"] == {"mean": [0.5] * 3, "std": [0.5] * 3}
    assert len(manifest["vocabulary"]["words"]) == 29
    source = load_source(store, trial.key, CATALOG)
    assert isinstance(source.task, GroundingTask)
    assert source.task.vocabulary_size == 34
    assert source.teacher().num_features == 16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"dataset": "digits"}}, "TinyGrounder learns a GroundingTask, but data set 'digits' gives a Task; data sets that fit: "),
        ({"stages": {"grounder": {"method": "supervised", "model": "tiny_cnn"}}, "search/objective": {"maximize": "grounder.top1"}},
         "Supervised learns a Task, but data set 'shapes_ref' gives a GroundingTask; data sets that fit: cifar10, cifar100"),
        ({"data": {**SHAPES, "fraction": 0.5}}, "fraction and imbalance thin out classes"),
        ({"data": {**SHAPES, "imbalance": 5.0}}, "fraction and imbalance thin out classes"),
        ({"data": {**SHAPES, "augment": {"pad": 2}}}, "augment.pad must be 0"),
        ({"data": {**SHAPES, "generalised": True}}, "no head for sentences that name nothing"),
        ({"data": {**SHAPES, "text_length": 8}}, "text_length must be at least 9"),
        ({"data": {**SHAPES, "protocol": "laft"}}, "'laft' is not a protocol; did you mean 'lavt'"),
        ({"data": {**SHAPES, "num_test": 1}}, "num_test must be at least 2"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_before_anything_starts(changes: dict[str, Any], message: str) -> None:
    problems = problems_of({**EXPERIMENT, **changes}, CATALOG)
    assert any(message in problem for problem in problems), problems


def test_a_stage_may_bring_data_of_another_kind() -> None:
    stages = {"teacher": {"method": "supervised", "model": "tiny_cnn", "data": {"dataset": "digits"}}, "grounder": STAGE}  # fmt: skip
    (problem,) = problems_of({**EXPERIMENT, "stages": stages}, CATALOG)
    assert "nothing leads from this stage" in problem


def test_every_builtin_method_is_offered_some_data() -> None:
    for name, method in BUILTIN.methods.items():
        fitting = [source for source in BUILTIN.datasets.values() if issubclass(getattr(source, "task_type", method.task_type), method.task_type)]  # fmt: skip
        assert fitting, name


def grounded(workers: Workers, slot: MemorySlot | None = None, **settings: Any) -> tuple[Training, dict[str, float]]:  # fmt: skip
    options = TrainSettings(**{"epochs": 2, "batch_size": 7, "learning_rate": 0.05, **settings})
    source = ShapesRef(num_train=26, num_validation=9, num_test=5, image_size=24)
    data = source.load()
    streams = data.streams(StreamSettings(
        batch_size=7, evaluation_batch_size=4, seed=1, augment=Augment(flip=True), validation=0.1, device=CPU,
        rank=workers.rank, num_workers=workers.size,
    ))  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        method = TinyGrounder(TinyGrounder.Settings(), task=data.task(), model=None, inputs={})
    training = train(
        method, settings=options, training=streams["training"], validation=streams["validation"], seed=1,
        device=CPU, workers=workers, checkpoints=slot, checkpoint_seconds=0.0,
    )  # fmt: skip
    return training, evaluate(method, streams["test"], device=CPU, workers=workers)


def test_interrupted_and_uninterrupted_give_the_same_bits() -> None:
    whole, _ = grounded(SOLO)
    slot = MemorySlot(die_after=5)
    with pytest.raises(Killed):
        grounded(SOLO, slot)
    slot.die_after = None
    resumed, _ = grounded(SOLO, slot)
    assert_same_bits(resumed.weights, whole.weights)
    assert repr(without_time(resumed.history)) == repr(without_time(whole.history))


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    untrained, metrics = grounded(TorchWorkers.current(CPU), learning_rate=1e-30)
    left = {"history": untrained.history, "test": metrics, "weights": grounded(TorchWorkers.current(CPU))[0].weights}  # fmt: skip
    for name, content in to_bytes(left).items():
        (Path(folder) / f"{rank}-{name}").write_bytes(content)
    dist.destroy_process_group()


def test_two_workers_give_the_same_digits_as_one(tmp_path: Path) -> None:
    multiprocessing.spawn(work, args=(str(tmp_path),), nprocs=2)
    found = from_bytes({name: (tmp_path / f"0-{name}").read_bytes() for name in to_bytes({})})
    untrained, metrics = grounded(SOLO, learning_rate=1e-30)
    assert repr(found["test"]) == repr(metrics)
    names = ("miou", "oiou", "pr50", "rec50", "language_gap")
    for row, expected in zip(found["history"], untrained.history, strict=True):
        assert {name: row[name] for name in names} == {name: expected[name] for name in names}
    for key, tensor in grounded(SOLO)[0].weights.items():
        torch.testing.assert_close(found["weights"][key], tensor, rtol=1e-4, atol=1e-5)
