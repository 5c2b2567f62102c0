"""A tracking server that takes connections and never answers: the sweep neither waits for it nor loses anything."""

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
from contextlib import contextmanager
from pathlib import Path

import pytest
from mlflow import MlflowClient

from orchestrator.mirror import AWAY_SECONDS

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.usefixtures("local_ray")]

NUM_TRIALS, NUM_STAGES = 3, 6
CHECK_SECONDS = 4.0
"""How long the server is asked for a sign of life before a sweep."""


class SilentServer:
    """Listens, accepts, reads, and says nothing."""

    def __init__(self) -> None:
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind(("127.0.0.1", 0))
        self._socket.listen(64)
        self.port = self._socket.getsockname()[1]
        self.connections: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                self.connections.append(self._socket.accept()[0])
            except OSError:
                return

    def stop(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        for connection in self.connections:
            connection.close()


@contextmanager
def real_server(folder: Path, port: int) -> Iterator[None]:
    """A real tracking server on ``port``."""
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
               "--backend-store-uri", f"sqlite:///{folder / 'server.db'}",
               "--artifacts-destination", str(folder / "artifacts")]  # fmt: skip
    with (folder / "server.txt").open("ab") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
    try:
        deadline = time.monotonic() + 300
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
                break
            except OSError:
                assert time.monotonic() < deadline, (folder / "server.txt").read_text()
                time.sleep(0.2)
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(20)


def test_a_silent_server_costs_seconds_and_no_record(sweep_of, tmp_path, capsys) -> None:
    silent = SilentServer()
    uri = f"http://127.0.0.1:{silent.port}"
    made = sweep_of(tmp_path / "runs", tracking=uri)
    started = time.time()
    result = made.run()
    ended = time.time()
    told = capsys.readouterr().err
    assert [row.status for row in result.rows] == ["done"] * NUM_TRIALS
    assert silent.connections, "nobody asked the server"
    assert f"warning: the MLflow server {uri}" in told
    assert "tracking records wait in" in told

    manifests = [result.store.manifest(row.key) for row in result.rows]
    finished = max(manifest["finished"] for manifest in manifests)
    assert ended - finished < AWAY_SECONDS + 30, "the end waited for a server that was known to be away"
    assert min(manifest["finished"] for manifest in manifests) - started > CHECK_SECONDS

    stages = [result.store.manifest(key) for key in list(result.store.keys())]
    training = sum(stage["cost"]["seconds"] for stage in stages)
    first = min(stage["finished"] - stage["cost"]["seconds"] for stage in stages)
    assert finished - first < training + 20, "stages waited for the server"

    silent.stop()
    with real_server(tmp_path, silent.port):
        made.run(quiet=True)
        client = MlflowClient(tracking_uri=uri)
        runs = client.search_runs([client.get_experiment_by_name("faults").experiment_id], max_results=100)
        kinds = [run.data.tags["stillhouse.id"].partition(":")[0] for run in runs]
        assert {kind: kinds.count(kind) for kind in kinds} == {
            "sweep": 1,
            "trial": NUM_TRIALS,
            "stage": NUM_STAGES,
        }
        assert {run.info.status for run in runs} == {"FINISHED"}
