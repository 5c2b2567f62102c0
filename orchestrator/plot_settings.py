"""The metric against each swept setting: one panel per setting, another setting as colour."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from orchestrator.plot_style import BASELINE, HIGHLIGHTS, finish
from orchestrator.report_cells import setting, short_names, title
from orchestrator.report_table import TrialRow
from orchestrator.spec import Objective
from orchestrator.statistics import spread

__all__ = ["draw_settings"]

MAX_PANELS_PER_ROW = 3
MAX_COLOURS = len(HIGHLIGHTS)
MAX_JOINED = 8
"""Up to so many values the means are joined by a line; more come from random draws and are no curve."""
MANY_DOTS = 500
"""From so many dots on they are pixels in the SVG too, which a reader could not open otherwise."""
LOG_RATIO = 20.0
"""From this ratio of largest to smallest value on, a setting gets a logarithmic axis."""


def draw_settings(
    rows: Sequence[TrialRow], objective: Objective, *, baseline: str | None = None
) -> Figure | None:
    """A dot per finished trial, a line through the means; the baseline as a dashed line. None without settings.

    A setting with one value among the finished trials has nothing to show and gets no panel, unless all are so.
    """
    done = [
        replace(row, settings={name: _hashable(value) for name, value in row.settings.items()})
        for row in rows
        if row.status == "done" and math.isfinite(row.metrics.get(objective.name, math.nan))
    ]
    swept = list(dict.fromkeys(name for row in done for name in row.settings))
    names = [name for name in swept if len({row.settings.get(name) for row in done} - {None}) > 1] or swept
    if not names:
        return None
    num_columns = min(len(names), MAX_PANELS_PER_ROW)
    num_rows = math.ceil(len(names) / num_columns)
    figure = Figure(figsize=(max(4.2, 3.7 * num_columns), 3.4 * num_rows), layout="constrained")
    panels = figure.subplots(num_rows, num_columns, squeeze=False, sharey=True)
    for position, panel in enumerate(panels.flat):
        if position >= len(names):
            panel.set_axis_off()
            continue
        _panel(
            panel,
            done,
            name=names[position],
            colour=_colour_setting(done, names, names[position]),
            objective=objective,
            baseline=baseline,
        )
        panel.set_xlabel(names[position])
        if position % num_columns == 0:
            panel.set_ylabel(f"{title(objective.name)}, validation")
    return figure


def _panel(
    axes: Axes,
    rows: Sequence[TrialRow],
    *,
    name: str,
    colour: str | None,
    objective: Objective,
    baseline: str | None,
) -> None:
    varied = [row for row in rows if row.settings.get(name) is not None]
    values = _sorted_values({row.settings[name] for row in varied})
    places = _axis(axes, values)
    groups: dict[Any, list[TrialRow]] = defaultdict(list)
    for row in varied:
        groups[row.settings.get(colour) if colour else None].append(row)
    ordered = _sorted_values(set(groups))
    for index, value in enumerate(ordered):
        shade = HIGHLIGHTS[index % MAX_COLOURS]
        label = f"{short_names([colour])[colour]} {setting(value)}" if colour else ""
        offset = (index - (len(ordered) - 1) / 2) * _offset(axes, places)
        _series(
            axes,
            groups[value],
            name=name,
            places=places,
            metric=objective.name,
            colour=shade,
            label=label,
            offset=offset,
        )
    _baseline(axes, rows, objective, baseline)
    finish(axes, name, "")
    if axes.get_legend_handles_labels()[1]:
        axes.legend(loc="best")


def _series(
    axes: Axes,
    rows: Sequence[TrialRow],
    *,
    name: str,
    places: dict[Any, float],
    metric: str,
    colour: str,
    label: str,
    offset: float,
) -> None:
    """Dots of single trials, and the mean at each value joined by a line."""

    def at(value: Any) -> float:
        return places[value] * (1 + offset) if axes.get_xscale() == "log" else places[value] + offset

    x = [at(row.settings[name]) for row in rows]
    is_crowded = len(rows) > MANY_DOTS
    axes.scatter(
        x, [row.metrics[metric] for row in rows], s=16, color=colour, alpha=0.35, linewidths=0, zorder=2,
        rasterized=is_crowded,
    )  # fmt: skip
    found: dict[Any, list[float]] = defaultdict(list)
    for row in rows:
        found[row.settings[name]].append(row.metrics[metric])
    values = [value for value in places if value in found]
    means = [spread(found[value]).mean for value in values]
    look, size = ("-o", 5.5) if len(values) <= MAX_JOINED else ("o", 4.0)
    axes.plot(
        [at(value) for value in values], means, look, ms=size, lw=1.8, color=colour, label=label, zorder=3,
        rasterized=is_crowded,
    )  # fmt: skip


def _baseline(axes: Axes, rows: Sequence[TrialRow], objective: Objective, baseline: str | None) -> None:
    named = [row for row in rows if baseline is not None and baseline in (row.label, row.point)]
    if named:
        mean = spread(row.metrics[objective.name] for row in named).mean
        axes.axhline(mean, ls="--", lw=1.4, color=BASELINE, zorder=1, label=baseline)


def _colour_setting(rows: Sequence[TrialRow], names: Sequence[str], own: str) -> str | None:
    """The other setting with the fewest values (two at least, as many as there are colours at most)."""
    counts = {name: len({row.settings.get(name) for row in rows} - {None}) for name in names if name != own}
    fitting = {name: count for name, count in counts.items() if 2 <= count <= MAX_COLOURS}
    return min(fitting, key=lambda name: fitting[name]) if fitting else None


def _hashable(value: Any) -> Any:
    """Values of a setting are told apart by what they hold: lists as tuples."""
    return tuple(map(_hashable, value)) if isinstance(value, list | tuple) else value


def _axis(axes: Axes, values: Sequence[Any]) -> dict[Any, float]:
    """Choose a linear, logarithmic or categorical axis; value -> place on it."""
    numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    if not numeric:
        axes.set_xticks(range(len(values)), [setting(value) for value in values])
        axes.set_xlim(-0.5, len(values) - 0.5)
        if max(len(setting(value)) for value in values) * len(values) > 28:
            axes.tick_params(axis="x", rotation=30)
        return {value: float(index) for index, value in enumerate(values)}
    places = {value: float(value) for value in values}
    low, high = min(places.values()), max(places.values())
    if low > 0 and high / low >= LOG_RATIO:
        axes.set_xscale("log")
        axes.xaxis.set_minor_locator(NullLocator())
    if len(values) <= 6:
        axes.set_xticks(list(places.values()), [setting(value) for value in values])
    elif axes.get_xscale() == "log":
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    return places


def _offset(axes: Axes, places: dict[Any, float]) -> float:
    """A small sideways step per colour, so that dots of several colours do not hide each other."""
    if len(places) < 2:
        return 0.02
    if axes.get_xscale() == "log":
        return 0.03
    ordered = sorted(places.values())
    return 0.03 * min(after - before for before, after in itertools.pairwise(ordered))


def _sorted_values(values: set[Any]) -> list[Any]:
    """Numbers by size, everything else by its text; None last."""

    def order(value: Any) -> tuple[int, float, str]:
        if isinstance(value, int | float):
            return 0, float(value), ""
        return (2 if value is None else 1), 0.0, str(value)

    return sorted(values, key=order)
