"""The Pareto front: the points that no other point beats in one objective without losing in another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from matplotlib.figure import Figure

from orchestrator.plot_style import BASELINE, HIGHLIGHTS, OTHERS, finish, point_name
from orchestrator.report_cells import title
from orchestrator.report_table import TrialRow, pareto_front, point_means
from orchestrator.spec import Objective

__all__ = ["draw_front"]


def draw_front(
    rows: Sequence[TrialRow], objectives: Sequence[Objective], *, baseline: str | None = None
) -> Figure | None:
    """The first objective against the second on validation, a mark per finished point; None unless there are two."""
    if len(objectives) != 2:
        return None
    means = point_means(rows, objectives)
    if not means:
        return None
    first = {row.point: row for row in reversed(rows)}
    front = sorted(pareto_front(means, objectives), key=lambda point: means[point][1])
    figure = Figure(figsize=(7.2, 4.8), layout="constrained")
    axes = figure.add_subplot()
    for point, (value, other) in means.items():
        is_base = baseline in (point, first[point].label)
        axes.plot(other, value, "o", ms=7, color=BASELINE if is_base else OTHERS, zorder=2)
    values, others = zip(*(means[point] for point in front), strict=True)
    # The line is what some point of the front reaches.
    where: Literal["pre", "post"] = "pre" if objectives[1].maximize else "post"
    axes.step(others, values, where=where, color=HIGHLIGHTS[0], lw=1.5, zorder=1)
    for index, point in enumerate(front):
        colour = HIGHLIGHTS[index % len(HIGHLIGHTS)]
        axes.plot(means[point][1], means[point][0], "o", ms=9, mfc="none", mew=2, color=colour, zorder=3, label=point_name(first[point], rows))  # fmt: skip
    finish(axes, f"{title(objectives[1].name)}, validation", f"{title(objectives[0].name)}, validation")
    figure.legend(loc="outside lower center")
    return figure
