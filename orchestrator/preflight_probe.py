"""What one node tells of itself. Travels to the nodes by value, since their installation may be absent or another.

Answers are plain data, so that no class of ours has to exist there. Nothing is imported at the top but the standard
library.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

__all__ = ["erase_marker", "look", "read_markers"]

PACKAGES = ("stillhouse", "ray", "torch")
MARKERS = "preflight"
SEEN_SECONDS = 5.0
"""How long a marker may take to appear: network file systems remember for a while what was not there."""
LOOK_SECONDS = 0.25
COMMAND_SECONDS = 20


def look(storage: str, run: str, node: str, needed: Sequence[str]) -> dict[str, Any]:
    """Facts about the node; leaves a marker in the storage, for the other nodes to read.

    Args:
        run: Name of this preflight: tells its markers from those of an earlier one.
        node: Name of the node, unique in the cluster.
        needed: Paths of files and folders that stages will read here.
    """
    return {
        "host": socket.gethostname(),
        "python": platform.python_version(),
        "versions": {package: _version(package) for package in PACKAGES},
        "source": _source(),
        "cpus": os.cpu_count() or 0,
        "memory_gb": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9,
        "gpus": _gpus(),
        "free_gb": _free_gb(storage),
        "missing": [path for path in needed if not Path(path).expanduser().exists()],
        "storage": _write_marker(storage, run, node),
        "time": time.time(),
    }


def read_markers(storage: str, run: str, nodes: Sequence[str]) -> dict[str, Any]:
    """Which of the nodes' markers cannot be read here."""
    from orchestrator.store import Store

    store = Store(storage)
    deadline = time.monotonic() + SEEN_SECONDS
    missing = list(nodes)
    while missing and time.monotonic() < deadline:
        missing = [node for node in missing if (store.read_json(_marker(node)) or {}).get("run") != run]
        if missing:
            time.sleep(LOOK_SECONDS)
    return {"missing": missing, "time": time.time()}


def erase_marker(storage: str, node: str) -> dict[str, Any]:
    """Remove what ``look`` left, also where the storage turned out to be this node's own."""
    from orchestrator.store import Store

    Store(storage).delete_json(_marker(node))
    if "://" not in storage:
        with contextlib.suppress(OSError):  # another node's marker still lies in it
            (Path(storage) / MARKERS).rmdir()
    return {"time": time.time()}


def _marker(node: str) -> str:
    return f"{MARKERS}/{node}.json"


def _write_marker(storage: str, run: str, node: str) -> str:
    """Empty, or why the storage cannot be written."""
    try:
        from orchestrator.store import Store

        store = Store(storage)
        store.check_writable()
        store.write_json(_marker(node), {"run": run, "host": socket.gethostname()})
    except Exception as error:  # told to the driver: whatever it is, this node cannot use the storage
        return f"{type(error).__name__}: {error}"
    return ""


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _source() -> str:
    try:
        from orchestrator.source import source_fingerprint
    except ImportError:  # not installed, or older than this check: the version says which
        return "unknown"
    return source_fingerprint()


def _gpus() -> list[dict[str, Any]]:
    """Name and memory of every GPU of the machine, whatever of them this process may use."""
    if shutil.which("nvidia-smi") is None:
        return []
    asked = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(
            asked, capture_output=True, text=True, timeout=COMMAND_SECONDS, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return [{"name": f"unknown ({error})", "memory_gb": 0.0}]
    lines = [line.rpartition(",") for line in told.splitlines() if "," in line]
    return [{"name": name.strip(), "memory_gb": float(memory) * 2**20 / 1e9} for name, _, memory in lines]


def _free_gb(storage: str) -> dict[str, float]:
    """Free space where the storage is, if it is a folder, and where Ray keeps what does not fit into memory."""
    return {what: shutil.disk_usage(place).free / 1e9 for what, place in _places(storage)}


def _places(storage: str) -> Iterator[tuple[str, Path]]:
    if "://" not in storage:
        path = Path(storage)
        yield "storage", next(folder for folder in (path, *path.parents) if folder.exists())
    yield "temporary", Path(os.environ.get("RAY_TMPDIR") or "/tmp")
