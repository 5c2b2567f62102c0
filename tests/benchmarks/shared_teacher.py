"""A sweep of 16 students under one teacher: ours against trials that each compute the teacher, under plain Ray Tune.

Counted is the CPU time of all processes of a sweep, Ray's included. Each system runs at two lengths in fresh processes;
the difference is what steps cost, the rest is what a sweep costs before its first step. Plain trials share nothing, so
when quick only some of them run and are counted as 16. The ideal computes the teacher's pass once for all students.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, fields
from statistics import median
from typing import Any

import pictures
import product
import textbook
import torch
import turns
from measurement import Measurement
from processes import CpuMeter

from orchestrator.spec import RunSettings

NUM_STUDENTS = 16
NUM_SLOTS = 2
SHARING = {"signals": "record", "pack": "auto"}
"""Settings of ``run`` that share the teacher's pass, where they exist."""
SHARE_OF_IDEAL, TEXTBOOK_TARGET = 0.85, 3.0
SYSTEMS = ("ours", "same loop", "textbook")
STEPS_OF_AN_EPOCH = 50_000 // textbook.BATCH_SIZE


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much of the sweep is run."""

    teacher: str = "resnet32x4"
    student: str = "resnet8x4"
    few_steps: int = 1
    many_steps: int = 4
    """Of each of our 16 students."""
    many_plain_steps: int = 9
    """Of each trial in the systems that share nothing."""
    num_plain: int = NUM_SLOTS
    """How many of the 16 trials run there."""
    num_rounds: int = 1

    def of(self, system: str) -> tuple[int, int]:
        """Trials of a system, and steps of each in the long run."""
        is_ours = system == "ours"
        return (NUM_STUDENTS, self.many_steps) if is_ours else (self.num_plain, self.many_plain_steps)


def measure(quick: bool) -> Iterator[Measurement]:
    """Our sweep against both others."""
    size = Size() if quick else Size(many_steps=17, many_plain_steps=17, num_plain=NUM_STUDENTS, num_rounds=3)
    split = teacher_and_student_seconds(size, num_rounds=3 if quick else 7)
    rounds = [{system: Cost.of(system, size) for system in SYSTEMS} for _ in range(size.num_rounds)]
    yield from summarise(size, rounds, split)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """CPU seconds of a sweep of 16 students."""

    per_step: float
    """All 16 students taking one step each."""
    fixed: float
    """Everything else, with as many trials as were run."""
    peak_bytes: int
    """Of the largest process."""

    @classmethod
    def of(cls, system: str, size: Size) -> Cost:
        """Run the system at both lengths."""
        num_trials, many_steps = size.of(system)
        few, _ = run_sweep(system, size, size.few_steps, num_trials)
        many, peak = run_sweep(system, size, many_steps, num_trials)
        of_trials = (many - few) / (many_steps - size.few_steps)
        return cls(
            per_step=of_trials * NUM_STUDENTS / num_trials,
            fixed=few - of_trials * size.few_steps,
            peak_bytes=peak,
        )

    def of_epoch(self) -> float:
        """A sweep in which each student sees 50,000 images once."""
        return self.fixed + self.per_step * STEPS_OF_AN_EPOCH


def summarise(size: Size, rounds: list[dict[str, Cost]], split: tuple[float, float]) -> Iterator[Measurement]:
    """Ratios of one epoch, extrapolated, with what they are made of."""
    teacher, student = split
    ideal = NUM_STUDENTS * (teacher + student) / (teacher + NUM_STUDENTS * student)
    sharing = ", ".join(f"{name}: {value}" for name, value in shared_settings().items()) or "stages only"
    targets = {"same loop": SHARE_OF_IDEAL * ideal, "textbook": TEXTBOOK_TARGET}
    for system, target in targets.items():
        ours, theirs = (median(costs[name].of_epoch() for costs in rounds) for name in ("ours", system))
        steps, other_steps = (median(costs[name].per_step for costs in rounds) for name in ("ours", system))
        yield Measurement(
            name=f"sweep of {NUM_STUDENTS} students, {size.teacher} -> {size.student}, an epoch of 50,000 images each",
            ours=ours, theirs=theirs, unit="CPU s", against=f"{system}, plain Ray Tune, teacher in each trial",
            peak_bytes=max(costs["ours"].peak_bytes for costs in rounds),
            ratio=median(costs[system].of_epoch() / costs["ours"].of_epoch() for costs in rounds), at_least=target,
            note=f"shared: {sharing}; extrapolated from {size.few_steps} and {size.many_steps} steps (theirs {size.many_plain_steps}); load average {os.getloadavg()[0]:.1f}; all students a step: "
            f"{steps:.1f} against {other_steps:.1f} CPU s; split of a step: teacher {teacher:.2f}, student {student:.2f} CPU s, "
            f"ideal {ideal:.2f}",
        )  # fmt: skip


def shared_settings() -> dict[str, Any]:
    known = {field.name for field in fields(RunSettings)}
    return {name: value for name, value in SHARING.items() if name in known}


def teacher_and_student_seconds(size: Size, num_rounds: int) -> tuple[float, float]:
    """CPU seconds of a batch in the teacher, and of all else in a step of our loop."""
    torch.set_num_threads(1)
    cpu = torch.device("cpu")
    teacher, student = (product.network(name, cpu) for name in (size.teacher, size.student))
    taught = product.method(student, teacher)
    stream = product.stream(pictures.images(textbook.BATCH_SIZE), textbook.BATCH_SIZE, cpu)
    batch = product.Repeated(stream).batch

    @torch.no_grad()
    def forward() -> None:
        teacher(batch.images)

    pairs = [
        (turns.timed(forward)[1], turns.timed(lambda: product.run(taught, stream, cpu))[1])
        for _ in range(num_rounds + 1)
    ]
    passes, steps = (median(column) for column in zip(*pairs[1:], strict=True))
    return passes, steps - passes


def run_sweep(system: str, size: Size, num_steps: int, num_trials: int) -> tuple[float, int]:
    """CPU seconds of all processes of one sweep, and peak memory of the largest. Raises RuntimeError with its last words when it fails."""
    command = [sys.executable, __file__, system, size.teacher, size.student, str(num_steps), str(num_trials)]
    with tempfile.TemporaryDirectory(prefix="s-") as folder, CpuMeter() as meter:
        # By default Ray's workers are nicer than all else, and starve on a busy machine. Ours are not.
        environment = os.environ | {"RAY_TMPDIR": folder, "RAY_worker_niceness": "0"}
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if ended.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with {ended.returncode}: {ended.stderr[-2000:]}")
    return meter.seconds, meter.peak_bytes


def weights(num_trials: int) -> list[float]:
    """What the trials differ in."""
    return [0.5 + 0.05 * number for number in range(num_trials)]


def run_ours(options: argparse.Namespace, folder: str) -> None:
    """The whole product. The teacher keeps its initial weights: it costs a stage, and no training."""
    from orchestrator import Experiment

    data = pictures.Pictures(num_training=options.num_steps * textbook.BATCH_SIZE)
    train = {"epochs": 1, "batch_size": textbook.BATCH_SIZE, "schedule": "constant"}
    experiment = Experiment(
        name="shared",
        data={"dataset": "pictures", "num_training": data.num_training, "validation": data.validation},
        stages={
            "teacher": {"method": "supervised", "model": options.teacher, "train": {"epochs": 0}},
            "student": {"method": "kd", "model": options.student, "teacher": "$teacher", "train": train},
        },
        search={
            "space": {"student.kd_weight": {"grid": weights(options.num_trials)}},
            "objective": {"maximize": "student.top1"},
        },
        run={"storage": folder, "concurrent_trials": NUM_SLOTS, **shared_settings()},
        datasets={"pictures": pictures.Pictures},
    )  # fmt: skip
    rows = experiment.run(quiet=True).rows
    if [row.status for row in rows] != ["done"] * options.num_trials:
        raise RuntimeError(f"not every trial is done: {[(row.status, row.reason) for row in rows]}")


def run_plain(options: argparse.Namespace, folder: str) -> None:
    """Ray Tune alone, two trials at a time, processes used again."""
    import ray
    from ray import tune

    ray.init(address="local", include_dashboard=False, log_to_driver=False)
    images = pictures.images(options.num_steps * textbook.BATCH_SIZE)
    function = tune.with_parameters(
        train_same if options.system == "same loop" else train_textbook, options=options, images=images
    )
    results = tune.Tuner(
        tune.with_resources(function, {"CPU": 1}),
        param_space={"kd_weight": tune.grid_search(weights(options.num_trials))},
        tune_config=tune.TuneConfig(max_concurrent_trials=NUM_SLOTS, reuse_actors=True),
        run_config=tune.RunConfig(storage_path=folder, verbose=0),
    ).fit()
    if len(results) != options.num_trials or results.num_errors:
        raise RuntimeError(f"{len(results)} trials ended, {results.num_errors} of them with an error")


def train_same(config: dict[str, Any], options: argparse.Namespace, images: Any) -> None:
    """A trial with our loop and stream, and a teacher of its own."""
    from ray import tune

    torch.set_num_threads(1)
    cpu = torch.device("cpu")
    teacher, student = (product.network(name, cpu) for name in (options.teacher, options.student))
    stream = product.stream(images, textbook.BATCH_SIZE, cpu)
    product.run(product.method(student, teacher, kd_weight=config["kd_weight"]), stream, cpu)
    tune.report({"done": 1})


def train_textbook(config: dict[str, Any], options: argparse.Namespace, images: Any) -> None:
    """A trial with the textbook loop."""
    from ray import tune

    torch.set_num_threads(1)
    cpu = torch.device("cpu")
    teacher, student = (
        product.network(name, cpu, channels_last=False).get_submodule("network")
        for name in (options.teacher, options.student)
    )
    textbook.train(student, teacher, textbook.batches(images, cpu), kd_weight=config["kd_weight"])
    tune.report({"done": 1})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="one sweep of the benchmark; started by it")
    parser.add_argument("system", choices=SYSTEMS)
    parser.add_argument("teacher")
    parser.add_argument("student")
    parser.add_argument("num_steps", type=int)
    parser.add_argument("num_trials", type=int)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="shared-") as storage:
        (run_ours if chosen.system == "ours" else run_plain)(chosen, storage)
