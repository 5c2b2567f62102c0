"""Ray Tune drives the sweep: it places trials, reports their epochs to the scheduler and restarts dead ones.

The only decisions taken here are Tune's own. Which trial may start next is the dispatcher's, and what a trial does is
the runner's; both are handed in. A trial that runs holds its resources from start to end, and the dispatcher starts
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
from typing import Any, Protocol

import ray
from ray import tune
from ray.tune.search import Searcher

from methods import BUILTIN, Catalog
from methods.data.base import ImageData
from orchestrator.data_section import DataSettings
from orchestrator.dispatch import Dispatcher, Outcome
from orchestrator.errors import ConfigurationError
from orchestrator.loop import Row
from orchestrator.placement import held_by_trial, most_at_a_time
from orchestrator.plan import Planner, Point, Trial
from orchestrator.ray_nodes import num_promised_workers, wait_for_workers
from orchestrator.secrecy import hide_in_logs
from orchestrator.spec import ExperimentSpec, SchedulerSettings
from orchestrator.trial import TrialRunner

__all__ = ["SharedData", "SweepListener", "connect", "drive", "trial_slots"]

ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000000",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_worker_niceness": "0",
}
"""Tune's own loggers, folders and signal handling are not used: the store is the truth about what is finished."""

HOLDS = "holds"
"""What a trial holds while it runs, in Ray's names."""
OBJECTIVE = "objective"
"""What the scheduler compares: the first objective's metric."""
ROW = "row"
"""An epoch's row as JSON, apart from the numbers that Tune adds."""
OUTCOME = "outcome"
"""The last thing that a trial reports, as JSON: Tune flattens anything else."""


class SweepListener(Protocol):
    """Hears what happens in the driver. Called in the driver's main thread; must return quickly."""

    def trial_started(self, trial: Trial) -> None: ...

    def trial_placed(self, trial: Trial) -> None:
        """The trial holds its resources from now on; again after its process died."""

    def trial_row(self, trial: Trial, row: Row) -> None: ...

    def trial_ended(self, trial: Trial, outcome: Outcome) -> None: ...

    def tick(self) -> None:
        """Called several times a second."""


class SharedData:
    """Data sets in Ray's object store: loaded once by the driver, mapped read-only into every trial's process."""

    _loaded: dict[str, ImageData] = {}  # noqa: RUF012 - one per process, on purpose

    def __init__(self, data: Iterable[tuple[str, ImageData]]) -> None:
        self._references = {name: ray.put(loaded) for name, loaded in data}

    def __call__(self, section: DataSettings) -> ImageData:
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
    if ray.is_initialized():
        return
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    options: dict[str, Any] = {"log_to_driver": False, "configure_logging": False}
    if os.environ.get("RAY_ADDRESS") or _cluster_is_here():
        ray.init(**options)
        wait_for_workers(num_promised_workers())
    else:
        ray.init(address="local", include_dashboard=False, **options)


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


def trial_slots(spec: ExperimentSpec, cluster: Mapping[str, float] | None = None) -> int:
    """How many trials have work at a time. Raises ``ConfigurationError`` when a stage fits nowhere."""
    cluster = ray.cluster_resources() if cluster is None else cluster
    wanted = spec.workers(spec.stage_names)
    for name, workers in zip(spec.stage_names, wanted, strict=True):
        if most_at_a_time([workers], cluster) < 1:
            asked = ", ".join(f"{amount:g} {kind}" for kind, amount in workers.least_resources.items())
            there = ", ".join(f"{cluster.get(kind, 0.0):g} {kind}" for kind in workers.least_resources)
            raise ConfigurationError(
                f"run: stage {name} needs {asked} ({workers.least_workers} x per-worker resources), but the cluster has {there}; "
                "lower workers, cpus_per_worker or gpus_per_worker in run, or in run.stages for this stage"
            )
    most = most_at_a_time(wanted, cluster)
    return min(most, spec.run.concurrent_trials or most)


@dataclass(frozen=True)
class _TrialFunction:
    """What Tune runs in a trial's process: plan the trial again from its point, and walk it."""

    planner: Planner
    runner: TrialRunner

    def __call__(self, config: dict[str, Any]) -> None:
        trial = self.planner.trial(Point(config["values"], config["label"]), config["seed"])
        objective = trial_objective(self.planner)

        def report(row: Row) -> None:
            # The last epoch goes unreported: a scheduler would stop what is finished, before its artifact is stored.
            if objective in row and row["epoch"] < trial.final.epochs:
                tune.report({ROW: json.dumps(row), OBJECTIVE: row[objective], "epoch": row["epoch"]})

        outcome = self.runner.run(trial, report)
        tune.report({OUTCOME: json.dumps(asdict(outcome)), "epoch": trial.final.epochs})


def trial_objective(planner: Planner) -> str:
    return planner.spec.search.objectives[0].metric


class _DispatchSearcher(Searcher):
    """Tune's view of the dispatcher."""

    def __init__(
        self, spec: ExperimentSpec, dispatcher: Dispatcher, listener: SweepListener, slots: int
    ) -> None:
        super().__init__()
        self._spec = spec
        self._dispatcher = dispatcher
        self._listener = listener
        self._slots = slots
        self._trials: dict[str, Trial] = {}
        self._last_rows: dict[str, Row] = {}

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        self._listener.tick()
        if len(self._trials) >= self._slots:
            return None
        trial = self._dispatcher.next()
        if trial is None:
            return Searcher.FINISHED if self._dispatcher.finished else None
        self._trials[trial_id] = trial
        self._listener.trial_started(trial)
        # Of the whole experiment, not of what this trial lacks: Tune keeps an idle trial's process, with all that it
        # holds, and where trials hold different things a group of workers would wait for that for ever.
        stages = self._spec.workers(self._spec.stage_names)
        return {
            "values": dict(trial.point.values),
            "label": trial.point.label,
            "seed": trial.seed,
            HOLDS: held_by_trial(stages),
        }

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        if OBJECTIVE in result and trial_id in self._trials:
            row: Row = json.loads(result[ROW])
            self._last_rows[trial_id] = row
            self._listener.trial_row(self._trials[trial_id], row)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        if error:  # a trial that died is taken in by ``died``, which Tune lets know why
            return
        result = result or {}
        if OUTCOME not in result:  # the row at which the scheduler stopped it, which Tune shows only here
            self.on_trial_result(trial_id, result)
        self._end(trial_id, _outcome(result, self._last_rows.get(trial_id)))

    def died(self, trial_id: str, error_text: str) -> None:
        """A trial's process ended without an outcome, and Tune has given up to start it again."""
        lines = [line for line in error_text.splitlines() if line.strip()]
        reason = f"the trial's process died: {lines[-1].strip() if lines else 'no reason given'}"
        self._end(trial_id, Outcome(status="failed", reason=reason))

    def _end(self, trial_id: str, outcome: Outcome) -> None:
        trial = self._trials.pop(trial_id, None)
        self._last_rows.pop(trial_id, None)
        if trial is None:
            return
        self._dispatcher.ended(trial, outcome)
        if outcome.status != "deferred":
            self._listener.trial_ended(trial, outcome)

    def placed(self, trial_id: str) -> None:
        if trial_id in self._trials:
            self._listener.trial_placed(self._trials[trial_id])

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the store knows what is finished."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: the store knows what is finished."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


def _outcome(result: Mapping[str, Any], row: Row | None) -> Outcome:
    if OUTCOME in result:
        told = json.loads(result[OUTCOME])
        return Outcome(status=told["status"], values=tuple(told["values"]), reason=told["reason"])
    if row is None:
        return Outcome(status="failed", reason="the trial ended without a result")
    return Outcome(
        status="stopped",
        values=(float(result[OBJECTIVE]),),
        reason=f"stopped early after epoch {row['epoch']:g}",
    )


class _Watch(tune.Callback):
    """Lets the listener look around while no trial reports, and learns when a trial got its place or died."""

    def __init__(self, listener: SweepListener, searcher: _DispatchSearcher) -> None:
        self._listener = listener
        self._searcher = searcher

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        self._listener.tick()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._searcher.placed(trial.trial_id)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._searcher.died(trial.trial_id, str(trial.get_error() or ""))

    def __getstate__(self) -> dict[str, Any]:
        return {}


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
    runner: TrialRunner,
    dispatcher: Dispatcher,
    listener: SweepListener,
    *,
    slots: int,
    interrupt: Callable[[], None],
) -> None:
    """Run every trial that the dispatcher gives. Returns when it has no more, or after an interruption.

    ``interrupt`` is called at the first Ctrl-C; a second one raises ``KeyboardInterrupt`` at once.
    """
    ship_by_value(planner.spec.catalog)
    searcher = _DispatchSearcher(planner.spec, dispatcher, listener, slots)
    trainable = tune.with_resources(
        tune.with_parameters(_run_trial, function=_TrialFunction(planner, runner)),
        trial_resources,
    )
    with tempfile.TemporaryDirectory(prefix="stillhouse-tune-") as folder, _interruptible(interrupt):
        tuner = tune.Tuner(
            trainable,
            tune_config=tune.TuneConfig(
                num_samples=-1,
                search_alg=searcher,
                scheduler=make_scheduler(planner.spec.search.scheduler, planner),
                reuse_actors=True,
                trial_dirname_creator=lambda trial: trial.trial_id,
                trial_name_creator=lambda trial: trial.trial_id,
            ),
            run_config=tune.RunConfig(
                name="sweep",
                storage_path=folder,
                verbose=0,
                callbacks=[_Watch(listener, searcher)],
                failure_config=tune.FailureConfig(max_failures=planner.spec.run.max_failures),
            ),
        )
        logging.getLogger("ray.tune.analysis").setLevel(
            logging.ERROR
        )  # it misses the result files that we turned off
        tuner.fit()


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
