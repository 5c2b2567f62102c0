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
    sockets: Path
    """Where Ray keeps its session: sockets, logs, what jobs brought."""


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
    monkey.setenv("AWS_SECRET_ACCESS_KEY", ENVIRONMENT_SECRET)
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
        yield Cluster(f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}", Path(sockets))
    finally:
        os.killpg(head.pid, signal.SIGTERM)
        try:
            head.wait(5)
        except subprocess.TimeoutExpired:
            os.killpg(head.pid, signal.SIGKILL)
        monkey.undo()
        shutil.rmtree(sockets, ignore_errors=True)


def wait_for(url: str, log: Path) -> None:
    deadline = time.monotonic() + 300
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
job = experiment.submit(sys.argv[2])
print("job", job, "exit", job.exit_code)
print([row.status for row in experiment.result().rows])
"""
SECRET = "hunter2-Xyz"
ENVIRONMENT_SECRET = "wJalrXUt/hunter3"
CLI = "import sys; from orchestrator.cli import main; sys.exit(main(sys.argv[1:]))"


@dataclass(frozen=True)
class Worker:
    """A second host of the cluster: its own name, its own file system in one place, its own installation of ours."""

    own_folder: Path
    """The same path as on the head, and not the same folder."""
    source: Path
    """Holds our packages, a copy."""


@pytest.fixture(scope="module")
def worker(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("a host with a file system of its own needs root and unshare")
    folder = tmp_path_factory.mktemp("worker")
    found = Worker(folder / "own", folder / "source")
    found.own_folder.mkdir()
    for package in ("methods", "orchestrator", "configs"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(REPOSITORY / package, found.source / package, ignore=ignored)
    ray_command = (
        f"{Path(sys.executable).with_name('ray')} start --address={cluster.address} --block --num-cpus=1 "
        f"--node-ip-address=127.0.0.1 --dashboard-agent-listen-port={free_port()} --disable-usage-stats"
    )
    script = f"hostname other-host && mount -t tmpfs none {found.own_folder} && exec {ray_command}"
    with (folder / "worker.txt").open("wb") as output:
        process = subprocess.Popen(
            ["unshare", "--mount", "--uts", "sh", "-c", script], stdout=output, stderr=output,
            start_new_session=True, env={**os.environ, "PYTHONPATH": str(found.source)}, cwd=folder,
        )  # fmt: skip
    yield found
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)


def document(tmp_path: Path, **run: object) -> dict[str, object]:
    return {
        "name": "submitted", "data": {"dataset": "digits"}, "stages": STAGES,
        "search": {"objective": {"maximize": "student.top1"}}, "run": {"storage": str(tmp_path / "runs"), **run},
    }  # fmt: skip


def run_python(
    arguments: list[str], cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """A fresh process: Ray reads its authentication mode once. It finds this repository before any installation."""
    return subprocess.run(
        [sys.executable, *arguments], env={**os.environ, "PYTHONPATH": str(REPOSITORY), **environment},
        capture_output=True, text=True, timeout=600, check=False, cwd=cwd,
    )  # fmt: skip


def command(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Our command line, away from the repository: Ray's workers get the driver's folder on their path."""
    return run_python(["-c", CLI, *arguments], cwd, **environment)


def experiment_file(tmp_path: Path, **run: object) -> str:
    path = tmp_path / "experiment.yaml"
    path.write_text(json.dumps(document(tmp_path, **run)))  # JSON is YAML
    return str(path)


def test_submitted_job_runs_the_sweep(cluster: Cluster, tmp_path: Path) -> None:
    tracking = f"sqlite:///{tmp_path}/mlflow.db?password={SECRET}"
    whole = document(tmp_path, tracking=tracking)
    arguments = ["-c", SUBMIT, json.dumps(whole), cluster.dashboard]
    done = run_python(arguments)
    assert done.returncode == 0, done.stderr
    assert "report:" in done.stdout
    assert "exit 0\n['done']" in done.stdout
    assert len(list(Store(str(tmp_path / "runs")).keys())) == 1
    assert (tmp_path / "mlflow.db").exists()
    shown = [done.stdout, done.stderr, command("status", "--address", cluster.dashboard, cwd=tmp_path).stdout]
    assert "submitted" in shown[-1]
    kept = [path for folder in (tmp_path, cluster.sockets) for path in folder.rglob("*") if path.is_file()]
    assert any(path.name.startswith("job-driver") for path in kept)
    # The document itself lies on the head, in the job's own folder; no log, report, journal or database repeats it.
    holding = {path for path in kept if SECRET.encode() in path.read_bytes()}
    assert {path.name for path in holding} == {"experiment.yaml"}
    # The head's own environment holds the other secret; Ray itself may log that, we may not.
    repeating = {path.name for path in kept if ENVIRONMENT_SECRET.encode() in path.read_bytes()}
    assert repeating <= {"runtime_env_agent.log"}
    assert not [text for text in shown if SECRET in text]
    refused = run_python(arguments, RAY_AUTH_TOKEN_PATH=os.devnull)
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


def test_a_job_is_followed_left_and_stopped(cluster: Cluster, tmp_path: Path) -> None:
    path, at = experiment_file(tmp_path), ("--address", cluster.dashboard)
    arguments = ["submit", path, "student.train.epochs=100000", *at]
    with (tmp_path / "out.txt").open("w") as out, (tmp_path / "err.txt").open("w") as err:
        following = subprocess.Popen(
            [sys.executable, "-c", CLI, *arguments], stdout=out, stderr=err, cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        )  # fmt: skip
    deadline = time.monotonic() + 600
    said = tmp_path / "out.txt"
    while not (list((tmp_path / "runs").glob("leases/*/*.json")) and "To run:" in said.read_text()):
        assert time.monotonic() < deadline, (tmp_path / "err.txt").read_text()
        assert following.poll() is None, (tmp_path / "err.txt").read_text()
        time.sleep(0.2)
    following.send_signal(signal.SIGINT)
    assert following.wait(300) == 130
    told = (tmp_path / "err.txt").read_text()
    assert "To follow it again: stillhouse logs raysubmit_" in told
    assert "Traceback" not in told
    assert "To run: 1 student stage." in said.read_text()
    job = told.split("job ")[1].split()[0]
    shown = command("status", *at, cwd=tmp_path).stdout
    assert any(line.split()[:3] == [job, "submitted", "RUNNING"] for line in shown.splitlines()), shown
    stopped = command("stop", job, *at, cwd=tmp_path)
    assert stopped.stdout == f"job {job}: STOPPED\n", stopped.stderr
    log = command("logs", job, *at, cwd=tmp_path).stdout
    assert "interrupted: running stages stop after their epoch" in log
    assert "the same command goes on from the store" in log  # it ended by itself: nobody killed it
    assert len(list((tmp_path / "runs").glob("work/*/*/manifest.json"))) >= 1
    assert command("stop", job, *at, cwd=tmp_path).stdout == f"job {job} has ended already: STOPPED\n"
    unknown = command("logs", "job-that-never-was", *at, cwd=tmp_path)
    assert (unknown.returncode, unknown.stderr[:7]) == (2, "error: ")


def wait_for_nodes(cluster: Cluster, num_nodes: int, tmp_path: Path) -> None:
    code = (
        "import ray, sys, time; ray.init(log_to_driver=False); end = time.monotonic() + 300\n"
        f"while sum(node['Alive'] for node in ray.nodes()) < {num_nodes}:\n"
        "    assert time.monotonic() < end; time.sleep(0.2)"
    )
    done = run_python(["-c", code], tmp_path, RAY_ADDRESS=cluster.address)
    assert done.returncode == 0, done.stderr


def test_preflight_asks_every_node(cluster: Cluster, worker: Worker, tmp_path: Path) -> None:
    wait_for_nodes(cluster, 2, tmp_path)
    path = experiment_file(tmp_path)
    fit = command("preflight", path, cwd=tmp_path, RAY_ADDRESS=cluster.address)
    assert fit.returncode == 0, fit.stdout + fit.stderr
    rows = [line.split() for line in fit.stdout.split("\n\n")[0].splitlines()]
    assert rows[0][0] == "host"
    assert [row[-1] for row in rows[1:]] == ["good", "good"]
    assert {row[0] for row in rows[1:]} == {socket.gethostname(), "other-host"}
    assert "asks for a token" in fit.stdout
    assert not list((tmp_path / "runs").rglob("*.json"))  # nothing is left behind
    with (worker.source / "methods" / "losses.py").open("a") as file:
        file.write("# another\n")
    unfit = command(
        "preflight", path, f"run.storage={worker.own_folder}/runs", cwd=tmp_path, RAY_ADDRESS=cluster.address
    )
    assert unfit.returncode == 2
    wrong = [line for line in unfit.stdout.splitlines() if line.startswith("wrong")]
    assert sum("other-host: source" in line and "same checkout" in line for line in wrong) == 1
    assert sum("other-host: the storage is not shared: what the driver" in line for line in wrong) == 1
    refused = command("run", path, cwd=tmp_path, RAY_ADDRESS=cluster.address)
    assert refused.returncode == 2
    assert "error: other-host: source" in refused.stderr
    assert list(Store(str(tmp_path / "runs")).keys()) == []
    submitted = command(
        "submit", path, "--address", cluster.dashboard, cwd=tmp_path, PYTHONPATH=str(worker.source)
    )
    assert submitted.returncode == 2
    assert "this job was submitted by another version. Stillhouse there is" in submitted.stdout
