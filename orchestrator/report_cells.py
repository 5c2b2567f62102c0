"""Numbers of the result table as short strings that a person reads."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from orchestrator.cost import amount
from orchestrator.report_table import on_test

__all__ = ["MISSING", "Column", "columns", "duration", "measure", "setting", "short_names", "signed", "title"]

MISSING = "\N{EN DASH}"
_PERCENT = re.compile(r"(top\d+|accuracy|(^|_)([mogc]iou|miou_rolled|pr\d0|rec50|[nt]_acc|language_gap))$")


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column of the text table."""

    name: str
    """Of the data frame column that it shows first."""
    title: str
    cells: list[str]
    numeric: bool = True
    rank: int = 0
    """When space is short the highest rank goes first; 0 always stays."""


def columns(frame: pd.DataFrame, *, compact: bool = False) -> list[Column]:
    """The readable columns of a table made by ``report.table``.

    ``compact`` breaks long titles and, where all points have equally many seeds, says so in the title only.
    """
    attributes = frame.attrs
    objectives = [name for name, _ in attributes["objectives"]]
    shown = [
        Column(name="label", title="method", cells=[str(text) for text in frame["label"]], numeric=False)
    ]
    for name, short in short_names(attributes["settings"]).items():
        heading = short.replace("_", "_\n").replace(".", ".\n") if compact else short
        shown.append(Column(name=name, title=heading, cells=[setting(value) for value in frame[name]]))
    for name in objectives:
        shown.append(_measured(frame, name, "validation", compact))
    for name in objectives:
        if on_test(name) in frame:
            shown.append(_measured(frame, on_test(name), "test", compact))
    split = attributes["split"]
    if f"difference ({split})" in frame:
        shown.append(_difference(frame, objectives[0], str(split)))
    for name in attributes["shown"]:
        on = "test" if name.rpartition(".")[2].startswith("test_") else "validation"
        shown.append(replace(_measured(frame, name, on, compact), rank=1))
    shown += _sizes(frame)
    shown.append(
        Column(
            name="seconds",
            title="time/\ntrial",
            cells=[duration(value) for value in frame["seconds"]],
            rank=1,
        )
    )
    for name, unit in (("gpu_hours", "GPU-h"), ("cpu_hours", "CPU-h"), ("money", attributes.get("currency"))):
        if name in frame:
            cells = [MISSING if math.isnan(value) else amount(value) for value in frame[name]]
            shown.append(Column(name=name, title=f"{unit}/\ntrial", cells=cells, rank=3))
    if set(frame["status"]) != {"done"}:
        shown.append(
            Column(
                name="status", title="status", cells=[str(text) for text in frame["status"]], numeric=False
            )
        )
    return shown


def _sizes(frame: pd.DataFrame) -> list[Column]:
    """What a network weighs and what an image costs it, where that is known."""
    shown: list[Column] = []
    parameters = [_count(value) for value in frame["parameters"]]
    if any(cell != MISSING for cell in parameters):
        shown.append(Column(name="parameters", title="params", cells=parameters, rank=2))
    for name, heading, cell in (("macs", "MACs", _macs), ("latency_ms", "ms/\nimage", _milliseconds)):
        if frame[name].notna().any():
            shown.append(
                Column(name=name, title=heading, cells=[cell(value) for value in frame[name]], rank=3)
            )
    return shown


def title(name: str) -> str:
    """``student.test_top1`` -> ``top1 %``: the metric with its unit."""
    metric = name.rpartition(".")[2].removeprefix("test_")
    return f"{metric} %" if _is_percent(name) else metric


def measure(value: float, name: str) -> str:
    """Percent with two decimals; others with four significant digits."""
    if math.isnan(value):
        return MISSING
    return f"{value:.2f}" if _is_percent(name) else f"{value:.4g}"


def signed(value: float, name: str) -> str:
    """A difference, with its sign."""
    if math.isnan(value):
        return MISSING
    return f"{value:+.2f}" if _is_percent(name) else f"{value:+.3g}"


def duration(seconds: float) -> str:
    """``48 s``, ``6.2 min``, ``3.4 h``."""
    if math.isnan(seconds):
        return MISSING
    if seconds < 100:
        return f"{seconds:.0f} s" if seconds >= 10 or seconds == 0 else f"{seconds:.1f} s"
    if seconds < 6000:
        return f"{seconds / 60:.1f} min" if seconds < 600 else f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def setting(value: Any) -> str:
    """The value of a swept setting."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return MISSING
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(setting, value))}]"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float) and (not value.is_integer() or abs(value) >= 1e6):
        return f"{value:.3g}"
    if isinstance(value, float):
        return str(int(value))
    return str(value)


def short_names(names: Sequence[str]) -> dict[str, str]:
    """The last part of each dotted name where that is unique, else the whole name."""
    count = Counter(name.rpartition(".")[2] for name in names)
    return {name: last if count[last := name.rpartition(".")[2]] == 1 else name for name in names}


def _measured(frame: pd.DataFrame, name: str, split: str, compact: bool) -> Column:
    """Cells like ``76.08 ± 0.21 (3)``."""
    counts = {
        int(seeds) for seeds, mean in zip(frame["seeds"], frame[name], strict=True) if not math.isnan(mean)
    }
    above = compact and len(counts) == 1
    cells = []
    for mean, std, seeds in zip(frame[name], frame[f"{name} std"], frame["seeds"], strict=True):
        number = "" if above else f" ({seeds})"
        cells.append(MISSING if math.isnan(mean) else f"{measure(mean, name)} ± {measure(std, name)}{number}")
    note = f"\n{_seeds(counts.pop())}" if above else ""
    return Column(name=name, title=f"{title(name)}\n{split}{note}", cells=cells)


def _seeds(count: int) -> str:
    return "1 seed" if count == 1 else f"{count} seeds"


def _difference(frame: pd.DataFrame, objective: str, split: str) -> Column:
    cells = []
    for mean, low, high in zip(frame[f"difference ({split})"], frame["low"], frame["high"], strict=True):
        interval = "" if math.isnan(low) else f" [{signed(low, objective)}, {signed(high, objective)}]"
        cells.append(signed(mean, objective) + interval)
    return Column(name=f"difference ({split})", title=f"Δ {split}\n[95 %]", cells=cells)


def _count(value: int) -> str:
    if value <= 0:
        return MISSING
    if value < 1000:
        return str(value)
    return f"{value / 1e3:.0f} k" if value < 1e6 else f"{value / 1e6:.2f} M"


def _macs(value: float) -> str:
    return MISSING if math.isnan(value) else _count(round(value))


def _milliseconds(value: float) -> str:
    return MISSING if math.isnan(value) else f"{value:.3g}"


def _is_percent(name: str) -> bool:
    """Accuracies and overlaps are in percent everywhere."""
    return _PERCENT.search(name.rpartition(".")[2]) is not None
