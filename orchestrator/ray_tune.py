"""Ray Tune drives the sweep: it places trials, reports their epochs to the scheduler and restarts dead ones.

The only decisions taken here are Tune's own. Which trial may start next is the dispatcher's, and what a trial does is
the runner's; both are handed in. What becomes of a trial that died is decided by kind, in ``ray_search``. A trial that runs holds its resources from start to end, and the dispatcher starts
none that would have to wait for a stage of another, so nothing idle holds a GPU.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray
from ray import tune

from methods import BUILTIN, Catalog
from methods.data.base import LoadedData
from orchestrator import allocator
from orchestrator.capacity import Waiting
from orchestrator.data_section import DataSettings
from orchestrator.dispatch import Dispatcher
from orchestrator.loop import Row
from orchestrator.plan import Planner, Point, Trial
from orchestrator.ray_cluster import ClusterView, Room
from orchestrator.ray_nodes import num_promised_workers, wait_for_workers
from orchestrator.ray_search import (
    HOLDS,
    LEADS,
    OBJECTIVE,
    OUTCOME,
    PACK,
    ROW,
    DispatchSearcher,
    GaveUp,
    Recovery,
    SweepListener,
    Watch,
)
from orchestrator.retry import Attempts
from orchestrator.secrecy import hide_in_logs
from orchestrator.spec import ExperimentSpec, SchedulerSettings
from orchestrator.trial_pack import PackRunner

__all__ = ["SharedData", "connect", "drive", "make_room"]

ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_MAX_PENDING_TRIALS_PG": "64",
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000000",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_worker_niceness": "0",
}
"""Tune's own loggers, folders and signal handling are not used: the store is the truth about what is finished."""


REPORT_SECONDS = 10.0
"""Without a scheduler Tune needs no more than a sign of life: each report makes the trial wait for the driver's answer."""


class SharedData:
    """Data sets in Ray's object store: loaded once by the driver, mapped read-only into every trial's process."""

    _loaded: dict[str, LoadedData] = {}  # noqa: RUF012 - one per process, on purpose

    def __init__(self, data: Iterable[tuple[str, LoadedData]]) -> None:
        self._references = {name: ray.put(loaded) for name, loaded in data}

    def __call__(self, section: DataSettings) -> LoadedData:
        reference = self._references[section.source_id]
        name = reference.hex()
        if name not in self._loaded:
            self._loaded[name] = ray.get(reference)
        return self._loaded[name]


def connect() -> None:
    """Join the cluster that this machine belongs to, else start a local one, closed to the network.

    Only a cluster made by ``ray start`` (or named by RAY_ADDRESS) is joined: a local one belongs to the process that
    started it and ends with it.
    """
    for name, value in (ENVIRONMENT | allocator.ENVIRONMENT).items():
        os.environ.setdefault(name, value)
    if ray.is_initialized():
        return
    options: dict[str, Any] = {"log_to_driver": False, "configure_logging": False}
    if os.environ.get("RAY_ADDRESS") or _cluster_is_here():
        ray.init(**options)
        _Own.cluster = False
        wait_for_workers(num_promised_workers())
    else:
        ray.init(address="local", include_dashboard=False, **options)
        _Own.cluster = True


class _Own:
    """Whether the cluster is this process's own, which no node can join."""

    cluster = False


def _cluster_is_here() -> bool:
    """Whether the cluster noted by ``ray start`` on this machine still answers."""
    note = Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray" / "ray_current_cluster"
    if not note.exists():
        return False
    host, _, port = note.read_text().strip().rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=2.0).close()
    except (OSError, ValueError):
        return False
    return True


def trial_resources(config: Mapping[str, Any]) -> tune.PlacementGroupFactory:
    """What a trial itself holds, as its configuration says: see ``placement.held_by_trial``."""
    return tune.PlacementGroupFactory([dict(config[HOLDS])])


def make_room(spec: ExperimentSpec) -> Room:
    """What the cluster that this process has joined has room for, as the sweep goes on."""
    waiting = Waiting(
        wanted=dict(zip(spec.stage_names, spec.workers(spec.stage_names), strict=True)),
        concurrent_trials=spec.run.concurrent_trials,
        patience_seconds=spec.run.wait_for_resources_seconds,
    )
    return Room(ClusterView(scales=spec.run.autoscaling, is_final=_Own.cluster), waiting)


@dataclass(frozen=True)
class _TrialFunction:
    """What Tune runs in a trial's process: plan the trial again from its point, and walk it."""

    planner: Planner
    runner: PackRunner

    def __call__(self, config: dict[str, Any]) -> None:
        trial = self._trial(config)
        objective = trial_objective(self.planner)
        pause_seconds = REPORT_SECONDS if self.planner.spec.search.scheduler.name == "none" else 0.0
        reported = time.monotonic()

        def report(row: Row) -> None:
            nonlocal reported
            # The last epoch goes unreported: a scheduler would stop what is finished, before its artifact is stored.
            is_due = time.monotonic() - reported >= pause_seconds
            if is_due and objective in row and row["epoch"] < trial.final.epochs:
                reported = time.monotonic()
                tune.report({ROW: json.dumps(row), OBJECTIVE: row[objective], "epoch": row["epoch"]})

        if LEADS in config:
            members = [trial, *(self._trial(choice) for choice in config[LEADS])]
            outcome = self.runner.lead(config[PACK], members, report)
        elif PACK in config:
            outcome = self.runner.follow(config[PACK], trial, report)
        else:
            outcome = self.runner.run(trial, report)
        tune.report({OUTCOME: json.dumps(asdict(outcome)), "epoch": trial.final.epochs})

    def _trial(self, choice: Mapping[str, Any]) -> Trial:
        return self.planner.trial(Point(choice["values"], choice["label"]), choice["seed"])


def trial_objective(planner: Planner) -> str:
    return planner.spec.search.objectives[0].metric


def ship_by_value(catalog: Catalog) -> None:
    """Let code that the user brought travel to workers as such: they may not be able to import its module."""
    tables = (
        (catalog.methods, BUILTIN.methods),
        (catalog.models, BUILTIN.models),
        (catalog.datasets, BUILTIN.datasets),
    )
    own = [code for ours, builtin in tables for name, code in ours.items() if builtin.get(name) is not code]
    for module in {sys.modules.get(code.__module__) for code in own}:
        path = getattr(module, "__file__", None)
        if (
            module is not None
            and path
            and "site-packages" not in Path(path).parts
            and module.__name__ != "__main__"
        ):
            ray.cloudpickle.register_pickle_by_value(module)


def drive(
    planner: Planner,
    runner: PackRunner,
    dispatcher: Dispatcher,
    listener: SweepListener,
    *,
    room: Room,
    interrupt: Callable[[], None],
) -> None:
    """Run every trial that the dispatcher gives. Returns when it has no more, or after an interruption.

    ``interrupt`` is called at the first Ctrl-C; a second one raises ``KeyboardInterrupt`` at once.
    """
    ship_by_value(planner.spec.catalog)
    recovery = Recovery(
        attempts=Attempts(planner.spec.run.max_failures), room=room.look, lighten=runner.killed_for_memory,
        stop_follower=runner.stop_follower,
    )  # fmt: skip
    searcher = DispatchSearcher(planner.spec, dispatcher, listener, recovery)
    trainable = tune.with_resources(
        tune.with_parameters(_run_trial, function=_TrialFunction(planner, runner)),
        trial_resources,
    )
    logging.getLogger("ray.tune.analysis").setLevel(
        logging.ERROR
    )  # it misses the result files that we turned off
    with tempfile.TemporaryDirectory(prefix="stillhouse-tune-") as folder, _interruptible(interrupt):
        tune.Tuner(
            trainable,
            tune_config=tune.TuneConfig(
                num_samples=-1,
                search_alg=searcher,
                scheduler=make_scheduler(planner.spec.search.scheduler, planner),
                # An idle process that waits for the next trial would keep a node from being released.
                reuse_actors=not room.grows,
                trial_dirname_creator=lambda trial: trial.trial_id,
                trial_name_creator=lambda trial: trial.trial_id,
            ),
            run_config=_run_config(folder, searcher, listener),
        ).fit()


def _run_config(folder: str, searcher: DispatchSearcher, listener: SweepListener) -> tune.RunConfig:
    return tune.RunConfig(
        name="sweep",
        storage_path=folder,
        verbose=0,
        stop=GaveUp(searcher),
        callbacks=[Watch(listener, searcher)],
        failure_config=tune.FailureConfig(max_failures=0),  # the searcher tries again, by kind
    )


def _run_trial(config: dict[str, Any], function: _TrialFunction) -> None:
    hide_in_logs()
    function(config)


def make_scheduler(settings: SchedulerSettings, planner: Planner) -> Any:
    """Tune's scheduler over epochs of the last stage, on the first objective."""
    if settings.name == "none":
        return None
    objective = planner.spec.search.objectives[0]
    common: dict[str, Any] = {
        "time_attr": "epoch",
        "metric": OBJECTIVE,
        "mode": "max" if objective.maximize else "min",
    }
    if settings.name == "median":
        return tune.schedulers.MedianStoppingRule(grace_period=settings.grace_epochs, **common)
    epochs = planner.trial(Point({}), 0).final.epochs
    return tune.schedulers.AsyncHyperBandScheduler(
        grace_period=min(settings.grace_epochs, epochs),
        max_t=max(epochs, settings.grace_epochs),
        reduction_factor=settings.reduction_factor,
        **common,
    )


@contextlib.contextmanager
def _interruptible(interrupt: Callable[[], None]) -> Iterator[None]:
    """First Ctrl-C, or SIGTERM (a job that is stopped, a node that is drained): finish cleanly. Second: now."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pressed: list[float] = []

    def handle(number: int, frame: Any) -> None:
        pressed.append(time.monotonic())
        if len(pressed) > 1:
            raise KeyboardInterrupt
        interrupt()

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
