"""A real ``mlflow server`` that a test can stop, freeze and start again; what the tests write, and how they read it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from methods import BUILTIN, ModelSettings, Task
from orchestrator.bundle import BundleSettings, write_bundle
from orchestrator.journal import Journal
from orchestrator.tracking import Mirror

DRAIN_SECONDS = 180.0


class Server:
    """``mlflow server`` on a free port of 127.0.0.1, over one SQLite file; the same port after a restart."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [
            sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1",
            "--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db", "--artifacts-destination",
            f"{self.folder}/artifacts",
        ]  # fmt: skip
        environment = os.environ | {
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        }
        with (self.folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, start_new_session=True, env=environment, cwd=self.folder
            )
        self._wait()

    def freeze(self) -> None:
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    def kill(self) -> None:
        if self._process is not None:
            self._signal(signal.SIGKILL)
            self._process.wait()
        self._process = None

    def _signal(self, number: int) -> None:
        assert self._process is not None
        os.killpg(self._process.pid, number)

    def _wait(self, timeout_seconds: float = 300.0) -> None:
        deadline = time.monotonic() + timeout_seconds
        while time.monotonic() < deadline:
            assert self._process is not None
            assert self._process.poll() is None, (self.folder / "server.log").read_text()[-2000:]
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=1):
                    return
            except OSError:
                time.sleep(0.05)
        raise AssertionError((self.folder / "server.log").read_text()[-2000:])


def write_sweep(journal: Journal, *, name: str = "a", trials: range = range(2), epochs: int = 3) -> None:
    """A sweep with ``trials``, one teacher that they share, and a student each."""
    sweep = f"sweep:{name}"
    journal.run(sweep, name=name, parent=None, kind="sweep", tags={"code": "1.0"}, started=1000.0)
    for number in trials:
        trial, student = f"trial:{name}{number}", f"stage:student-{name}{number}"
        journal.run(trial, name=f"trial {number}", parent=sweep, kind="trial")
        journal.run("stage:teacher", name="teacher", parent=sweep, kind="stage")
        journal.run(student, name="student", parent=trial, kind="stage")
        journal.params(trial, {"views.margin": 0.1 * number, "seed": number})
        journal.params("stage:teacher", {"model": "resnet8"})
        journal.link(trial, "teacher", "stage:teacher")
        for epoch in range(1, epochs + 1):
            row = {"epoch": epoch, "time": 2000.0 + epoch, "top1": 10.0 * epoch, "loss": 1 / epoch}
            journal.metrics(student, [row])
            journal.metrics("stage:teacher", [row])
        for id in ("stage:teacher", student, trial):
            journal.end(id, "FINISHED", 3000.0)
    journal.end(sweep, "FINISHED", 4000.0)


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
