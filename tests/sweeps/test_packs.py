"""Sweeps whose students share a process: the table of students that run alone, with fewer passes of the teacher."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from methods import Batch, Step
from methods.kd import KnowledgeDistillation, KnowledgeDistillationSettings
from orchestrator import Experiment, Result, grid
from orchestrator.store import Store

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]

TRAIN = {"epochs": 3, "batch_size": 128}
STUDENT = {"method": "kd", "model": "tiny_mlp", "teacher": "$teacher", "train": TRAIN}
WEIGHTS = [0.3, 0.6, 0.9, 2.0]
RATES = [0.05, 1e-6, 2e-6, 0.06]


@dataclass(frozen=True, kw_only=True)
class MortalSettings(KnowledgeDistillationSettings):
    """Settings of ``mortal``."""

    note: str = ""
    """The file that says that a process has died already; without a name none dies."""


class Mortal(KnowledgeDistillation):
    """Distils, and kills its process in the second epoch, once."""

    Settings = MortalSettings
    settings: MortalSettings

    @classmethod
    def inactive(cls, settings: Any) -> frozenset[str]:
        return super().inactive(settings) | {"note"}

    def forward(self, batch: Batch) -> Step:
        note = Path(self.settings.note)
        if self.settings.note and batch.epoch == 1 and not note.exists():
            note.write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(batch)


def sweep(experiment: Any, storage: Path, pack: Any, **changes: Any) -> Experiment:
    made: Experiment = experiment(
        remove=("views",),
        baselines={},
        stages={"student": {**STUDENT, **changes.pop("student", {})}},
        search={"space": {"student.kd_weight": grid(WEIGHTS)}, "seeds": 1, **changes.pop("search", {})},
        run={"storage": str(storage), "pack": pack, "concurrent_trials": 1, **changes.pop("run", {})},
        methods={"mortal": Mortal},
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
def test_a_packed_sweep_that_is_killed_gives_the_same_table(experiment: Any, tmp_path: Path) -> None:
    note = tmp_path / "died"
    mortal = {"method": "mortal", "note": str(note)}
    quick = {"checkpoint_seconds": 0, "lease_seconds": 2}
    packed = sweep(experiment, tmp_path / "packed", 2, student=mortal, run=quick).run(quiet=True)
    alone = sweep(experiment, tmp_path / "alone", "off", student={"method": "mortal"}).run(quiet=True)
    assert note.exists()
    assert packed.num_failed == alone.num_failed == 0
    assert artifacts(tmp_path / "packed") == artifacts(tmp_path / "alone")
    assert numbers(packed.table()).equals(numbers(alone.table()))
    assert len(packed.rows) == 4


def endings(result: Result) -> dict[float, str]:
    return {row.settings["student.train.learning_rate"]: row.status for row in result.rows}


@pytest.mark.slow
def test_asha_stops_single_trials_of_a_pack(experiment: Any, tmp_path: Path) -> None:
    """First a follower is stopped, whose epochs are long over when Tune hears of the first; then a leader."""
    search = {
        "space": {"student.train.learning_rate": grid(RATES)},
        "scheduler": {"name": "asha", "reduction_factor": 1.5},
    }
    first = sweep(experiment, tmp_path, 2, search=search).run(quiet=True)
    assert endings(first) == dict(zip(RATES, ("done", "stopped", "stopped", "done"), strict=True))
    store = Store(str(tmp_path))
    assert {row.settings["student.train.learning_rate"] for row in first.rows if store.has(row.key)} == {
        RATES[0],
        RATES[3],
    }
    assert store.list_json("packs/") == []
    again = sweep(experiment, tmp_path, 2, search=search).run(quiet=True)
    assert endings(again) == endings(first)
