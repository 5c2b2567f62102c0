"""The nodes of a cluster that is still coming up: which are promised, and waiting for them."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import ray
import yaml

__all__ = ["num_promised_workers", "wait_for_workers"]

BOOTSTRAP = Path("~/ray_bootstrap_config.yaml")
"""What ``ray up`` leaves on the head: the cluster file, completed."""
WAIT_SECONDS = 300.0
POLL_SECONDS = 1.0


def num_promised_workers(path: Path = BOOTSTRAP) -> int:
    """How many worker nodes the cluster file keeps up from its start; 0 where no ``ray up`` has been."""
    try:
        cluster = yaml.safe_load(path.expanduser().read_text(encoding="utf-8"))
    except FileNotFoundError:
        return 0
    return sum(int(kind.get("min_workers", 0)) for kind in cluster["available_node_types"].values())


def wait_for_workers(
    num_workers: int,
    timeout_seconds: float = WAIT_SECONDS,
    count_nodes: Callable[[], int] | None = None,
) -> bool:
    """Wait until so many nodes have joined the head. They come some 30 s after ``ray up`` has returned.

    After the deadline it says what is missing and gives False: the sweep can go on with fewer nodes, or refuses what
    does not fit. ``count_nodes`` counts the nodes that are alive, the head among them.
    """
    count = count_nodes or _num_alive_nodes
    deadline = time.monotonic() + timeout_seconds
    joined = count() - 1
    if joined >= num_workers:
        return True
    _say(f"waiting for {num_workers - joined} of {num_workers} worker nodes, at most {timeout_seconds:g} s")
    while joined < num_workers:
        if time.monotonic() > deadline:
            _say(
                f"warning: {num_workers - joined} of {num_workers} worker nodes did not join within {timeout_seconds:g} s; going on without. On the head, /tmp/ray/session_latest/logs/monitor.* say why"
            )
            return False
        time.sleep(min(POLL_SECONDS, timeout_seconds))
        joined = count() - 1
    _say(f"{num_workers} worker nodes are there")
    return True


def _num_alive_nodes() -> int:
    return sum(bool(node["Alive"]) for node in ray.nodes())


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
