"""Sweeps whose students share a process: the table of students that run alone, with fewer passes of the teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orchestrator import Experiment, grid
from orchestrator.store import Store

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]

TRAIN = {"epochs": 3, "batch_size": 128}
STUDENT = {"method": "kd", "model": "tiny_mlp", "teacher": "$teacher", "train": TRAIN}
WEIGHTS = [0.3, 0.6, 0.9, 2.0]


def sweep(experiment: Any, storage: Path, pack: Any, **changes: Any) -> Experiment:
    made: Experiment = experiment(
        remove=("views",),
        baselines={},
        stages={"student": STUDENT},
        search={"space": {"student.kd_weight": grid(WEIGHTS)}, "seeds": 1, **changes.pop("search", {})},
        run={"storage": str(storage), "pack": pack, "concurrent_trials": 1, **changes.pop("run", {})},
        **changes,
    )
    return made


def artifacts(storage: Path) -> dict[str, bytes]:
    store = Store(str(storage))
    return {key: store.read(key, "weights.safetensors") for key in list(store.keys())}


def numbers(table: Any) -> Any:
    """Without what was measured with a clock."""
    return table[[name for name in table.columns if not name.endswith(("seconds", "hours", "latency_ms"))]]


@pytest.mark.slow
def test_a_packed_sweep_gives_the_same_table(experiment: Any, tmp_path: Path) -> None:
    packed = sweep(experiment, tmp_path / "packed", 2).run(quiet=True)
    alone = sweep(experiment, tmp_path / "alone", "off").run(quiet=True)
    assert packed.num_failed == alone.num_failed == 0
    assert artifacts(tmp_path / "packed") == artifacts(tmp_path / "alone")
    assert numbers(packed.table()).equals(numbers(alone.table()))
    assert len(packed.rows) == 4
