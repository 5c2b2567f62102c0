"""Whole sweeps with real Ray: what is shared runs once, what is stored never runs again, a trial reproduces."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from orchestrator import grid, uniform
from orchestrator.store import Store

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]


def artifacts(storage: Path) -> dict[str, dict[str, Any]]:
    store = Store(str(storage))
    keys = list(store.keys())
    return {key: store.manifest(key) for key in keys}


def stage_runs(storage: Path) -> Counter[str]:
    """How often each kind of stage was trained: every training, finished in the store, adds to its cost history."""
    store = Store(str(storage))
    runs: Counter[str] = Counter()
    signatures = {manifest["signature"]: manifest["name"] for manifest in artifacts(storage).values()}
    for signature, name in signatures.items():
        runs[name] += len(store.read_json(f"costs/{signature}.json")["seconds_per_epoch"])
    return runs


def weights(storage: Path) -> dict[str, bytes]:
    store = Store(str(storage))
    keys = list(store.keys())
    return {key: store.read(key, "weights.safetensors") for key in keys}


@pytest.mark.slow
def test_stages_are_shared_stored_and_extended(experiment, tmp_path) -> None:
    storage = tmp_path / "runs"
    result = experiment(run={"concurrent_trials": 2}).run(quiet=True)
    table = result.table()
    assert result.num_failed == 0
    assert len(result.rows) == 14
    assert stage_runs(storage) == {"teacher": 1, "views": 6, "student": 14}
    assert sorted(table["seeds"]) == [2] * 7
    assert table["student.top1"].between(0, 100).all()
    assert table["student.test_top1"].notna().all()

    before = {key: manifest["created"] for key, manifest in artifacts(storage).items()}
    again = experiment().run(quiet=True)
    assert {key: manifest["created"] for key, manifest in artifacts(storage).items()} == before
    assert again.table().equals(table)
    assert experiment().plan().missing == {}

    wider = experiment(
        search={"space": {"views.num_branches": grid([1, 2, 3, 4]), "views.margin": grid([0.1, 0.3])}}
    )
    assert {name: row["to_run"] for name, row in wider.plan().counts().items()} == {
        "teacher": 0,
        "views": 2,
        "student": 4,
    }
    wider.run(quiet=True)
    assert stage_runs(storage) == {"teacher": 1, "views": 8, "student": 18}
    assert (
        before.items() <= {key: manifest["created"] for key, manifest in artifacts(storage).items()}.items()
    )

    in_sweep = weights(storage)
    alone = experiment(
        search={"space": {"views.num_branches": grid([2]), "views.margin": grid([0.3])}},
        run={"storage": str(tmp_path / "alone")},
    )
    alone.run(quiet=True)
    alone_weights = weights(tmp_path / "alone")
    assert len(alone_weights) == 6  # teacher, views, 2 students and 2 baseline students
    assert {key: in_sweep[key] for key in alone_weights} == alone_weights


@pytest.mark.parametrize("name", ["teacher", "views"])
def test_a_damaged_stage_that_others_need_is_built_again(experiment, tmp_path, name) -> None:
    storage = tmp_path / "runs"
    points = {"seeds": 1, "space": {"views.num_branches": grid([1])}}
    experiment(search=points, baselines={}).run(quiet=True)
    before = weights(storage)
    (key,) = [key for key, manifest in artifacts(storage).items() if manifest["name"] == name]
    marker = storage / "artifacts" / key[:2] / key / "manifest.json"
    marker.write_text(marker.read_text().replace('"epochs": ', '"epochs": 1'))
    points["seeds"] = 2  # both students need it, one of them has to be trained
    result = experiment(search=points, baselines={}).run(quiet=True)
    assert [row.status for row in result.rows] == ["done", "done"]
    assert before.items() <= weights(storage).items()
    assert list((storage / "damaged").iterdir())


@pytest.mark.slow
def test_report_files(experiment, tmp_path) -> None:
    result = experiment(search={"space": {"views.num_branches": grid([1, 2])}}).run(quiet=True)
    folder = tmp_path / "runs" / "sweeps" / "small"
    text = (folder / "report" / "report.md").read_text()
    assert "validation" in text
    assert "mlflow ui" in text
    assert (folder / "report" / "table.csv").exists()
    assert list((folder / "report").glob("*.png"))
    bundle = json.loads((folder / "best" / "model.json").read_text())
    assert bundle["model"] == "tiny_mlp"
    assert result.best["student.top1"] == result.table().query("label == 'point'")["student.top1"].max()


def test_diverged_trial_is_a_result(experiment, tmp_path) -> None:
    space = {"student.train.learning_rate": grid([0.05, 1e30])}
    broken = experiment(search={"space": space, "seeds": 1}, baselines={})
    result = broken.run(quiet=True)
    table = result.table().set_index("student.train.learning_rate")
    assert table.loc[0.05, "status"] == "done"
    assert table.loc[1e30, "status"] == "failed"
    assert "Diverged" in table.loc[1e30, "reason"]
    assert result.num_failed == 1
    again = broken.run(quiet=True)
    assert again.table().set_index("student.train.learning_rate").loc[1e30, "reason"].startswith("Diverged")


def test_early_stopping_stays_stopped(experiment, tmp_path) -> None:
    asha = experiment(
        search={"space": {"student.train.learning_rate": grid([0.1, 1e-5, 1e-6, 1e-7])}, "seeds": 1,
                "scheduler": {"name": "asha", "grace_epochs": 1, "reduction_factor": 2}},
        stages={"student": {"method": "angular_kd", "model": "tiny_mlp", "teacher": "$views", "train": {"epochs": 9}}},
        baselines={},
    )  # fmt: skip
    result = asha.run(quiet=True)
    table = result.table()
    assert (table["status"] == "stopped").any()
    assert result.best["student.train.learning_rate"] == 0.1
    stopped = table[table["status"] == "stopped"]
    assert stopped["student.test_top1"].isna().all()
    assert asha.run(quiet=True).table().equals(table)


@pytest.mark.parametrize("objective", ["one", "two"])
def test_optuna(experiment, objective) -> None:
    objectives = {
        "one": {"maximize": "student.top1"},
        "two": [{"maximize": "student.top1"}, {"minimize": "student.num_parameters"}],
    }
    drawn = experiment(
        search={"space": {"views.margin": uniform(0.05, 0.5), "student.model": {"choice": ["tiny_mlp", "mini_cnn"]}},
                "algorithm": "optuna", "num_samples": 4, "seeds": 1, "objective": objectives[objective]},
        baselines={},
    )  # fmt: skip
    result = drawn.run(quiet=True)
    assert len(result.rows) == 4
    assert {row.status for row in result.rows} == {"done"}
    assert [row.key for row in drawn.run(quiet=True).rows] == [row.key for row in result.rows]


def test_confirm_adds_seeds_to_the_best(experiment) -> None:
    result = experiment(
        search={
            "space": {"views.num_branches": grid([1, 2, 3])},
            "seeds": 1,
            "confirm": {"top": 1, "seeds": 3},
        }
    ).run(quiet=True)
    seeds = result.table().set_index("label")["seeds"]
    assert seeds["kd"] == 3
    assert sorted(seeds["point"]) == [1, 1, 3]
    assert result.table().query("label == 'point' and seeds == 3")["pairs"].item() == 3
