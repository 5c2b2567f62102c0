"""What is wrong with this machine or cluster: each finding with its remedy."""

from __future__ import annotations

import os
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from orchestrator.errors import StillhouseError
from orchestrator.store import Store

__all__ = ["Finding", "examine"]

MIN_FREE_GB = 2.0
DASHBOARD_PORT = 8265


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    level: Literal["good", "note", "wrong"]
    text: str

    def __str__(self) -> str:
        return f"{self.level:6} {self.text}"


def examine(storage: str, tracking: str | None) -> list[Finding]:
    """Look at versions, devices, the storage, tracking, Ray. Starts nothing and leaves nothing behind."""
    checks: list[Callable[[], Iterator[Finding]]] = [
        _versions, _devices, _threads, lambda: _storage(storage), lambda: _tracking(tracking), _ray,
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
        level: Literal["good", "wrong"] = "good" if free > MIN_FREE_GB else "wrong"
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


def _ray() -> Iterator[Finding]:
    address = os.environ.get("RAY_ADDRESS")
    token = Path.home() / ".ray" / "auth_token"
    if address:
        yield Finding("note", f"RAY_ADDRESS={address}: runs join that cluster")
    if os.environ.get("RAY_AUTH_MODE", "").lower() == "disabled":
        yield Finding(
            "wrong", "RAY_AUTH_MODE=disabled: anybody who reaches a Ray port can run code here; unset it"
        )
    elif token.exists() and token.stat().st_mode & 0o077:
        yield Finding("note", f"{token} can be read by others: chmod 600 {token}")
    for host in _open_addresses():
        yield Finding(
            "wrong",
            f"Ray's job endpoint is open on {host}:{DASHBOARD_PORT}: start the head with --dashboard-host 127.0.0.1 and reach it through an SSH tunnel",
        )
    small = Path("/dev/shm")
    if small.exists() and shutil.disk_usage(small).total < 1e9:
        yield Finding(
            "note", "/dev/shm is below 1 GB: Ray's object store is then slow; in Docker use --shm-size"
        )


def _open_addresses() -> Iterator[str]:
    """Addresses of this machine other than loopback on which the dashboard port is open."""
    try:
        found = {str(item[4][0]) for item in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)}
    except OSError:
        return
    for address in sorted(found):
        if not address.startswith("127."):
            with socket.socket() as probe:
                probe.settimeout(0.5)
                if probe.connect_ex((address, DASHBOARD_PORT)) == 0:
                    yield address


def _memory_gb() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
