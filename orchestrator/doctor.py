"""What is wrong with this machine or cluster: each finding with its remedy."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from urllib.parse import urlsplit

from orchestrator.endpoints import judge_endpoint
from orchestrator.errors import StillhouseError
from orchestrator.findings import Finding, Level
from orchestrator.store import Store

__all__ = ["Finding", "examine"]

MIN_FREE_GB = 2.0
DASHBOARD_PORT = 8265
PROBE_SECONDS = 2.0


def examine(storage: str, tracking: str | None, allow_open: Collection[str] = ()) -> list[Finding]:
    """Look at versions, devices, the storage, tracking, Ray. Starts nothing and leaves nothing behind.

    Args:
        allow_open: Addresses on which a job endpoint may take jobs from anybody.
    """
    checks: list[Callable[[], Iterator[Finding]]] = [
        _versions, _devices, _threads, lambda: _storage(storage), lambda: _tracking(tracking), lambda: _ray(allow_open),
    ]  # fmt: skip
    return [finding for check in checks for finding in check()]


def _versions() -> Iterator[Finding]:
    yield Finding("good", f"Python {sys.version.split()[0]} on {socket.gethostname()}")
    for package in ("stillhouse", "ray", "torch", "torchvision", "timm", "mlflow", "optuna", "fsspec"):
        try:
            yield Finding("good", f"{package} {version(package)}")
        except PackageNotFoundError:
            yield Finding("wrong", f"{package} is not installed: pip install stillhouse")


def _devices() -> Iterator[Finding]:
    import torch

    yield Finding("good", f"{os.cpu_count()} CPU cores, {_memory_gb():.1f} GB memory")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            yield Finding(
                "good",
                f"GPU {index}: {properties.name}, {properties.total_memory / 1e9:.0f} GB; use it with run.gpus_per_worker=1",
            )
    elif shutil.which("nvidia-smi"):
        yield Finding(
            "wrong", "nvidia-smi is here but torch sees no GPU: driver and torch's CUDA version do not fit"
        )
    else:
        yield Finding("note", "no GPU: stages run on CPU cores")


def _threads() -> Iterator[Finding]:
    threads = os.environ.get("OMP_NUM_THREADS")
    if threads:
        yield Finding(
            "note",
            f"OMP_NUM_THREADS={threads} is set; stages use run.cpus_per_worker threads whatever it says",
        )


def _storage(url: str) -> Iterator[Finding]:
    existed = "://" in url or Path(url).exists()
    try:
        Store(url).check_writable()
        yield Finding("good", f"storage {url} can be written and read")
    except StillhouseError as error:
        yield Finding("wrong", str(error))
        return
    if "://" not in url:
        free = shutil.disk_usage(url).free / 1e9
        level: Level = "good" if free > MIN_FREE_GB else "wrong"
        yield Finding(level, f"{free:.1f} GB free below {url}")
        if not existed:
            shutil.rmtree(url)


def _tracking(uri: str | None) -> Iterator[Finding]:
    if uri is None:
        yield Finding("good", "tracking: an SQLite file beside the reports (the default)")
        return
    from orchestrator.tracking import Mirror

    try:
        trouble = Mirror(Path(os.devnull), uri, "doctor").check()
    except StillhouseError as error:
        trouble = str(error)
    yield Finding("wrong", trouble) if trouble else Finding("good", f"tracking server {uri} answers")


def _ray(allow_open: Collection[str]) -> Iterator[Finding]:
    yield from _token()
    address = os.environ.get("RAY_ADDRESS")
    if address:
        yield from _cluster(address, allow_open)
    for host, port in _own_endpoints():
        yield from judge_endpoint(host, port, allow_open)
    small = Path("/dev/shm")
    if small.exists() and shutil.disk_usage(small).total < 1e9:
        yield Finding(
            "note", "/dev/shm is below 1 GB: Ray's object store is then slow; in Docker use --shm-size"
        )


def _token() -> Iterator[Finding]:
    """Whether Ray here would ask for, and has, a token. Its own rule: the mode if it is set, else whether a token exists."""
    mode = os.environ.get("RAY_AUTH_MODE", "").lower()
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    has_token = bool(os.environ.get("RAY_AUTH_TOKEN")) or (path.is_file() and path.stat().st_size > 0)
    if mode == "disabled":
        yield Finding(
            "wrong", "RAY_AUTH_MODE=disabled: anybody who reaches a Ray port can run code here; unset it"
        )
    elif has_token:
        yield Finding(
            "good", f"Ray's token is {'in RAY_AUTH_TOKEN' if os.environ.get('RAY_AUTH_TOKEN') else path}"
        )
    elif mode == "token":
        yield Finding(
            "wrong", f"RAY_AUTH_MODE=token, but there is no token: neither RAY_AUTH_TOKEN nor {path}; make one with `ray get-auth-token --generate`",
        )  # fmt: skip
    else:
        yield Finding(
            "note", "Ray has no token here: a sweep on this machine makes one, `ray start` does not; before it, run `ray get-auth-token --generate`",
        )  # fmt: skip
    if path.is_file() and path.stat().st_mode & 0o077:
        yield Finding("note", f"{path} can be read by others: chmod 600 {path}")


def _cluster(address: str, allow_open: Collection[str]) -> Iterator[Finding]:
    """The cluster that runs would join: does it answer, what has it, who may submit jobs to it."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        if port.isdigit():  # Ray itself would wait a minute for a cluster that is not there
            socket.create_connection((host, int(port)), timeout=PROBE_SECONDS).close()
    except OSError as error:
        yield Finding(
            "wrong", f"RAY_ADDRESS={address}: nobody answers there ({error}); start the cluster or unset it"
        )
        return
    from orchestrator.ray_preflight import look_at_cluster

    try:
        nodes, dashboard = look_at_cluster()
    except StillhouseError as error:
        yield Finding("wrong", f"RAY_ADDRESS={address}: {error}")
        return
    gpus = sum(node.num_gpus for node in nodes)
    yield Finding("good", f"RAY_ADDRESS={address}: runs join that cluster, {len(nodes)} nodes with {gpus:g} GPUs; `stillhouse preflight EXPERIMENT` asks each node")  # fmt: skip
    host, _, port = dashboard.rpartition(":")
    if port.isdigit() and (host, int(port)) not in set(_own_endpoints()):
        yield from judge_endpoint(host, int(port), allow_open)


def _own_endpoints() -> Iterator[tuple[str, int]]:
    """Where a job endpoint of this machine would be reached: each of its addresses, at the port in use."""
    named = urlsplit(os.environ.get("RAY_API_SERVER_ADDRESS", ""))
    port = named.port or DASHBOARD_PORT
    try:
        found = {str(item[4][0]) for item in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)}
    except OSError:
        found = set()
    outside = {address for address in found if not address.startswith("127.")} | set(_addresses())
    for address in ["127.0.0.1", *sorted(outside)]:
        yield address, port


def _addresses() -> Iterator[str]:
    """IPv4 addresses of the network interfaces, loopback aside, where the system tells them."""
    if shutil.which("ip") is None:
        return
    told = subprocess.run(["ip", "-4", "-o", "addr"], capture_output=True, text=True, timeout=10, check=False)
    for line in told.stdout.splitlines():
        words = line.split()
        address = words[words.index("inet") + 1].partition("/")[0] if "inet" in words else "127."
        if not address.startswith("127."):
            yield address


def _memory_gb() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
