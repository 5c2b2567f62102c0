"""What fits on which nodes, and how long it is waited for."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.capacity import (
    FIXED_CLUSTER_PATIENCE_SECONDS,
    MOST_ASKED_ALONE,
    MOST_ASKED_IN_GROUPS,
    Cluster,
    Node,
    Waiting,
    num_fitting,
    why_unplaced,
)
from orchestrator.placement import WorkerSettings

HEAD: Node = {"memory": 1e9}
CPUS: Node = {"CPU": 4.0}
ONE_GPU: Node = {"CPU": 4.0, "GPU": 1.0}
TWO_GPUS: Node = {"CPU": 8.0, "GPU": 2.0}
WEEK_SECONDS = 7 * 24 * 3600.0


def workers(number: int = 1, cpus: int = 1, gpus: float = 0.0, **more: Any) -> WorkerSettings:
    return WorkerSettings(workers=number, cpus_per_worker=cpus, gpus_per_worker=gpus, **more)


FITS: list[tuple[WorkerSettings, tuple[Node, ...], int]] = [
    (workers(), (CPUS,), 4),
    (workers(), (HEAD,), 0),
    (workers(), (), 0),
    (workers(cpus=3), (CPUS, CPUS), 2),  # the sum would hold 8 / 3
    (workers(gpus=2), (ONE_GPU, ONE_GPU), 0),  # the sum would hold one
    (workers(gpus=2), (ONE_GPU, TWO_GPUS), 1),
    (workers(number=2, gpus=1), (ONE_GPU, ONE_GPU, HEAD), 1),
    (workers(number=2, gpus=1), (ONE_GPU, TWO_GPUS), 1),
    (workers(number=2, gpus=1), (TWO_GPUS, TWO_GPUS), 2),
    (workers(number=4, gpus=1, min_workers=1), (ONE_GPU,), 1),
    (workers(gpus=0.25), (ONE_GPU,), 4),
    (workers(gpus=0.1), (ONE_GPU,), 4),  # ten by GPU, four by CPU
    (workers(gpus=0.1, cpus=1), ({"CPU": 64.0, "GPU": 1.0},), 10),
]


@pytest.mark.parametrize(("asked", "nodes", "fits"), FITS)
def test_workers_lie_on_one_node_each(asked: WorkerSettings, nodes: tuple[Node, ...], fits: int) -> None:
    assert num_fitting(asked, nodes) == fits


def test_the_reason_names_what_is_asked_and_what_every_node_has() -> None:
    text = why_unplaced("teacher", workers(number=2, gpus=2), (ONE_GPU, ONE_GPU, CPUS))
    assert text == (
        "stage teacher asks for 2 workers with 1 CPU, 2 GPU each; "
        "the cluster has 3 nodes: 2 x (4 CPU, 1 GPU); 1 x (4 CPU, 0 GPU)"
    )
    assert why_unplaced("teacher", workers(), ()).endswith("the cluster has 0 nodes: none")


def waiting(**changes: Any) -> Waiting:
    return Waiting(**{"wanted": {"teacher": workers(gpus=2), "student": workers(gpus=1)}, **changes})


def test_a_fixed_cluster_is_waited_for_a_minute() -> None:
    looks = waiting()
    small = Cluster(nodes=(HEAD,))
    first, last = looks.look(small, 100.0), looks.look(small, 99.0 + FIXED_CLUSTER_PATIENCE_SECONDS)
    assert (first.slots, first.is_hopeless, last.is_hopeless) == (0, False, False)
    assert first.text.startswith("stage teacher asks for 1 worker with 1 CPU, 2 GPU;")
    assert looks.look(small, 101.0 + FIXED_CLUSTER_PATIENCE_SECONDS).is_hopeless


def test_a_node_that_joins_ends_the_wait_and_one_that_leaves_begins_it_anew() -> None:
    looks = waiting()
    looks.look(Cluster(nodes=(HEAD,)), 0.0)
    joined = looks.look(Cluster(nodes=(HEAD, TWO_GPUS)), 59.0)
    assert (joined.slots, joined.text, joined.is_hopeless) == (2, "", False)
    assert looks.look(Cluster(nodes=(HEAD, TWO_GPUS, TWO_GPUS)), 60.0).slots == 4
    assert not looks.look(Cluster(nodes=(HEAD,)), 200.0).is_hopeless
    assert looks.look(Cluster(nodes=(HEAD,)), 261.0).is_hopeless


def test_work_that_goes_on_meanwhile_gives_hope() -> None:
    looks = waiting()
    small = Cluster(nodes=(ONE_GPU,))
    states = [looks.look(small, at, is_running=True) for at in (0.0, 100.0, 1000.0)]
    assert not any(state.is_hopeless for state in states)
    assert all(state.slots == 1 for state in states)  # a student has room
    assert not looks.look(small, 1030.0).is_hopeless
    assert looks.look(small, 1061.0).is_hopeless


@pytest.mark.parametrize("grows", [False, True])
def test_the_user_says_how_long(grows: bool) -> None:
    looks = waiting(patience_seconds=5.0)
    cluster = Cluster(nodes=(HEAD,), grows=grows)
    assert [looks.look(cluster, at).is_hopeless for at in (0.0, 4.0, 6.0)] == [False, False, True]


def test_an_autoscaler_is_waited_for_without_end_and_asked_for_many_trials() -> None:
    looks = waiting()
    grows = Cluster(nodes=(HEAD,), grows=True)
    states = [looks.look(grows, at) for at in (0.0, WEEK_SECONDS)]
    assert [(state.slots, state.is_hopeless) for state in states] == [(MOST_ASKED_ALONE, False)] * 2
    assert states[0].text
    groups = waiting(wanted={"teacher": workers(number=2)})
    assert groups.look(grows, 0.0).slots == MOST_ASKED_IN_GROUPS
    assert waiting(concurrent_trials=3).look(grows, 0.0).slots == 3


@pytest.mark.parametrize(("largest", "slots", "is_hopeless"), [((HEAD, TWO_GPUS, TWO_GPUS), 4, False), ((HEAD, ONE_GPU), 1, True)])  # fmt: skip
def test_what_the_grown_cluster_cannot_hold_is_refused_at_once(
    largest: tuple[Node, ...], slots: int, is_hopeless: bool
) -> None:
    state = waiting().look(Cluster(nodes=(HEAD,), grows=True, largest=largest), 0.0)
    assert (state.slots, state.is_hopeless) == (slots, is_hopeless)
    assert ("fully grown" in state.text) == is_hopeless


def test_on_a_cluster_of_our_own_nothing_is_waited_for() -> None:
    state = waiting().look(Cluster(nodes=(CPUS,), largest=(CPUS,)), 0.0)
    assert state.is_hopeless
    assert "fully grown" not in state.text


@pytest.mark.parametrize(("concurrent_trials", "slots"), [(None, 4), (3, 3), (9, 4)])
def test_the_users_bound_holds(concurrent_trials: int | None, slots: int) -> None:
    looks = waiting(wanted={"student": workers()}, concurrent_trials=concurrent_trials)
    assert looks.look(Cluster(nodes=(CPUS,)), 0.0).slots == slots
