"""The result table as text: a terminal table that fits its width, and a complete ``report.md``."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from orchestrator.cost import NOTHING_SPENT, PriceSettings, Spent
from orchestrator.report_cells import MISSING, Column, columns, setting, short_names, signed
from orchestrator.report_controls import control_lines
from orchestrator.report_cost import cost_lines
from orchestrator.report_pictures import Panel, panel_lines
from orchestrator.report_table import TrialRow, best, pareto_front, point_means, table
from orchestrator.spec import Objective
from orchestrator.statistics import PairedDifference, more_seeds, verdict

__all__ = ["Report", "to_markdown", "to_text"]

MAX_VERDICTS = 5
MAX_UNFINISHED = 30
MAX_POINTS = 40
"""A table of more points shows the best few and the baselines; ``table.csv`` has them all."""
NUM_BEST = 20


@dataclass(frozen=True, kw_only=True)
class Report:
    """All that a finished, or interrupted, sweep has to say."""

    name: str
    """Of the experiment."""
    rows: Sequence[TrialRow]
    objectives: Sequence[Objective]
    shown: Sequence[str] = ()
    """Further metrics for the table, ``STAGE.METRIC``."""
    baseline: str | None = None
    """Label, or point id, of the point that the others are compared with."""
    controls: Sequence[str] = ()
    """Labels of the control runs; see ``orchestrator.controls``."""
    baselines: Sequence[str] = ()
    """Labels of all rows that are no points of the search."""
    description: str = ""
    """What was run, in a sentence or two."""
    command: str = ""
    """Runs the same sweep again."""
    tracking_command: str = ""
    """Opens MLflow on it; see ``orchestrator.tracking.ui_command``."""
    plots: Sequence[Path] = ()
    """Pictures to show, linked relative to ``folder``."""
    panels: Sequence[Panel] = ()
    """What trained networks do with a few validation pictures."""
    folder: Path | None = None
    """Where ``report.md`` will lie."""
    prices: PriceSettings | None = None
    """Cost is shown as money too, where they are known."""
    spent: Spent = NOTHING_SPENT
    """What all runs of the sweep have held."""


def to_text(frame: pd.DataFrame, width: int = 120) -> str:
    """The table for a terminal ``width`` characters wide; the least needed columns are left out until it fits."""
    if frame.empty:
        return "no trials yet\n"
    told = frame[frame["reason"] != ""]
    reasons = [
        f"{status}: {label} {point}: {reason}"
        for status, label, point, reason in zip(
            told["status"], told["label"], told["point"], told["reason"], strict=True
        )
    ]
    shown = _best_points(frame)
    notes = [note] if (note := _rest(frame, shown)) else []
    lines = [*notes, *(["", *_shortened(reasons)] if reasons else [])]
    return _rich(_fitting(shown, width), width) + "".join(f"{line}\n" for line in lines)


def _best_points(frame: pd.DataFrame) -> pd.DataFrame:
    """All points, or of many the best and every baseline."""
    if len(frame) <= MAX_POINTS:
        return frame
    searched = frame["label"] == "point"
    shown = frame[~searched | (searched.cumsum() <= NUM_BEST)]
    shown.attrs = frame.attrs
    return shown


def _rest(frame: pd.DataFrame, shown: pd.DataFrame) -> str:
    """What is not shown of a long table."""
    left = frame.drop(shown.index)
    if left.empty:
        return ""
    counts = ", ".join(
        f"{count} {_status_word(str(name))}" for name, count in left["status"].value_counts().items()
    )
    others = "" if (shown["label"] == "point").all() else ", and the baselines"
    return f"The best {NUM_BEST} points of the search{others}. table.csv also has the other {len(left)} ({counts})."


def _shortened(lines: Sequence[str]) -> list[str]:
    more = len(lines) - MAX_UNFINISHED
    return list(lines) if more <= 0 else [*lines[:MAX_UNFINISHED], f"and {more} more"]


def _fitting(frame: pd.DataFrame, width: int) -> list[Column]:
    """Columns for this width: without the spare ones, then compact, then with the interval on a line of its own."""
    shown = columns(frame)
    while _natural_width(shown) > width and (spare := [column for column in shown if column.rank > 0]):
        shown.remove(max(spare, key=lambda column: column.rank))
    if _natural_width(shown) <= width:
        return shown
    shown = [column for column in columns(frame, compact=True) if column.rank == 0]
    if _natural_width(shown) <= width:
        return shown
    return [
        replace(column, cells=[cell.replace(" [", "\n[") for cell in column.cells])
        if column.name.startswith("difference")
        else column
        for column in shown
    ]


def to_markdown(report: Report, frame: pd.DataFrame | None = None) -> str:
    """A complete report: what was run, which split is which, table, verdicts, cost, failures, how to look further.

    ``frame`` is the table of the report's rows, where it is there already.
    """
    if frame is None:
        frame = table(
            report.rows, report.objectives,
            baseline=report.baseline, prices=report.prices, shown=report.shown,
        )  # fmt: skip
    sections = [
        f"# {report.name}",
        report.description,
        _what_ran(report, frame),
        _markdown_table(frame),
        _reading(report, frame),
        _section("Verdict", _verdicts(report, frame)),
        _section(
            "Controls", control_lines(report.rows, report.objectives[0], report.controls, report.baselines)
        ),
        _section("Cost", cost_lines(report.rows, report.prices, report.spent)),
        _section("Not finished", _unfinished(report)),
        _section("Pictures", _pictures(report)),
        _section("What the networks see", panel_lines(report.panels, report.folder or Path())),
        _section("Again, and further", _commands(report)),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _natural_width(shown: Sequence[Column]) -> int:
    """Characters that rich needs: every column and two spaces between them."""
    lines = [
        [line for text in (column.title, *column.cells) for line in text.split("\n")] for column in shown
    ]
    return sum(max(len(line) for line in column) + 2 for column in lines) - 2


def _rich(shown: Sequence[Column], width: int) -> str:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    drawn = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for column in shown:
        drawn.add_column(column.title, justify="right" if column.numeric else "left", overflow="fold")
    for cells in zip(*(column.cells for column in shown), strict=True):
        drawn.add_row(*cells)
    stream = io.StringIO()
    Console(
        file=stream, width=width, force_terminal=False, color_system=None, markup=False, highlight=False
    ).print(drawn)
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()) + "\n"


def _what_ran(report: Report, frame: pd.DataFrame) -> str:
    seeds = {row.seed for row in report.rows}
    counts = {
        status: sum(row.status == status for row in report.rows)
        for status in ("done", "stopped", "waiting", "failed")
    }
    told = ", ".join(f"{count} {_status_word(status)}" for status, count in counts.items() if count)
    goals = " and ".join(
        f"{'maximize' if goal.maximize else 'minimize'} `{goal.name}`" for goal in report.objectives
    )
    settings = ", ".join(f"`{name}`" for name in frame.attrs["settings"])
    varied = f" Varied: {settings}." if settings else ""
    return (
        f"{_plural(len(frame), 'point')}, {_plural(len(seeds), 'seed')}, {_plural(len(report.rows), 'trial')} ({told}); "
        f"{goals}.{varied}"
    )


def _markdown_table(frame: pd.DataFrame) -> str:
    if frame.empty:
        return "No trials yet."
    few = _best_points(frame)
    shown = columns(few)
    head = "| " + " | ".join(column.title.replace("\n", " ") for column in shown) + " |"
    rule = "|" + "|".join("---:" if column.numeric else "---" for column in shown) + "|"
    lines = [
        "| " + " | ".join(_escaped(cell) for cell in cells) + " |"
        for cells in zip(*(c.cells for c in shown), strict=True)
    ]
    note = _rest(frame, few)
    return "\n".join([head, rule, *lines, *(["", note] if note else [])])


def _reading(report: Report, frame: pd.DataFrame) -> str:
    if frame.empty:
        return ""
    lines = [
        f"`76.08 ± 0.21 (3)` is the mean over 3 seeds and the standard deviation between them; `{MISSING}` means not known. "
        "Points are sorted and chosen by **validation**, a part of the training data held out from training. "
        "The **test** split is read once per finished student and is not used for any choice; a trial that the scheduler stopped early has no test number."
    ]
    if report.baseline is not None:
        lines.append(
            f"Δ is the difference to **{report.baseline}** on {frame.attrs['split']}, paired by seed, with its 95 % t interval."
        )
    gains = [
        row.metrics[best] - row.metrics[name]
        for name in (objective.name for objective in report.objectives[:1])
        for row in report.rows
        if row.status == "done" and (best := _of_best_epoch(name)) in row.metrics and name in row.metrics
    ]
    if any(gains):
        lines.append(
            f"Numbers are those of the kept epoch (the last, unless `keep: best`). Each trial's best epoch reads "
            f"{signed(sum(gains) / len(gains), report.objectives[0].name)} on validation in the mean: that is choosing by luck, so it is not in the table."
        )
    return " ".join(lines)


def _of_best_epoch(name: str) -> str:
    """``student.top1`` -> ``student.best_top1``."""
    stage, dot, metric = name.rpartition(".")
    return f"{stage}{dot}best_{metric}"


def _verdicts(report: Report, frame: pd.DataFrame) -> list[str]:
    winner = best(frame)
    if winner is None:
        return []
    sentences = [f"Best on validation: {_point(winner, frame)}.", *_front(report, frame)]
    column = f"difference ({frame.attrs['split']})"
    if column not in frame:
        return sentences
    compared = frame[frame["status"].isin(["done", "partial"]) & (frame["pairs"] > 0)]
    for _, point in compared.head(MAX_VERDICTS).iterrows():
        sentences.append(_verdict(point, frame, report))
    if len(compared) > 1:
        sentences.append(
            f"{len(compared)} points were compared with the baseline: about one 95 % interval in twenty misses 0 by chance "
            "alone, so the words above are corrected for their number (Holm)."
        )
    return sentences


def _front(report: Report, frame: pd.DataFrame) -> list[str]:
    """With two objectives, which points are worth choosing between."""
    if len(report.objectives) < 2:
        return []
    front = set(pareto_front(point_means(report.rows, report.objectives), report.objectives))
    named = [_point(point, frame) for _, point in frame.iterrows() if point["point"] in front]
    shown = "; ".join(named[:NUM_BEST]) + (
        f"; and {len(named) - NUM_BEST} more" if len(named) > NUM_BEST else ""
    )
    return [
        f"Pareto front on validation, of means over seeds (no other point is as good in all objectives): {shown}."
    ]


def _verdict(point: pd.Series, frame: pd.DataFrame, report: Report) -> str:
    split = frame.attrs["split"]
    objective = report.objectives[0]
    difference = PairedDifference(
        mean=point[f"difference ({split})"],
        low=point["low"],
        high=point["high"],
        num_pairs=int(point["pairs"]),
        std=point["pair std"],
    )
    word = verdict(difference, maximize=objective.maximize, adjusted_p=point["adjusted p"])
    pairs = "one seed" if difference.num_pairs == 1 else f"{difference.num_pairs} paired seeds"
    interval = (
        f" (95 % interval {signed(difference.low, objective.name)} to {signed(difference.high, objective.name)})"
        if difference.num_pairs > 1
        else ""
    )
    return (
        f"{_point(point, frame)} against {report.baseline}, {split}: {signed(difference.mean, objective.name)}{interval}, "
        f"{pairs}: **{word}**{_what_would_settle_it(difference, word, point['adjusted p'])}."
    )


def _what_would_settle_it(difference: PairedDifference, word: str, adjusted_p: float) -> str:
    if word != "not distinguishable":
        return ""
    needed = more_seeds(difference)
    if needed is None:
        return "; more seeds will hardly tell them apart"
    if needed == 0:
        return f" among so many comparisons (p {adjusted_p:.2g} after correction)"
    return f"; about {_plural(needed, 'more seed')} would tell, if difference and spread stay as they are"


def _point(point: pd.Series, frame: pd.DataFrame) -> str:
    values = {short: setting(point[name]) for name, short in short_names(frame.attrs["settings"]).items()}
    named = [f"{name} {value}" for name, value in values.items() if value != MISSING]
    return f"{point['label']} ({', '.join(named)})" if named else str(point["label"])


def _unfinished(report: Report) -> list[str]:
    lines = [
        f"{_status_word(row.status)}: {row.label} `{row.point}` seed {row.seed}"
        f"{f', after {row.epochs} epochs' if row.epochs else ''}{f': {row.reason}' if row.reason else ''}"
        for row in report.rows
        if row.status != "done"
    ]
    return _shortened(lines)


def _pictures(report: Report) -> list[str]:
    folder = report.folder or Path()
    return [f"![{path.stem.replace('_', ' ')}]({os.path.relpath(path, folder)})" for path in report.plots]


def _commands(report: Report) -> list[str]:
    lines = []
    if report.command:
        lines.append(f"The same sweep again (what is finished is not repeated): `{report.command}`")
    if report.tracking_command:
        lines.append(f"Every run with its curves in MLflow: `{report.tracking_command}`")
    return lines


def _section(title: str, lines: Sequence[str]) -> str:
    return (
        f"## {title}\n\n" + "\n".join(f"- {line}" if not line.startswith("![") else line for line in lines)
        if lines
        else ""
    )


def _status_word(status: str) -> str:
    return "stopped early" if status == "stopped" else status


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|").replace("\n", " ")
