"""How many trials fit on the nodes of a cluster, and why none does. Pure: the nodes are handed in.

A worker lies on one node, so sums over the cluster say too much: two nodes with one GPU each hold no worker that
asks for two. Resources in use are counted as there: whoever uses them gives them back some day.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from orchestrator.placement import WorkerSettings

__all__ = ["Cluster", "Node", "WaitState", "Waiting", "num_fitting", "why_unplaced"]

MOST_WORKERS_ON_A_NODE = 10_000
MOST_ASKED_ALONE = 64
MOST_ASKED_IN_GROUPS = 8
"""Trials asked for at a time where an autoscaler does not tell how far it may grow; ``run.concurrent_trials`` says
otherwise. A trial whose stages have groups of workers holds a process on the head while it waits: hence fewer."""
FIXED_CLUSTER_PATIENCE_SECONDS = 60.0
"""The nodes of a cluster that has just been started join within some 20 seconds."""

Node = Mapping[str, float]
"""What a node has in all, in use or not, by Ray's names."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """What there is, and what may still come."""

    nodes: tuple[Node, ...]
    grows: bool = False
    """Whether an autoscaler starts nodes when something waits for resources."""
    largest: tuple[Node, ...] | None = None
    """Every node when fully grown (``nodes`` where nothing can join); None where that is not known."""


def num_fitting(workers: WorkerSettings, nodes: Sequence[Node]) -> int:
    """How many groups of such workers run side by side on ``nodes``, as small as they may be."""
    return sum(_num_on(node, workers.resources) for node in nodes) // workers.least_workers


def _num_on(node: Node, resources: Mapping[str, float]) -> int:
    fits = [int(node.get(name, 0.0) / need + 1e-9) for name, need in resources.items() if need > 0]
    return min(fits, default=MOST_WORKERS_ON_A_NODE)


def why_unplaced(name: str, workers: WorkerSettings, nodes: Sequence[Node], *, is_all: bool = False) -> str:
    """What stage ``name`` asks for and what every node has. Equal nodes are counted, not repeated.

    Args:
        is_all: ``nodes`` are those of the fully grown cluster.
    """
    number = workers.least_workers
    asked = f"{number} worker{'s' * (number > 1)} with {_shown(workers.resources)}{' each' * (number > 1)}"
    kinds = Counter(_shown({kind: node.get(kind, 0.0) for kind in workers.resources}) for node in nodes)
    there = "; ".join(f"{count} x ({text})" for text, count in kinds.items())
    cluster = "the cluster, fully grown," if is_all else "the cluster"
    return f"stage {name} asks for {asked}; {cluster} has {len(nodes)} node{'s' * (len(nodes) != 1)}: {there or 'none'}"


def _shown(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{amount:g} {kind}" for kind, amount in resources.items())


@dataclass(frozen=True, kw_only=True)
class WaitState:
    """One look at a sweep that may have to wait for nodes."""

    slots: int
    """How many trials may be under way now, those included for which a node has to be started first."""
    text: str = ""
    """What is waited for; empty when nothing is."""
    is_hopeless: bool = False
    """Some stage cannot be placed, nothing else runs meanwhile, and this has lasted too long."""


@dataclass
class Waiting:
    """Decides how many trials may be under way, and when waiting for nodes has lasted too long.

    Args:
        wanted: Stage -> its workers.
        concurrent_trials: The user's bound on trials at a time, or None.
        patience_seconds: How long a stage that fits on no node is waited for. None: without end where the cluster
            grows by itself, a minute elsewhere.
    """

    wanted: Mapping[str, WorkerSettings]
    concurrent_trials: int | None = None
    patience_seconds: float | None = None
    _since: float | None = field(default=None, init=False)

    def look(self, cluster: Cluster, now: float, *, is_running: bool = False) -> WaitState:
        """What holds at ``now`` (seconds that only grow). ``is_running``: some trial is at work meanwhile."""
        slots = self._slots(cluster)
        unplaced = self._unplaced(cluster.nodes)
        if not unplaced:
            self._since = None
            return WaitState(slots=slots)
        if is_running or self._since is None:
            self._since = now
        if cluster.largest is not None and (never := self._unplaced(cluster.largest)):
            is_all = cluster.grows
            text = why_unplaced(never[0], self.wanted[never[0]], cluster.largest, is_all=is_all)
            return WaitState(slots=slots, text=text, is_hopeless=not is_running)
        patience = self._patience_seconds(cluster)
        is_hopeless = patience is not None and now - self._since >= patience and not is_running
        text = why_unplaced(unplaced[0], self.wanted[unplaced[0]], cluster.nodes)
        return WaitState(slots=slots, text=text, is_hopeless=is_hopeless)

    def _unplaced(self, nodes: Sequence[Node]) -> list[str]:
        return [name for name, workers in self.wanted.items() if num_fitting(workers, nodes) < 1]

    def _slots(self, cluster: Cluster) -> int:
        nodes = (cluster.largest or cluster.nodes) if cluster.grows else cluster.nodes
        slots = max((num_fitting(workers, nodes) for workers in self.wanted.values()), default=0)
        if cluster.grows and cluster.largest is None:
            alone = all(workers.is_alone for workers in self.wanted.values())
            slots = max(slots, MOST_ASKED_ALONE if alone else MOST_ASKED_IN_GROUPS)
        return slots if self.concurrent_trials is None else min(slots, self.concurrent_trials)

    def _patience_seconds(self, cluster: Cluster) -> float | None:
        if self.patience_seconds is not None:
            return self.patience_seconds
        return None if cluster.grows else FIXED_CLUSTER_PATIENCE_SECONDS
