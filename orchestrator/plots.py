"""Pictures of a sweep: metric against each setting, learning curves, accuracy against cost. PNG and SVG.

Drawn with matplotlib's objects on the Agg canvas: no window, no global state, safe in any thread.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from orchestrator.plot_settings import draw_settings
from orchestrator.plot_style import BASELINE, HIGHLIGHTS, OTHERS, finish, point_name, style
from orchestrator.report_cells import title
from orchestrator.report_table import TrialRow, on_test, selected
from orchestrator.spec import Objective
from orchestrator.statistics import spread

__all__ = ["draw", "draw_cost", "draw_curves", "draw_settings"]

NUM_HIGHLIGHTED = 3


def draw(
    rows: Sequence[TrialRow], objectives: Sequence[Objective], folder: Path, *, baseline: str | None = None
) -> list[Path]:
    """Draw every picture that the rows allow into ``folder``; the paths of the files, PNG before SVG.

    Failed and waiting trials are left out. Nothing finished gives no pictures and an empty list.
    """
    if not objectives:
        raise ValueError("a plot needs at least one objective")
    folder.mkdir(parents=True, exist_ok=True)
    drawings: dict[str, Callable[..., Figure | None]] = {
        "settings": draw_settings,
        "learning_curves": draw_curves,
        "cost": draw_cost,
    }
    paths = []
    for name, drawing in drawings.items():
        with style():
            figure = drawing(rows, objectives[0], baseline=baseline)
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
    curves = {point: curve for point, group in _points(rows).items() if (curve := _mean_curve(group, metric))}
    if not curves:
        return None
    groups = _points(rows)
    ranked = _ranked({point: groups[point] for point in curves}, objective)
    bases = [point for point in ranked if baseline in (point, groups[point][0].label)]
    coloured = [point for point in ranked if point not in bases][:NUM_HIGHLIGHTED]
    figure = Figure(figsize=(7.2, 4.8), layout="constrained")
    axes = figure.add_subplot()
    for point in reversed(ranked):
        style: dict[str, Any] = {"color": OTHERS, "lw": 1, "zorder": 1}
        if point in coloured:
            name = point_name(groups[point][0], rows)
            style = {"color": HIGHLIGHTS[coloured.index(point)], "lw": 2, "zorder": 3, "label": name}
        elif point in bases:
            style = {"color": BASELINE, "ls": "--", "lw": 1.8, "zorder": 2, "label": groups[point][0].label}
        epochs, values = curves[point]
        axes.plot(epochs, values, marker="o" if len(epochs) == 1 else "", **style)
    _zoom(axes, list(curves.values()), objective)
    hidden = len(ranked) - len(coloured) - len(bases)
    finish(axes, "epoch", f"{title(objective.name)}, validation", integer_x=True)
    _legend(figure, axes, f"{hidden} other points" if hidden > 1 else "1 other point" if hidden else "")
    return figure


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
    drawn = 0
    for point in reversed(ranked):
        group = selected(finished[point])
        style: dict[str, Any] = {"color": OTHERS, "zorder": 1}
        if point in coloured:
            name_of = point_name(group[0], rows)
            style = {"color": HIGHLIGHTS[coloured.index(point)], "zorder": 3, "label": name_of}
        elif point in bases:
            style = {"color": BASELINE, "zorder": 3, "label": group[0].label}
        drawn += _mark(axes, group, name, 60 if minutes else 1, style)
    if not drawn:
        return None
    axes.set_xlim(left=0)
    finish(
        axes,
        f"training time of the whole chain, {'minutes' if minutes else 'seconds'}",
        f"{title(name)}, {split}",
    )
    hidden = drawn - len(coloured) - len(bases)
    _legend(
        figure,
        axes,
        f"{hidden} other points" if hidden > 1 else "1 other point" if hidden > 0 else "",
        marker="o",
    )
    return figure


def _measured(finished: Mapping[str, Sequence[TrialRow]], objective: Objective) -> tuple[str, str]:
    """The metric to show and its split: test where any point has it."""
    name = on_test(objective.name)
    if any(name in row.metrics for group in finished.values() for row in group):
        return name, "test"
    return objective.name, "validation"


def _mark(
    axes: Axes, group: Sequence[TrialRow], name: str, unit_seconds: float, style: dict[str, Any]
) -> bool:
    """One point with its spread over seeds; False when it has no number or no time."""
    values = spread(row.metrics[name] for row in group if name in row.metrics)
    seconds = spread(row.seconds for row in group if row.seconds > 0)
    if not values.count or not seconds.count:
        return False
    error = values.std if values.count > 1 else None
    common: dict[str, Any] = {"fmt": "o", "ms": 7, "elinewidth": 1.2, "capsize": 2.5}
    axes.errorbar(seconds.mean / unit_seconds, values.mean, yerr=error, **common, **style)
    return True


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
