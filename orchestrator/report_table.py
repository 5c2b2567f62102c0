"""From finished trials to one table: a row per point, means and spreads over seeds, differences to the baseline.

Every choice was made on the validation split; the test split is read once per finished student and only reported.
``report_text`` turns the table into text for the terminal and into ``report.md``.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import pandas as pd

from orchestrator.cost import NO_TIME, MachineTime, PriceSettings
from orchestrator.spec import Objective
from orchestrator.statistics import PairedDifference, holm, paired_difference, spread

__all__ = [
    "Cost",
    "Objective",
    "TrialRow",
    "best",
    "cost",
    "on_test",
    "pareto_front",
    "point_means",
    "selected",
    "table",
]

Status = Literal["done", "failed", "stopped", "waiting"]
ORDER = {"done": 0, "partial": 0, "stopped": 1, "waiting": 2, "failed": 3}


@dataclass(frozen=True, kw_only=True)
class TrialRow:
    """One trial: a point with one seed."""

    point: str
    """Short id of the point; all seeds of a point share it."""
    label: str
    """What the point is called, or the name of the baseline that it is."""
    settings: dict[str, Any]
    """Swept settings by path, for instance ``{"views.margin": 0.2}``."""
    seed: int
    status: Status
    """``stopped`` was ended early by the scheduler: it has validation numbers and no test number."""
    reason: str = ""
    """Why it failed, was stopped, or waits."""
    metrics: dict[str, float] = field(default_factory=dict)
    """``STAGE.METRIC`` on validation and ``STAGE.test_METRIC`` on test."""
    num_parameters: int = 0
    """Of the trained network of the last stage."""
    seconds: float = 0.0
    """Training time of its whole chain, as if it had run alone."""
    epochs: int = 0
    """Finished epochs of the last stage."""
    shared_seconds: float = 0.0
    """The part of ``seconds`` that another trial or an earlier sweep had already paid."""
    held: MachineTime = NO_TIME
    """Cores and GPUs held by its whole chain, as if it had run alone."""
    shared_held: MachineTime = NO_TIME
    """The part of ``held`` that another trial or an earlier sweep had already paid."""
    history: Sequence[dict[str, float]] = field(default_factory=list)
    """Rows of the last stage, one per epoch, with validation metrics by their plain names."""
    key: str = ""
    """Content key of the last stage."""
    stage: str = ""
    """Name of the last stage."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Training time of all trials together."""

    alone_seconds: float
    """What it would have been without sharing."""
    shared_seconds: float
    """What sharing saved."""
    alone: MachineTime = NO_TIME
    """Cores and GPUs that would have been held without sharing."""
    shared: MachineTime = NO_TIME
    """What of that sharing saved."""

    @property
    def paid_seconds(self) -> float:
        return self.alone_seconds - self.shared_seconds


def table(
    rows: Sequence[TrialRow],
    objectives: Sequence[Objective],
    *,
    baseline: str | None = None,
    prices: PriceSettings | None = None,
    shown: Sequence[str] = (),
) -> pd.DataFrame:
    """One row per point, the best validation mean first, failed points last.

    Columns: ``point``, ``label``, one per swept setting, ``seeds``; per objective its mean and ``... std`` on
    validation and, where measured, on test; ``difference (SPLIT)`` to the baseline (a label or point id) for the
    first objective with ``low``, ``high``, ``pairs``, ``pair std``, ``p`` and ``adjusted p`` (for the number of points
    compared), on test where measured, else on validation; mean and ``... std`` of each metric of ``shown``, on the same split; ``parameters``, ``macs`` and ``latency_ms`` of one image, ``seconds``, ``shared_seconds`` (means per
    trial), ``status``, ``reason``. Where they tell more than the seconds (several cores, GPUs, prices given) also
    ``cpu_hours``, ``gpu_hours``, ``money``, and each with ``shared_``. Numbers stay numbers; what is not known is NaN.
    ``attrs`` keeps objectives, baseline and settings for the text forms.
    """
    if not objectives:
        raise ValueError("a table needs at least one objective")
    points: dict[str, list[TrialRow]] = defaultdict(list)
    for row in rows:
        points[row.point].append(row)
    settings = list(dict.fromkeys(name for row in rows for name in row.settings))
    reference = _reference(points, baseline, objectives[0])
    split = _difference_split(points, reference, objectives[0])
    beside = [on_test(name) if _measured_on_test(rows, [name]) else name for name in shown]
    finals = [*_measured_on_test(rows, [objective.name for objective in objectives]), *beside]
    told = _telling_costs(rows, prices)
    lines = []
    for point in points.values():
        line = _line(point, settings, [objective.name for objective in objectives], finals)
        if reference:
            line |= _difference(point, reference, objectives[0], split)
        held = _held(point, prices)
        lines.append(line | _ending(point) | {name: held[name] for name in held if name in told})
    frame = pd.DataFrame(lines)
    if reference and lines:
        frame["adjusted p"] = holm(frame["p"].tolist())
    if lines:
        frame = _sorted(frame, objectives[0])
    frame.attrs = {
        "objectives": [(objective.name, objective.maximize) for objective in objectives],
        "baseline": baseline,
        "split": split,
        "shown": beside,
        "settings": settings,
        "currency": prices.currency if prices else "",
    }
    return frame


def best(frame: pd.DataFrame) -> pd.Series | None:
    """The point with the best validation mean among those with a finished seed; None when nothing has finished."""
    if frame.empty:
        return None
    finished = frame[frame["status"].isin(["done", "partial"])]
    return None if finished.empty else finished.iloc[0]


def cost(rows: Sequence[TrialRow]) -> Cost:
    """Time of all trials, including failed and stopped ones."""
    return Cost(
        alone_seconds=sum(row.seconds for row in rows),
        shared_seconds=sum(row.shared_seconds for row in rows),
        alone=sum((row.held for row in rows), NO_TIME),
        shared=sum((row.shared_held for row in rows), NO_TIME),
    )


def selected(point: Sequence[TrialRow]) -> list[TrialRow]:
    """The trials of a point that its numbers are made of: the finished ones, or the stopped ones if none finished."""
    done = [row for row in point if row.status == "done"]
    return done or [row for row in point if row.status == "stopped"]


def point_means(rows: Sequence[TrialRow], objectives: Sequence[Objective]) -> dict[str, tuple[float, ...]]:
    """Each finished point's mean of every objective over its seeds, on validation; without points that lack one."""
    points: dict[str, list[TrialRow]] = {}
    for row in rows:
        values = [row.metrics.get(objective.name, math.nan) for objective in objectives]
        if row.status == "done" and all(map(math.isfinite, values)):
            points.setdefault(row.point, []).append(row)
    return {
        point: tuple(spread(row.metrics[objective.name] for row in group).mean for objective in objectives)
        for point, group in points.items()
    }


def pareto_front(means: Mapping[str, Sequence[float]], objectives: Sequence[Objective]) -> list[str]:
    """The points that no other point equals or beats in every objective and beats in one, in the order given."""
    signs = [1 if objective.maximize else -1 for objective in objectives]
    gains = {
        point: [sign * value for sign, value in zip(signs, values, strict=True)]
        for point, values in means.items()
    }

    def beats(one: Sequence[float], other: Sequence[float]) -> bool:
        return list(one) != list(other) and all(
            ours >= theirs for ours, theirs in zip(one, other, strict=True)
        )

    return [point for point, gain in gains.items() if not any(beats(other, gain) for other in gains.values())]


def on_test(name: str) -> str:
    """``student.top1`` -> ``student.test_top1``."""
    stage, dot, metric = name.rpartition(".")
    return f"{stage}{dot}test_{metric}"


def _line(
    point: Sequence[TrialRow], settings: Sequence[str], chosen_by: Sequence[str], finals: Sequence[str]
) -> dict[str, Any]:
    """``chosen_by`` is told of stopped trials too; ``finals`` only where a trial has ended."""
    first = point[0]
    line: dict[str, Any] = {"point": first.point, "label": first.label}
    line |= {name: first.settings.get(name) for name in settings}
    chosen = selected(point)
    line["seeds"] = len(chosen)
    for name in chosen_by:
        line |= _statistics(name, [row.metrics.get(name, math.nan) for row in chosen])
    done = [row for row in chosen if row.status == "done"]
    for name in finals:
        line |= _statistics(name, [row.metrics.get(name, math.nan) for row in done])
    return line


def _statistics(name: str, values: Sequence[float]) -> dict[str, float]:
    result = spread(values)
    return {name: result.mean, f"{name} std": result.std}


def _difference(
    point: Sequence[TrialRow], reference: Sequence[TrialRow], objective: Objective, split: str
) -> dict[str, float]:
    name = objective.name if split == "validation" else on_test(objective.name)
    if point[0].point in {row.point for row in reference}:
        result = PairedDifference(mean=math.nan, low=math.nan, high=math.nan, num_pairs=0)
    else:
        result = paired_difference(_by_seed(point, name), _by_seed(reference, name))
    return {
        f"difference ({split})": result.mean,
        "low": result.low,
        "high": result.high,
        "pairs": result.num_pairs,
        "pair std": result.std,
        "p": result.p_value,
    }


def _reference(
    points: Mapping[str, Sequence[TrialRow]], baseline: str | None, objective: Objective
) -> list[TrialRow]:
    """The trials of the baseline: of several points of that label, the best on validation."""
    sign = 1.0 if objective.maximize else -1.0
    named = [list(point) for point in points.values() if baseline in (point[0].label, point[0].point)]
    means = [spread(_by_seed(point, objective.name).values()).mean for point in named]
    scores = [-math.inf if math.isnan(mean) else sign * mean for mean in means]
    return named[scores.index(max(scores))] if named else []


def _difference_split(
    points: Mapping[str, Sequence[TrialRow]], reference: Sequence[TrialRow], objective: Objective
) -> str:
    """Test, when any point shares a seed with the baseline there."""
    name = on_test(objective.name)
    base = _by_seed(reference, name)
    others = [point for point in points.values() if point[0] not in reference]
    return "test" if any(base.keys() & _by_seed(point, name).keys() for point in others) else "validation"


def _by_seed(rows: Sequence[TrialRow], name: str) -> dict[int, float]:
    return {row.seed: row.metrics[name] for row in rows if row.status == "done" and name in row.metrics}


def _measured_on_test(rows: Sequence[TrialRow], names: Sequence[str]) -> list[str]:
    """Test names of the metrics that any finished trial has."""
    return [
        name
        for name in map(on_test, names)
        if any(row.status == "done" and name in row.metrics for row in rows)
    ]


def _ending(point: Sequence[TrialRow]) -> dict[str, Any]:
    ran = [row for row in point if row.seconds > 0]
    reasons = Counter(row.reason for row in point if row.status != "done" and row.reason)
    return {
        "parameters": max((row.num_parameters for row in point), default=0),
        **{name: spread(_of_final(point, name)).mean for name in ("macs", "latency_ms")},
        "seconds": spread(row.seconds for row in ran).mean,
        "shared_seconds": spread(row.shared_seconds for row in ran).mean,
        "status": _status(point),
        "reason": "; ".join(
            text if count == 1 else f"{text} ({count} seeds)" for text, count in reasons.items()
        ),
    }


def _telling_costs(rows: Sequence[TrialRow], prices: PriceSettings | None) -> set[str]:
    """Cost columns that say more than ``seconds`` does."""
    names = {"money"} if prices is not None else set()
    if any(row.held.gpu_seconds for row in rows):
        names.add("gpu_hours")
    if any(row.held != NO_TIME and not math.isclose(row.held.cpu_seconds, row.seconds) for row in rows):
        names.add("cpu_hours")
    return names | {f"shared_{name}" for name in names}


def _held(point: Sequence[TrialRow], prices: PriceSettings | None) -> dict[str, float]:
    """Means per trial."""
    ran = [row for row in point if row.seconds > 0]
    if not ran:
        empty = NO_TIME.numbers(prices) | NO_TIME.numbers(prices, "shared_")
        return dict.fromkeys(empty, math.nan)
    held = sum((row.held for row in ran), NO_TIME) / len(ran)
    shared = sum((row.shared_held for row in ran), NO_TIME) / len(ran)
    return held.numbers(prices) | shared.numbers(prices, "shared_")


def _of_final(point: Sequence[TrialRow], name: str) -> list[float]:
    """A metric of the last stage, whichever its name."""
    return [row.metrics[f"{row.stage}.{name}"] for row in point if f"{row.stage}.{name}" in row.metrics]


def _status(point: Sequence[TrialRow]) -> str:
    """That of all seeds, ``partial`` when only some have finished, else the one that still promises most."""
    present = {row.status for row in point}
    if present == {"done"}:
        return "done"
    if "done" in present:
        return "partial"
    return next(status for status in ("stopped", "waiting", "failed") if status in present)


def _sorted(frame: pd.DataFrame, objective: Objective) -> pd.DataFrame:
    sign = -1.0 if objective.maximize else 1.0
    ranked = frame.assign(_group=frame["status"].map(ORDER), _value=sign * frame[objective.name])
    ranked = ranked.sort_values(["_group", "_value"], kind="stable", na_position="last")
    return ranked.drop(columns=["_group", "_value"]).reset_index(drop=True)
