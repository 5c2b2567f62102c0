"""From an experiment to the graph of stages that have to run. Pure: nothing is read, written or started here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from orchestrator.chain import Chain, StageSpec, stage_marks
from orchestrator.cost import NO_TIME, MachineTime, stage_resources
from orchestrator.data_section import DataSettings
from orchestrator.errors import ConfigurationError
from orchestrator.keys import (
    Facts,
    active_train,
    content_key,
    cost_signature,
    inactive_settings,
    stage_content,
)
from orchestrator.signals_plan import compression, refuse_unrecordable, unrecordable, wanted_recordings
from orchestrator.spec import ExperimentSpec, RunSettings

__all__ = ["Plan", "PlannedStage", "Planner", "Point", "Trial", "make_plan"]


@dataclass(frozen=True)
class Point:
    """One choice of values: of the search space, or of a baseline (``label``)."""

    values: Mapping[str, Any] = field(default_factory=dict)
    label: str | None = None


@dataclass(frozen=True, kw_only=True)
class PlannedStage:
    """A stage of a trial with its seed, its key and the keys of its inputs."""

    name: str
    key: str
    spec: StageSpec
    data: DataSettings
    seed: int
    inputs: Mapping[str, str]
    content: Mapping[str, Any]
    signature: str
    """Which history tells what it will cost."""
    signals: Mapping[str, str] = field(default_factory=dict)
    """Role of a teacher -> the recording of its signals that this stage would read; equal names are equal signals."""
    unrecordable: str = ""
    """Why what teaches it cannot be recorded."""

    @property
    def epochs(self) -> int:
        return self.spec.train.epochs


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One point with one seed: the chain of stages to walk, inputs first, the optimised stage last."""

    point: Point
    point_id: str
    """Names the point in tables: equal for points that train the same thing."""
    values: Mapping[str, Any]
    """The point's values that have an effect."""
    seed: int
    stages: tuple[PlannedStage, ...]

    @property
    def final(self) -> PlannedStage:
        return self.stages[-1]

    @property
    def key(self) -> str:
        return self.final.key


@dataclass
class _Known:
    """What a planner has planned before: equal stages and trials are the same objects, however many points have them."""

    specs: dict[str | None, dict[tuple[str, str], StageSpec]] = field(default_factory=dict)
    """Label -> stages that the points of this label share."""
    stages: dict[tuple[str | None, str, str, int], PlannedStage] = field(default_factory=dict)
    """Label, name, mark and seed of the trial -> stage."""
    trials: dict[tuple[str | None, str, int], Trial] = field(default_factory=dict)
    """Label, values and seed -> trial."""
    data: dict[str, Any] = field(default_factory=dict)
    """Content of the experiment's data section."""
    signatures: dict[Hashable, str] = field(default_factory=dict)
    """Method, network, training and signatures of the inputs, on the experiment's data -> signature."""


@dataclass(frozen=True)
class Planner:
    """Plans trials of one experiment, given the facts about its data and code. Remembers what it has planned."""

    spec: ExperimentSpec
    facts: Facts
    _known: _Known = field(default_factory=_Known, init=False, repr=False, compare=False)

    def __reduce__(self) -> tuple[type[Planner], tuple[ExperimentSpec, Facts]]:
        return Planner, (self.spec, self.facts)  # a process that walks one trial has no use for the others

    def trial(self, point: Point, seed: int) -> Trial:
        """The trial of ``point`` with ``seed``. A setting without effect is dropped before keys are made."""
        mark = (point.label, repr(list(point.values.items())), seed)
        known = self._known.trials.get(mark)
        if known is None:
            known = self._known.trials[mark] = self._plan(point, seed)
        return known

    def _plan(self, point: Point, seed: int) -> Trial:
        chain = self.spec.chain(point.label, point.values, self._known.specs.setdefault(point.label, {}))
        if self.spec.run.signals == "record":
            refuse_unrecordable(chain, self.spec.catalog)
        _refuse_compiled_packs(chain, self.spec.run)
        stages = self._key_stages(point, chain, seed)
        return Trial(
            point=point,
            point_id=stages[-1].key[:12] if seed == 0 else self.trial(point, 0).point_id,
            values=self._active_values(point, chain),
            seed=seed,
            stages=stages,
        )

    def _key_stages(self, point: Point, chain: Chain, trial_seed: int) -> tuple[PlannedStage, ...]:
        marks = stage_marks(self.spec.stages_of(point.label), point.values)
        planned: dict[str, PlannedStage] = {}
        for name, stage in chain.items():
            mark = (point.label, name, marks[name], trial_seed)
            known = self._known.stages.get(mark)
            if known is None:
                known = self._plan_stage(stage, trial_seed, planned, chain)
                if name != self.spec.target:
                    self._known.stages[mark] = known
            planned[name] = known
        return tuple(planned.values())

    def _plan_stage(
        self, stage: StageSpec, trial_seed: int, earlier: Mapping[str, PlannedStage], chain: Chain
    ) -> PlannedStage:
        data = stage.data or self.spec.data
        data_content = self._data_content(data)
        seed = trial_seed if stage.seed == "trial" else stage.seed
        inputs = {role: earlier[source].key for role, source in stage.inputs.items()}
        signatures = {role: earlier[source].signature for role, source in stage.inputs.items()}
        signals = wanted_recordings(
            stage, chain=chain, keys={name: item.key for name, item in earlier.items()}, data=data,
            content=data_content, seed=seed,
            num_workers=self.spec.run.for_stage(stage.name).workers, catalog=self.spec.catalog,
        )  # fmt: skip
        content = stage_content(
            stage, data=data_content, seed=seed, inputs=inputs, facts=self.facts, catalog=self.spec.catalog,
            signals=compression(stage, self.spec.run.signal_format, self.spec.catalog) if signals else None,
        )  # fmt: skip
        return PlannedStage(
            name=stage.name,
            key=content_key(content),
            spec=stage,
            data=data,
            seed=seed,
            inputs=inputs,
            content=content,
            signature=self._signature(stage, data, signatures),
            signals=signals,
            unrecordable=unrecordable(stage, self.spec.catalog),
        )

    def _signature(self, stage: StageSpec, data: DataSettings, inputs: Mapping[str, str]) -> str:
        if data is not self.spec.data:
            return cost_signature(stage, self._data_content(data), inputs)
        mark = (stage.method, stage.model, stage.train, tuple(inputs.items()))
        known = self._known.signatures.get(mark)
        if known is None:
            known = cost_signature(stage, self._data_content(data), inputs)
            self._known.signatures[mark] = known
        return known

    def _data_content(self, data: DataSettings) -> dict[str, Any]:
        known = self._known.data
        if data is not self.spec.data:
            return data.content(self.facts.data[data.source_id])
        if not known:
            known.update(data.content(self.facts.data[data.source_id]))
        return known

    def _active_values(self, point: Point, chain: Chain) -> dict[str, Any]:
        active: dict[str, Any] = {}
        for path, value in point.values.items():
            name, _, setting = path.partition(".")
            if name in chain and _has_effect(chain[name], setting, self.spec):
                active[path] = value
        return active


def _refuse_compiled_packs(chain: Chain, run: RunSettings) -> None:
    compiled = [name for name, stage in chain.items() if stage.train.compile]
    if compiled and run.pack_size not in (1, "auto"):
        raise ConfigurationError(
            f"stages.{compiled[0]}.train.compile is true and run.pack is {run.pack}, which exclude each other: networks are "
            "compiled for one stage in one process; set run.pack to 'auto' or 'off', or compile to false"
        )


def _has_effect(stage: StageSpec, setting: str, spec: ExperimentSpec) -> bool:
    if setting.startswith("train."):
        return setting.removeprefix("train.") in active_train(stage.train)
    if any(setting == item.name for item in fields(stage.settings)):
        return setting not in inactive_settings(stage, spec.catalog)
    return True


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The stages behind a set of trials: what is shared, what is stored already, and what is left to run."""

    name: str
    trials: tuple[Trial, ...]
    stored: frozenset[str]
    """Keys that the store holds."""
    costs: Mapping[str, float]
    """Key -> expected seconds, where history knows the kind of stage."""
    num_undrawn: int = 0
    """Points that the search will draw while it runs."""
    num_confirming: int = 0
    """Trials that the confirmation of the best points may add in the end."""
    slots: int = 1
    """How many trials run at a time."""
    run: RunSettings = field(default_factory=RunSettings)
    """What stages hold, what that costs, and what it may."""
    spent: MachineTime = NO_TIME
    """What earlier runs of this sweep have held."""
    drawn_like: tuple[Trial, ...] = ()
    """A trial for each seed of the points that the search will draw, as far as it does not vary them."""
    varied: frozenset[str] = frozenset()
    """Names of the stages that differ between those points."""

    @property
    def stages(self) -> dict[str, PlannedStage]:
        """Distinct stages by key, inputs before users."""
        return {stage.key: stage for trial in self.trials for stage in trial.stages}

    @property
    def missing(self) -> dict[str, PlannedStage]:
        """Stages that have to run: not stored, and needed by a trial whose last stage is not stored."""
        return {
            stage.key: stage
            for trial in self.trials if trial.key not in self.stored
            for stage in trial.stages if stage.key not in self.stored
        }  # fmt: skip

    def uses(self) -> Counter[str]:
        """Key -> how many trials need it."""
        return Counter(stage.key for trial in self.trials for stage in trial.stages)

    def seconds(self, stages: Iterable[PlannedStage]) -> float | None:
        """Expected training time one after the other; None when a kind of stage has no history."""
        costs = [self.costs.get(stage.key) for stage in stages]
        return None if any(cost is None for cost in costs) else float(sum(filter(None, costs)))

    def machine_time(self, stages: Iterable[PlannedStage]) -> MachineTime | None:
        """Cores and GPUs that these stages will hold; None when a kind of stage has no history."""
        total = NO_TIME
        for stage in stages:
            seconds = self.costs.get(stage.key)
            if seconds is None:
                return None
            total += stage_resources(self.run, stage.name).over(seconds)
        return total

    def counts(self) -> dict[str, dict[str, int]]:
        """Stage name -> how many distinct stages there are in all, stored, and to run."""
        rows: dict[str, dict[str, int]] = {}
        missing = self.missing
        for key, stage in self.stages.items():
            row = rows.setdefault(stage.name, {"all": 0, "stored": 0, "to_run": 0})
            row["all"] += 1
            row["stored"] += key in self.stored
            row["to_run"] += key in missing
        return rows

    def __str__(self) -> str:
        from orchestrator.plan_text import plan_text

        return plan_text(self)


def make_plan(
    planner: Planner,
    points: Iterable[Point],
    *,
    has: Callable[[str], bool],
    cost: Callable[[PlannedStage], float | None],
    num_undrawn: int = 0,
    slots: int = 1,
) -> Plan:
    """Plan every point with every seed. Points that train the same thing become one. Problems are all reported."""
    search = planner.spec.search
    problems: list[str] = []
    trials: dict[str, Trial] = {}
    for point in points:
        for seed in range(search.num_seeds(point.label)):
            try:
                trial = planner.trial(point, seed)
            except ConfigurationError as error:
                problems += [f"point {dict(point.values)}: {problem}" for problem in error.problems]
                break
            trials.setdefault(trial.key, trial)
    if problems:
        raise ConfigurationError(*problems)
    stages = {stage.key: stage for trial in trials.values() for stage in trial.stages}
    costs = {key: seconds for key, stage in stages.items() if (seconds := cost(stage)) is not None}
    return Plan(
        name=planner.spec.name,
        trials=tuple(trials.values()),
        stored=frozenset(key for key in stages if has(key)),
        costs=costs,
        num_undrawn=num_undrawn,
        num_confirming=search.confirm.top * max(0, search.confirm.seeds - search.seeds),
        slots=slots,
        run=planner.spec.run,
        drawn_like=tuple(planner.trial(Point(), seed) for seed in range(search.seeds)) if num_undrawn else (),
        varied=frozenset({planner.spec.target, *(path.partition(".")[0] for path in search.space)}),
    )
