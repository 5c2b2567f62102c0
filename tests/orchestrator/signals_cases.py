"""Small real stages with a teacher, and ways to train one with other ``run`` settings in one folder."""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from methods import BUILTIN
from methods.base import Method
from methods.data.base import Augment, ImageData, Images
from orchestrator.keys import Facts
from orchestrator.plan import Planner, Point, Trial
from orchestrator.reader import parse_experiment
from orchestrator.spec import RunSettings
from orchestrator.stage import StageRunner, load_source
from orchestrator.store import Store
from orchestrator.workers import SOLO, Workers

NUM_IMAGES = 130
BATCH_SIZE = 32
NUM_TRAINING = 104
NUM_BATCHES = 4
"""Three of 32 and one of 8."""
EPOCHS = 2


class Restless:
    """Images that are a little different each time they are asked for."""

    def __init__(self, pixels: np.ndarray) -> None:
        self._pixels = pixels
        self.shape = pixels.shape
        self._calls = 0

    def __len__(self) -> int:
        return len(self._pixels)

    def gather(self, indices: np.ndarray) -> np.ndarray:
        self._calls += 1
        return (np.take(self._pixels, indices, axis=0) + self._calls % 7).astype(np.uint8)


@dataclass(frozen=True, kw_only=True)
class Noise:
    """Random images with random labels."""

    restless: bool = False
    """Whether images draw random numbers of their own."""
    default_augment: ClassVar[Augment] = Augment(pad=1, flip=True)

    def fingerprint(self) -> str:
        return f"noise {self.restless}"

    def load(self) -> ImageData:
        generator = np.random.default_rng(0)
        pixels = generator.integers(0, 200, (NUM_IMAGES, 1, 8, 8), dtype=np.uint8)
        labels = np.arange(NUM_IMAGES) % 5
        train = Images(Restless(pixels) if self.restless else pixels, labels)
        names = tuple("abcde")
        return ImageData(train, Images(pixels[:20], labels[:20]), names, mean=(0.4,), std=(0.25,))


def quick(
    method: str, epochs: int = EPOCHS, train: Mapping[str, Any] | None = None, **settings: Any
) -> dict[str, Any]:
    return {
        "method": method,
        "train": {"epochs": epochs, "batch_size": BATCH_SIZE, **(train or {})},
        **settings,
    }


TEACHERS: dict[str, Any] = {
    "teacher": quick("supervised", 1, model="mini_cnn"),
    "second": quick("supervised", 1, model="tiny_mlp"),
    "views": quick("angular_views", 1, teacher="$teacher", num_branches=2),
    "noise": {"method": "tekap", "teacher": "$teacher"},
}


def planner_of(
    student: Mapping[str, Any],
    run: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
    methods: Mapping[str, type[Method]] | None = None,
) -> Planner:
    """An experiment of the student with those of the teachers that it needs."""
    used = {name: TEACHERS[name] for name in TEACHERS if f"${name}" in str(student)}
    if {"views", "noise"} & set(used):
        used = {"teacher": TEACHERS["teacher"], **used}
    document = {
        "name": "signals",
        "data": {"dataset": "noise", "validation": 0.2, **(data or {})},
        "stages": {**used, "student": student},
        "search": {"objective": {"maximize": "student.top1"}},
        "run": {"storage": "unused", **(run or {})},
    }
    catalog = BUILTIN.extended(methods=methods, datasets={"noise": Noise})
    return Planner(
        parse_experiment(document, catalog),
        Facts(data=defaultdict(lambda: "f0"), code=defaultdict(lambda: "c0")),
    )


@dataclass
class Trained:
    """What a student's training left."""

    weights: dict[str, torch.Tensor]
    signals: dict[str, Any]

    def same_as(self, other: Trained) -> bool:
        assert self.weights.keys() == other.weights.keys()
        return all(torch.equal(value, other.weights[name]) for name, value in self.weights.items())


class Bench:
    """A storage in which students are trained again and again. Their teachers are trained once."""

    plan = staticmethod(planner_of)
    """How an experiment is made of a student."""

    def __init__(self, folder: Path) -> None:
        self.store = Store(str(folder))

    @property
    def recordings(self) -> Path:
        return Path(self.store.url) / "signals"

    def chunks(self) -> list[Path]:
        return sorted(self.recordings.rglob("*.chunk"))

    def train(
        self, student: Mapping[str, Any], *, seed: int = 0, data: Mapping[str, Any] | None = None, shared: bool = False,
        workers: Workers = SOLO, methods: Any = None, **run: Any,
    ) -> Trained:  # fmt: skip
        """Train ``student`` anew with these settings of ``run``, with what else is there. All workers call it."""
        planner = self.plan(student, run, data, methods)
        catalog, trial = planner.spec.catalog, planner.trial(Point({}), seed)
        stages = StageRunner(
            self.store, catalog, planner.spec.run, lambda section: section.source.load(), workers=workers,
            shared_signals=frozenset(trial.final.signals.values()) if shared else frozenset(),
        )  # fmt: skip
        if workers.rank == 0:
            self._forget(trial.key)
            self._teach(trial, stages)
        workers.barrier()
        stages.execute(trial.final, lambda row: None)
        workers.barrier()
        trained = self.result(trial.key, catalog)
        workers.barrier()  # before it is forgotten again
        return trained

    def _teach(self, trial: Trial, stages: StageRunner) -> None:
        for stage in trial.stages[:-1]:
            if not self.store.has(stage.key):
                alone = replace(stages, run=RunSettings(signals="live"), workers=SOLO)
                alone.execute(stage, lambda row: None)

    def result(self, key: str, catalog: Any) -> Trained:
        weights = dict(load_source(self.store, key, catalog).weights)
        return Trained(weights, self.store.manifest(key).get("signals", {}))

    def _forget(self, key: str) -> None:
        shutil.rmtree(Path(self.store.url) / "artifacts" / key[:2] / key, ignore_errors=True)
