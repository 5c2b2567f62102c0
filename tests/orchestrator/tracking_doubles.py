"""A real ``mlflow server`` that a test can stop, freeze and start again, and what the tests write."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from orchestrator.journal import Journal


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
