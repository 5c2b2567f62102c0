"""Stages on several workers through Ray Train, inside a sweep."""

from __future__ import annotations

import pytest
from safetensors.torch import load

from orchestrator import grid
from orchestrator.store import Store

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("local_ray")]


def test_two_workers_train_the_same_student(experiment, tmp_path) -> None:
    """Global batches are the same for one worker and two, so without batch norm the weights agree to float tolerance."""
    common = {
        "stages": {"teacher": {"method": "supervised", "model": "tiny_mlp", "train": {"epochs": 1}},
                   "student": {"method": "kd", "model": "tiny_mlp", "teacher": "$teacher", "train": {"epochs": 2}}},
        "search": {"space": {"student.temperature": grid([4.0])}, "seeds": 1},
        "baselines": {},
    }  # fmt: skip

    def drop_views(**run: object):
        made = {**common, "run": run}
        return experiment(**made, remove=("views",))

    alone = drop_views(storage=str(tmp_path / "alone")).run(quiet=True)
    both = drop_views(storage=str(tmp_path / "both"), workers=2).run(quiet=True)
    assert [row.status for row in both.rows] == ["done"]
    key = both.rows[0].key
    assert alone.rows[0].key == key
    stores = [Store(str(tmp_path / name)) for name in ("alone", "both")]
    assert stores[1].manifest(key)["placement"]["workers"] == 2
    assert stores[1].manifest(key)["placement"]["batch_per_worker"] == 32
    cost = stores[1].manifest(key)["cost"]
    assert cost["held_cpu_seconds"] == pytest.approx(2 * cost["seconds"])
    trained = sum(stores[1].manifest(key)["cost"]["held_cpu_seconds"] for key in list(stores[1].keys()))
    assert both.spent.finished.cpu_seconds > trained
    first, second = (load(store.read(key, "weights.safetensors")) for store in stores)
    for name, tensor in first.items():
        assert (tensor - second[name]).abs().max() < 1e-3, name
    assert len(both.rows[0].history) == 2


def test_diverged_on_two_workers_is_told_once(experiment) -> None:
    result = experiment(
        stages={"student": {"method": "supervised", "model": "tiny_mlp", "train": {"epochs": 2, "learning_rate": 1e30}}},
        search={"space": {}, "seeds": 1}, baselines={}, run={"workers": 2}, remove=("teacher", "views"),
    ).run(quiet=True)  # fmt: skip
    assert result.num_failed == 1
    assert "Diverged" in result.rows[0].reason
