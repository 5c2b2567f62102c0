"""Which stages could read the same recorded teacher signals, and for which that is worth a recording. Pure."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from methods.base import Method
from methods.catalog import Catalog
from methods.data.base import Augment
from orchestrator.data_section import DataSettings
from orchestrator.errors import ConfigurationError
from orchestrator.keys import content_key

if TYPE_CHECKING:
    from orchestrator.chain import Chain, StageSpec
    from orchestrator.optimisation import TrainSettings
    from orchestrator.plan import Plan, PlannedStage, Trial
    from orchestrator.signals_codec import SignalFormat

__all__ = [
    "Uses",
    "compression",
    "is_fixed",
    "network_stage",
    "recording_content",
    "refuse_unrecordable",
    "shared_recordings",
    "signal_lines",
    "unrecordable",
    "wanted_recordings",
]

PASSED_ON = frozenset({"views", "copies"})
"""What a stage adds to the signals of the network below it, leaving those as they are."""
MIN_USES = 2


def is_fixed(data: DataSettings) -> bool:
    """Whether an image looks the same in every epoch, so that one recording serves all epochs and seeds."""
    return data.active_augment == Augment()


def unrecordable(stage: StageSpec, catalog: Catalog) -> str:
    """Why what teaches this stage cannot be recorded; empty if it can."""
    method = catalog.method(stage.method)
    if any("maps" in method.inputs[role.partition(".")[0]] for role in stage.inputs):
        return f"{stage.method} compares feature maps, which are not recorded"
    if _learns_from_parts(stage, method) and method.asks(stage.settings) is None:
        return f"{stage.method} does not tell what it reads of its teacher's answer (Method.asks)"
    return ""


def _learns_from_parts(stage: StageSpec, method: type[Method]) -> bool:
    """Whether what teaches is no classifier, so that its answer has no logits and pooled features but named parts."""
    return any("grounding" in method.inputs[role.partition(".")[0]] for role in stage.inputs)


def compression(stage: StageSpec, form: SignalFormat, catalog: Catalog) -> dict[str, Any]:
    """What of ``form`` changes the bytes of what ``stage`` learns; empty where nothing does.

    Raises:
        ConfigurationError: Largest logits are to be kept of a teacher that has none.
    """
    if form.top_k is not None and _learns_from_parts(stage, catalog.method(stage.method)):
        raise ConfigurationError(
            f"stages.{stage.name}: run.signals_top_k keeps the largest logits of classes, and what teaches "
            f"{stage.method} tells no classes apart; leave it out (run.signals_precision: float16 halves recordings)"
        )
    return form.content()


def refuse_unrecordable(chain: Chain, catalog: Catalog) -> None:
    """``ConfigurationError`` with every stage that ``run.signals: record`` cannot be obeyed for."""
    reasons = [
        f"stages.{name}: run.signals is 'record', but {reason}; use run.signals: auto, which computes these live"
        for name, stage in chain.items()
        if (reason := unrecordable(stage, catalog))
    ]
    if reasons:
        raise ConfigurationError(*reasons)


def network_stage(name: str, chain: Chain, catalog: Catalog) -> str:
    """Name of the stage whose network emits the logits and pooled features that ``name`` passes on."""
    stage = chain[name]
    method = catalog.method(stage.method)
    below = stage.inputs.get("teacher")
    is_passed = stage.model is None and below is not None and method.emits & PASSED_ON
    return network_stage(below, chain, catalog) if is_passed and below is not None else name


def recording_content(
    *, teacher: str, data: Mapping[str, Any], seed: int | None, train: TrainSettings, num_workers: int
) -> dict[str, Any]:
    """What must be equal for two stages to see the same rows in the same batches. ``seed`` None: all epochs are alike.

    How large a batch is, and how it is shared, may change the last bits of a row.
    """
    return {
        "teacher": teacher,
        "data": dict(data),
        "seed": seed,
        "batch_size": train.batch_size,
        "accumulate": train.accumulate,
        "precision": train.precision,
        **({"compile": True} if train.compile else {}),
        "workers": num_workers,
    }


def wanted_recordings(
    stage: StageSpec,
    *,
    chain: Chain,
    keys: Mapping[str, str],
    data: DataSettings,
    content: Mapping[str, Any],
    seed: int,
    num_workers: int,
    catalog: Catalog,
) -> dict[str, str]:
    """Role -> name of the recording that this stage would like to read. Stages that want the same have equal names."""
    method = catalog.method(stage.method)
    parts = method.asks(stage.settings)
    trains = method.trains and stage.train.epochs > 0
    if not trains or unrecordable(stage, catalog) or parts == ():
        return {}
    stream = None if is_fixed(data) else data.seed_of_stream(seed, stage.method)
    return {
        role: content_key(
            recording_content(
                teacher=keys[network_stage(source, chain, catalog)],
                data=content, seed=stream, train=stage.train, num_workers=num_workers,
            )
            | ({"parts": sorted(parts)} if parts else {})
        )
        for role, source in stage.inputs.items()
    }  # fmt: skip


@dataclass(frozen=True)
class Uses:
    """How many stages that have to run want each recording."""

    by_recording: Counter[str]

    @classmethod
    def of(cls, plan: Plan) -> Uses:
        """Those of known points, and those that points will have which the search draws as it runs."""
        uses: Counter[str] = Counter()
        for stage in plan.missing.values():
            uses.update(set(stage.signals.values()))
        for trial in plan.drawn_like:
            for stage in _varied(trial, plan.varied):
                for recording in set(stage.signals.values()):
                    uses[recording] += plan.num_undrawn
        return cls(uses)

    def is_shared(self, recording: str) -> bool:
        return self.by_recording[recording] >= MIN_USES


def _varied(trial: Trial, names: frozenset[str]) -> Iterator[PlannedStage]:
    """The stages of which each point has its own: those that the search varies, and what is made from them."""
    touched: set[str] = set()
    for stage in trial.stages:
        if stage.name in names or touched & set(stage.spec.inputs.values()):
            touched.add(stage.name)
            yield stage


def shared_recordings(plan: Plan) -> frozenset[str]:
    """Recordings that are worth making: more than one stage wants them."""
    uses = Uses.of(plan)
    return frozenset(recording for recording in uses.by_recording if uses.is_shared(recording))


def signal_lines(plan: Plan) -> list[str]:
    """What the plan says about teacher signals: one line for each kind of stage that has a teacher."""
    mode, uses = plan.run.signals, Uses.of(plan)
    kinds: dict[tuple[str, str, str], list[PlannedStage]] = defaultdict(list)
    for stage in plan.missing.values():
        if mode != "live" and (stage.signals or stage.unrecordable):
            kinds[stage.name, stage.spec.method, _verdict(stage, mode, uses)].append(stage)
    return [
        f"Teacher signals: {_count(stages, f'{name} stage')} ({method}) {verdict.format(recordings=_recordings(stages))}."
        for (name, method, verdict), stages in kinds.items()
    ]


def _verdict(stage: PlannedStage, mode: str, uses: Uses) -> str:
    if stage.unrecordable:
        return f"computed live: {stage.unrecordable}"
    if mode == "record":
        return "recorded in {recordings}, as run.signals says"
    counts = {uses.by_recording[recording] for recording in stage.signals.values()}
    if max(counts) < MIN_USES:
        return "computed live: no other stage wants the same ones"
    return (
        f"read from {{recordings}}, {_range(counts)} stages from each, if they fit into run.signals_gigabytes and the "
        "teacher is not quicker than the disk"
    )


def _recordings(stages: Iterable[PlannedStage]) -> str:
    return _count({recording for stage in stages for recording in stage.signals.values()}, "recording")


def _range(counts: set[int]) -> str:
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low} to {high}"


def _count(items: Collection[object], noun: str) -> str:
    return f"{len(items)} {noun}{'s' * (len(items) > 1)}"
