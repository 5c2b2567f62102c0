"""What Ray Train's controller is told when workers fail: begin again, or end with a reason."""

from __future__ import annotations

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayActorError, RayTaskError
from ray.exceptions import OutOfMemoryError as KilledForMemoryError
from ray.train import ControllerError

from orchestrator import group_failures
from orchestrator.errors import (
    ConfigurationError,
    DamagedArtifactError,
    DivergedError,
    OutOfMemoryError,
    StillhouseError,
    StorageError,
)
from orchestrator.fence import FencedError
from orchestrator.group_failures import GroupFailures, PauseBeforeCollateral, is_collateral, stage_error
from orchestrator.loop import StopTraining


class Wrapped(Exception):  # noqa: N818 - as Ray Train does
    def __init__(self, error: Exception, name: str) -> None:
        super().__init__("wrapped")
        setattr(self, name, error)


GLOO = RuntimeError(
    "[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1234"
)
LOST = RayActorError(error_msg="The actor died because its node has died. Node Id: 0123")
KILLED = RayActorError(error_msg="The actor died unexpectedly: worker exited with exit code 1")
UNAVAILABLE = ActorUnavailableError("RPC error: Connection reset by peer", b"0123456789abcdef")


class Nodes:
    """What the cluster knows of its dead nodes: one more after each ``num_looks`` looks."""

    def __init__(self, *looks: set[str]) -> None:
        self.looks = list(looks)

    def __call__(self) -> frozenset[str]:
        return frozenset(self.looks.pop(0) if len(self.looks) > 1 else self.looks[0])


def failures(max_failures: int, *looks: set[str], seconds: float = 0.0) -> GroupFailures:
    return GroupFailures(max_failures, Nodes(*looks or (set(),)), seconds)


@pytest.mark.parametrize(
    "error",
    [
        ConfigurationError("no GPU"), DivergedError("nan"), OutOfMemoryError("peak 3"), StorageError("full"),
        DamagedArtifactError("torn"), StopTraining("stop"), FencedError("taken over"),
    ],
)  # fmt: skip
def test_what_another_start_would_meet_again_ends_the_stage(error: Exception) -> None:
    with pytest.raises(type(error)) as raised:
        failures(5).after_exception(None, {0: GLOO, 1: Wrapped(error, "_base_exc")})
    assert raised.value is error


def test_crashes_are_counted() -> None:
    group = failures(2)
    for _ in range(2):
        group.after_exception(None, {0: GLOO, 1: Wrapped(KILLED, "health_check_failure")})
    with pytest.raises(
        StillhouseError, match=r"failed 3 times, run.max_failures allows 2; the last time: RayActor"
    ):
        group.after_exception(None, {0: GLOO, 1: KILLED})


def test_a_lost_node_is_not_counted() -> None:
    group = failures(0)
    for _ in range(3):
        group.after_exception(None, {0: GLOO, 1: Wrapped(LOST, "health_check_failure")})
    preempted = RayActorError(error_msg="gone", preempted=True)
    group.after_exception(None, {1: preempted})
    assert group.num_failures == 0


def test_a_silent_worker_is_given_time_to_turn_out_as_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group_failures.time, "sleep", lambda seconds: None)
    group = failures(0, {"old"}, {"old"}, {"old"}, {"old", "new"}, seconds=30)
    group.after_exception(None, {1: UNAVAILABLE})
    assert group.num_failures == 0
    with pytest.raises(StillhouseError, match="ActorUnavailable"):  # no further node has gone
        failures(0, {"old"}).after_exception(None, {1: UNAVAILABLE})
    with pytest.raises(StillhouseError):  # a crash is a crash, whatever happens to other nodes
        failures(0, set(), {"other"}, seconds=30).after_exception(None, {1: KILLED})


def test_a_worker_killed_for_memory_is_out_of_memory() -> None:
    killed = RayActorError(
        error_msg="The actor died: the worker was killed due to the node running low on memory."
    )
    with pytest.raises(OutOfMemoryError, match="low on memory"):
        failures(5).after_exception(None, {0: GLOO, 1: killed})


def test_a_broken_connection_is_held_back(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(group_failures.time, "sleep", pauses.append)
    for error, num_pauses in ((ValueError("gloo"), 0), (RuntimeError("shape"), 0), (GLOO, 1)):
        pauses.clear()
        with pytest.raises(type(error)), PauseBeforeCollateral():
            raise error
        assert len(pauses) == num_pauses
    assert is_collateral(GLOO)
    with PauseBeforeCollateral():
        pass


@pytest.mark.parametrize(
    ("error", "kind", "told"),
    [
        (ControllerError(DivergedError("nan at epoch 2")), DivergedError, "nan at epoch 2"),
        (ControllerError(StillhouseError("its workers failed 2 times")), StillhouseError, "stage s: its workers failed"),
        (ControllerError(ValueError("odd")), StillhouseError, "stage s: ValueError: odd"),
        (RayTaskError("f", "trace", OutOfMemoryError("peak 3")), OutOfMemoryError, "peak 3"),
        (KilledForMemoryError("low on memory"), OutOfMemoryError, "stage s: low on memory"),
        (KILLED, StillhouseError, "stage s: its worker died more often than run.max_failures allows"),
        (ActorDiedError(), StillhouseError, "stage s: its worker died more often than run.max_failures allows"),
    ],
)  # fmt: skip
def test_what_a_trial_hears_of_its_workers_is_one_of_our_errors(
    error: Exception, kind: type[Exception], told: str
) -> None:
    found = stage_error(error, "stage s")
    assert type(found) is kind
    assert str(found).startswith(told)


@pytest.mark.parametrize(
    "text",
    [
        "The actor is dead because its owner has died. Worker exit detail: Owner's node has crashed.",
        "The actor died because its node has died. Node Id: 0123",
    ],
)
def test_a_trial_that_hears_of_its_own_nodes_loss_records_no_failure(text: str) -> None:
    """The cluster may be wrong about that: a busy node can miss the health checks and go on."""
    assert isinstance(stage_error(RayActorError(error_msg=text), "stage s"), StopTraining)
