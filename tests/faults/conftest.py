"""A small real sweep whose trials take a few seconds."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator import Experiment


@pytest.fixture(scope="module")
def sweep_of(migrated: Path) -> Callable[..., Experiment]:
    """``sweep_of(storage, tracking=...)``: one teacher, two sets of views, three students."""

    def make(storage: Path, **run: Any) -> Experiment:
        uri = run.setdefault("tracking", f"sqlite:///{storage}/mlflow.db")
        database = Path(uri.removeprefix("sqlite:///"))
        if uri.startswith("sqlite") and not database.exists():
            database.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(migrated, database)
        return Experiment(
            name="faults",
            data={"dataset": "digits", "validation": 0.2},
            stages={
                "teacher": {"method": "supervised", "model": "tiny_mlp", "train": {"epochs": 4}},
                "views": {"method": "angular_views", "teacher": "$teacher", "train": {"epochs": 4}},
                "student": {
                    "method": "angular_kd", "model": "tiny_mlp", "teacher": "$views", "train": {"epochs": 12},
                },
            },
            baselines={"kd": {"student": {"method": "kd", "teacher": "$teacher"}}},
            search={
                "space": {"views.num_branches": {"grid": [1, 2]}},
                "objective": {"maximize": "student.top1"},
            },
            # A second process for trials would take longer to start than the sweep takes.
            run={"storage": str(storage), "checkpoint_seconds": 0, "lease_seconds": 20, "concurrent_trials": 1, **run},
        )  # fmt: skip

    return make
