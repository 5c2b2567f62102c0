"""A small real experiment on the bundled digits."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator import Experiment

DOCUMENT: dict[str, Any] = {
    "name": "small",
    "data": {"dataset": "digits", "validation": 0.2},
    "stages": {
        "teacher": {"method": "supervised", "model": "tiny_mlp", "train": {"epochs": 2}},
        "views": {"method": "angular_views", "teacher": "$teacher", "train": {"epochs": 1}},
        "student": {"method": "angular_kd", "model": "tiny_mlp", "teacher": "$views", "train": {"epochs": 2}},
    },
    "baselines": {"kd": {"student": {"method": "kd", "teacher": "$teacher"}}},
    "search": {
        "space": {"views.num_branches": {"grid": [1, 2, 3]}, "views.margin": {"grid": [0.1, 0.3]}},
        "objective": {"maximize": "student.top1"},
        "seeds": 2,
    },
}

ONE_AT_A_TIME = {"concurrent_trials": 1}
"""Where a test says nothing else: the process of a second trial takes longer to start than most sweeps here need."""


@pytest.fixture
def experiment(tmp_path: Path, migrated: Path) -> Callable[..., Experiment]:
    """``experiment(search={...}, remove=("views",))``: the small one, sections updated and stages removed."""

    (tmp_path / "runs").mkdir()
    shutil.copy(migrated, tmp_path / "runs" / "mlflow.db")

    def make(**changes: Any) -> Experiment:
        document = {
            name: dict(section) if isinstance(section, dict) else section
            for name, section in DOCUMENT.items()
        }
        document["run"] = {"storage": str(tmp_path / "runs"), **ONE_AT_A_TIME}
        for name in changes.pop("remove", ()):
            del document["stages"][name]
        for name in ("data", "stages", "search", "run"):
            document[name] = {**document[name], **changes.pop(name, {})}
        return Experiment(**{**document, **changes})

    return make
