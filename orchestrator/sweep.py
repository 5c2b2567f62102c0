"""Run a sweep from its specification to its report: the place where plan, store, Ray and tracking meet."""

from __future__ import annotations

import gc
import logging
import subprocess
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from methods.data.base import LoadedData
from orchestrator.account import Account, read_spent
from orchestrator.cost import Spent
from orchestrator.dispatch import ALONE, Dispatcher, Outcome
from orchestrator.ending import Endings
from orchestrator.errors import ConfigurationError, StorageError
from orchestrator.facts import data_sections, files_on_every_node, gather_facts
from orchestrator.journal import EndStatus, Journal
from orchestrator.keys import Facts
from orchestrator.monitor import Monitor
from orchestrator.packing import PackPolicy
from orchestrator.plan import Plan, Planner, Point, Trial, make_plan
from orchestrator.progress import Display, make_display
from orchestrator.result import Result
from orchestrator.rows import CostHistory, Manifests, trial_rows
from orchestrator.search import known_points, make_sampler
from orchestrator.signals_plan import shared_recordings
from orchestrator.spec import ExperimentSpec
from orchestrator.spending import Spending
from orchestrator.stage import StageRunner
from orchestrator.stopping import Stopper
from orchestrator.store import Store
from orchestrator.sweep_log import SweepLog
from orchestrator.tracking import Mirror, ui_command
from orchestrator.tracking_uri import absolute
from orchestrator.trial_pack import PackRunner

if TYPE_CHECKING:
    from orchestrator.preflight import Preflight
    from orchestrator.ray_cluster import Room

__all__ = ["Sweep"]

DRAIN_SECONDS = 60.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Run:
    """What one run of a sweep leaves: how far it came, what it held, who stopped it."""

    dispatcher: Dispatcher
    spending: Spending
    stopper: Stopper


@dataclass
class Sweep:
    """One experiment with its store. ``document_text`` and ``command`` are shown to readers of the results."""

    spec: ExperimentSpec
    document_text: str = ""
    command: str = ""
    _shared_signals: frozenset[str] = frozenset()

    @cached_property
    def store(self) -> Store:
        return Store(self.spec.run.storage, lease_seconds=self.spec.run.lease_seconds)

    @cached_property
    def facts(self) -> Facts:
        return gather_facts(self.spec)

    @cached_property
    def planner(self) -> Planner:
        return Planner(self.spec, self.facts)

    @property
    def folder(self) -> Path:
        """Journal and reports of this sweep: below the storage when it is local, else below ``runs``."""
        storage = self.spec.run.storage
        root = Path("runs") if "://" in storage else Path(storage).expanduser()
        return (root / "sweeps" / self.spec.name).absolute()

    @property
    def tracking_uri(self) -> str:
        return self.spec.run.tracking or f"sqlite:///{self.folder.parents[1] / 'mlflow.db'}"

    def plan(self, slots: int = 1) -> Plan:
        """What would run. Reads the data's fingerprint and the store; starts nothing."""
        points = known_points(self.spec.search)
        baselines = [Point(label=label) for label in self.spec.baselines]
        plan = make_plan(
            self.planner,
            baselines + [Point(values) for values in points or []],
            has=self.store.has,
            cost=CostHistory(self.store).seconds,
            num_undrawn=0 if points is not None else self.spec.search.num_samples,
            slots=slots,
        )
        return replace(plan, spent=read_spent(self.store, self.spec.name).total)

    def preflight(self) -> Preflight:
        """Ask every node of the cluster at hand whether it can do its part. Joins the cluster; starts no stage."""
        from orchestrator.endpoints import allowed_open
        from orchestrator.preflight import run_preflight
        from orchestrator.ray_tune import connect

        self.facts  # noqa: B018 - data that is not even here is refused first
        connect()
        return run_preflight(
            self.store.url,
            absolute(self.tracking_uri),
            files_on_every_node(self.spec),
            lease_seconds=self.spec.run.lease_seconds,
            needs_gpu=any(
                self.spec.run.for_stage(name).gpus_per_worker > 0 for name in self.spec.stage_names
            ),
            allow_open=allowed_open(),
        )

    def result(self) -> Result:
        """What the store knows of this sweep, without running anything."""
        manifests = Manifests(self.store)
        dispatcher = self._dispatcher(Endings(self.store, self.spec.search, manifests).look_up)
        with _everything_stays():
            dispatcher.draw()
            return self._result(dispatcher, read_spent(self.store, self.spec.name), manifests)

    def run(self, quiet: bool = False) -> Result:
        """Run what is missing, then report. The same call resumes an interrupted sweep and extends a finished one."""
        self.store.check_writable()
        plan = self.plan()  # finds every mistake in every point before anything starts
        self._shared_signals = shared_recordings(plan)
        endings = Endings(self.store, self.spec.search)
        mirror = Mirror(self.folder / "journal.jsonl", self.tracking_uri, self.spec.name)
        trouble = mirror.check()
        journal = self._open_journal()
        mirror.start()
        run_id = uuid.uuid4().hex[:12]
        with make_display(quiet) as display:
            if trouble:
                display.event(
                    f"warning: {trouble} The sweep goes on; its journal is sent when the server is back."
                )
            log = SweepLog(journal, self.spec, self.store, code_version())
            log.sweep_started(self.document_text, self.facts.data[self.spec.data.source_id])
            try:
                run = self._drive(endings, log, display, run_id)
            except BaseException:
                log.sweep_ended("KILLED", report=None, best_trial=None, bundle=None, numbers={})
                mirror.close(DRAIN_SECONDS / 6)
                raise
            result = self._result_of(run)
            self._log_end(result, log, display)
            self._close(mirror, journal, display)
        return result

    def _open_journal(self) -> Journal:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            return Journal(self.folder / "journal.jsonl")
        except OSError as error:
            raise StorageError(
                f"{self.folder}: the folder for journal and reports cannot be made or written: {error.strerror}; "
                "free space there, or set run.storage to another place"
            ) from error

    def _drive(self, endings: Endings, log: SweepLog, display: Display, run_id: str) -> _Run:
        costs = CostHistory(self.store)
        packing = PackPolicy.of(self.spec, costs.seconds, costs.memory_share)
        if packing.is_off and self.spec.run.pack_size not in (1, "auto"):
            display.event(
                f"run.pack is {self.spec.run.pack}, but trials train alone: all stages need one worker and the same resources"
            )
        dispatcher = self._dispatcher(endings.recall, costs, packing)
        spending = Spending(Account(self.store, self.spec.name, run_id), self.spec.run)
        run = _Run(dispatcher, spending, Stopper(dispatcher, self.store, display, run_id))
        if not dispatcher.finished and (limits := spending.exceeded()):
            run.stopper.budget_reached(limits)
        room = None if dispatcher.finished else self._room(display)
        slots = 1 if room is None else max(1, room.look().slots)
        monitor = Monitor(
            dispatcher, self.store, log, display, name=self.spec.name, objective=self.spec.search.objectives[0],
            endings=endings, costs=costs, slots=slots, spending=spending, stopper=run.stopper,
        )  # fmt: skip
        monitor.log_recalled()
        try:
            if room is not None:
                self._run_on_ray(run, monitor, run_id, room)
                monitor.log_recalled()
        finally:
            spending.write(now=True)
            run.stopper.clear()
        return run

    def _room(self, display: Display) -> Room:
        from orchestrator.ray_tune import connect, make_room

        connect()
        self._refuse_unfit_cluster()
        room = make_room(self.spec)
        room.wait(display.event)
        return room

    def _refuse_unfit_cluster(self) -> None:
        """On several nodes, each is asked first whether it can do its part; on one there is nothing to compare."""
        from orchestrator.ray_preflight import alive_nodes

        if len(alive_nodes()) > 1 and (problems := self.preflight().problems):
            raise ConfigurationError(*problems, "nothing was started; `stillhouse preflight` shows the table")

    def _run_on_ray(self, run: _Run, monitor: Monitor, run_id: str, room: Room) -> None:
        from orchestrator.ray_train import StageExecute
        from orchestrator.ray_tune import SharedData, drive

        stages = StageRunner(
            self.store, self.spec.catalog, self.spec.run, SharedData(self._load_data()),
            shared_signals=self._shared_signals,
        )  # fmt: skip
        execute = StageExecute(stages)
        runner = PackRunner(
            self.store, execute, self.spec.search.objectives, run_id, execute_all=execute.together,
            is_scheduled=self.spec.search.scheduler.name != "none",
        )  # fmt: skip
        drive(self.planner, runner, run.dispatcher, monitor, room=room, interrupt=run.stopper.interrupt)

    def _load_data(self) -> Iterator[tuple[str, LoadedData]]:
        """Every data set that a stage may ask for, one after the other."""
        for name, section in data_sections(self.spec).items():
            try:
                yield name, section.source.load()
            except (OSError, ValueError) as error:
                raise ConfigurationError(f"data {section.dataset}: {error}") from error

    def _dispatcher(
        self,
        recall: Callable[[Trial], Outcome | None],
        costs: CostHistory | None = None,
        packing: PackPolicy = ALONE,
    ) -> Dispatcher:
        return Dispatcher(
            self.planner,
            make_sampler(self.spec.search),
            stored=self.store.has,
            busy=lambda key: self.store.holder(key) is not None,
            recall=recall,
            seconds=(costs or CostHistory(self.store)).seconds,
            packing=packing,
        )

    def _result_of(self, run: _Run) -> Result:
        stopped = run.stopper.cause == "budget" and not run.dispatcher.complete
        return replace(
            self._result(run.dispatcher, run.spending.spent),
            interrupted=run.stopper.cause == "interrupt",
            budget_reached=run.spending.overshoot() if stopped else "",
        )

    def _result(self, dispatcher: Dispatcher, spent: Spent, manifests: Manifests | None = None) -> Result:
        return Result(
            spec=self.spec,
            rows=trial_rows(dispatcher.trials.values(), dispatcher.outcomes, self.store, manifests),
            trials=dict(dispatcher.trials),
            broken=tuple(dispatcher.broken),
            folder=self.folder,
            store=self.store,
            command=self.command,
            tracking_command=ui_command(self.tracking_uri),
            spent=spent,
        )

    def _log_end(self, result: Result, log: SweepLog, display: Display) -> None:
        """Write and log what the sweep came to. A report that cannot be written costs no result: it is in the store."""
        status: EndStatus = "KILLED" if result.is_partial else "FAILED" if result.num_failed else "FINISHED"
        best, report, bundle = result.best_trial, None, None
        try:
            report = result.write().parent
            bundle = result.write_best(best) if best is not None else None
        except (OSError, StorageError) as error:
            display.event(f"warning: {error}. `stillhouse results` writes the report again")
        log.sweep_ended(status, report=report, best_trial=best, bundle=bundle, numbers=result.numbers())

    def _close(self, mirror: Mirror, journal: Journal, display: Display) -> None:
        lost = journal.close()
        if lost:
            display.event(
                f"{lost} tracking records could not be written to {journal.path}; "
                "the same command tells tracking about finished trials again"
            )
        left = mirror.close(DRAIN_SECONDS)
        if left:
            display.event(
                f"{left} tracking records wait in {self.folder / 'journal.jsonl'}; the same command sends them"
            )


@contextmanager
def _everything_stays() -> Iterator[None]:
    """No search for garbage among what is made meanwhile: for ten thousand trials that is a tenth of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def code_version() -> str:
    """The installed version and, in a checkout, its commit."""
    from importlib.metadata import version

    found = version("stillhouse")
    here = Path(__file__).parents[1]
    if (here / ".git").exists():
        commit = subprocess.run(
            ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if commit.returncode == 0:
            return f"{found}+{commit.stdout.strip()}"
    return found
