"""A budget with real Ray: the sweep stops cleanly at the limit, and a larger one leads to the same table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from mlflow import MlflowClient

from orchestrator.account import read_spent
from orchestrator.cli import finish
from orchestrator.store import Store

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("local_ray")]

TIMES = ["seconds", "shared_seconds", "latency_ms", "money", "shared_money", "cpu_hours", "shared_cpu_hours"]
SEARCH: dict[str, Any] = {"space": {"views.num_branches": {"grid": [1, 2, 3]}}, "seeds": 2}
PRICES = {"cpu_hour": 36.0}
"""One CPU-second costs a cent."""
LONG_STUDENT = {
    "method": "angular_kd",
    "model": "tiny_mlp",
    "teacher": "$views",
    "train": {"epochs": 10},
}
"""Eight of them take many times what the first run may spend."""


def contents(storage: Path) -> dict[str, bytes]:
    store = Store(str(storage))
    return {key: store.read(key, "weights.safetensors") for key in list(store.keys())}


def test_it_stops_at_the_budget_and_goes_on_with_a_larger_one(experiment, tmp_path, capsys) -> None:
    storage = tmp_path / "runs"

    def limited(money: float):
        run = {
            "storage": str(storage),
            "prices": PRICES,
            "budget": {"money": money},
            "checkpoint_seconds": 1000,
        }
        return experiment(search=SEARCH, run=run, stages={"student": LONG_STUDENT})

    assert finish(limited(0.01)) == 3
    told = capsys.readouterr().err
    assert "stopped at the budget:" in told
    assert "of 0.01 EUR (run.budget.money)" in told
    assert " over" in told
    store = Store(str(storage))
    before = contents(storage)
    assert len(before) < 1 + 3 + 8
    assert store.list_json("stops/") == []
    spent = read_spent(store, "small").total.money(limited(1).plan().run.prices)
    assert spent >= 0.01

    assert finish(limited(0.01)) == 3, "what was spent before counts: nothing new starts"
    assert contents(storage) == before
    assert "Earlier runs of this sweep held" in capsys.readouterr().out

    again = limited(100.0).run(quiet=True)
    assert again.budget_reached == ""
    assert again.spent.total.money(limited(1).plan().run.prices) > spent
    whole = {"storage": str(tmp_path / "other"), "prices": PRICES}
    undisturbed = experiment(search=SEARCH, run=whole, stages={"student": LONG_STUDENT}).run(quiet=True)
    assert before.items() <= contents(storage).items()
    assert contents(storage) == contents(tmp_path / "other")
    pd.testing.assert_frame_equal(
        again.table().drop(columns=TIMES, errors="ignore"),
        undisturbed.table().drop(columns=TIMES, errors="ignore"),
    )
    check_reports(storage, again.spent.total.cpu_hours)


def check_reports(storage: Path, spent_cpu_hours: float) -> None:
    report = storage / "sweeps" / "small" / "report"
    assert "All runs of this sweep held" in (report / "report.md").read_text()
    costs = pd.read_csv(report / "costs.csv")
    assert len(costs) == 8
    manifests = [json.loads(path.read_text()) for path in storage.glob("artifacts/*/*/manifest.json")]
    trained = sum(manifest["cost"]["held_cpu_seconds"] for manifest in manifests)
    assert costs["own_cpu_hours"].sum() * 3600 == pytest.approx(trained)
    assert spent_cpu_hours * 3600 > trained
    client = MlflowClient(tracking_uri=f"sqlite:///{storage / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("small").experiment_id], max_results=100)
    kinds = {run.data.tags["stillhouse.id"].partition(":")[0]: run for run in runs}
    assert kinds["sweep"].info.status == "FINISHED"
    assert kinds["sweep"].data.metrics["spent_cpu_hours"] == pytest.approx(spent_cpu_hours)
    assert {"spent_money", "saved_by_sharing_money"} <= set(kinds["sweep"].data.metrics)
    assert {"cost_cpu_hours", "cost_money", "saved_by_sharing_money"} <= set(kinds["trial"].data.metrics)


def test_the_clock_limits_a_run_and_a_stage_keeps_its_checkpoint(experiment, tmp_path) -> None:
    long = {
        "student": {"method": "kd", "model": "tiny_mlp", "teacher": "$teacher", "train": {"epochs": 3000}}
    }
    made = experiment(
        stages=long, search={"space": {}, "seeds": 1}, baselines={}, remove=("views",),
        run={"budget": {"hours": 25 / 3600}, "checkpoint_seconds": 1000},
    )  # fmt: skip
    result = made.run(quiet=True)
    assert "(run.budget.hours)" in result.budget_reached
    assert result.is_partial
    assert [row.status for row in result.rows] == ["waiting"]
    assert result.spent.unfinished.cpu_seconds > 1
    store = Store(str(tmp_path / "runs"))
    checkpoint = store.checkpoints(result.rows[0].key).load()
    assert checkpoint is not None
    assert checkpoint["epoch"] >= 1
    assert store.holder(result.rows[0].key) is None
