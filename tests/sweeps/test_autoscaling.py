"""A sweep on Ray's own autoscaler with fake nodes (real raylets on this machine): up from nothing, and down again."""

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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from orchestrator.ray_cluster import fully_grown, is_scaled

HEAD, SMALL = "ray.head.default", "small"
CONFIG: dict[str, Any] = {
    "cluster_name": "fake",
    "max_workers": 2,
    "idle_timeout_minutes": 0.08,
    "upscaling_speed": 1.0,
    "provider": {
        "type": "fake_multinode", "use_node_id_as_ip": True, "disable_node_updaters": True,
        "disable_launch_config_check": True,
    },
    "available_node_types": {
        HEAD: {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        SMALL: {
            "resources": {"CPU": 1, "object_store_memory": 2**27}, "node_config": {},
            "min_workers": 0, "max_workers": 2,
        },
    },
    "head_node_type": HEAD,
    **{name: {} for name in ("auth", "docker", "file_mounts")},
    **{name: [] for name in (
        "cluster_synced_files", "rsync_exclude", "rsync_filter", "initialization_commands", "setup_commands",
        "head_setup_commands", "worker_setup_commands", "head_start_ray_commands", "worker_start_ray_commands",
    )},
    "file_mounts_sync_continuously": False,
}  # fmt: skip
"""What ``ray.cluster_utils.AutoscalingCluster`` makes out of a template that Ray's wheel does not contain."""

SWEEP = """
import json, sys, threading, time
import ray
from orchestrator import Experiment
from orchestrator.ray_tune import connect

connect()
def alive():
    return sum(node["Alive"] for node in ray.nodes()) - 1

assert alive() == 0, ray.nodes()
counts = []
over = threading.Event()

def count():
    while not over.wait(0.3):
        counts.append(alive())

watch = threading.Thread(target=count)
watch.start()
try:
    result = Experiment(**json.loads(sys.argv[1])).run()
finally:
    over.set()
    watch.join()
deadline = time.monotonic() + 60
while alive() and time.monotonic() < deadline:
    time.sleep(0.5)
print(json.dumps({"statuses": [row.status for row in result.rows], "most": max(counts), "left": alive()}))
"""


@dataclass(frozen=True)
class Head:
    address: str
    environment: Mapping[str, str]


def free_port() -> int:
    """Below the range from which Ray takes the ports of its workers, and outside of the ephemeral one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def head(tmp_path: Path) -> Iterator[Head]:
    """A head without CPUs, with an autoscaler that looks once a second. All of it in a process group of its own."""
    folder = tempfile.mkdtemp(prefix="sh-")  # a short path: sockets lie in it
    (Path(folder) / "ray").mkdir()
    token, port = Path(folder) / "token", free_port()
    token.write_text("0123456789abcdef0123456789abcdef")
    token.chmod(0o600)
    config = {**CONFIG, "provider": {**CONFIG["provider"], "gcs_address": f"127.0.0.1:{port}"}}
    (Path(folder) / "cluster.json").write_text(json.dumps(config))
    environment = {
        **os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_TMPDIR": folder,
        "RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_ADDRESS": f"127.0.0.1:{port}",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }  # fmt: skip
    command = [
        str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--num-cpus=0", f"--port={port}",
        "--node-ip-address=127.0.0.1", "--include-dashboard=false", "--min-worker-port=0", "--max-worker-port=0",
        f"--temp-dir={folder}", "--disable-usage-stats", f"--autoscaling-config={folder}/cluster.json",
        f"--ray-client-server-port={free_port()}", f"--dashboard-agent-listen-port={free_port()}",
    ]  # fmt: skip
    environment_of_head = {name: value for name, value in environment.items() if name != "RAY_ADDRESS"}
    with (tmp_path / "head.txt").open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, start_new_session=True, env=environment_of_head
        )
    try:
        wait_for(port, tmp_path / "head.txt")
        yield Head(f"127.0.0.1:{port}", environment)
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)


def wait_for(port: int, log: Path) -> None:
    deadline = time.monotonic() + 300
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=2).close()
            return
        except OSError:
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.3)


@pytest.mark.ray
@pytest.mark.slow
def test_a_sweep_scales_up_from_nothing_and_gives_the_nodes_back(head: Head, tmp_path: Path) -> None:
    """Two trials at a time ask for two nodes; when the sweep is over, and this process still there, both go."""
    document = {
        "name": "scaled", "data": {"dataset": "digits", "validation": 0.2},
        "stages": {"student": {"method": "supervised", "model": "tiny_mlp", "train": {"epochs": 2}}},
        "search": {
            "space": {"student.train.learning_rate": {"grid": [0.01, 0.02, 0.05]}},
            "objective": {"maximize": "student.top1"},
        },
        "run": {"storage": str(tmp_path / "runs")},
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", SWEEP, json.dumps(document)], env=dict(head.environment), capture_output=True,
        text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr + (tmp_path / "head.txt").read_text()
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["statuses"] == ["done"] * 3
    assert told["most"] == 2
    assert told["left"] == 0
    assert (
        "waiting for nodes: stage student asks for 1 worker with 1 CPU; the cluster has 1 node: 1 x (0 CPU)"
        in done.stderr
    )


MIRRORED = {"node_type_mapping": {"ab": "node_ab"}, "active_nodes": {"node_ab": 1}, "pending_launches": {}}
"""Of a cluster without autoscaler: a process beside the head reports what it sees, each node as its own type."""


@pytest.mark.parametrize(
    ("report", "scales"),
    [
        (None, False),
        ({}, False),
        (MIRRORED, False),
        ({"node_type_mapping": {"ff": HEAD}, "active_nodes": {}}, True),
        ({**MIRRORED, "pending_launches": {"gpu_worker": 2}}, True),
        (
            {"node_type_mapping": {"ff": "local.cluster.node"}, "active_nodes": {"local.cluster.node": 3}},
            False,
        ),
    ],
)
def test_an_autoscaler_is_told_by_its_report(report: Mapping[str, Any] | None, scales: bool) -> None:
    assert is_scaled({"autoscaler_report": report} if report is not None else {}) == scales


def test_the_fully_grown_cluster_is_read_from_its_description() -> None:
    nodes = fully_grown(CONFIG)
    assert nodes is not None
    assert sorted(node["CPU"] for node in nodes) == [0, 1, 1]
    bounded = fully_grown({**CONFIG, "max_workers": 1})
    assert bounded is not None
    assert len(bounded) == 2
    unknown = {**CONFIG["available_node_types"], "other": {"node_config": {}, "max_workers": 3}}
    assert fully_grown({**CONFIG, "available_node_types": unknown}) is None
