"""Ray Train runs one stage on several workers: distributed data parallel over one host or many.

The workers speak to the trial through the store: worker 0 keeps a small progress document, and a stop document asks
them to leave after an epoch. That works on any storage and from any host, and survives the restart of either side.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import ray.train
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from orchestrator.errors import ConfigurationError, DivergedError, OutOfMemoryError, StillhouseError
from orchestrator.loop import Row, StopTraining
from orchestrator.plan import PlannedStage
from orchestrator.secrecy import hide_in_logs
from orchestrator.stage import StageRunner
from orchestrator.store import Store
from orchestrator.workers import TorchWorkers

__all__ = ["DistributedExecute"]

LOOK_SECONDS = 0.3
FINAL = {kind.__name__: kind for kind in (ConfigurationError, DivergedError)}
"""Errors that every worker meets alike, and that another attempt would meet again."""


@dataclass(frozen=True)
class DistributedExecute:
    """Trains a stage on ``run.workers`` Ray Train workers, seen from the trial's process."""

    stages: StageRunner

    def __call__(self, stage: PlannedStage, report: Callable[[Row], bool | None]) -> None:
        """Start the workers, pass each new row to ``report``, and stop them when it says so or raises."""
        store = self.stages.store
        for path in (_progress_path(stage), _stop_path(stage)):
            store.delete_json(path)
        fit = _Fit(self._trainer(stage))
        fit.start()
        try:
            self._follow(stage, fit, report)
        finally:
            if fit.is_alive():
                store.write_json(_stop_path(stage), {"at": time.time()})
                fit.join()
            told = store.read_json(_progress_path(stage)) or {}
            store.delete_json(_progress_path(stage))
            store.delete_json(_stop_path(stage))
        _raise_what_was_told(told)
        if fit.error is not None:
            raise _as_ours(fit.error, stage)
        if told.get("stopped"):
            raise StopTraining(f"stage {stage.name} ({stage.key[:8]}) was asked to stop")

    def _follow(self, stage: PlannedStage, fit: _Fit, report: Callable[[Row], bool | None]) -> None:
        last_epoch = 0.0
        while True:
            alive = fit.is_alive()
            told = self.stages.store.read_json(_progress_path(stage)) or {}
            for row in told.get("rows", []):
                if row["epoch"] > last_epoch:
                    last_epoch = row["epoch"]
                    if report(row):
                        return
            if not alive:
                return
            fit.join(LOOK_SECONDS)

    def _trainer(self, stage: PlannedStage) -> TorchTrainer:
        run = self.stages.run
        resources = {"CPU": float(run.cpus_per_worker)}
        if run.gpus_per_worker:
            resources["GPU"] = run.gpus_per_worker
        return TorchTrainer(
            _train_worker,
            train_loop_config={"stages": self.stages, "stage": stage},
            scaling_config=ScalingConfig(
                num_workers=run.workers, use_gpu=run.gpus_per_worker > 0, resources_per_worker=resources
            ),
            run_config=RunConfig(
                name=f"{stage.name}-{stage.key[:8]}",
                storage_path=f"{self.stages.store.url.rstrip('/')}/train",
                failure_config=FailureConfig(max_failures=run.max_failures),
            ),
        )


class _Fit(threading.Thread):
    """``trainer.fit()`` beside the trial's own thread."""

    def __init__(self, trainer: TorchTrainer) -> None:
        super().__init__(name="ray-train-fit", daemon=True)
        self._trainer = trainer
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            self._trainer.fit()
        except Exception as error:  # raised again by the trial's thread
            self.error = error


def _train_worker(config: dict[str, Any]) -> None:
    """What every worker runs. Errors that no other attempt would change are told, not raised: Train does not retry."""
    stages: StageRunner = config["stages"]
    stage: PlannedStage = config["stage"]
    gpu = stages.run.gpus_per_worker > 0
    workers = TorchWorkers.current(ray.train.torch.get_device() if gpu else torch.device("cpu"))
    telling = _Telling(stages.store, stage)
    hide_in_logs()
    try:
        replace(stages, workers=workers).execute(stage, telling.row)
    except StopTraining:
        telling.tell(workers.rank, stopped=True)
    except (ConfigurationError, DivergedError) as error:
        telling.tell(workers.rank, kind=type(error).__name__, text=str(error))


class _Telling:
    """Worker 0's side of the progress document."""

    def __init__(self, store: Store, stage: PlannedStage) -> None:
        self._store = store
        self._stage = stage
        self._rows: list[Row] = []

    def row(self, row: Row) -> bool:
        self._rows.append(row)
        self._store.write_json(_progress_path(self._stage), {"rows": self._rows})
        return self._store.read_json(_stop_path(self._stage)) is not None

    def tell(self, rank: int, **news: Any) -> None:
        if rank == 0:
            self._store.write_json(_progress_path(self._stage), {"rows": self._rows, **news})


def _raise_what_was_told(told: dict[str, Any]) -> None:
    if "kind" in told:
        raise FINAL[told["kind"]](told["text"])


def _as_ours(error: Exception, stage: PlannedStage) -> StillhouseError:
    text = str(error)
    if "OutOfMemoryError" in text:
        return OutOfMemoryError(f"stage {stage.name} ({stage.key[:8]}): {text.splitlines()[-1]}")
    return StillhouseError(f"stage {stage.name} ({stage.key[:8]}): Ray Train gave up: {text}")


def _progress_path(stage: PlannedStage) -> str:
    return f"progress/{stage.key}.json"


def _stop_path(stage: PlannedStage) -> str:
    return f"progress/{stage.key}.stop.json"
