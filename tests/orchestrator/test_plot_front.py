"""The Pareto front: which points are on it, in words and as a picture."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from orchestrator.plots import draw
from orchestrator.report import Objective, Report, TrialRow, to_markdown
from orchestrator.report_table import pareto_front, point_means

TOP1, LATENCY = Objective(name="student.top1"), Objective(name="student.latency_ms", maximize=False)


def trial(
    point: str, top1: float, latency: float, seed: int = 0, status: str = "done", label: str = "point"
) -> TrialRow:
    return TrialRow(
        point=point, label=label, seed=seed, key=f"{point}{seed}", settings={"student.model": point},
        status=status,  # type: ignore[arg-type]
        metrics={"student.top1": top1, "student.latency_ms": latency},
    )  # fmt: skip


ROWS = [
    trial("large", 90.0, 4.0), trial("large", 92.0, 6.0, seed=1), trial("middle", 88.0, 2.0),
    trial("slow", 88.0, 3.0), trial("small", 70.0, 0.5), trial("broken", 99.0, 0.1, status="failed"),
    trial("plain", 60.0, 0.6, label="kd"), trial("unmeasured", 99.0, math.nan),
]  # fmt: skip


def test_the_front_is_made_of_means_of_finished_points() -> None:
    means = point_means(ROWS, (TOP1, LATENCY))
    assert means["large"] == (91.0, 5.0)
    assert not {"broken", "unmeasured"} & means.keys()
    assert pareto_front(means, (TOP1, LATENCY)) == ["large", "middle", "small"]


def test_equal_points_are_both_on_the_front() -> None:
    assert pareto_front({"a": (1.0, 1.0), "b": (1.0, 1.0), "c": (1.0, 2.0)}, (TOP1, LATENCY)) == ["a", "b"]


@pytest.mark.parametrize("seed", range(5))
def test_the_front_is_that_of_a_plain_search(seed: int) -> None:
    """A point is off the front exactly if some other is at least as good in both and better in one."""
    values = np.random.default_rng(seed).integers(0, 6, (30, 2)).astype(float)
    means = {str(index): tuple(pair) for index, pair in enumerate(values)}
    expected = []
    for index, (top1, latency) in enumerate(values):
        worse = False
        for other_top1, other_latency in values:
            as_good = other_top1 >= top1 and other_latency <= latency
            worse = worse or (as_good and (other_top1 > top1 or other_latency < latency))
        if not worse:
            expected.append(str(index))
    assert pareto_front(means, (TOP1, LATENCY)) == expected


def test_the_report_names_the_front_and_draws_it(tmp_path: Path) -> None:
    names = {path.name for path in draw(ROWS, (TOP1, LATENCY), tmp_path, baseline="kd")}
    assert {"pareto_front.png", "pareto_front.svg"} <= names
    text = (tmp_path / "pareto_front.svg").read_text()
    assert "model large" in text
    assert "latency" in text
    assert "model slow" not in text
    told = to_markdown(Report(name="x", rows=ROWS, objectives=(TOP1, LATENCY), baseline="kd"))
    (line,) = (line for line in told.splitlines() if "Pareto front" in line)
    assert line.endswith("point (model large); point (model middle); point (model small).")


def test_one_objective_has_no_front(tmp_path: Path) -> None:
    assert not [path for path in draw(ROWS, (TOP1,), tmp_path) if "front" in path.name]
    assert "Pareto" not in to_markdown(Report(name="x", rows=ROWS, objectives=(TOP1,)))
