"""Panels of trained grounders: kept in the artifact, attached to the runs in a real MLflow, shown in the report."""

from __future__ import annotations

import io
import logging
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import pytest
from grounding_artifact import StoredTrial, changes, stored
from PIL import Image

from methods.grounding.refer import Refer
from orchestrator.dispatch import Outcome
from orchestrator.journal import Journal, read_records
from orchestrator.pictures import PANEL
from orchestrator.plan import Trial
from orchestrator.report_pictures import collect_panels
from orchestrator.report_table import TrialRow, table
from orchestrator.result import Result
from orchestrator.spec import ExperimentSpec, Objective
from orchestrator.store import Store
from orchestrator.sweep_log import SweepLog
from orchestrator.tracking import Mirror


@dataclass(frozen=True)
class Trained:
    store: Store
    trial: Trial
    spec: ExperimentSpec

    @property
    def panel(self) -> bytes:
        return self.store.read(self.trial.key, PANEL)

    @property
    def ids(self) -> tuple[str, str]:
        return f"stage:{self.trial.key}", f"trial:{self.trial.key}"

    def log(self, path: Path) -> None:
        """Tell tracking about the finished trial."""
        journal = Journal(path)
        log = SweepLog(journal, self.spec, self.store, "1")
        log.sweep_started("document", "f0")
        log.trial_started(self.trial)
        log.trial_ended(self.trial, Outcome(status="done", values=(1.0,)), shared={"grounder": False, self.trial.key: False}, stored={self.trial.key}, paid=set())  # fmt: skip
        log.sweep_ended("FINISHED", report=None, best_trial=None, bundle=None, numbers={})
        journal.close()

    def result(self, folder: Path, rows: list[TrialRow] | None = None) -> Result:
        return Result(spec=self.spec, rows=rows or [row(self.trial.key)], trials={self.trial.key: self.trial}, folder=folder, store=self.store)  # fmt: skip


def row(key: str, point: str = "p0", seed: int = 0, label: str = "point", miou: float = 1.0) -> TrialRow:
    return TrialRow(point=point, label=label, settings={}, seed=seed, status="done", key=key, stage="grounder", metrics={"grounder.miou": miou})  # fmt: skip


@pytest.fixture
def trained(grounder: StoredTrial) -> Trained:
    return Trained(*grounder)


def records(path: Path, op: str) -> list[dict[str, Any]]:
    return [record for record, _ in read_records(path) if record["op"] == op]


def test_a_trained_grounder_leaves_its_pictures(trained: Trained) -> None:
    manifest = trained.store.manifest(trained.trial.key)
    assert "panel" not in manifest
    assert manifest["metrics"]["miou"] > 0
    assert 10_000 < len(trained.panel) < 300_000
    image = Image.open(io.BytesIO(trained.panel))
    columns = 4 + 1 + 3  # picture, truth, prediction, probability; the sentence and three latent expressions
    assert image.width == 6 + columns * 150
    assert image.height > 6 * 144


def test_mlflow_shows_them_at_the_stage_and_at_the_trial(
    trained: Trained, migrated: Path, tmp_path: Path
) -> None:
    shutil.copy(migrated, tmp_path / "mlflow.db")
    trained.log(tmp_path / "journal.jsonl")
    mirror = Mirror(tmp_path / "journal.jsonl", f"sqlite:///{tmp_path}/mlflow.db", "pictures")
    mirror.start()
    assert mirror.close(300.0) == 0
    assert mirror.num_rejected == 0
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=mirror.tracking_uri)
    for id in trained.ids:
        run_id = mirror.run_id(id)
        assert [item.path for item in client.list_artifacts(run_id)] == [PANEL]
        assert Path(client.download_artifacts(run_id, PANEL, str(tmp_path))).read_bytes() == trained.panel


def test_a_panel_that_cannot_be_copied_is_told_and_stops_nothing(trained: Trained, tmp_path: Path) -> None:
    (tmp_path / "panels").write_text("a file where the folder should be")
    trained.log(tmp_path / "journal.jsonl")
    assert records(tmp_path / "journal.jsonl", "artifact") == []
    told = [record for record in records(tmp_path / "journal.jsonl", "tags") if "stillhouse.panel" in record["values"]]  # fmt: skip
    assert [record["id"] for record in told] == list(trained.ids)
    assert all("not shown: " in record["values"]["stillhouse.panel"] for record in told)
    ended = {record["id"]: record["status"] for record in records(tmp_path / "journal.jsonl", "end")}
    assert {ended[id] for id in trained.ids} == {"FINISHED"}


def test_the_report_shows_them(trained: Trained, tmp_path: Path) -> None:
    text = trained.result(tmp_path).write().read_text()
    key = trained.trial.key[:8]
    assert f"## What the networks see\n\n- point p0 seed 0, stage grounder ({key})\n![" in text
    assert f"(panels/grounder-{key}.png)" in text
    assert (tmp_path / "report" / "panels" / f"grounder-{key}.png").read_bytes() == trained.panel


def test_the_report_shows_the_best_points_and_some_baselines(tmp_path: Path) -> None:
    store, folder = Store(str(tmp_path / "store")), tmp_path / "report" / "panels"
    keys = [f"{number:x}" * 32 for number in range(1, 12)]
    for key in keys:
        store.put(key, {PANEL: key.encode()}, {})
    points = [row(key, f"p{n}", miou=n) for n, key in enumerate(keys[:6])]
    baselines = [row(key, f"b{n}", label=f"base{n}", miou=n - 9) for n, key in enumerate(keys[6:9])]
    rows = [row(keys[9], "p5", seed=1, miou=4.9), *points, *baselines, replace(row(keys[10], "p6"), status="failed")]  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "grounder-old.png").write_bytes(b"of an earlier report")
    points_in_order = table(rows, [Objective(name="grounder.miou", maximize=True)])
    panels = collect_panels(store, rows, points_in_order, ["base0", "base1", "base2"], folder)
    shown = [panel.title.partition(",")[0] for panel in panels]
    assert shown == [*(f"point p{n} seed 0" for n in (5, 4, 3, 2)), "base2 b2 seed 0", "base1 b1 seed 0"]
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert files == {f"grounder-{key[:8]}.png": key.encode() for key in [*keys[2:6], *keys[7:9]]}


def test_a_panel_that_was_not_stored_is_drawn_from_the_stored_network(
    trained: Trained, tmp_path: Path
) -> None:
    """As for what was trained before there were panels. Drawn once; where the data is gone, told."""
    store, key = Store(str(tmp_path / "store")), trained.trial.key
    manifest = trained.store.manifest(key)
    files = {name: trained.store.read(key, name) for name in manifest["files"] if name != PANEL}
    own = {"files", "attempt", "created", "checksum"}
    store.put(key, files, {name: value for name, value in manifest.items() if name not in own})
    old = replace(trained, store=store)
    old.result(tmp_path).write()
    path = tmp_path / "report" / "panels" / f"grounder-{key[:8]}.png"
    assert path.read_bytes() == trained.panel
    final = trained.trial.final
    gone = replace(final, data=replace(final.data, source=Refer(root=str(tmp_path / "gone"), collection="pack")))  # fmt: skip
    without_data = replace(old, trial=replace(trained.trial, stages=(gone,)))
    assert f"({path.parent.name}/{path.name})" in without_data.result(tmp_path).write().read_text()
    text = without_data.result(tmp_path / "new").write().read_text()
    assert f"({key[:8]}): not drawn: DataError: " in text


def test_trials_without_pictures_need_no_section(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    store.put("a" * 32, {"weights.safetensors": b""}, {})
    frame = table([row("a" * 32)], [Objective(name="grounder.miou", maximize=True)])
    assert collect_panels(store, [row("a" * 32)], frame, [], tmp_path / "panels") == []
    assert not (tmp_path / "panels").exists()


def test_a_damaged_panel_costs_the_report_only_that_picture(trained: Trained, tmp_path: Path) -> None:
    key, store = "e" * 32, Store(str(tmp_path / "store"))
    store.put(key, {PANEL: b"right"}, {})
    (path,) = (tmp_path / "store").glob(f"artifacts/ee/{key}/*/{PANEL}")
    path.write_bytes(b"wrong")
    other = replace(trained, store=store)
    text = other.result(tmp_path, [row(key), row("f" * 32, "p1")]).write().read_text()
    assert "seed 0, stage grounder (eeeeeeee): not shown: " in text
    assert "seed 0, stage grounder (ffffffff): not shown: no artifact " in text
    assert "![" not in text


def test_pictures_that_cannot_be_drawn_are_told_and_the_artifact_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*arguments: object) -> NoReturn:
        raise RuntimeError("no memory for pictures")

    monkeypatch.setattr("methods.grounding.method.grounding_panel", fails)
    short = changes()
    short["stages"]["grounder"]["train"] = {"epochs": 1, "batch_size": 24}
    with caplog.at_level(logging.WARNING):
        failed = Trained(*stored(tmp_path / "store", short))
    (message,) = [each.getMessage() for each in caplog.records if each.name == "orchestrator.pictures"]
    assert "is trained, but its pictures could not be drawn: RuntimeError: no memory for pictures" in message
    manifest = failed.store.manifest(failed.trial.key)
    assert sorted(manifest["files"]) == ["history.json", "weights.safetensors"]
    assert manifest["panel"] == "not drawn: RuntimeError: no memory for pictures"
    failed.log(tmp_path / "journal.jsonl")
    told = [each["values"]["stillhouse.panel"] for each in records(tmp_path / "journal.jsonl", "tags") if "stillhouse.panel" in each["values"]]  # fmt: skip
    assert told == [manifest["panel"]] * 2
    text = failed.result(tmp_path / "sweep").write().read_text()
    assert f"stage grounder ({failed.trial.key[:8]}): not drawn: RuntimeError: no memory for pictures" in text
