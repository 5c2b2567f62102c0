"""How many trials fit on the nodes of a cluster, and why none does. Pure: the nodes are handed in.

A worker lies on one node, so sums over the cluster say too much: two nodes with one GPU each hold no worker that
asks for two. Nodes are filled one worker at a time, as Ray does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

__all__ = ["Ask", "Cluster", "Node", "Waiting", "WaitState", "num_fitting", "why_none_fits"]

SHOWN_RESOURCES = ("CPU", "GPU")
MOST_TRIALS = 10_000
"""Bound of a count that would otherwise be infinite: a worker that asks for nothing fits any number of times."""


@dataclass(frozen=True, kw_only=True)
class Node:
    """One node, or one kind of node that an autoscaler may start."""

    name: str
    resources: Mapping[str, float]
    """In all, in use or not."""
    available: Mapping[str, float] | None = None
    """Not in use right now; None where unknown."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """What there is, and what may still come."""

    nodes: tuple[Node, ...]
    grows: bool = False
    """Whether an autoscaler starts nodes when something waits for resources."""
    largest: tuple[Node, ...] | None = None
    """Every node that the cluster has when fully grown; None where the autoscaler does not tell."""


@dataclass(frozen=True, kw_only=True)
class Ask:
    """What one trial needs at a time: workers, each on one node."""

    num_workers: int
    resources: Mapping[str, float]
    """Of each worker, by Ray's names."""

    def __str__(self) -> str:
        worker = _shown(self.resources, [name for name, need in self.resources.items() if need])
        return f"{self.num_workers} worker{'s' * (self.num_workers > 1)} with {worker} each"


def num_fitting(ask: Ask, nodes: Sequence[Node]) -> int:
    """How many trials with such needs run side by side on ``nodes``, each worker on one node."""
    return sum(_num_workers_on(node, ask.resources) for node in nodes) // ask.num_workers


def _num_workers_on(node: Node, resources: Mapping[str, float]) -> int:
    fits = [int(node.resources.get(name, 0.0) / need + 1e-9) for name, need in resources.items() if need > 0]
    return min(fits, default=MOST_TRIALS)


def why_none_fits(ask: Ask, cluster: Cluster) -> str:
    """One sentence: what a trial asks for and what every node has. Equal nodes are counted, not repeated."""
    nodes = cluster.nodes if cluster.largest is None else cluster.largest
    kinds: dict[str, int] = {}
    for node in nodes:
        text = _shown(node.resources, SHOWN_RESOURCES)
        kinds[text] = kinds.get(text, 0) + 1
    there = "; ".join(f"{count} x {text}" if count > 1 else text for text, count in kinds.items())
    head = "the cluster, fully grown, has" if cluster.largest is not None else "the cluster has"
    return f"a trial asks for {ask}; {head} {len(nodes)} node{'s' * (len(nodes) != 1)}: {there or 'none'}"


def _shown(resources: Mapping[str, float], names: Sequence[str]) -> str:
    return ", ".join(f"{resources.get(name, 0.0):g} {name}" for name in names) or "nothing"


@dataclass(frozen=True, kw_only=True)
class WaitState:
    """One look at a sweep that may have to wait for nodes."""

    slots: int
    """How many trials may be under way now, those that wait for a node to be started included."""
    text: str = ""
    """What is waited for; empty when nothing is."""
    is_hopeless: bool = False
    """Nothing can be placed, and has not been for too long."""


@dataclass
class Waiting:
    """Decides how many trials may be asked for, and when waiting has lasted too long.

    Args:
        ask: What a trial needs.
        concurrent_trials: The user's bound, or None.
        patience_seconds: How long a cluster that cannot hold one trial is waited for; None waits without end where
            the cluster grows by itself, and a minute elsewhere.
    """

    ask: Ask
    concurrent_trials: int | None = None
    patience_seconds: float | None = None
    _since: float | None = field(default=None, init=False)

    def look(self, cluster: Cluster, now: float, *, is_running: bool = False) -> WaitState:
        """What holds at ``now`` (seconds that only grow). ``is_running``: some trial is making progress."""
        here = num_fitting(self.ask, cluster.nodes)
        slots = self._slots(cluster, here)
        if here > 0:
            self._since = None
            return WaitState(slots=slots)
        if is_running or self._since is None:
            self._since = now
        text = why_none_fits(self.ask, Cluster(nodes=cluster.nodes))
        if cluster.largest is not None and num_fitting(self.ask, cluster.largest) < 1:
            text = why_none_fits(self.ask, cluster)
            patience: float | None = 0.0
        else:
            patience = self._patience(cluster)
        is_hopeless = patience is not None and now - self._since >= patience and not is_running
        return WaitState(slots=slots, text=text, is_hopeless=is_hopeless)

    def _slots(self, cluster: Cluster, here: int) -> int:
        if not cluster.grows:
            slots = here
        elif cluster.largest is None:
            slots = MOST_ASKED_OF_AN_AUTOSCALER
        else:
            slots = num_fitting(self.ask, cluster.largest)
        slots = max(slots, here)
        return slots if self.concurrent_trials is None else min(slots, self.concurrent_trials)

    def _patience(self, cluster: Cluster) -> float | None:
        if self.patience_seconds is not None:
            return self.patience_seconds
        return None if cluster.grows else FIXED_CLUSTER_PATIENCE_SECONDS


MOST_ASKED_OF_AN_AUTOSCALER = 64
"""Trials that are asked for at a time where the autoscaler does not tell how far it may grow."""
FIXED_CLUSTER_PATIENCE_SECONDS = 60.0
"""Nodes of a cluster that has just been started join within some 20 seconds."""
