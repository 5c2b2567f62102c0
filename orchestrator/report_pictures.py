"""What the report shows of the pictures that trained stages have left: those of the best points and of baselines."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from orchestrator.errors import StorageError
from orchestrator.pictures import PANEL, copy_panel
from orchestrator.report_table import TrialRow
from orchestrator.store import Store

__all__ = ["Panel", "collect_panels", "panel_lines"]

NUM_POINTS, NUM_BASELINES = 4, 2
"""So many are shown; those of other trials are in their artifacts, and in MLflow."""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """The pictures of one trial."""

    title: str
    path: Path
    trouble: str = ""
    """Why there is no file at ``path``; empty where there is one."""


def collect_panels(
    store: Store, rows: Sequence[TrialRow], table: pd.DataFrame, baselines: Sequence[str], folder: Path
) -> list[Panel]:
    """Copy the panels of the best points and of the first baselines, each of its first seed, into ``folder``.

    ``table`` has the points in order, the best first. What an earlier report left in the folder is removed.
    """
    panels = [
        panel for row in _shown(rows, table, baselines) if (panel := _collected(store, row, folder)) is not None
    ]  # fmt: skip
    kept = {panel.path for panel in panels if not panel.trouble}
    for path in folder.glob("*.png"):
        if path not in kept:
            path.unlink()
    return panels


def _shown(rows: Sequence[TrialRow], table: pd.DataFrame, baselines: Sequence[str]) -> Iterator[TrialRow]:
    first: dict[str, TrialRow] = {}
    for row in sorted(rows, key=lambda row: row.seed):
        if row.status == "done":
            first.setdefault(row.point, row)
    ordered = [first[point] for point in table.get("point", ()) if point in first]
    yield from [row for row in ordered if row.label not in baselines][:NUM_POINTS]
    yield from [row for row in ordered if row.label in baselines][:NUM_BASELINES]


def _collected(store: Store, row: TrialRow, folder: Path) -> Panel | None:
    """The panel of one trial; None where its last stage has nothing to show."""
    path = folder / f"{row.stage}-{row.key[:8]}.png"
    title = f"{row.label} {row.point} seed {row.seed}, stage {row.stage} ({row.key[:8]})"
    try:
        manifest = store.manifest(row.key)
    except StorageError as error:
        return Panel(title=title, path=path, trouble=f"not shown: {error}")
    if trouble := copy_panel(store, row.key, manifest, path):
        return Panel(title=title, path=path, trouble=trouble)
    return Panel(title=title, path=path) if PANEL in manifest["files"] else None


def panel_lines(panels: Sequence[Panel], folder: Path) -> list[str]:
    """Lines of ``report.md``: a title and a picture each, or what went wrong."""
    lines = []
    for panel in panels:
        lines.append(f"{panel.title}{f': {panel.trouble}' if panel.trouble else ''}")
        if not panel.trouble:
            lines.append(f"![{panel.title}]({os.path.relpath(panel.path, folder)})")
    return lines
