"""A Ray cluster and a tracking server on hosts of their own: what the fault tests break."""

from __future__ import annotations

import json
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from hosts import Hosts

HEAD, TRACKING, NODES = "head", "tracking", ("a", "b")
EVERY_HOST = (HEAD, *NODES, TRACKING)
PORT, TRACKING_PORT = 6379, 5000
OBJECT_STORE_BYTES = 100_000_000
TEND_SECONDS = 1.0
START_SECONDS = 240.0
HEALTH = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "2500",
    "RAY_health_check_failure_threshold": "4",
}
"""A host that does not answer is given up after some ten seconds; by default it takes Ray about a minute."""
RAYS_OWN = ("ray::DashboardAgent", "ray::RuntimeEnvAgent", "ray::_AutoscalingCoordinatorActor", "ray::IDLE")
"""Processes that belong to Ray's nodes, not to a sweep."""


@dataclass(frozen=True)
class Process:
    """A process of a host, numbered as outside."""

    host: str
    pid: int
    title: str


@dataclass
class Cluster:
    """``head`` runs the driver and no stage, ``a`` and ``b`` one worker each, ``tracking`` an MLflow server."""

    hosts: Hosts
    folder: Path
    _joining: dict[str, threading.Thread] = field(default_factory=dict)
    _tended: float = 0.0
    _tracking: subprocess.Popen[bytes] | None = None

    def __post_init__(self) -> None:
        self.token.write_text("0123456789abcdef0123456789abcdef")
        self.token.chmod(0o600)

    @property
    def token(self) -> Path:
        return self.folder / "token"

    @property
    def address(self) -> str:
        return f"{self.hosts[HEAD].address}:{PORT}"

    @property
    def tracking_uri(self) -> str:
        return f"http://{self.hosts[TRACKING].address}:{TRACKING_PORT}"

    @property
    def environment(self) -> dict[str, str]:
        auth = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.token)}
        return {**auth, **HEALTH, "RAY_worker_niceness": "0", "OMP_NUM_THREADS": "1"}

    def start(self) -> None:
        """Head, both nodes and the tracking server, as far as possible at the same time."""
        tracking = threading.Thread(target=self.start_tracking, daemon=True)
        tracking.start()
        self.start_head()
        wait_until(self._has_joined, START_SECONDS, "both nodes to join")
        tracking.join(START_SECONDS)

    def start_head(self) -> None:
        # With the dashboard, on loopback: Ray Train asks it which placement groups have lost their owner.
        self._ray_start(HEAD, f"--head --port={PORT} --num-cpus=0 --include-dashboard=true")

    def tend(self) -> None:
        """Let every node that is up and has no Ray join, in the background: the part of an autoscaler, or of an operator."""
        if time.monotonic() - self._tended < TEND_SECONDS:
            return
        self._tended = time.monotonic()
        for name in NODES:
            joining = self._joining.get(name)
            is_joining = joining is not None and joining.is_alive()
            if self.hosts[name].is_up and not is_joining and not self.has_raylet(name):
                self._joining[name] = threading.Thread(target=self._join, args=(name,), daemon=True)
                self._joining[name].start()

    @property
    def is_whole(self) -> bool:
        return all(map(self.has_raylet, NODES)) and not any(
            thread.is_alive() for thread in self._joining.values()
        )

    def has_raylet(self, name: str) -> bool:
        return self.raylet(name) is not None

    def raylet(self, name: str) -> int | None:
        """The process that makes a host a node of the cluster."""
        found = [process.pid for process in self.processes((name,)) if "/raylet/raylet " in process.title]
        return found[0] if found else None

    def _has_joined(self) -> bool:
        self.tend()
        return self.is_whole

    def leave_lost_cluster(self) -> None:
        """What an operator does on every node whose head is gone."""
        for name in NODES:
            if self.hosts[name].is_up:
                self.hosts[name].run("ray stop --force", env=self.environment, timeout=300, check=False)

    def start_tracking(self) -> None:
        """A real MLflow server. Returns when it answers."""
        host = self.hosts[TRACKING]
        command = (
            f"python -m mlflow server --host {host.address} --port {TRACKING_PORT} --workers 1 "
            f"--backend-store-uri sqlite:///{self.folder}/tracking.db --artifacts-destination {self.folder}/tracking"
        )
        lean = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # eight processes less
        self._tracking = host.start(f"exec {command}", lean, self.folder / "tracking.txt")
        wait_until(self.tracking_answers, START_SECONDS, "the tracking server")

    def stop_tracking(self) -> None:
        """Pull the plug of its host, and boot it again without the server."""
        self.hosts[TRACKING].kill()
        self.hosts[TRACKING].boot()

    def tracking_answers(self) -> bool:
        try:
            urllib.request.urlopen(f"{self.tracking_uri}/health", timeout=2).close()
        except OSError:
            return False
        return True

    def drive(self, experiment: Path) -> subprocess.Popen[bytes]:
        """``stillhouse run`` on the head; its output goes beside the experiment."""
        command = ["python", "-m", "orchestrator.cli", "run", str(experiment)]
        environment = {**self.environment, "RAY_ADDRESS": self.address}
        return self.hosts[HEAD].start(command, environment, experiment.with_suffix(".txt"))

    def processes(self, names: tuple[str, ...] = (HEAD, *NODES)) -> list[Process]:
        found = []
        for name in names:
            for pid in self.hosts[name].pids():
                try:
                    title = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
                except OSError:  # it has just ended
                    continue
                found.append(Process(name, pid, title))
        return found

    def of_sweeps(self) -> list[Process]:
        """Processes that a sweep has started, the driver among them."""
        return [
            process
            for process in self.processes()
            if (process.title.startswith("ray::") and not process.title.startswith(RAYS_OWN))
            or "orchestrator.cli" in process.title
        ]

    def resources(self) -> tuple[dict[str, float], dict[str, float]]:
        """All resources of the cluster, and those that nobody holds."""
        code = (
            "import json, ray; ray.init(log_to_driver=False, configure_logging=False); "
            "print(json.dumps([ray.cluster_resources(), ray.available_resources()]))"
        )
        done = self.hosts[HEAD].run(
            ["python", "-c", code], env={**self.environment, "RAY_ADDRESS": self.address}
        )
        total, free = json.loads(done.stdout.splitlines()[-1])
        return total, free

    def _join(self, name: str) -> None:
        self._ray_start(name, f"--address={self.address} --num-cpus=1")

    def _ray_start(self, name: str, options: str) -> None:
        address = self.hosts[name].address
        done = self.hosts[name].run(
            f"ray start {options} --node-ip-address={address} --disable-usage-stats --object-store-memory={OBJECT_STORE_BYTES}",
            env=self.environment, timeout=300, check=False,
        )  # fmt: skip
        with (self.folder / "ray.txt").open("a") as log:
            log.write(f"{name}: exit {done.returncode}\n{done.stdout}{done.stderr}\n")


def wait_until(condition: Callable[[], bool], timeout_seconds: float, what: str) -> None:
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_seconds} s for {what}"
        time.sleep(0.1)
