"""Stage-tree sharing alone: a real sweep of n students of d teachers runs d + n stages, never one more."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from measurement import Measurement, peak_bytes

from orchestrator import Experiment
from orchestrator.store import Store


def measure(quick: bool) -> Iterator[Measurement]:
    """Tiny networks on the bundled digits, two trials at a time."""
    num_students, num_teachers = (12, 3) if quick else (48, 4)
    with tempfile.TemporaryDirectory(prefix="sharing-") as folder:
        experiment = Experiment(**document(num_students, num_teachers, folder))
        result = experiment.run(quiet=True)
        if [row.status for row in result.rows] != ["done"] * num_students:
            raise RuntimeError(
                f"not every trial is done: {[(row.status, row.reason) for row in result.rows]}"
            )
        num_runs = stage_runs(Store(folder))
    expected = num_teachers + num_students
    print(f"{num_students} students, {num_teachers} teachers: {num_runs} stage runs, {expected} expected")
    yield Measurement(
        name=f"stage runs of {num_students} students on {num_teachers} teachers",
        ours=num_runs, theirs=2 * num_students, unit="stages", against="each trial with a teacher of its own; the ratio is to d + n",
        ratio=num_runs / expected, at_most=1.0, peak_bytes=peak_bytes(),
        note="counted from the leases, which every run of a stage takes",
    )  # fmt: skip


def document(num_students: int, num_teachers: int, storage: str) -> dict[str, Any]:
    """Teachers differ in label smoothing, students in temperature."""
    return {
        "name": "sharing",
        "data": {"dataset": "digits", "validation": 0.2},
        "stages": {
            "teacher": {"method": "supervised", "model": "tiny_mlp", "train": {"epochs": 1}},
            "student": {"method": "kd", "model": "tiny_mlp", "teacher": "$teacher", "train": {"epochs": 1}},
        },
        "search": {
            "space": {
                "teacher.label_smoothing": {"grid": [index / 100 for index in range(num_teachers)]},
                "student.temperature": {"grid": [1.0 + index for index in range(num_students // num_teachers)]},
            },
            "objective": {"maximize": "student.top1"},
        },
        "run": {"storage": storage, "concurrent_trials": 2},
    }  # fmt: skip


def stage_runs(store: Store) -> int:
    """How often a stage was begun: each time takes the next generation of its lease."""
    return sum(store.generation(folder.name) for folder in (Path(store.url) / "leases").iterdir())
