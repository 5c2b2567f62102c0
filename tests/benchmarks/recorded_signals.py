"""A distillation step whose teacher's signals are read from a recording: against the student alone, and against live.

    python tests/benchmarks/recorded_signals.py [--quick]

Three runs take turns in one process, from the same weights and behind the same stream, as stages would make them: the
student on labels, the same with a recorded teacher, the same with a live one. Audits are left out, since an epoch here
is short: they add one pass of the teacher to an epoch of any length. CPU time is compared, that of the thread which
reads and writes included: other work on the machine disturbs it less than the clock. Random weights and images:
nothing depends on what they are. Nothing is asserted here.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import numpy as np
import torch
from measurement import Measurement, machine, markdown, peak_bytes

from methods import BUILTIN, METHODS, ModelSettings, Task
from methods.base import Method, Source, Teacher
from methods.data.base import Augment, ImageData, Images
from methods.data.stream import Stream
from methods.teachers import freeze
from orchestrator.keys import Facts
from orchestrator.loop import train
from orchestrator.plan import PlannedStage, Planner, Point
from orchestrator.reader import parse_experiment
from orchestrator.signals import StageSignals
from orchestrator.workers import SOLO

CPU = torch.device("cpu")
NUM_CLASSES = 100
TARGET = 1.05
AUDIT_BATCHES = 391
"""Batches of an epoch of CIFAR-100."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A pair of networks on images of 32 x 32."""

    teacher: str = "resnet32x4"
    student: str = "resnet8x4"
    batch_size: int = 64
    num_batches: int = 2
    """Of the one epoch that each run trains."""


class Runs:
    """The three kinds of runs of one case."""

    def __init__(self, case: Case, folder: str) -> None:
        torch.set_num_threads(1)
        self.case, self.folder = case, folder
        self.task = Task(num_classes=NUM_CLASSES)
        self.data = make_data(case.num_batches * case.batch_size)
        self.stages = {name: make_stage(case, name) for name in ("supervised", "kd")}
        self.teacher = self._network(case.teacher, seed=1)
        freeze(self.teacher)

    def seconds(self, name: str) -> float:
        """CPU time of a step of ``student``, ``recorded`` or ``live``."""
        method_name = "supervised" if name == "student" else "kd"
        stage = self.stages[method_name]
        mode = "record" if name == "recorded" else "live"
        signals = StageSignals(
            stage, replace(RUN, signals=mode), self.folder, frozenset(), SOLO, CPU, is_audited=False
        )
        method = self._method(method_name, signals)
        with signals.watching(self._stream()) as stream:
            started = time.process_time()
            train(method, settings=stage.spec.train, training=stream, validation=None, seed=0, device=CPU)
            return (time.process_time() - started) / self.case.num_batches

    def _method(self, name: str, signals: StageSignals) -> Method:
        inputs = {}
        if name == "kd":
            teacher = Teacher(
                network=self.teacher, num_features=self.teacher.num_features, num_classes=NUM_CLASSES
            )
            inputs["teacher"] = signals.teacher("teacher", self._source(), teacher)
        settings = METHODS[name].Settings()
        model = self._network(self.case.student, seed=2)
        return METHODS[name](settings, task=self.task, model=model, inputs=inputs)

    def _network(self, name: str, seed: int) -> Any:
        torch.manual_seed(seed)
        network = BUILTIN.build_model(ModelSettings(name=name), self.task)
        return network.to(memory_format=torch.channels_last)

    def _source(self) -> Source:
        model = ModelSettings(name=self.case.teacher)
        return Source(
            key="0" * 32, method="supervised", settings=None, model=model, task=self.task, weights={}, inputs={},
            catalog=BUILTIN,
        )  # fmt: skip

    def _stream(self) -> Stream:
        return Stream(
            self.data.train, indices=np.arange(len(self.data.train)), batch_size=self.case.batch_size, seed=0,
            mean=self.data.mean, std=self.data.std, augment=Augment(pad=4, flip=True), shuffle=True, device=CPU,
        )  # fmt: skip


def make_data(num_images: int) -> ImageData:
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (num_images, 3, 32, 32), dtype=np.uint8)
    images = Images(pixels, generator.integers(0, NUM_CLASSES, num_images))
    return ImageData(images, images, tuple(map(str, range(NUM_CLASSES))), mean=(0.5,) * 3, std=(0.25,) * 3)


def make_stage(case: Case, method: str) -> PlannedStage:
    """The planned student, as a sweep would have it."""
    train_settings = {"epochs": 1, "batch_size": case.batch_size}
    students = {
        "supervised": {"method": "supervised"},
        "kd": {"method": "kd", "teacher": "$teacher"},
    }
    stages = {"student": {**students[method], "model": case.student, "train": train_settings}}
    if method == "kd":
        stages = {"teacher": {"method": "supervised", "model": case.teacher}, **stages}
    document = {
        "name": "benchmark", "data": {"dataset": "cifar100", "root": "unused"}, "stages": stages,
        "search": {"objective": {"maximize": "student.top1"}},
    }  # fmt: skip
    spec = parse_experiment(document, BUILTIN)
    return Planner(spec, Facts(data={spec.data.source_id: "random"})).trial(Point(), 0).final


RUN = parse_experiment(
    {
        "name": "benchmark", "data": {"dataset": "digits"}, "stages": {"only": {"method": "supervised", "model": "mini_cnn"}},
        "search": {"objective": {"maximize": "only.top1"}},
    },
    BUILTIN,
).run  # fmt: skip


@dataclass(frozen=True)
class Medians:
    """Seconds of a step of each kind, and ratios of runs that took turns."""

    student: float
    recorded: float
    live: float
    recorded_over_student: float
    live_over_recorded: float


def compare(case: Case, num_rounds: int) -> Medians:
    """Run the three kinds in turns. The first round warms up, and makes the recording."""
    names = ("student", "recorded", "live")
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        runs = Runs(case, folder)
        for number in range(num_rounds + 1):
            for name in names:
                measured = runs.seconds(name)
                if number > 0:
                    seconds[name].append(measured)
    student, recorded, live = (seconds[name] for name in names)
    return Medians(
        *(median(seconds[name]) for name in names),
        recorded_over_student=median(one / other for one, other in zip(recorded, student, strict=True)),
        live_over_recorded=median(one / other for one, other in zip(live, recorded, strict=True)),
    )


def measure(quick: bool) -> Iterable[Measurement]:
    """Two lines: what reading adds to the student alone, and what it saves against live."""
    case = Case() if quick else Case(num_batches=6)
    found = compare(case, num_rounds=3 if quick else 9)
    pair = f"{case.teacher} -> {case.student}, batch {case.batch_size}"
    audit = (found.live - found.recorded) / found.recorded / AUDIT_BATCHES
    yield Measurement(
        name=f"KD step with recorded signals, {pair}", ours=1000 * found.recorded, theirs=1000 * found.student,
        unit="CPU ms/step", against="the student on labels alone", ratio=found.recorded_over_student, at_most=TARGET,
        peak_bytes=peak_bytes(), note=f"audit not included: {audit:.2%} of an epoch of {AUDIT_BATCHES} batches",
    )  # fmt: skip
    yield Measurement(
        name=f"KD step with recorded signals, {pair}", ours=1000 * found.recorded, theirs=1000 * found.live,
        unit="CPU ms/step", against="live teacher", ratio=found.live_over_recorded, at_least=1.0, peak_bytes=peak_bytes(),
    )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds")
    options = parser.parse_args(arguments)
    started = time.monotonic()
    measured = list(measure(options.quick))
    print(markdown(measured, {}, machine(time.monotonic() - started)))


if __name__ == "__main__":
    main()
