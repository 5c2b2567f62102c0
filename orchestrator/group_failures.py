"""What becomes of a group of workers when one of them fails: begin again, or give up, and with which reason.

Ray Train calls this in its controller, and begins again unless we raise. It imports nothing of Ray beyond the base
class that Ray Train asks for.
"""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

import torch.distributed as dist
from ray.train import UserCallback

from orchestrator.errors import (
    ConfigurationError,
    DivergedError,
    OutOfMemoryError,
    StillhouseError,
    StorageError,
)
from orchestrator.training import StopTraining

__all__ = ["GroupFailures", "PauseBeforeCollateral", "is_collateral", "is_lost_node"]

FINAL = (ConfigurationError, DivergedError, OutOfMemoryError, StorageError, StopTraining)
"""What another start of the group would meet again, or what the trial itself knows how to wait for."""
COLLATERAL_SECONDS = 30.0
LOST_NODE_SIGNS = ("node has died", "node was terminated", "node died", "preempted", "node is dead")
MEMORY_SIGNS = ("low on memory", "OutOfMemoryError")


class GroupFailures(UserCallback):
    """Counts the failures of one stage's workers. A lost node is none of theirs and is not counted."""

    def __init__(self, max_failures: int) -> None:
        self.max_failures = max_failures
        self.num_failures = 0

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Return to let the group begin again from its checkpoint; raise to end the stage."""
        errors = [_root(error) for _, error in sorted(worker_exceptions.items())]
        final = [error for error in errors if isinstance(error, FINAL)]
        if final:
            raise final[0]
        for error in errors:
            if any(sign in str(error) for sign in MEMORY_SIGNS):
                raise OutOfMemoryError(f"a worker was killed for its use of memory: {error}")
        if any(is_lost_node(error) for error in errors):
            return
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


def _root(error: Exception) -> Exception:
    """The error of the worker below those in which Ray Train wraps it."""
    for name in ("_base_exc", "health_check_failure"):
        error = getattr(error, name, error)
    return error
