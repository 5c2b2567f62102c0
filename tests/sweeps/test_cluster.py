"""A sweep on a cluster that was there before: the script of ``cluster/``, and submission through Ray's job API."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from orchestrator import ConfigurationError, Experiment
from orchestrator.store import Store

pytestmark = [pytest.mark.ray, pytest.mark.slow]

REPOSITORY = Path(__file__).parents[2]
STAGES = {"student": {"method": "supervised", "model": "tiny_mlp", "train": {"epochs": 1}}}


@dataclass(frozen=True)
class Cluster:
    address: str
    dashboard: str


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A head made by ``ray start`` on loopback, with token authentication, in its own process group."""
    folder = tmp_path_factory.mktemp("head")
    sockets = tempfile.mkdtemp(prefix="stillhouse-")  # a short path: sockets lie in it
    token = folder / "token"
    token.write_text("0123456789abcdef0123456789abcdef")
    token.chmod(0o600)
    port, dashboard = free_port(), free_port()
    monkey = pytest.MonkeyPatch()
    monkey.setenv("RAY_AUTH_MODE", "token")
    monkey.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    command = [
        str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--num-cpus=2", f"--port={port}",
        "--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}",
        f"--temp-dir={sockets}", "--disable-usage-stats",
        f"--dashboard-agent-listen-port={free_port()}",
    ]  # fmt: skip
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with (folder / "head.txt").open("wb") as output:
        head = subprocess.Popen(
            command, stdout=output, stderr=output, start_new_session=True, env={**os.environ, "PATH": path}
        )
    try:
        wait_for(f"http://127.0.0.1:{dashboard}/api/version", folder / "head.txt")
        yield Cluster(f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}")
    finally:
        os.killpg(head.pid, signal.SIGTERM)
        try:
            head.wait(5)
        except subprocess.TimeoutExpired:
            os.killpg(head.pid, signal.SIGKILL)
        monkey.undo()
        shutil.rmtree(sockets, ignore_errors=True)


def wait_for(url: str, log: Path) -> None:
    deadline = time.monotonic() + 120
    while True:
        try:
            urllib.request.urlopen(url, timeout=2).close()
            return
        except urllib.error.HTTPError:  # it answers, and wants the token
            return
        except OSError:
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.3)


SUBMIT = """
import json, sys
from orchestrator import Experiment
experiment = Experiment(**json.loads(sys.argv[1]))
print("job", experiment.submit(sys.argv[2]))
print([row.status for row in experiment.result().rows])
"""


def run_python(arguments: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh process: Ray reads its authentication mode once."""
    return subprocess.run(
        [sys.executable, *arguments], env={**os.environ, **environment}, capture_output=True, text=True,
        timeout=240, check=False,
    )  # fmt: skip


def test_submitted_job_runs_the_sweep(cluster: Cluster, tmp_path: Path) -> None:
    document = {
        "name": "submitted", "data": {"dataset": "digits"}, "stages": STAGES,
        "search": {"objective": {"maximize": "student.top1"}}, "run": {"storage": str(tmp_path / "runs")},
    }  # fmt: skip
    done = run_python(["-c", SUBMIT, json.dumps(document), cluster.dashboard])
    assert done.returncode == 0, done.stderr
    assert "report:" in done.stdout
    assert "['done']" in done.stdout
    assert len(list(Store(str(tmp_path / "runs")).keys())) == 1
    refused = run_python(
        ["-c", SUBMIT, json.dumps(document), cluster.dashboard], RAY_AUTH_TOKEN_PATH=os.devnull
    )
    assert refused.returncode != 0
    assert "ConfigurationError: submit:" in refused.stderr


def test_nothing_is_submitted_without_the_token(cluster: Cluster, tmp_path: Path) -> None:
    request = urllib.request.Request(
        f"{cluster.dashboard}/api/jobs/", data=b'{"entrypoint": "touch /tmp/never"}', method="POST"
    )
    with pytest.raises(urllib.error.HTTPError) as refusal:
        urllib.request.urlopen(request, timeout=10)
    assert refusal.value.code in (401, 403)


def test_sweep_script_joins_the_cluster(cluster: Cluster, tmp_path: Path) -> None:
    path = tmp_path / "experiment.yaml"
    path.write_text(
        "name: joined\ndata: {dataset: digits}\n"
        "stages: {student: {method: supervised, model: tiny_mlp, train: {epochs: 1}}}\n"
        "search: {objective: {maximize: student.top1}}\n"
    )
    script = str(REPOSITORY / "cluster" / "sweep.py")
    done = run_python(
        [script, "--", str(path), f"run.storage={tmp_path / 'runs'}"], RAY_ADDRESS=cluster.address
    )
    assert done.returncode == 0, done.stderr
    assert "top1" in done.stdout
    assert len(list(Store(str(tmp_path / "runs")).keys())) == 1


def test_relative_storage_and_absent_cluster_are_refused(tmp_path: Path) -> None:
    search = {"objective": {"maximize": "student.top1"}}
    relative = Experiment(name="relative", data={"dataset": "digits"}, stages=STAGES, search=search)
    with pytest.raises(ConfigurationError, match=r"run\.storage"):
        relative.submit("http://127.0.0.1:1")
    absolute = Experiment(
        name="absolute",
        data={"dataset": "digits"},
        stages=STAGES,
        search=search,
        run={"storage": str(tmp_path)},
    )
    with pytest.raises(ConfigurationError, match="no Ray job endpoint"):
        absolute.submit("http://127.0.0.1:1")
