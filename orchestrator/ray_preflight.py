"""Asks every alive node of the Ray cluster, each in a task that can run nowhere else, within a time limit."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError, TaskUnschedulableError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator import preflight_probe
from orchestrator.errors import ConfigurationError

__all__ = ["Answer", "Node", "alive_nodes", "ask", "dashboard_address", "look_at_cluster"]


@dataclass(frozen=True, kw_only=True)
class Node:
    """A machine of the cluster, as Ray knows it."""

    id: str
    address: str
    num_gpus: float
    """GPUs that Ray may give away there."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a node said, or why it said nothing."""

    facts: Mapping[str, Any] | None
    error: str = ""
    sent: float = 0.0
    """Unix seconds of the driver's clock."""
    received: float = 0.0
    gone: bool = False
    """The node has left the cluster since it was listed."""


def alive_nodes() -> list[Node]:
    """The nodes of the cluster that this process has joined, in order of their address."""
    nodes = [
        Node(
            id=node["NodeID"], address=node["NodeManagerAddress"], num_gpus=node["Resources"].get("GPU", 0.0)
        )
        for node in ray.nodes()
        if node["Alive"]
    ]
    return sorted(nodes, key=lambda node: (node.address, node.id))


def dashboard_address() -> str:
    """HOST:PORT of the dashboard, where jobs are taken; empty when there is none."""
    from ray._private.worker import get_dashboard_url

    return str(get_dashboard_url() or "")


def look_at_cluster() -> tuple[list[Node], str]:
    """Nodes and dashboard of the cluster that RAY_ADDRESS names. Joins it for the moment, if this process has not."""
    if ray.is_initialized():
        return alive_nodes(), dashboard_address()
    try:
        ray.init(log_to_driver=False, configure_logging=False)
    except (ConnectionError, RuntimeError, ValueError, RayError) as error:
        raise ConfigurationError(f"the cluster does not take us: {error}") from error
    try:
        return alive_nodes(), dashboard_address()
    finally:
        ray.shutdown()


def ask(
    nodes: Sequence[Node],
    function: Callable[..., dict[str, Any]],
    arguments: Callable[[Node], tuple[Any, ...]],
    timeout_seconds: float,
) -> dict[str, Answer]:
    """Run ``function`` on each node; id of the node -> its answer. One that does not answer in time is given up."""
    ray.cloudpickle.register_pickle_by_value(preflight_probe)
    try:
        task = ray.remote(num_cpus=0, max_retries=0)(function)
        sent = time.time()
        waiting = {
            task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False)).remote(
                *arguments(node)
            ): node
            for node in nodes
        }
    finally:
        ray.cloudpickle.unregister_pickle_by_value(preflight_probe)
    answers: dict[str, Answer] = {}
    deadline = time.monotonic() + timeout_seconds
    while waiting and (left := deadline - time.monotonic()) > 0:
        ready, _ = ray.wait(list(waiting), num_returns=1, timeout=left)
        for reference in ready:
            node = waiting.pop(reference)
            answers[node.id] = _answer(reference, sent, node.id)
    for reference, node in waiting.items():
        ray.cancel(reference, force=True)
        answers[node.id] = Answer(facts=None, error=f"no answer within {timeout_seconds:g} s")
    return answers


def _answer(reference: Any, sent: float, node: str) -> Answer:
    try:
        return Answer(facts=ray.get(reference), sent=sent, received=time.time())
    except RayError as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        # Bound to its node and without resources, the task can be placed unless that node is no more.
        gone = isinstance(error, TaskUnschedulableError) or node not in {item.id for item in alive_nodes()}
        return Answer(facts=None, error=lines[-1].strip() if lines else type(error).__name__, gone=gone)
