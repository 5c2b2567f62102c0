"""The mirror against real MLflow, over a SQLite file."""

from __future__ import annotations

import json
import logging
import math
import shutil
import sqlite3
import sys
import time
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from tracking_doubles import (
    DRAIN_SECONDS,
    assert_complete,
    client,
    history,
    runs,
    send,
    write_sweep,
)

from orchestrator.errors import ConfigurationError
from orchestrator.journal import Journal
from orchestrator.tracking import Mirror, ui_command
from orchestrator.tracking_state import MirrorState, state_path


def test_nesting_params_metrics_and_times_arrive_once(tmp_path: Path, uri: str) -> None:
    journal = Journal(tmp_path / "j.jsonl")
    write_sweep(journal)
    mirror = send(journal.path, uri)
    assert_complete(uri)
    found = runs(uri)
    assert len(found) == 6
    assert mirror.run_id("trial:a1") == found["trial:a1"].info.run_id
    assert mirror.run_id("nobody") is None
    assert mirror.run_url("trial:a1") is None
    assert found["trial:a1"].info.run_name == "trial 1"
    assert found["sweep:a"].data.tags["mlflow.source.name"] == "stillhouse"
    assert found["sweep:a"].data.tags["code"] == "1.0"
    assert found["sweep:a"].info.artifact_uri.startswith(f"file://{tmp_path}/mlflow-artifacts/")


@pytest.mark.parametrize("lost", ["nothing", "state", "journal", "run ids"])
def test_sending_again_changes_nothing(tmp_path: Path, uri: str, lost: str) -> None:
    """``run ids``: killed between creating the runs and remembering them."""
    path = tmp_path / "j.jsonl"
    write_sweep(Journal(path))
    first = send(path, uri)
    if lost == "state":
        state_path(path).unlink()
    elif lost == "journal":
        path.unlink()
        state_path(path).unlink()
    elif lost == "run ids":
        target = f"{first.tracking_uri} distil"
        state = MirrorState.load(path, target)
        state.runs, state.offset = {}, 0
        state.save(path, target)
    write_sweep(Journal(path))
    send(path, uri)
    assert_complete(uri)
    assert len(runs(uri)) == 6


def test_an_extended_sweep_adds_to_the_same_run(tmp_path: Path, uri: str) -> None:
    path = tmp_path / "j.jsonl"
    write_sweep(Journal(path))
    before = send(path, uri).run_id("sweep:a")
    write_sweep(Journal(path), trials=range(3))
    assert send(path, uri).run_id("sweep:a") == before
    assert_complete(uri, trials=range(3))


def test_a_stage_that_another_sweep_finished_is_linked(tmp_path: Path, uri: str) -> None:
    write_sweep(Journal(tmp_path / "a.jsonl"), name="a")
    write_sweep(Journal(tmp_path / "b.jsonl"), name="b", epochs=5)
    send(tmp_path / "a.jsonl", uri)
    mirror = send(tmp_path / "b.jsonl", uri)
    assert_complete(uri, "a")
    found = runs(uri)
    teacher = found["stage:teacher"].info.run_id
    assert len(found) == 11
    assert mirror.run_id("stage:teacher") == teacher
    assert found["sweep:b"].data.tags["stillhouse.shared.stage:teacher"] == teacher
    assert found["trial:b0"].data.tags["stillhouse.uses.teacher"] == teacher


def test_a_new_database_gets_everything_again(tmp_path: Path, uri: str, migrated: Path) -> None:
    path = tmp_path / "j.jsonl"
    write_sweep(Journal(path))
    send(path, uri)
    (tmp_path / "two").mkdir()
    shutil.copy(migrated, tmp_path / "two" / "mlflow.db")
    state = state_path(path)
    other = f"sqlite:///{tmp_path}/two/mlflow.db"
    old = MirrorState.load(path, f"{uri} distil")
    old.save(path, f"{other} distil")
    assert state.exists()
    send(path, other)
    assert_complete(other)


def test_values_beyond_mlflows_limits(tmp_path: Path, uri: str, caplog: pytest.LogCaptureFixture) -> None:
    journal = Journal(tmp_path / "j.jsonl")
    journal.run("s", name="s", parent=None, kind="sweep", tags={"odd'name!": "x" * 9000})
    journal.params(
        "s", {f"p{index}": index for index in range(250)} | {"long": "x" * 7000, "a=b": "", "../up": 1}
    )
    journal.metrics("s", [{"epoch": step, "time": 1.0, "loss": 0.5} for step in range(2500)])
    journal.metrics("s", [{"epoch": 1, "time": 1.0, "nan": math.nan, "inf": math.inf, "low": -math.inf}])
    journal.params("s", {"p3": "another", "p4": 4, "late": 1})
    journal.link("s", "self", "s")
    with caplog.at_level(logging.WARNING):
        mirror = send(journal.path, uri)
    data = runs(uri)["s"].data
    assert mirror.num_rejected == 2
    assert "'../up'" in caplog.text
    assert "'p3'" in caplog.text
    assert (len(data.params), data.params["p3"], data.params["late"]) == (253, "3", "1")
    assert len(data.params["long"]) == 6000
    assert data.params["a_b"] == ""
    assert len(data.tags["odd_name_"]) == 8000
    assert len(history(uri, runs(uri)["s"], "loss")) == 2500
    assert math.isnan(data.metrics["nan"])
    assert data.metrics["inf"] > 1e308
    assert data.metrics["low"] < -1e308


def test_a_run_deleted_by_hand_is_named_once(
    tmp_path: Path, uri: str, caplog: pytest.LogCaptureFixture
) -> None:
    journal = Journal(tmp_path / "j.jsonl")
    write_sweep(journal)
    journal.run("trial:open", name="open", parent="sweep:a", kind="trial")
    client(uri).delete_run(send(journal.path, uri).run_id("trial:open"))
    journal.metrics("trial:open", [{"epoch": step, "time": 1.0, "loss": 0.5} for step in range(100)])
    journal.metrics("sweep:a", [{"epoch": 1, "time": 1.0, "total": 1.0}])
    with caplog.at_level(logging.WARNING):
        mirror = send(journal.path, uri)
    assert mirror.num_rejected == 1
    assert caplog.text.count("was deleted in MLflow") == 1
    assert runs(uri)["sweep:a"].data.metrics == {"total": 1.0}


def test_artifacts_are_copied_and_a_missing_one_is_left_out(
    tmp_path: Path, uri: str, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "table.csv").write_text("a,b\n")
    journal = Journal(tmp_path / "j.jsonl")
    journal.run("s", name="s", parent=None, kind="sweep")
    journal.artifact("s", tmp_path / "report", "report")
    journal.artifact("s", tmp_path / "absent.md")
    journal.artifact("s", tmp_path / "report" / "table.csv")
    journal.end("s", "FINISHED")
    with caplog.at_level(logging.WARNING):
        mirror = send(journal.path, uri)
    run = mirror.run_id("s")
    assert [entry.path for entry in client(uri).list_artifacts(run)] == ["report", "table.csv"]
    assert [entry.path for entry in client(uri).list_artifacts(run, "report")] == ["report/table.csv"]
    assert "absent.md" in caplog.text


def test_a_locked_database_delays_and_loses_nothing(tmp_path: Path, uri: str) -> None:
    journal = Journal(tmp_path / "j.jsonl")
    write_sweep(journal)
    send(journal.path, uri)
    blocker = sqlite3.connect(tmp_path / "mlflow.db", isolation_level=None)
    blocker.execute("BEGIN EXCLUSIVE")
    journal.run("trial:late", name="late", parent="sweep:a", kind="trial")
    mirror = Mirror(journal.path, uri, "distil", retry_seconds=0.1)
    mirror.start()
    started = time.monotonic()
    assert mirror.drain(1.0) == 1
    assert time.monotonic() - started < 2.0
    blocker.execute("ROLLBACK")
    assert mirror.close(DRAIN_SECONDS) == 0
    assert "trial:late" in runs(uri)


@pytest.mark.parametrize("answered_late", [False, True])
def test_a_creation_without_an_answer_leaves_one_run(
    tmp_path: Path, uri: str, monkeypatch: pytest.MonkeyPatch, answered_late: bool
) -> None:
    """The server carries out the first creation at once, or only after the mirror has created the run again."""
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    create, calls = MlflowClient.create_run, []

    def unlucky(self: Any, *arguments: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) > 1 or not answered_late:
            run = create(self, *arguments, **named)
        if len(calls) == 1:
            raise MlflowException("API request to http://x failed with timeout exception")
        return create(self, *arguments, **named) if len(calls) == 2 and answered_late else run

    monkeypatch.setattr(MlflowClient, "create_run", unlucky)
    path = tmp_path / "j.jsonl"
    write_sweep(Journal(path))
    send(path, uri)
    assert_complete(uri)
    assert len(runs(uri)) == 6
    assert json.loads(state_path(path).read_text())["targets"].popitem()[1]["uncertain"] == []


def test_two_mirrors_share_one_file(tmp_path: Path, uri: str) -> None:
    mirrors = []
    for name in ("a", "b"):
        journal = Journal(tmp_path / name / "j.jsonl")
        write_sweep(journal, name=name)
        journal.run("stage:teacher", name="teacher", parent=f"sweep:{name}", kind="stage")
        mirrors.append(Mirror(journal.path, uri, f"exp-{name}", retry_seconds=0.1))
    for mirror in mirrors:
        mirror.start()
    assert [mirror.close(DRAIN_SECONDS) for mirror in mirrors] == [0, 0]
    assert_complete(uri, "a", experiment="exp-a")
    assert_complete(uri, "b", experiment="exp-b")


@pytest.mark.parametrize(("uri", "text"), [
    ("mlruns", r"is a folder.*sqlite:////.*/mlruns/mlflow.db"),
    ("file:///tmp/mlruns", r"is a folder"),
    ("gopher://host/x", r"does not know the scheme 'gopher'"),
    ("http://", r"names no host"),
    ("sqlite://", r"names no file"),
    ("sqlite:///:memory:", r"names no file"),
])  # fmt: skip
def test_a_uri_that_mlflow_cannot_use(tmp_path: Path, uri: str, text: str) -> None:
    with pytest.raises(ConfigurationError, match=text):
        Mirror(tmp_path / "j.jsonl", uri, "x").check()


def test_check_says_what_is_wrong_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    cases = {
        f"sqlite:///{tmp_path}/new/mlflow.db": None,
        f"sqlite:///{tmp_path}": "is a folder",
        f"sqlite:///{tmp_path}/file/mlflow.db": "is not a folder",
        "http://127.0.0.1:9": "http://127.0.0.1:9 cannot be reached",
        "http://someone:secret@127.0.0.1:9": "someone:***@127.0.0.1:9 cannot be reached",
        "postgresql://someone:secret@127.0.0.1:9/db": "cannot be reached",
    }
    for uri, text in cases.items():
        started = time.monotonic()
        found = Mirror(tmp_path / "j.jsonl", uri, "x").check()
        assert (
            found is None if text is None else (found is not None and text in found and "secret" not in found)
        )
        assert time.monotonic() - started < 5


def test_ui_command_is_what_one_types(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    relative = Mirror(tmp_path / "j.jsonl", "sqlite:///a b/mlflow.db", "x")
    expected = f"mlflow ui --backend-store-uri 'sqlite:///{tmp_path}/a b/mlflow.db'"
    assert ui_command(relative.tracking_uri) == expected
    assert ui_command("http://someone:secret@host:5000") == "http://someone:***@host:5000"
