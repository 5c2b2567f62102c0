"""A small real sweep whose trials take a few seconds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator import Experiment


@pytest.fixture(scope="module")
def sweep_of() -> Callable[..., Experiment]:
    """``sweep_of(storage, tracking=...)``: one teacher, two sets of views, three students."""

    def make(storage: Path, **run: Any) -> Experiment:
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
            run={"storage": str(storage), "checkpoint_seconds": 0, "lease_seconds": 20, **run},
        )  # fmt: skip

    return make
