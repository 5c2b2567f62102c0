"""What becomes of a group of workers when one of them fails: begin again, or give up, and with which reason.

Ray Train calls this in its controller, and begins again unless we raise.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

import ray
import torch.distributed as dist
from ray.exceptions import ActorUnavailableError, RayError, RayTaskError
from ray.exceptions import OutOfMemoryError as KilledForMemoryError
from ray.train import ControllerError, UserCallback

from orchestrator.errors import (
    ConfigurationError,
    DivergedError,
    OutOfMemoryError,
    StillhouseError,
    StorageError,
)
from orchestrator.retry import kind_of_death
from orchestrator.training import StopTraining

__all__ = [
    "GroupFailures",
    "PauseBeforeCollateral",
    "dead_nodes",
    "is_collateral",
    "is_lost_node",
    "stage_error",
]

FINAL = (ConfigurationError, DivergedError, OutOfMemoryError, StorageError, StopTraining)
"""What another start of the group would meet again, or what the trial itself knows how to wait for."""
COLLATERAL_SECONDS = 30.0
LOST_NODE_SECONDS = 75.0
"""After this long, with Ray's own settings, the cluster knows that a node without power is gone."""
SHUTDOWN_SECONDS = "5"
"""How long workers may take to leave a process group in which one is missing: they seldom can at all."""
LOST_NODE_SIGNS = ("node has died", "node was terminated", "node died", "preempted", "node is dead")
MEMORY_SIGNS = ("low on memory", "OutOfMemoryError")


def dead_nodes() -> frozenset[str]:
    """Nodes that this cluster has lost up to now."""
    return frozenset(node["NodeID"] for node in ray.nodes() if not node["Alive"])


class GroupFailures(UserCallback):
    """Counts the failures of one stage's workers. A lost node is none of theirs and is not counted.

    Args:
        max_failures: How often the group is started again after a worker's crash.
        find_dead_nodes: Nodes that the cluster has lost up to now.
        lost_node_seconds: How long a worker that does not answer is given to turn out as lost with its node.
    """

    def __init__(
        self,
        max_failures: int,
        find_dead_nodes: Callable[[], frozenset[str]] = dead_nodes,
        lost_node_seconds: float = LOST_NODE_SECONDS,
    ) -> None:
        self.max_failures = max_failures
        self.num_failures = 0
        self._find_dead_nodes = find_dead_nodes
        self._lost_node_seconds = lost_node_seconds
        self._dead = find_dead_nodes()

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Return to let the group begin again from its checkpoint; raise to end the stage."""
        os.environ.setdefault("TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S", SHUTDOWN_SECONDS)
        errors = [_root(error) for _, error in sorted(worker_exceptions.items())]
        final = [error for error in errors if isinstance(error, FINAL)]
        if final:
            raise final[0]
        for error in errors:
            if any(sign in str(error) for sign in MEMORY_SIGNS):
                raise OutOfMemoryError(f"a worker was killed for its use of memory: {error}")
        if not self._a_node_was_lost(errors):
            self._count(errors)

    def _a_node_was_lost(self, errors: list[Exception]) -> bool:
        """Whether a worker died with its node. Where one only does not answer, the cluster may not know yet."""
        is_open = any(isinstance(error, ActorUnavailableError) for error in errors)
        deadline = time.monotonic() + (self._lost_node_seconds if is_open else 0.0)
        while True:
            known, self._dead = self._dead, self._find_dead_nodes()
            if any(is_lost_node(error) for error in errors) or (is_open and self._dead - known):
                return True
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.5)

    def _count(self, errors: list[Exception]) -> None:
        self.num_failures += 1
        if self.num_failures > self.max_failures:
            told = [error for error in errors if not is_collateral(error)] or errors
            raise StillhouseError(
                f"its workers failed {self.num_failures} times, run.max_failures allows {self.max_failures}; "
                f"the last time: {type(told[0]).__name__}: {told[0]}"
            )


class PauseBeforeCollateral:
    """Scope in a worker that holds back the error of a broken connection, until its cause had time to show.

    When a host goes away its peers notice at once and the cluster later; taken at its word, their error would count
    as a crash. The group is stopped as soon as the cause is known, so this rarely lasts as long as it may.
    """

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and is_collateral(error):
            time.sleep(COLLATERAL_SECONDS)


def is_collateral(error: BaseException) -> bool:
    """Whether an error only says that another worker is not there any more."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def is_lost_node(error: BaseException) -> bool:
    """Whether a worker died with its node."""
    return bool(getattr(error, "preempted", False)) or any(
        sign in str(error).lower() for sign in LOST_NODE_SIGNS
    )


def stage_error(error: Exception, where: str) -> StillhouseError:
    """What Ray raises to the trial, as one of our own errors: the worker's where it raised one of these.

    A trial that hears of its own node's loss (Ray may err in that) has no result to tell, so it stops.
    """
    cause = error
    if isinstance(error, ControllerError):
        cause = error.controller_failure
    elif isinstance(error, RayTaskError):
        cause = error.cause
    if isinstance(cause, StillhouseError) and type(cause) is not StillhouseError:
        return cause
    if isinstance(cause, KilledForMemoryError) or "OutOfMemoryError" in str(cause):
        return OutOfMemoryError(f"{where}: {cause}")
    if isinstance(cause, RayError):
        if kind_of_death(str(cause)) == "node":
            return StopTraining(f"{where}: lost with its node: {cause}")
        return StillhouseError(f"{where}: its worker died more often than run.max_failures allows: {cause}")
    kind = "" if isinstance(cause, StillhouseError) else f"{type(cause).__name__}: "
    return StillhouseError(f"{where}: {kind}{cause}")


def _root(error: Exception) -> Exception:
    """The error of the worker below those in which Ray Train wraps it."""
    for name in ("_base_exc", "health_check_failure"):
        error = getattr(error, name, error)
    return error
