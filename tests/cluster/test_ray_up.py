"""``ray up``, ``ray submit`` and ``ray down`` as ``cluster/README.md`` prints them, against hosts of their own."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from host import REPOSITORY, Host
from hosts import Hosts, make_hosts, require_hosts
from mlflow import MlflowClient

from orchestrator.store import Store

pytestmark = [pytest.mark.ray, pytest.mark.slow]

SHIPPED = ("orchestrator", "methods", "configs", "cluster")
EXPERIMENT = """\
name: two-hosts
data: {dataset: digits, validation: 0.2}
stages:
  teacher: {method: supervised, model: tiny_mlp, train: {epochs: 2, batch_size: 512}}
  student: {method: kd, model: tiny_mlp, teacher: $teacher, train: {epochs: 2, batch_size: 512}}
search:
  space: {student.temperature: {grid: [2.0, 4.0]}}
  objective: {maximize: student.top1}
run: {workers: 2, placement: spread, stages: {student: {workers: 1}}}
"""
ASK = """\
import sys, urllib.error, urllib.request
request = urllib.request.Request("http://localhost:8265/api/jobs/", headers={"Authorization": sys.argv[1]})
try:
    print(urllib.request.urlopen(request, timeout=5).status)
except urllib.error.HTTPError as error:
    print(error.code)
"""


@dataclass(frozen=True)
class Site:
    """A laptop with a checkout, and two machines that ``local.yaml`` names."""

    hosts: Hosts
    folder: Path

    @property
    def storage(self) -> Path:
        return self.folder / "runs"

    @property
    def checkout(self) -> Path:
        return self.folder / "checkout"

    def fill_in(self, text: str) -> str:
        """What a user changes: addresses, user, storage. Everything else is used as it stands."""
        worker = self.hosts["worker"].address
        changes = {
            "192.168.1.11, 192.168.1.12": worker,
            "192.168.1.11 192.168.1.12": worker,
            "192.168.1.10": self.hosts["head"].address,
            "ssh_user: ubuntu": f"ssh_user: {self.hosts['head'].user}",
            "ubuntu@": f"-o StrictHostKeyChecking=no {self.hosts['head'].user}@",
            "/srv/stillhouse": str(self.storage),
        }
        for old, new in changes.items():
            text = text.replace(old, new)
        assert "192.168" not in text
        return text

    def type(self, command: str, timeout: float = 600) -> str:
        """A command of the README, typed on the laptop inside ``cluster/``; its output."""
        # Building without isolation needs no package index, which these hosts do not reach.
        line = f"cd {self.checkout / 'cluster'} && {self.fill_in(command)}"
        done = self.hosts["laptop"].run(["bash", "-c", line], env={"PIP_NO_BUILD_ISOLATION": "0"}, timeout=timeout, check=False)  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stdout[-6000:]}{done.stderr[-3000:]}"
        return done.stdout


def commands(heading: str) -> list[str]:
    """The shell commands below a heading of the README, in order."""
    text = (REPOSITORY / "cluster" / "README.md").read_text(encoding="utf-8")
    section = text.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    found = [
        line for block in re.findall(r"```sh\n(.*?)```", section, re.DOTALL) for line in block.splitlines()
    ]
    assert found
    return found


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    require_hosts()
    if shutil.which("rsync") is None:
        pytest.skip("`ray up` needs rsync")
    folder = tmp_path_factory.mktemp("site")
    with make_hosts(["laptop", "head", "worker"], folder) as hosts:
        site = Site(hosts, folder)
        unpack_checkout(site)
        for name in ("head", "worker"):
            make_environment(hosts[name])
        keys = hosts["laptop"].home / ".ssh"
        keys.mkdir(mode=0o700)
        shutil.copy(hosts["laptop"].ssh_key, keys / "id_ed25519")
        yield site


def unpack_checkout(site: Site) -> None:
    site.checkout.mkdir()
    for name in SHIPPED:
        ignored = shutil.ignore_patterns("__pycache__", "dist")
        shutil.copytree(REPOSITORY / name, site.checkout / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, site.checkout / name)
    cluster_file = site.checkout / "cluster" / "local.yaml"
    cluster_file.write_text(site.fill_in(cluster_file.read_text()))
    (site.checkout / "cluster" / "experiment.yaml").write_text(EXPERIMENT)


def make_environment(host: Host) -> None:
    """What a machine of one's own has: an environment with our dependencies, but without us."""
    place = host.home / ".stillhouse" / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(place)], check=True)
    seen_inside = Path.home() / ".stillhouse" / "venv"
    (packages,) = place.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(
        "\n".join(path for path in sys.path if path.endswith("site-packages"))
    )
    ray = place / "bin" / "ray"
    ray.write_text(f"#!{seen_inside}/bin/python\nfrom ray.scripts.scripts import main\n\nmain()\n")
    ray.chmod(0o755)


def ray_processes(host: Host) -> list[str]:
    titles = [Path(f"/proc/{pid}/cmdline") for pid in host.pids()]
    texts = [path.read_bytes().replace(b"\0", b" ").decode() for path in titles if path.exists()]
    return [text for text in texts if "ray" in text and "sshd" not in text and "init.sh" not in text]


class TrainingSeen(threading.Thread):
    """Looks on which hosts workers of a stage with several workers are at work."""

    def __init__(self, hosts: Hosts) -> None:
        super().__init__(daemon=True)
        self.found: set[str] = set()
        self._hosts = hosts
        self._ended = threading.Event()

    def run(self) -> None:
        while not self._ended.wait(0.5):
            for name in ("head", "worker"):
                if any("RayTrainWorker" in title for title in ray_processes(self._hosts[name])):
                    self.found.add(name)

    def end(self) -> set[str]:
        self._ended.set()
        self.join(10)
        return self.found


def test_up_submit_and_down_as_printed(site: Site) -> None:
    up, *submit, down, stop_workers = commands("Your own machines")
    for command in (*commands("Before the first start"), up):
        site.type(command)
    check_ports(site)
    seen = TrainingSeen(site.hosts)
    seen.start()
    output = "".join(site.type(command) for command in submit)
    assert seen.end() == {"head", "worker"}
    assert "report:" in output
    check_results(site)
    check_tunnel(site)
    for command in (down, stop_workers):
        site.type(command)
    left = {name: ray_processes(site.hosts[name]) for name in ("head", "worker")}
    assert left == {"head": [], "worker": []}


def check_ports(site: Site) -> None:
    """From the network, nothing of Ray but what nodes need among themselves, and that wants the token."""
    head = site.hosts["head"].address
    for port in (8265, 10001):
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((head, port), timeout=5).close()
    with pytest.raises(urllib.error.HTTPError) as refusal:
        urllib.request.urlopen(f"http://{head}:52365/api/job_agent/jobs/", timeout=5)
    assert refusal.value.code == 401
    join = f"import ray; ray.init(address='{head}:6379', log_to_driver=False)"
    wrong = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}
    done = site.hosts["worker"].run([sys.executable, "-c", join], env=wrong, check=False)
    assert done.returncode != 0
    assert "authenti" in (done.stdout + done.stderr).lower()


def check_results(site: Site) -> None:
    store = Store(str(site.storage))
    manifests = list(map(store.manifest, store.keys()))
    assert sorted(manifest["placement"]["workers"] for manifest in manifests) == [1, 1, 2]
    client = MlflowClient(f"sqlite:///{site.storage / 'mlflow.db'}")
    (experiment,) = client.search_experiments(filter_string="name = 'two-hosts'")
    runs = client.search_runs([experiment.experiment_id])
    kinds = sorted(run.data.tags["stillhouse.id"].partition(":")[0] for run in runs)
    assert kinds == ["stage"] * 3 + ["sweep"] + ["trial"] * 2
    assert {run.info.status for run in runs} == {"FINISHED"}
    trials = [run for run in runs if run.data.tags["stillhouse.id"].startswith("trial:")]
    assert all("student.final_test_top1" in run.data.metrics for run in trials)


def check_tunnel(site: Site) -> None:
    """``ray dashboard`` leads to the head's loopback, where the token opens and its absence does not."""
    laptop = site.hosts["laptop"]
    token = (laptop.home / ".ray" / "auth_token").read_text()
    tunnel = laptop.start(f"cd {site.checkout / 'cluster'} && exec ray dashboard local.yaml")
    try:
        deadline = time.monotonic() + 180
        while laptop.run([sys.executable, "-c", ASK, f"Bearer {token}"], check=False).stdout.strip() != "200":
            assert time.monotonic() < deadline
            time.sleep(1)
        assert laptop.run([sys.executable, "-c", ASK, ""]).stdout.strip() == "401"
    finally:
        laptop.end(tunnel)
