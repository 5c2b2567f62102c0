"""What MLflow shows of a sweep, read with MLflow's own client."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
from mlflow import MlflowClient

from orchestrator import grid

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("local_ray")]

SMALL = {"space": {"views.num_branches": grid([1, 3])}, "seeds": 2}
NUM_TRIALS, NUM_STAGES = 6, 1 + 2 + 6


def read_runs(uri: str) -> tuple[MlflowClient, dict[str, list[Any]]]:
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("small")
    runs = client.search_runs([experiment.experiment_id], max_results=1000)
    by_kind: dict[str, list[Any]] = {"sweep": [], "trial": [], "stage": []}
    for run in runs:
        by_kind[run.data.tags["stillhouse.id"].partition(":")[0]].append(run)
    return client, by_kind


def check_runs(uri: str) -> None:
    client, runs = read_runs(uri)
    assert {kind: len(found) for kind, found in runs.items()} == {
        "sweep": 1,
        "trial": NUM_TRIALS,
        "stage": NUM_STAGES,
    }
    assert {run.info.status for found in runs.values() for run in found} == {"FINISHED"}
    sweep = runs["sweep"][0].info.run_id
    trials = {run.info.run_id: run for run in runs["trial"]}
    assert {run.data.tags["mlflow.parentRunId"] for run in trials.values()} == {sweep}
    for stage in runs["stage"]:
        shared = stage.data.tags["stillhouse.stage"] in ("teacher", "views")
        assert (stage.data.tags["mlflow.parentRunId"] == sweep) == shared
        assert stage.data.tags["stillhouse.device"].startswith("cpu")
    stages = {run.info.run_id: run for run in runs["stage"]}
    for run in trials.values():
        names = ["teacher", "student"] + (["views"] if run.data.params["label"] == "point" else [])
        for name in names:
            used = stages[run.data.tags[f"stillhouse.uses.{name}"]]
            assert used.data.tags["stillhouse.key"] == run.data.tags[f"stillhouse.key.{name}"]
        history = client.get_metric_history(run.info.run_id, "student.top1")
        assert [point.step for point in history] == [1, 2]
        assert "student.final_test_top1" in run.data.metrics
    point = next(run for run in trials.values() if run.data.params["label"] == "point")
    assert {"seed", "views.num_branches", "views.margin", "student.model", "student.train.epochs"} <= set(
        point.data.params
    )


def test_nesting_metrics_and_model(experiment, tmp_path) -> None:
    swept = experiment(search=SMALL)
    result = swept.run(quiet=True)
    uri = f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}"
    assert result.tracking_command == f"mlflow ui --backend-store-uri {uri}"
    check_runs(uri)
    swept.run(quiet=True)
    check_runs(uri)
    client, runs = read_runs(uri)
    assert client.list_artifacts(runs["sweep"][0].info.run_id, "report")
    best = next(run for run in runs["trial"] if run.data.tags["stillhouse.key"] == result.best_trial.key)
    (output,) = best.outputs.model_outputs
    mlflow.set_tracking_uri(uri)
    model = mlflow.pyfunc.load_model(f"models:/{output.model_id}")
    pixels = np.zeros((2, 1, 8, 8), dtype=np.uint8)
    assert model.predict(pixels).shape == (2, 10)


LEAN = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
"""Eight processes less."""


class Server:
    """A real tracking server on loopback."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self._folder = folder
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port),
                   "--workers", "1", "--backend-store-uri", f"sqlite:///{self._folder / 'server.db'}",
                   "--artifacts-destination", str(self._folder / "artifacts")]  # fmt: skip
        with (self._folder / "server.txt").open("ab") as output:
            self.process = subprocess.Popen(
                command, stdout=output, stderr=output, start_new_session=True, env={**os.environ, **LEAN}
            )
        deadline = time.monotonic() + 300
        while True:
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=2).close()
                return
            except OSError:
                assert time.monotonic() < deadline, (self._folder / "server.txt").read_text()
                time.sleep(0.2)

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(20)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    found = Server(tmp_path)
    found.start()
    yield found
    found.stop()


def test_server_away_in_the_middle(experiment, server, tmp_path) -> None:
    swept = experiment(search=SMALL, run={"tracking": server.uri})
    outage: list[float] = []

    def interrupt_service() -> None:
        artifacts = tmp_path / "runs" / "artifacts"
        while len(list(artifacts.glob("*/*/manifest.json"))) < 3:
            time.sleep(0.05)
        server.stop()
        outage.append(time.monotonic())
        time.sleep(6)
        server.start()
        outage.append(time.monotonic())

    helper = threading.Thread(target=interrupt_service, daemon=True)
    helper.start()
    result = swept.run(quiet=True)
    helper.join(600)
    assert len(outage) == 2
    assert result.num_failed == 0
    # Sends what still waited: a process gives a server that is away ten seconds at its end, no more.
    swept.run(quiet=True)
    check_runs(server.uri)
