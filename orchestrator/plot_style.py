"""The common look of the pictures: quiet axes, few colours, labels that can be read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from orchestrator.report_cells import MISSING, setting, short_names
from orchestrator.report_table import TrialRow

__all__ = ["BASELINE", "HIGHLIGHTS", "OTHERS", "finish", "point_name", "style"]

HIGHLIGHTS = ("#1b5e9e", "#d1642c", "#2f8f6b", "#8a4f9e", "#b8860b", "#5b6770")
"""Told apart also with the common kinds of colour blindness, and in grey by their order."""
BASELINE = "#222222"
OTHERS = "#c4c9ce"
INK = "#333333"

LOOK = {
    "font.size": 10,
    "font.family": "DejaVu Sans",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8a8f94",
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e7e9eb",
    "grid.linewidth": 0.8,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "savefig.facecolor": "white",
    "svg.fonttype": "none",
    "svg.hashsalt": "stillhouse",
}


@contextmanager
def style() -> Iterator[None]:
    """Draw with our look; the caller's matplotlib settings come back afterwards."""
    with rc_context(LOOK):  # type: ignore[arg-type]
        yield


def finish(axes: Axes, x: str, y: str, *, integer_x: bool = False) -> None:
    """Label the axes; epochs get whole numbers only."""
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if integer_x:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(x=0.03)


def point_name(row: TrialRow, rows: Sequence[TrialRow]) -> str:
    """``angular: num_branches 5, margin 0.2``."""
    names = short_names(list(dict.fromkeys(name for other in rows for name in other.settings)))
    shown = {short: setting(row.settings.get(name)) for name, short in names.items()}
    told = ", ".join(f"{name} {value}" for name, value in shown.items() if value != MISSING)
    return f"{row.label}: {told}" if told else row.label
