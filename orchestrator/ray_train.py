"""Where a stage is trained: in the trial's process, in a Ray task, or by a group of workers under Ray Train.

Whoever trains elsewhere speaks to the trial through the store: worker 0 keeps a small progress document, and a stop
document asks for the end of the epoch. That works on any storage and from any host. Errors come back through Ray.
"""

from __future__ import annotations

import os
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import ray
import ray.train
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.controller.state import RunningState, TrainControllerState
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from orchestrator.errors import StillhouseError
from orchestrator.fence import LeaseFence
from orchestrator.group_failures import GroupFailures, PauseBeforeCollateral, stage_error
from orchestrator.loop import Row, StopTraining
from orchestrator.placement import WorkerSettings
from orchestrator.plan import PlannedStage
from orchestrator.secrecy import hide_in_logs
from orchestrator.stage import StageRunner
from orchestrator.stage_pack import StageJob, StagePack
from orchestrator.training import Observer
from orchestrator.trial_pack import StageReport
from orchestrator.workers import SOLO, TorchWorkers, Workers

__all__ = ["StageExecute"]

LOOK_SECONDS = 0.3
ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}
"""For Ray Train's controller. A watcher of its own process would add seconds to each start, and tell us nothing:
workers on a node that goes away are started again without being counted, watched or not."""
PASSED_ON = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "NCCL_IB_DISABLE", "NCCL_DEBUG")
"""What a user sets where the sweep is started, and means for the workers: by which network they meet."""
ELASTIC_START_SECONDS = "20"
"""How long an elastic group waits for room before it looks again how much there is. Ray's own minute is for groups
that cannot be any smaller."""
UNUSED_CALLBACKS = ("DatasetsCallback",)
"""Parts of Ray Train that start a process for every group of workers, for Ray Data, which we do not use."""


def environment_of_workers() -> dict[str, str]:
    """The variables that the user has set here for the workers."""
    return {name: os.environ[name] for name in PASSED_ON if name in os.environ}


@dataclass(frozen=True)
class StageExecute:
    """Trains a stage with the workers it asks for, seen from the trial's process. Made in the driver."""

    stages: StageRunner
    environment: Mapping[str, str] = field(default_factory=environment_of_workers)
    """What the workers find in their environment."""

    def __call__(self, stage: PlannedStage, report: Callable[[Row], bool | None]) -> None:
        """Train ``stage``, pass each new row to ``report``, and stop when it says so or raises.

        Raises:
            StopTraining: ``report`` asked for it, or this trial does not hold what the stage needs (an artifact that
                it counted on has gone, for instance) and is to be started again.
        """
        wanted = self.stages.run.for_stage(stage.name)
        fence = self._fence(stage)
        held = _held_resources()
        if wanted.is_alone and _covers(held, wanted.resources):
            replace(self.stages, fence=fence).execute(stage, report)
        elif _covers(held, {"CPU": 1.0}):
            # Its own workers might wait for ever for what it holds itself.
            raise StopTraining(f"stage {stage.name} needs other resources than this trial holds: {held}")
        else:
            self._delegate(stage, report, wanted, fence)

    def together(self, reports: Sequence[StageReport]) -> list[Exception | None]:
        """Train stages side by side in this process; gives for each why it is not finished, or None.

        Raises:
            StopTraining: This process does not hold what they need.
        """
        first = reports[0][0]
        if not self.stages.catalog.method(
            first.spec.method
        ).trains:  # nothing is gained by making it side by side
            return [self._failure(stage, report) for stage, report in reports]
        wanted, held = self.stages.run.for_stage(first.name), _held_resources()
        if not wanted.is_alone or not _covers(held, wanted.resources):
            raise StopTraining(f"stages {first.name} need other resources than this trial holds: {held}")
        failures: dict[str, Exception | None] = {}
        jobs = []
        for stage, report in reports:
            try:
                jobs.append(StageJob(stage=stage, report=report, fence=self._fence(stage)))
            except StopTraining as taken_over:
                failures[stage.key] = taken_over
        found = StagePack.of(self.stages).execute_all(jobs) if jobs else []
        failures |= {job.stage.key: failure for job, failure in zip(jobs, found, strict=True)}
        return [failures[stage.key] for stage, _ in reports]

    def _failure(self, stage: PlannedStage, report: Observer) -> Exception | None:
        try:
            self(stage, report)
        except Exception as error:
            return error
        return None

    def _fence(self, stage: PlannedStage) -> LeaseFence:
        """For the lease that this process holds on the stage."""
        store = self.stages.store
        fence = LeaseFence(store=store, key=stage.key, generation=store.generation(stage.key))
        holder = store.holder(stage.key)
        if holder is not None and holder.pid != os.getpid():
            raise StopTraining(f"stage {stage.name} ({stage.key[:8]}) was taken over by {holder.host}")
        return fence

    def _delegate(
        self,
        stage: PlannedStage,
        report: Callable[[Row], bool | None],
        wanted: WorkerSettings,
        fence: LeaseFence,
    ) -> None:
        store = self.stages.store
        fence.remove()
        store.delete_json(_folder(fence))
        job = _Job(self._task(stage, wanted, fence) if wanted.is_alone else self._group(stage, wanted, fence))
        job.start()
        try:
            self._follow(fence, job, report)
        finally:
            if job.is_alive():
                store.write_json(_stop_path(fence), {"at": time.time()})
                job.join()
            fence.remove()
            store.delete_json(_folder(fence))
        if job.error is not None:
            raise stage_error(job.error, f"stage {stage.name} ({stage.key[:8]})") from job.error
        if not store.has(stage.key):
            raise StillhouseError(
                f"stage {stage.name} ({stage.key[:8]}): its workers left without an artifact"
            )

    def _follow(self, fence: LeaseFence, job: _Job, report: Callable[[Row], bool | None]) -> None:
        last_epoch = 0.0
        while True:
            alive = job.is_alive()
            told = fence.store.read_json(_progress_path(fence)) or {}
            for row in told.get("rows", []):
                if row["epoch"] > last_epoch:  # a group that was started again shows some epochs twice
                    last_epoch = row["epoch"]
                    if report(row):
                        return
            if not alive:
                return
            job.join(LOOK_SECONDS)

    def _task(self, stage: PlannedStage, wanted: WorkerSettings, fence: LeaseFence) -> Callable[[], Any]:
        """One worker: a Ray task, whose process is there already from the task before."""
        task = ray.remote(_train_alone).options(
            num_cpus=wanted.cpus_per_worker,
            num_gpus=wanted.gpus_per_worker,
            max_retries=self.stages.run.max_failures,
            runtime_env={"env_vars": dict(self.environment)} if self.environment else None,
            # Not inside of the trial's own placement group, which holds no more than a token.
            scheduling_strategy=PlacementGroupSchedulingStrategy(placement_group=None),
        )
        return lambda: ray.get(task.remote(self.stages, stage, fence))

    def _group(self, stage: PlannedStage, wanted: WorkerSettings, fence: LeaseFence) -> Callable[[], Any]:
        """Several workers: Ray Train."""
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        if wanted.is_elastic:
            os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", ELASTIC_START_SECONDS)
        trainer = _Trainer(
            _train_in_group,
            train_loop_config={"stages": self.stages, "stage": stage, "fence": fence},
            # Two workers cannot share a GPU under NCCL.
            torch_config=TorchConfig(backend="nccl" if wanted.gpus_per_worker >= 1 else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=wanted.num_workers,
                use_gpu=wanted.gpus_per_worker > 0,
                resources_per_worker=wanted.resources,
                placement_strategy=wanted.placement.upper(),
            ),
            run_config=RunConfig(
                name=f"{stage.name}-{stage.key[:8]}",
                storage_path=f"{self.stages.store.url.rstrip('/')}/train",
                failure_config=FailureConfig(max_failures=-1),  # counted by GroupFailures
                callbacks=[GroupFailures(self.stages.run.max_failures)],
                worker_runtime_env={"env_vars": dict(self.environment)},
            ),
        )
        fit: Callable[[], Any] = trainer.fit
        return fit


class _Trainer(TorchTrainer):
    """Ray's trainer without what we do not use, each group starts one process less; and with patience."""

    def _create_default_callbacks(self) -> list[Any]:
        made = super()._create_default_callbacks()
        used = [callback for callback in made if type(callback).__name__ not in UNUSED_CALLBACKS]
        return [*used, _Patience()]


class _Patience(ControllerCallback):
    """Lets a controller that waits for room rest between two looks; by itself it takes a whole CPU for asking."""

    def after_controller_state_update(
        self, previous_state: TrainControllerState, current_state: TrainControllerState
    ) -> None:
        is_waiting = type(previous_state) is type(current_state)
        if is_waiting and not isinstance(current_state, RunningState):
            time.sleep(LOOK_SECONDS)


class _Job(threading.Thread):
    """What Ray does for us, beside the trial's own thread."""

    def __init__(self, work: Callable[[], Any]) -> None:
        super().__init__(name="stage", daemon=True)
        self._work = work
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            self._work()
        except Exception as error:  # raised again by the trial's thread
            self.error = error


def _train_alone(stages: StageRunner, stage: PlannedStage, fence: LeaseFence) -> None:
    _train(stages, stage, fence, SOLO)


def _train_in_group(config: dict[str, Any]) -> None:
    """What every worker runs. All of them leave together; only what happened to the first worker is told."""
    stages: StageRunner = config["stages"]
    stage: PlannedStage = config["stage"]
    gpu = stages.run.for_stage(stage.name).gpus_per_worker > 0
    workers = TorchWorkers.current(ray.train.torch.get_device() if gpu else torch.device("cpu"))
    with PauseBeforeCollateral():
        try:
            _train(stages, stage, config["fence"], workers)
        except StopTraining:
            if workers.rank == 0:
                raise


def _train(stages: StageRunner, stage: PlannedStage, fence: LeaseFence, workers: Workers) -> None:
    """Train, on the first worker with a fence of its own, so that earlier starts of this stage write no more."""
    hide_in_logs()
    store = stages.store
    if workers.rank == 0:
        fence = replace(fence, group=uuid.uuid4().hex)
        fence.take()
        stages = replace(stages, fence=fence)
    rows: list[Row] = []

    def tell(row: Row) -> bool:
        fence.check()
        rows.append(row)
        store.write_json(_progress_path(fence), {"rows": rows})
        return store.read_json(_stop_path(fence)) is not None

    replace(stages, workers=workers).execute(stage, tell)


def _held_resources() -> dict[str, float]:
    """What Ray has given to this process: in a trial, what the trial holds."""
    if not ray.is_initialized() or ray.get_runtime_context().worker.mode != ray.WORKER_MODE:
        return {}
    held: dict[str, float] = ray.get_runtime_context().get_assigned_resources()
    return held


def _covers(held: Mapping[str, float], wanted: Mapping[str, float]) -> bool:
    return all(held.get(kind, 0.0) >= amount - 1e-9 for kind, amount in wanted.items())


def _folder(fence: LeaseFence) -> str:
    return f"progress/{fence.key}"


def _progress_path(fence: LeaseFence) -> str:
    return f"{_folder(fence)}/{fence.generation}.json"


def _stop_path(fence: LeaseFence) -> str:
    return f"{_folder(fence)}/{fence.generation}.stop.json"
