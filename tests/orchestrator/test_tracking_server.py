"""The mirror against a real MLflow server that is frozen, killed and started again."""

from __future__ import annotations

import json
import math
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from tracking_doubles import (
    DRAIN_SECONDS,
    Server,
    assert_complete,
    assert_predicts,
    bundle,
    client,
    runs,
    send,
    write_sweep,
)

from orchestrator import tracking_uri
from orchestrator.journal import Journal
from orchestrator.tracking import Mirror


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, migrated: Path) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    shutil.copy(migrated, folder / "mlflow.db")
    server = Server(folder)
    server.start()
    yield server
    server.kill()


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
