"""The typed form of an experiment: sections with their settings, checked completely before anything starts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from methods.catalog import Catalog
from orchestrator.budget import BudgetSettings
from orchestrator.chain import Chain, StageSpec, resolve_chain, with_baseline
from orchestrator.cost import PriceSettings
from orchestrator.data_section import DataSettings
from orchestrator.errors import ConfigurationError
from orchestrator.placement import Placement, StageWorkers, WorkerSettings
from orchestrator.settings import Problems
from orchestrator.signals_codec import SignalFormat, SignalPrecision
from orchestrator.space import Domain

__all__ = [
    "ConfirmSettings",
    "ExperimentSpec",
    "Objective",
    "RunSettings",
    "SchedulerSettings",
    "SearchSettings",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Objective:
    """What the search optimises: a metric of the last stage, on the validation split."""

    name: str
    """``STAGE.METRIC``"""
    maximize: bool = True

    @property
    def stage(self) -> str:
        return self.name.partition(".")[0]

    @property
    def metric(self) -> str:
        return self.name.partition(".")[2]


@dataclass(frozen=True, kw_only=True, slots=True)
class SchedulerSettings:
    """Which trials are stopped early."""

    name: Literal["none", "asha", "median"] = "none"
    """``asha``: keep the best fraction at each rung. ``median``: stop what is below the running median."""
    grace_epochs: int = 1
    """No trial is stopped before this epoch of its last stage."""
    reduction_factor: float = 3.0
    """ASHA keeps one in this many at each rung."""

    def __post_init__(self) -> None:
        if self.grace_epochs < 1:
            raise ValueError(f"grace_epochs must be at least 1, got {self.grace_epochs}")
        if not 1 < self.reduction_factor < math.inf:
            raise ValueError(f"reduction_factor must be finite and above 1, got {self.reduction_factor}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ConfirmSettings:
    """After the search: run the best points again on more seeds."""

    top: int = 0
    """How many of the best points (chosen on validation) are confirmed. 0 turns it off."""
    seeds: int = 3
    """How many seeds a confirmed point, and every baseline, has in the end."""

    def __post_init__(self) -> None:
        if self.top < 0 or self.seeds < 1:
            raise ValueError(f"top must be at least 0 and seeds at least 1, got {self.top} and {self.seeds}")


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchSettings:
    """What varies, what is optimised, and by which algorithm."""

    objectives: tuple[Objective, ...]
    """One, or two for a Pareto front (``algorithm: optuna`` then uses NSGA-II)."""
    shown: tuple[str, ...] = ()
    """Other metrics of the objective's stage that the table has beside it, such as ``language_gap``. Nothing is chosen by them."""
    space: Mapping[str, Domain] = field(default_factory=dict)
    """``STAGE.SETTING`` -> domain."""
    algorithm: Literal["grid", "random", "optuna"] = "grid"
    """How points are chosen."""
    scheduler: SchedulerSettings = field(default_factory=SchedulerSettings)
    """Early stopping."""
    num_samples: int = 16
    """How many points ``random`` and ``optuna`` draw; ``grid`` takes all."""
    num_ahead: int = 8
    """How many points ``optuna`` may draw ahead of their predecessors' worth. It bounds how many points are under way
    and, unlike the size of the cluster, never changes: so an interrupted search goes on with the same points."""
    seeds: int = 1
    """How often each point is run; it is judged by its mean."""
    seed: int = 0
    """Seed of the search itself."""
    confirm: ConfirmSettings = field(default_factory=ConfirmSettings)
    """More seeds for the best points."""

    def __post_init__(self) -> None:
        for name in ("num_samples", "num_ahead", "seeds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if len({objective.name for objective in self.objectives}) < len(self.objectives):
            raise ValueError(f"objective names {self.objectives[0].name!r} twice")
        if named := {metric for metric in self.shown if "." in metric or metric.startswith("test_")}:
            raise ValueError(
                f"shown names metrics as validation has them, without stage or test_, got {', '.join(sorted(named))}"
            )
        if len(self.objectives) > 1 and self.scheduler.name != "none":
            raise ValueError(
                f"scheduler {self.scheduler.name!r} needs a single objective; use scheduler: none"
            )

    @property
    def shown_names(self) -> tuple[str, ...]:
        """``shown`` as trials name them: ``STAGE.METRIC``."""
        return tuple(f"{self.objectives[0].stage}.{metric}" for metric in self.shown)

    def num_seeds(self, label: str | None) -> int:
        """Seeds of a point of the search (None) or of a baseline, which has as many as a confirmed point."""
        return max(self.seeds, self.confirm.seeds) if label is not None and self.confirm.top else self.seeds


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSettings:
    """Where and with what the stages run. Nothing in here changes a result or is in a key, except ``batch: scale`` and
    compressed signals (``signals_precision``, ``signals_top_k``)."""

    workers: int = 1
    """Ray Train workers of each stage; a stage with one worker runs in the trial's own process."""
    cpus_per_worker: int = 1
    """CPU cores, and torch threads, of each worker."""
    gpus_per_worker: float = 0.0
    """GPUs of each worker; a fraction lets several trials share one."""
    placement: Placement = "pack"
    """``pack``: the workers of a stage lie on as few hosts as possible. ``spread``: on as many as possible."""
    min_workers: int | None = None
    """Elastic stages: begin and go on with this many of ``workers`` while there is no room for more."""
    batch: Literal["keep", "scale"] = "keep"
    """``keep``: ``train.batch_size`` is that of all workers together, so their number changes no result. ``scale``:
    it is that of each worker, and the learning rate is multiplied by ``workers`` too, which gives other keys."""
    stages: Mapping[str, StageWorkers] = field(default_factory=dict)
    """Stage -> what it wants otherwise: ``workers``, ``cpus_per_worker``, ``gpus_per_worker``, ``placement``, ``min_workers``."""
    concurrent_trials: int | None = None
    """Upper bound of trials at a time; by default as many as fit."""
    pack: int | bool | Literal["auto", "off"] = "auto"
    """How many trials that learn from the same network train side by side in one process, behind one pass of it.
    ``auto``: as many as leave every slot busy and fit into the memory, once a stage of their kind was measured and is
    known to take long enough. Trials with
    other teachers, seeds or batches are not packed together, and those whose stages are compiled or have groups of
    workers never."""
    storage: str = "runs"
    """Artifacts, checkpoints and reports: a folder or an fsspec URL that every node reaches."""
    tracking: str | None = None
    """MLflow tracking URI; an SQLite file beside the reports by default."""
    max_failures: int = 2
    """How often a trial is started again after its process died. A node that was lost is not counted."""
    wait_for_resources_seconds: float | None = None
    """How long a stage that fits on no node is waited for before it fails, with what it asks for and what is there.
    By default a minute, and without end where an autoscaler may start the node."""
    autoscaling: bool | None = None
    """Whether the cluster starts nodes when something waits for them. By default this is found out; say so where
    Ray does not tell, as under Kubernetes."""
    checkpoint_seconds: float = 30.0
    """At most this much training is lost when a stage is killed."""
    lease_seconds: float = 30.0
    """A stage whose holder gave no sign of life for this long is taken over."""
    signals: Literal["auto", "record", "live"] = "auto"
    """What frozen teachers emit for training batches. ``live``: it is computed in each step. ``record``: rows that are
    not recorded yet are computed and recorded, others read. ``auto``: recorded where several stages of the sweep want
    the same rows and they fit, read where they are there. Results are the same to the bit on CPUs."""
    signals_precision: SignalPrecision = "float32"
    """``float32`` keeps the teacher's bits. ``float16`` halves recordings; all students then learn from rounded
    signals, recorded or not, and have other keys."""
    signals_top_k: int | None = None
    """Keep this many of the largest logits and the level of the rest; changes results and keys, see ``signals_codec``."""
    signals_dir: str | None = None
    """Absolute path of a folder on a disk of each node, for recordings that are read there. By default those in a local ``storage`` are
    used in place; for URLs and network mounts it is ``stillhouse`` in the user's cache folder."""
    signals_gigabytes: float = 20.0
    """How much recordings may take, in the storage and on each node. The least recently used make room."""
    prices: PriceSettings | None = None
    """What machine time costs; plans and reports then speak of money."""
    budget: BudgetSettings | None = None
    """Limits at which the sweep stops cleanly, to be resumed with larger ones."""

    def __post_init__(self) -> None:
        self._check_workers()
        if self.concurrent_trials is not None and self.concurrent_trials < 1:
            raise ValueError(f"concurrent_trials must be at least 1, got {self.concurrent_trials}")
        if self.pack is True or (self.pack is not False and isinstance(self.pack, int) and self.pack < 1):
            raise ValueError(f"pack must be 'auto', 'off' or a number from 1, got {self.pack!r}")
        for name in ("max_failures", "checkpoint_seconds"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be finite and not negative, got {getattr(self, name)}")
        if self.wait_for_resources_seconds is not None and not self.wait_for_resources_seconds >= 0:
            raise ValueError(
                f"wait_for_resources_seconds must not be negative, got {self.wait_for_resources_seconds}"
            )
        if not 1 <= self.lease_seconds < math.inf:
            raise ValueError(f"lease_seconds must be finite and at least 1, got {self.lease_seconds}")
        self._check_signals()
        if not self.storage:
            raise ValueError("storage must name a folder or URL, got ''")
        if self.budget is not None and self.budget.money is not None and self.prices is None:
            raise ValueError(f"budget.money is {self.budget.money:g}, but run.prices is missing: set both")

    def for_stage(self, name: str) -> WorkerSettings:
        """The workers of one stage: those of ``run`` with what ``run.stages`` says of it laid over."""
        common = WorkerSettings(
            workers=self.workers,
            cpus_per_worker=self.cpus_per_worker,
            gpus_per_worker=self.gpus_per_worker,
            placement=self.placement,
            min_workers=self.min_workers,
        )
        return self.stages[name].over(common) if name in self.stages else common

    @property
    def signal_format(self) -> SignalFormat:
        """How signals are kept, and thereby what students learn from."""
        return SignalFormat(precision=self.signals_precision, top_k=self.signals_top_k)

    @property
    def pack_size(self) -> int | Literal["auto"]:
        """``pack`` as a number: 1 where it is off, which YAML reads as ``false``."""
        if isinstance(self.pack, int):
            return max(1, int(self.pack))
        return 1 if self.pack == "off" else "auto"

    def batch_scale(self, name: str) -> int:
        """By how much batch size and learning rate of a stage are multiplied."""
        return self.for_stage(name).workers if self.batch == "scale" else 1

    def _check_signals(self) -> None:
        if self.signals == "record" and self.pack_size not in (1, "auto"):
            raise ValueError(
                f"signals 'record' and pack {self.pack} exclude each other: a pack learns from its teacher itself"
            )
        if self.signals_top_k is not None and self.signals_top_k < 1:
            raise ValueError(f"signals_top_k must be at least 1, got {self.signals_top_k}")
        if not 0 < self.signals_gigabytes < math.inf:
            raise ValueError(f"signals_gigabytes must be finite and above 0, got {self.signals_gigabytes}")
        if self.signals_dir is not None and not self.signals_dir.startswith(("/", "~")):
            raise ValueError(
                f"signals_dir must be an absolute path, the same on each node, got {self.signals_dir!r}"
            )
        if self.signals == "live" and not self.signal_format.is_exact:
            raise ValueError(
                "signals must be 'auto' or 'record' where signals_precision or signals_top_k compress them, got 'live'"
            )

    def _check_workers(self) -> None:
        elastic = [self.for_stage("").min_workers]
        for name in self.stages:
            try:
                elastic.append(self.for_stage(name).min_workers)
            except ValueError as error:
                raise ValueError(f"stages.{name}.{error}") from error
        if self.batch == "scale" and any(number is not None for number in elastic):
            raise ValueError(
                "batch must be 'keep' where min_workers is set: a batch of as many workers as happen to be there "
                "would give another result each time, got 'scale'"
            )


@dataclass(frozen=True, kw_only=True)
class ExperimentSpec:
    """A whole experiment, valid in itself. Whether its data and storage exist is looked at when it is planned."""

    name: str
    data: DataSettings
    stages: Mapping[str, Mapping[str, Any]]
    baselines: Mapping[str, Mapping[str, Mapping[str, Any]]]
    search: SearchSettings
    run: RunSettings
    catalog: Catalog
    controls: tuple[str, ...] = ()
    """Those of the baselines that ``controls: true`` added."""

    @property
    def target(self) -> str:
        """The stage that is optimised: the last of every trial's chain."""
        return self.search.objectives[0].stage

    def chain(
        self,
        label: str | None,
        values: Mapping[str, Any],
        known: dict[tuple[str, str], StageSpec] | None = None,
    ) -> Chain:
        """The typed stages of a point (of the baseline ``label``, or of the experiment itself).

        ``known`` keeps shared stages from one point of the same ``label`` to the next; see ``resolve_chain``.
        """
        problems = Problems()
        stages = self.stages_of(label)
        chain = resolve_chain(stages, values, self.target, self.catalog, problems, self.data, known)
        if problems:
            raise ConfigurationError(*problems)
        return {name: _scaled(stage, self.run.batch_scale(name)) for name, stage in chain.items()}

    def stages_of(self, label: str | None) -> Mapping[str, Mapping[str, Any]]:
        """The stages as they are written, those of the baseline ``label`` in the place of ours."""
        return self.stages if label is None else with_baseline(self.stages, self.baselines[label])

    def workers(self, names: Iterable[str]) -> tuple[WorkerSettings, ...]:
        """The workers of each of these stages."""
        return tuple(self.run.for_stage(name) for name in names)

    @property
    def stage_names(self) -> tuple[str, ...]:
        """All stages, those that only a baseline has at the end."""
        own = [*self.stages, *(name for stages in self.baselines.values() for name in stages)]
        return tuple(dict.fromkeys(own))


def _scaled(stage: StageSpec, factor: int) -> StageSpec:
    """The linear rule: with ``factor`` times the batch, ``factor`` times the learning rate."""
    if factor == 1:
        return stage
    train = replace(
        stage.train,
        batch_size=stage.train.batch_size * factor,
        learning_rate=stage.train.learning_rate * factor,
    )
    return replace(stage, train=train, batch_scale=factor)
