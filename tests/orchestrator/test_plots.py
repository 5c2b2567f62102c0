"""Every kind of sweep gives readable files and no warning. How they look is judged by eye."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest

from orchestrator.plots import draw, draw_curves
from orchestrator.report import Objective, TrialRow

TOP1 = [Objective(name="student.top1")]


def trial(
    point: str, settings: dict[str, Any], *, top1: float = 70.0, status: Any = "done", epochs: int = 4
) -> TrialRow:
    history = [
        {"epoch": float(epoch), "time": 1.0, "top1": top1 - 8 / epoch} for epoch in range(1, epochs + 1)
    ]
    return TrialRow(
        point=point, label=point if not settings else "angular", settings=settings, seed=0, status=status, seconds=30.0,
        metrics={"student.top1": top1, "student.test_top1": top1 - 1}, history=history,
    )  # fmt: skip


GRID = [
    trial(f"{n}{m}", {"views.num_branches": n, "views.margin": m}, top1=70 + n + m)
    for n in (1, 3, 5)
    for m in (0.1, 0.3)
]
MIXED = [
    trial(str(place), {"weight": weight, "optimizer": optimizer, "freeze": freeze}, top1=60 + place)
    for place, (weight, optimizer, freeze) in enumerate(
        [(0.01, "sgd", True), (0.5, "adamw", False), (10.0, "sgd", False)]
    )
]
LISTS = [
    trial(f"{lengths}{margin}", {"attribute_lengths": lengths, "margin": margin}, top1=60 + len(lengths))
    for lengths in ([8], [4, 10])
    for margin in (0.0, 0.2, None)
]
"""As ``latent_margins_small`` has them: a grid of lists, and points at which another setting has no effect."""
CASES = {
    "grid and baseline": ([*GRID, trial("kd", {})], {"settings", "learning_curves", "cost"}),
    "log, category, bool": (MIXED, {"settings", "learning_curves", "cost"}),
    "lists of several lengths": (LISTS, {"settings", "learning_curves", "cost"}),
    "one trial": (GRID[:1], {"settings", "learning_curves", "cost"}),
    "baseline only": ([trial("kd", {})], {"learning_curves", "cost"}),
    "one epoch": ([trial("p", {"a": 1}, epochs=1)], {"settings", "learning_curves", "cost"}),
    "stopped": ([trial("p", {"a": 1}, status="stopped")], {"learning_curves"}),
    "failed": ([trial("p", {"a": 1}, status="failed")], set()),
    "diverged": ([trial("p", {"a": 1}, top1=math.nan)], set()),
    "nothing": ([], set()),
    "many random points": ([trial(str(n), {"a": 1.1**n}, top1=60 + n % 7) for n in range(40)], {"settings", "learning_curves", "cost"}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_every_kind_of_sweep_is_drawn(tmp_path: Path, case: str) -> None:
    rows, expected = CASES[case]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        paths = draw(rows, TOP1, tmp_path / "plots", baseline="kd")
    assert {path.stem for path in paths} == expected
    assert sorted(path.suffix for path in paths) == sorted([".png", ".svg"] * len(expected))
    assert all(path.stat().st_size > 2000 for path in paths)


def test_svg_keeps_its_text_and_names_the_settings(tmp_path: Path) -> None:
    draw(GRID, TOP1, tmp_path)
    text = (tmp_path / "settings.svg").read_text()
    assert "views.num_branches" in text
    assert "top1 %, validation" in text
    assert "top1 %, test" in (tmp_path / "cost.svg").read_text()


def test_the_best_points_are_named_and_the_others_counted() -> None:
    figure = draw_curves([*GRID, trial("kd", {})], TOP1[0], baseline="kd")
    assert figure is not None
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels[0] == "angular: num_branches 5, margin 0.3"
    assert set(labels[3:]) == {"kd", "3 other points"}


def test_the_callers_matplotlib_settings_stay(tmp_path: Path) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    draw(GRID, TOP1, tmp_path)
    assert dict(matplotlib.rcParams) == before
