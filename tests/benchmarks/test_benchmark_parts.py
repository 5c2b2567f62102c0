"""The parts of the benchmarks: what is counted, how it is put together. What they measure is not asserted."""

from __future__ import annotations

import subprocess
import sys
import time

import kd_step
import numpy as np
import pictures
import processes
import product
import pytest
import scaling
import shared_teacher
import textbook
import torch
import turns

from methods.base import Batch

CPU = torch.device("cpu")
BURN = "import time\nwhile time.process_time() < 0.5: pass\n"
GRANDCHILD = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {BURN!r}])\n"


def test_cpu_time_of_grandchildren_is_counted() -> None:
    with processes.CpuMeter() as meter:
        subprocess.run([sys.executable, "-c", GRANDCHILD], check=True)
    assert 0.4 <= meter.seconds <= 5.0
    assert 5e6 < meter.peak_bytes < 1e9


def test_time_spent_before_a_meter_is_not_counted() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", BURN + "print('burnt', flush=True)\ninput()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:  # fmt: skip
        assert child.stdout is not None
        child.stdout.readline()
        with processes.CpuMeter() as meter:
            time.sleep(0.05)
        child.communicate(b"\n")
    assert meter.seconds < 0.2


def test_both_loops_minimise_the_same() -> None:
    """On the same images, with the same weights, the first losses agree."""
    images = product.stream(pictures.images(6), 6, CPU)
    batch: Batch = next(iter(images.batches(0)))
    student, teacher = product.network("resnet8", CPU), product.network("resnet8", CPU)
    with torch.no_grad():
        student.get_submodule("network.classifier").weight.mul_(1.7)  # type: ignore[operator,union-attr]
    ours = product.method(student, teacher)
    expected = ours.train()(batch).total.item()
    networks = (network.get_submodule("network") for network in (student, teacher))
    loss, _, _ = textbook.train(*networks, [(batch.images, batch.labels)])
    assert loss == pytest.approx(expected, rel=1e-5)


def test_textbook_images_are_those_of_ours_as_tensors() -> None:
    few = pictures.images(3)
    dataset = textbook.PilDataset(few)
    dataset.transform.transforms = dataset.transform.transforms[2:]  # without what is drawn
    found = torch.stack([dataset[index][0] for index in range(3)])
    stream = product.stream(few, 3, CPU)
    assert torch.allclose(found, stream._normalise(torch.from_numpy(few.gather(np.arange(3)))), atol=1e-5)


def test_the_held_out_share_leaves_whole_batches() -> None:
    data = pictures.Pictures(num_training=64)
    loaded = data.load()
    assert round(len(loaded.train) * data.validation) == data.num_held_out
    assert len(loaded.train) - data.num_held_out == 64
    assert np.bincount(loaded.train.labels).min() > 1


def told(scale: float) -> dict[str, float]:
    parts = {"whole": 1.0, "step": 0.9, "data": 0.1, "bf16": 0.45}
    seconds = {f"{part} {kind}": scale * value for part, value in parts.items() for kind in ("cpu", "clock")}
    return {**seconds, "peak_bytes": 5e6}


def test_a_step_is_split_into_data_and_step() -> None:
    case = kd_step.Case("resnet20", "resnet8", 10)
    lines = {
        item.name.partition(": ")[2]: item
        for item in kd_step.summarise(case, [told(1.0)] * 3, [told(2.0)] * 3)
    }
    whole = lines["CPU time of all processes"]
    assert (whole.ours, whole.theirs, whole.ratio) == pytest.approx((100.0, 200.0, 2.0))
    assert whole.target == ">= 1.5: met"
    assert whole.note.startswith("of what is saved, 10 ms is data, 90 ms the step")
    assert lines["step in bf16"].ratio == pytest.approx(2.0)
    assert lines["data alone"].theirs == pytest.approx(20.0)


def test_the_cost_of_16_students_follows_from_two_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    """20 s for a sweep, 2 s for a step of each trial; ours runs all 16 trials, others some of them, for longer."""

    def run_sweep(
        system: str, size: shared_teacher.Size, num_steps: int, num_trials: int
    ) -> tuple[float, int]:
        return 20.0 + (1.0 if system == "ours" else 2.0) * num_steps * num_trials, 10 * num_steps

    monkeypatch.setattr(shared_teacher, "run_sweep", run_sweep)
    size = shared_teacher.Size()
    costs = {system: shared_teacher.Cost.of(system, size) for system in shared_teacher.SYSTEMS}
    assert (costs["ours"].per_step, costs["ours"].fixed) == (16.0, 20.0)
    assert (costs["textbook"].per_step, costs["textbook"].fixed) == (32.0, 20.0)
    same, text = shared_teacher.summarise(size, [costs], (1.0, 0.7))
    assert same.ratio == pytest.approx(2.0, rel=0.01)
    assert same.at_least == pytest.approx(0.85 * 16 * 1.7 / (1.0 + 16 * 0.7))
    assert (text.at_least, text.peak_bytes) == (3.0, 40)


def test_efficiency_is_that_of_the_second_core() -> None:
    costs = [{"seconds": 4.0, "cpu_seconds": 3.0, "peak_memory_bytes": 7}] * 2
    manifests = [{"finished": 10.0 + 3 * number, "cost": cost} for number, cost in enumerate(costs)]
    single = scaling.spans(manifests)
    assert single == {"seconds": 7.0, "cpu_seconds": 6.0, "peak_bytes": 7}
    item = scaling.summarise("trials", scaling.Size(), [(single, {**single, "seconds": 4.0})])
    assert item.ratio == pytest.approx(7 / 8)


def test_runners_answer_in_turns() -> None:
    code = "import sys\nfor number, _ in enumerate(sys.stdin): print(f'{{\"number\": {number}}}', flush=True)"
    with turns.Runner(["-c", code], {}) as runner:
        assert [runner.round()["number"] for _ in range(2)] == [0, 1]


def test_a_runner_that_died_is_an_error() -> None:
    with (
        turns.Runner(["-c", "raise SystemExit(3)"], {}) as runner,
        pytest.raises(RuntimeError, match="ended with 3"),
    ):
        runner.round()
