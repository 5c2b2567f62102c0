"""What the report shows of the pictures that trained stages have left: those of the best points and of baselines."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch

from methods.base import Method
from methods.catalog import Catalog
from methods.data.base import StreamSettings
from orchestrator.errors import StorageError
from orchestrator.pictures import PANEL, copy_panel
from orchestrator.plan import PlannedStage
from orchestrator.report_table import TrialRow
from orchestrator.secrecy import hide
from orchestrator.stage import load_source
from orchestrator.store import Store

__all__ = ["Draw", "Panel", "collect_panels", "draw_stored", "panel_lines"]

Draw = Callable[[str], bytes | None]
"""Key of an artifact -> its panel, None where it has nothing to show; may raise whatever it likes."""
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
    store: Store,
    rows: Sequence[TrialRow],
    table: pd.DataFrame,
    baselines: Sequence[str],
    folder: Path,
    draw: Draw = lambda key: None,
) -> list[Panel]:
    """Copy the panels of the best points and of the best baselines, each of its first seed, into ``folder``.

    Args:
        store: Where the artifacts are.
        rows: All trials.
        table: The points in order, the best first.
        baselines: Labels of points that are baselines.
        folder: What an earlier report left there, and is not shown any more, is removed.
        draw: Draws the panel of an artifact that was stored without one.
    """
    found = [_collected(store, row, folder, draw) for row in _shown(rows, table, baselines)]
    panels = [panel for panel in found if panel is not None]
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


def _collected(store: Store, row: TrialRow, folder: Path, draw: Draw) -> Panel | None:
    """The panel of one trial; None where its last stage has nothing to show."""
    path = folder / f"{row.stage}-{row.key[:8]}.png"
    title = f"{row.label} {row.point} seed {row.seed}, stage {row.stage} ({row.key[:8]})"
    try:
        manifest = store.manifest(row.key)
    except StorageError as error:
        return Panel(title=title, path=path, trouble=f"not shown: {error}")
    if trouble := copy_panel(store, row.key, manifest, path):
        return Panel(title=title, path=path, trouble=trouble)
    if (
        PANEL in manifest["files"] or path.exists()
    ):  # a key stands for one network: its pictures stay the same
        return Panel(title=title, path=path)
    return _drawn(row.key, title, path, draw)


def _drawn(key: str, title: str, path: Path, draw: Draw) -> Panel | None:
    try:
        content = draw(key)
        if content is None:
            return None
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    except Exception as error:  # a report without pictures is better than none
        return Panel(title=title, path=path, trouble=hide(f"not drawn: {type(error).__name__}: {error}"))
    return Panel(title=title, path=path)


def draw_stored(store: Store, stage: PlannedStage, catalog: Catalog) -> bytes | None:
    """The panel of a finished stage, from its artifact and its data; None where its method draws none."""
    method = catalog.method(stage.spec.method)
    if method.panel.__func__ is Method.panel.__func__:  # type: ignore[attr-defined]
        return None  # without a look at network and data
    network = load_source(store, stage.key, catalog, with_inputs=False).teacher().network
    return method.panel(network, stage.data.source.load().streams(_stream_settings(stage))["validation"])


def _stream_settings(stage: PlannedStage) -> StreamSettings:
    """Those that give the stage its validation split."""
    data, batch_size = stage.data, stage.spec.train.batch_size
    return StreamSettings(
        batch_size=batch_size,
        evaluation_batch_size=batch_size,
        seed=0,
        augment=data.active_augment,
        validation=data.validation,
        split_seed=data.split_seed,
        fraction=data.fraction,
        imbalance=data.imbalance,
        device=torch.device("cpu"),
    )


def panel_lines(panels: Sequence[Panel], folder: Path) -> list[str]:
    """Lines of ``report.md``: a title and a picture each, or what went wrong."""
    lines = []
    for panel in panels:
        lines.append(f"{panel.title}{f': {panel.trouble}' if panel.trouble else ''}")
        if not panel.trouble:
            lines.append(f"![{panel.title}]({os.path.relpath(panel.path, folder)})")
    return lines
