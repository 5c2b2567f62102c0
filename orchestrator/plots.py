"""Pictures of a sweep: metric against each setting, learning curves, accuracy against cost, the Pareto front. PNG and SVG.

Drawn with matplotlib's objects on the Agg canvas: no window, no global state, safe in any thread.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from orchestrator.plot_front import draw_front
from orchestrator.plot_settings import draw_settings
from orchestrator.plot_style import BASELINE, HIGHLIGHTS, OTHERS, finish, point_name, style
from orchestrator.report_cells import title
from orchestrator.report_table import TrialRow, on_test, selected
from orchestrator.spec import Objective
from orchestrator.statistics import spread

__all__ = ["draw", "draw_cost", "draw_curves", "draw_settings"]

NUM_HIGHLIGHTED = 3
NUM_CURVES = 200
"""So many grey curves are drawn at most, evenly taken from the best to the worst; more would be one grey area."""
MANY_MARKS = 500
"""From so many marks on they are pixels in the SVG too, which a reader could not open otherwise."""


def draw(
    rows: Sequence[TrialRow], objectives: Sequence[Objective], folder: Path, *, baseline: str | None = None
) -> list[Path]:
    """Draw every picture that the rows allow into ``folder``; the paths of the files, PNG before SVG.

    Failed and waiting trials are left out. Nothing finished gives no pictures and an empty list.
    """
    if not objectives:
        raise ValueError("a plot needs at least one objective")
    folder.mkdir(parents=True, exist_ok=True)
    drawings: dict[str, Callable[[], Figure | None]] = {
        "settings": partial(draw_settings, rows, objectives[0], baseline=baseline),
        "learning_curves": partial(draw_curves, rows, objectives[0], baseline=baseline),
        "cost": partial(draw_cost, rows, objectives[0], baseline=baseline),
        "pareto_front": partial(draw_front, rows, objectives, baseline=baseline),
    }
    paths = []
    for name, drawing in drawings.items():
        with style():
            figure = drawing()
            if figure is not None:
                FigureCanvasAgg(figure)
                for ending in ("png", "svg"):
                    paths.append(folder / f"{name}.{ending}")
                    figure.savefig(paths[-1], dpi=160)
    return paths


def draw_curves(
    rows: Sequence[TrialRow], objective: Objective, *, baseline: str | None = None
) -> Figure | None:
    """Validation metric per epoch, a line per point (mean over its seeds); the best few and the baseline in colour."""
    metric = objective.name.rpartition(".")[2]
    groups = {point: group for point, group in _points(rows).items() if selected(group)}
    ranked = _ranked(groups, objective)
    bases = [point for point in ranked if baseline in (point, groups[point][0].label)]
    searched = [point for point in ranked if point not in bases]
    sample = _evenly(searched, NUM_HIGHLIGHTED, NUM_CURVES)
    curves = {point: curve for point in [*bases, *sample] if (curve := _mean_curve(groups[point], metric))}
    if not curves:
        return None
    drawn = [point for point in ranked if point in curves]
    coloured = [point for point in drawn if point not in bases][:NUM_HIGHLIGHTED]
    figure = Figure(figsize=(7.2, 4.8), layout="constrained")
    axes = figure.add_subplot()
    for point in reversed(drawn):
        style: dict[str, Any] = {"color": OTHERS, "lw": 1, "zorder": 1}
        if point in coloured:
            name = point_name(groups[point][0], rows)
            style = {"color": HIGHLIGHTS[coloured.index(point)], "lw": 2, "zorder": 3, "label": name}
        elif point in bases:
            style = {"color": BASELINE, "ls": "--", "lw": 1.8, "zorder": 2, "label": groups[point][0].label}
        epochs, values = curves[point]
        axes.plot(epochs, values, marker="o" if len(epochs) == 1 else "", **style)
    _zoom(axes, list(curves.values()), objective)
    finish(axes, "epoch", f"{title(objective.name)}, validation", integer_x=True)
    num_grey = len(set(drawn) - {*coloured, *bases})
    _legend(figure, axes, _others(num_grey, num_grey + len(searched) - len(sample)))
    return figure


def _evenly(ranked: Sequence[str], num_best: int, num_others: int) -> list[str]:
    """The best, and so many of the others at most, evenly taken from the best to the worst."""
    others = ranked[num_best:]
    step = max(1.0, len(others) / num_others)
    return [*ranked[:num_best], *(others[int(step * index)] for index in range(min(len(others), num_others)))]


def _others(num_drawn: int, num_all: int) -> str:
    if num_drawn < num_all:
        return f"{num_drawn} of {num_all} other points"
    return f"{num_all} other points" if num_all > 1 else "1 other point" if num_all else ""


def draw_cost(
    rows: Sequence[TrialRow], objective: Objective, *, baseline: str | None = None
) -> Figure | None:
    """Metric (test where measured, else validation) against training time per trial, a mark per point."""
    finished = {
        point: group for point, group in _points(rows).items() if any(row.status == "done" for row in group)
    }
    name, split = _measured(finished, objective)
    figure = Figure(figsize=(7.2, 4.8), layout="constrained")
    axes = figure.add_subplot()
    ranked = _ranked(finished, objective)
    bases = [point for point in ranked if baseline in (point, finished[point][0].label)]
    coloured = [point for point in ranked if point not in bases][:NUM_HIGHLIGHTED]
    minutes = max((row.seconds for row in rows), default=0.0) >= 300
    unit_seconds = 60 if minutes else 1
    named = {*coloured, *bases}
    grey = [mark for point in ranked if point not in named and (mark := _mark(selected(finished[point]), name, unit_seconds))]  # fmt: skip
    _draw_marks(axes, grey, {"color": OTHERS, "zorder": 1, "rasterized": len(grey) > MANY_MARKS})
    drawn = len(grey)
    for point in reversed([point for point in ranked if point in named]):
        group = selected(finished[point])
        style: dict[str, Any] = {"color": BASELINE, "zorder": 3, "label": group[0].label}
        if point in coloured:
            name_of = point_name(group[0], rows)
            style = {"color": HIGHLIGHTS[coloured.index(point)], "zorder": 3, "label": name_of}
        mark = _mark(group, name, unit_seconds)
        if mark is not None:
            _draw_marks(axes, [mark], style)
            drawn += 1
    if not drawn:
        return None
    axes.set_xlim(left=0)
    finish(
        axes,
        f"training time of the whole chain, {'minutes' if minutes else 'seconds'}",
        f"{title(name)}, {split}",
    )
    _legend(figure, axes, _others(len(grey), len(grey)), marker="o")
    return figure


def _measured(finished: Mapping[str, Sequence[TrialRow]], objective: Objective) -> tuple[str, str]:
    """The metric to show and its split: test where any point has it."""
    name = on_test(objective.name)
    if any(name in row.metrics for group in finished.values() for row in group):
        return name, "test"
    return objective.name, "validation"


def _mark(group: Sequence[TrialRow], name: str, unit_seconds: float) -> tuple[float, float, float] | None:
    """Time, metric and its spread over seeds (NaN for one) of a point; None when it has no number or no time."""
    values = spread(row.metrics[name] for row in group if name in row.metrics)
    seconds = spread(row.seconds for row in group if row.seconds > 0)
    if not values.count or not seconds.count:
        return None
    return seconds.mean / unit_seconds, values.mean, values.std


def _draw_marks(axes: Axes, marks: Sequence[tuple[float, float, float]], style: dict[str, Any]) -> None:
    if marks:
        seconds, values, errors = (list(column) for column in zip(*marks, strict=True))
        spreads = None if all(map(math.isnan, errors)) else errors
        axes.errorbar(seconds, values, yerr=spreads, fmt="o", ms=7, elinewidth=1.2, capsize=2.5, **style)


def _legend(figure: Figure, axes: Axes, others: str, marker: str = "") -> None:
    """Best point first, the rest as one grey entry."""
    handles, labels = axes.get_legend_handles_labels()
    entries = list(zip(handles, labels, strict=True))[::-1]
    if others:
        (line,) = axes.plot([], [], marker=marker, ls="" if marker else "-", color=OTHERS, ms=7)
        entries.append((line, others))
    if entries:
        figure.legend(
            [handle for handle, _ in entries], [label for _, label in entries], loc="outside lower center"
        )


def _points(rows: Sequence[TrialRow]) -> dict[str, list[TrialRow]]:
    points: dict[str, list[TrialRow]] = defaultdict(list)
    for row in rows:
        points[row.point].append(row)
    return points


def _ranked(points: dict[str, list[TrialRow]], objective: Objective) -> list[str]:
    """Points by validation mean, the best first; finished ones before those that were stopped."""

    def order(point: str) -> tuple[bool, float]:
        group = selected(points[point])
        mean = spread(row.metrics[objective.name] for row in group if objective.name in row.metrics).mean
        value = -mean if objective.maximize else mean
        return not any(row.status == "done" for row in group), math.inf if math.isnan(value) else value

    return sorted(points, key=order)


def _mean_curve(rows: Sequence[TrialRow], metric: str) -> tuple[list[float], list[float]] | None:
    """Epochs and the mean over those seeds of the point that reached each of them; None without any value."""
    found: dict[float, list[float]] = defaultdict(list)
    for row in selected(rows):
        for line in row.history:
            if metric in line:
                found[line["epoch"]].append(line[metric])
    means = {epoch: spread(values).mean for epoch, values in sorted(found.items())}
    kept = {epoch: mean for epoch, mean in means.items() if not math.isnan(mean)}
    return (list(kept), list(kept.values())) if kept else None


def _zoom(axes: Axes, curves: Sequence[tuple[list[float], list[float]]], objective: Objective) -> None:
    """Show where the curves end up, not the first epochs far away from there."""
    settled = sorted(value for _, values in curves for value in values[len(values) // 4 :])
    if len(settled) < 8:
        return
    low, high = settled[0], settled[-1]
    margin = 0.06 * (high - low)
    if margin > 0 and objective.maximize:
        axes.set_ylim(bottom=low - margin)
    elif margin > 0:
        axes.set_ylim(top=high + margin)
