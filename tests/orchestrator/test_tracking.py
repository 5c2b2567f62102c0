"""The mirror against real MLflow: a SQLite file, and a server that is frozen, killed and started again."""

from __future__ import annotations

import json
import logging
import math
import shutil
import sqlite3
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from tracking_doubles import Server, write_sweep

from methods import BUILTIN, ModelSettings, Task
from orchestrator import tracking_uri
from orchestrator.bundle import BundleSettings, write_bundle
from orchestrator.errors import ConfigurationError
from orchestrator.journal import Journal
from orchestrator.serving import load_bundle
from orchestrator.tracking import Mirror, ui_command
from orchestrator.tracking_state import MirrorState, state_path

DRAIN_SECONDS = 180.0


@pytest.fixture
def uri(tmp_path: Path, migrated: Path) -> str:
    shutil.copy(migrated, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path}/mlflow.db"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, migrated: Path) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    shutil.copy(migrated, folder / "mlflow.db")
    server = Server(folder)
    server.start()
    yield server
    server.kill()


def send(path: Path, uri: str, experiment: str = "distil") -> Mirror:
    mirror = Mirror(path, uri, experiment, retry_seconds=0.1)
    mirror.start()
    assert mirror.close(DRAIN_SECONDS) == 0
    return mirror


def client(uri: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def runs(uri: str, experiment: str = "distil") -> dict[str, Any]:
    """Our id -> run; fails when an id has two runs."""
    asked = client(uri)
    found = asked.search_runs([asked.get_experiment_by_name(experiment).experiment_id], max_results=1000)
    by_id = {run.data.tags["stillhouse.id"]: run for run in found}
    assert len(by_id) == len(found), sorted(run.data.tags["stillhouse.id"] for run in found)
    return by_id


def history(uri: str, run: Any, metric: str) -> list[tuple[int, int, float]]:
    points = client(uri).get_metric_history(run.info.run_id, metric)
    return sorted((point.step, point.timestamp, point.value) for point in points)


EXPECTED_TOP1 = [(epoch, 2_000_000 + 1000 * epoch, 10.0 * epoch) for epoch in (1, 2, 3)]


def assert_complete(uri: str, name: str = "a", trials: range = range(2), experiment: str = "distil") -> None:
    found = runs(uri, experiment)
    sweep = found[f"sweep:{name}"]
    assert (sweep.info.status, sweep.info.start_time, sweep.info.end_time) == (
        "FINISHED",
        1_000_000,
        4_000_000,
    )
    for number in trials:
        trial, student = found[f"trial:{name}{number}"], found[f"stage:student-{name}{number}"]
        assert trial.data.tags["mlflow.parentRunId"] == sweep.info.run_id
        assert student.data.tags["mlflow.parentRunId"] == trial.info.run_id
        assert trial.data.tags["stillhouse.uses.teacher"] == found["stage:teacher"].info.run_id
        assert trial.data.params == {"views.margin": str(0.1 * number), "seed": str(number)}
        assert history(uri, student, "top1") == EXPECTED_TOP1
        assert (trial.info.status, student.info.status) == ("FINISHED", "FINISHED")
    assert history(uri, found["stage:teacher"], "top1") == EXPECTED_TOP1


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


def bundle(folder: Path, name: str = "tiny_cnn", key: str = "k1") -> tuple[Path, torch.nn.Module]:
    torch.manual_seed(0)
    task = Task(num_classes=10, in_channels=1, image_size=8)
    network = BUILTIN.build_model(ModelSettings(name="tiny_cnn"), task).eval()
    settings = BundleSettings(
        model=name, task=task, mean=(0.3,), std=(0.4,), class_names=tuple("0123456789"), key=key
    )
    return write_bundle(folder, settings, network.state_dict()), network


def assert_predicts(uri: str, mirror: Mirror, run: str, network: torch.nn.Module) -> None:
    """The model that hangs on ``run`` gives the network's logits, through MLflow's own loader."""
    import mlflow

    (output,) = client(uri).get_run(mirror.run_id(run)).outputs.model_outputs
    model = client(uri).get_logged_model(output.model_id)
    assert model.status == "READY"
    assert model.source_run_id == mirror.run_id(run)
    mlflow.set_tracking_uri(uri)
    loaded = mlflow.pyfunc.load_model(f"models:/{output.model_id}")
    pixels = np.random.default_rng(0).integers(0, 256, (5, 1, 8, 8), dtype=np.uint8)
    expected, _ = network((torch.from_numpy(pixels).float() / 255 - 0.3) / 0.4)
    np.testing.assert_allclose(loaded.predict(pixels), expected.detach().numpy(), rtol=1e-6)
    assert loaded.metadata.signature.inputs.to_dict()[0]["tensor-spec"] == {
        "dtype": "uint8",
        "shape": (-1, 1, 8, 8),
    }
    with pytest.raises(mlflow.exceptions.MlflowException, match="uint8"):
        loaded.predict(pixels.astype(np.float32))


def test_a_model_is_logged_once_and_loads_back(
    tmp_path: Path, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    path = tmp_path / "j.jsonl"
    folder, network = bundle(tmp_path / "best")
    for _ in range(2):
        journal = Journal(path)
        journal.run("trial", name="t", parent=None, kind="trial")
        journal.params("trial", {"margin": 0.2})
        journal.model("trial", folder)
        mirror = send(path, uri)
        state_path(path).unlink()
    assert_predicts(uri, mirror, "trial", network)
    files = sorted(file.suffix for file in (tmp_path / "mlflow-artifacts").rglob("*") if file.is_file())
    assert files.count(".safetensors") == 1
    assert not {".pkl", ".pt", ".pth"} & set(files)


def test_a_bundle_that_was_replaced_is_not_logged_for_the_wrong_trial(
    tmp_path: Path, uri: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder, _ = bundle(tmp_path / "best")
    journal = Journal(tmp_path / "j.jsonl")
    journal.run("trial", name="t", parent=None, kind="trial")
    journal.model("trial", folder)
    bundle(tmp_path / "best", key="k2")
    with caplog.at_level(logging.WARNING):
        mirror = send(journal.path, uri)
    assert mirror.num_rejected == 1
    assert "k2" in caplog.text


@pytest.mark.parametrize(("spoil", "text"), [
    (lambda folder: bundle(folder, name="my_net"), r"'my_net', which is not built in.*BUILTIN.extended"),
    (lambda folder: (folder / "model.json").write_text("{}"), r"model.json cannot be read"),
    (lambda folder: (folder / "weights.safetensors").write_bytes(b"x" * 40), r"weights.safetensors"),
    (lambda folder: (folder / "weights.safetensors").unlink(), r"weights.safetensors"),
])  # fmt: skip
def test_a_bundle_that_cannot_be_loaded_says_why(tmp_path: Path, spoil: Any, text: str) -> None:
    folder, _ = bundle(tmp_path / "best")
    spoil(folder)
    with pytest.raises(ConfigurationError, match=text):
        load_bundle(folder, BUILTIN)


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


@pytest.mark.slow
def test_a_server_that_is_away_frozen_and_killed(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One sweep through everything that can happen to a server: all of it arrives, and once."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    journal = Journal(tmp_path / "j.jsonl")
    mirror = Mirror(journal.path, server.uri, "distil", retry_seconds=0.1)
    assert mirror.check() is None
    mirror.start()
    write_sweep(journal, trials=range(1))
    assert mirror.drain(DRAIN_SECONDS) == 0

    server.freeze()
    started = time.monotonic()
    assert "does not answer" in (tracking_uri.reach(server.uri, 0.5) or "")
    write_sweep(journal, trials=range(2))
    assert time.monotonic() - started < 1.5
    assert mirror.drain(2.5) > 0
    server.thaw()
    assert mirror.drain(DRAIN_SECONDS) == 0
    assert_complete(server.uri, trials=range(2))

    server.kill()
    write_sweep(journal, trials=range(3))
    assert mirror.close(1.0) > 0
    assert "cannot be reached" in (mirror.check() or "")
    server.start()
    later = send(journal.path, server.uri)
    assert_complete(server.uri, trials=range(3))
    assert len(runs(server.uri)) == 8
    assert (later.run_url("sweep:a") or "").startswith(f"{server.uri}/#/experiments/")


@pytest.mark.slow
def test_a_server_takes_odd_values_artifacts_and_models(tmp_path: Path, server: Server) -> None:
    folder, network = bundle(tmp_path / "best")
    journal = Journal(tmp_path / "j.jsonl")
    journal.run("trial", name="t", parent=None, kind="trial")
    journal.params("trial", {"empty": "", "margin": 0.2})
    journal.metrics("trial", [{"epoch": 1, "time": 1.0, "nan": math.nan, "inf": math.inf, "top1": 70.0}])
    journal.artifact("trial", folder / "model.json", "files")
    journal.model("trial", folder)
    journal.end("trial", "FAILED")
    mirror = send(journal.path, server.uri, "odd")
    run = client(server.uri).get_run(mirror.run_id("trial"))
    assert (run.info.status, run.data.params["margin"]) == ("FAILED", "0.2")
    assert math.isnan(run.data.metrics["nan"])
    assert run.data.metrics["inf"] > 1e308
    local = client(server.uri).download_artifacts(mirror.run_id("trial"), "files/model.json", str(tmp_path))
    assert json.loads(Path(local).read_text())["model"] == "tiny_cnn"
    assert_predicts(server.uri, mirror, "trial", network)
