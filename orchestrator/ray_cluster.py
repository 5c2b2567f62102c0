"""What the Ray cluster has and may grow to: the nodes as plain mappings, and the signs of an autoscaler."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ray
import yaml
from ray.experimental import internal_kv

from orchestrator.capacity import Cluster, Node, Waiting, WaitState
from orchestrator.errors import ConfigurationError
from orchestrator.ray_reservations import give_up_reservations_of_the_dead

__all__ = ["ClusterView", "Room", "fully_grown", "is_scaled"]

BOOTSTRAP_FILE = "~/ray_bootstrap_config.yaml"
"""What ``ray up`` leaves on the head: the cluster's YAML, with the resources of each node type filled in."""
STATUS_KEY = b"__autoscaling_status"
"""Where the process beside the head that scales, or only watches, leaves its report: what ``ray status`` prints."""
MIRRORED_PREFIX = "node_"
"""A process that only watches names each node's type after the node itself."""
ON_PREMISES_TYPE = "local.cluster.node"
"""The one node type of clusters made of the user's own hosts: they are what they are."""

LOOK_SECONDS = 1.0


class ClusterView:
    """Looks at the cluster that this process has joined.

    Args:
        scales: Whether nodes are started when something waits for them; None finds it out.
        is_final: No node can ever join: the cluster is this process's own.
    """

    def __init__(self, *, scales: bool | None = None, is_final: bool = False) -> None:
        self._scales = scales
        self._is_final = is_final
        config = None if is_final else _bootstrap_config()
        self._largest = None if config is None else fully_grown(config)

    def look(self) -> Cluster:
        """The nodes that are alive now. One question to the head; a few milliseconds."""
        nodes: tuple[Node, ...] = tuple(node["Resources"] for node in ray.nodes() if node["Alive"])
        if self._is_final:
            return Cluster(nodes=nodes, largest=nodes)
        if self._scales is None and is_scaled(_status()):
            self._scales = True  # it takes a few seconds to show, and does not go away
        return Cluster(nodes=nodes, grows=bool(self._scales), largest=self._largest if self._scales else None)


class Room:
    """What the cluster has room for, looked at once a second at most."""

    def __init__(self, view: ClusterView, waiting: Waiting) -> None:
        self._view = view
        self._waiting = waiting
        self._looked = float("-inf")
        self._state = WaitState(slots=0)
        self.grows = False

    def look(self, is_running: bool = False) -> WaitState:
        """How many trials may be under way, and what is waited for. ``is_running``: some trial is at work."""
        now = time.monotonic()
        if now - self._looked >= LOOK_SECONDS:
            give_up_reservations_of_the_dead()
            cluster = self._view.look()
            self.grows = cluster.grows
            self._state = self._waiting.look(cluster, now, is_running=is_running)
            self._looked = now
        return self._state

    def wait(self, tell: Callable[[str], None]) -> int:
        """Wait until every stage has a place, or a growing cluster can be asked for it. Gives the number of slots.

        A cluster that was started a moment ago shows only its head at first.

        Raises:
            ConfigurationError: A stage fits nowhere, with what it asks for and what is there.
        """
        told = ""
        while (state := self.look()).text and not self.grows:
            if state.is_hopeless:
                break
            if state.text != told:
                tell(f"waiting for nodes: {state.text}")
                told = state.text
            time.sleep(LOOK_SECONDS)
        if state.is_hopeless:
            raise ConfigurationError(
                f"run: {state.text}; start such nodes, or lower workers, cpus_per_worker or gpus_per_worker in run, "
                "or in run.stages for this stage (run.wait_for_resources_seconds says how long nodes are waited for)"
            )
        return max(state.slots, 1)


def _bootstrap_config() -> Mapping[str, Any] | None:
    path = Path(BOOTSTRAP_FILE).expanduser()
    return yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else None


def _status() -> Mapping[str, Any]:
    told = internal_kv._internal_kv_get(STATUS_KEY)
    return json.loads(told) if told else {}


def is_scaled(status: Mapping[str, Any]) -> bool:
    """Whether an autoscaler's report tells of node types that it can start, rather than of nodes found there."""
    report = status.get("autoscaler_report") or {}
    types = {str(name) for name in (report.get("node_type_mapping") or {}).values()}
    types |= {str(name) for name in report.get("active_nodes") or {}}
    types |= {str(name) for name in report.get("pending_launches") or {}}
    return any(not name.startswith(MIRRORED_PREFIX) and name != ON_PREMISES_TYPE for name in types)


def fully_grown(config: Mapping[str, Any]) -> tuple[Node, ...] | None:
    """Every node that the cluster of ``config`` (as for ``ray up``) may have; None where it does not tell resources.

    Each node type counts as if it grew alone: with a bound over all types, which of them grow is not known before.
    """
    head = config.get("head_node_type")
    nodes: list[Node] = []
    for name, kind in (config.get("available_node_types") or {}).items():
        most = int(kind.get("max_workers", 0))
        count = 1 if name == head else min(most, int(config.get("max_workers", most)))
        if count and not kind.get("resources"):
            return None
        nodes += [kind["resources"]] * count
    return tuple(nodes)
