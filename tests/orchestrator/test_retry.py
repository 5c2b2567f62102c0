"""Failures by kind: what Ray says about a death, and what follows from it."""

from __future__ import annotations

import pytest

from orchestrator.retry import (
    LONGEST_PAUSE_SECONDS,
    NODE_LOSSES_SECONDS,
    Attempts,
    Kind,
    death_text,
    kind_of_death,
)

DIED = "The actor died unexpectedly before finishing this task.\n\tclass_name: A\n\tactor_id: 156a\n\tpid: 6754\n"
NODE_DEAD = (
    "The actor died because its node has died. Node Id: f049\n"
    "\tthe actor's node was terminated unexpectedly: health check failed due to missing too many heartbeats"
)
DRAINED = (
    "The actor died because its node has died. Node Id: 9fc2\n"
    "\tthe actor's node was terminated expectedly: received SIGTERM"
)
CRASHED = (
    "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker "
    "unexpectedly exits with a connection error code 2. End of file. Some common causes include: (1) the process was "
    "killed by the OOM killer due to high memory usage, (2) ray stop --force was called"
)
KILLED = (
    "1 worker(s) were killed due to the node running low on memory. Memory on the node (IP: 10.0.0.2, ID: ab00) was "
    "1.63GB used / 23.54GB limit (0.069182)\nOOM kill reason: Memory usage exceeded threshold\nSelected to kill: "
    "(Actor(d4b5): pid=6677, actual memory used=0.25GB, worker ID=a872)\nTop 10 memory users: PID\tMEM(GB)\tCOMMAND"
)
ORPHANED = (
    "The actor is dead because its owner has died. Owner Id: 53ab Owner Ip address: 10.0.0.2 Owner worker exit type: "
    "SYSTEM_ERROR Worker exit detail: Owner's node has crashed."
)
UNAVAILABLE = (
    "The actor 156a is unavailable: The actor is temporarily unavailable: RpcError: RPC error: Deadline"
)
"""As Ray 2.60 words them, shortened where nothing is looked for."""


@pytest.mark.parametrize(
    ("text", "kind", "shown"),
    [
        (DIED + NODE_DEAD, "node", "the trial's node was lost: The actor died because its node has died. Node Id: f049"),
        (DIED + DRAINED, "node", "the trial's node was lost: The actor died because its node has died. Node Id: 9fc2"),
        (DIED + ORPHANED, "node", "the trial's node was lost: The actor is dead because its owner has died"),
        (UNAVAILABLE, "node", "the trial's node was lost: The actor 156a is unavailable"),
        (DIED + CRASHED, "process", "the trial's process died: The actor is dead because its worker process"),
        (KILLED, "memory", "the trial's process was killed for its use of memory: 1 worker(s) were killed"),
        ("", "process", "the trial's process died: no reason given"),
        ("Failure # 1\nValueError: odd", "process", "the trial's process died: ValueError: odd"),
    ],
)  # fmt: skip
def test_a_death_has_a_kind_and_a_sentence(text: str, kind: Kind, shown: str) -> None:
    assert kind_of_death(text) == kind
    assert death_text(text)[0].startswith(shown)


def test_the_peak_is_read_where_ray_tells_it() -> None:
    assert death_text(KILLED)[1] == 2**28
    assert death_text(DIED + CRASHED)[1] == 0


@pytest.mark.parametrize("max_failures", [0, 1, 3])
def test_crashes_are_counted(max_failures: int) -> None:
    attempts = Attempts(max_failures)
    decisions = [attempts.decide("trial", "process", now=0.0) for _ in range(max_failures + 1)]
    assert [decision.again for decision in decisions] == [True] * max_failures + [False]
    assert [decision.pause_seconds for decision in decisions[:-1]] == [
        2.0**number for number in range(max_failures)
    ]
    assert f"run.max_failures is {max_failures}" in decisions[-1].text
    assert attempts.decide("other", "process", now=0.0).again == (max_failures > 0)


def test_lost_nodes_are_paced_and_not_counted() -> None:
    attempts = Attempts(max_failures=0)
    decisions = [attempts.decide("trial", "node", now=float(number)) for number in range(30)]
    assert all(decision.again for decision in decisions)
    pauses = [decision.pause_seconds for decision in decisions]
    assert pauses == sorted(pauses)
    assert (pauses[0], pauses[-1]) == (2.0, LONGEST_PAUSE_SECONDS)
    assert "not counted" in decisions[0].text
    assert not attempts.decide("trial", "process", now=0.0).again


def test_a_trial_that_only_loses_nodes_comes_to_an_end() -> None:
    attempts = Attempts(max_failures=9)
    attempts.decide("trial", "node", now=0.0)
    assert attempts.decide("trial", "node", now=NODE_LOSSES_SECONDS - 1).again
    given_up = attempts.decide("trial", "node", now=NODE_LOSSES_SECONDS + 1)
    assert not given_up.again
    assert "lost its node 3 times in 24 hours" in given_up.text


def test_progress_begins_the_pacing_anew() -> None:
    attempts = Attempts(max_failures=9)
    for _ in range(5):
        attempts.decide("trial", "node", now=0.0)
    attempts.progressed("trial")
    later = attempts.decide("trial", "node", now=10 * NODE_LOSSES_SECONDS)
    assert (later.again, later.pause_seconds) == (True, 2.0)


@pytest.mark.parametrize("kind", ["memory", "diverged", "configuration", "storage", "other"])
def test_what_another_attempt_would_meet_again_is_not_tried(kind: Kind) -> None:
    assert not Attempts(max_failures=9).decide("trial", kind, now=0.0).again


def test_memory_is_tried_again_when_the_next_attempt_asks_for_less() -> None:
    attempts = Attempts(max_failures=0)
    assert all(attempts.decide("trial", "memory", now=0.0, is_lighter=True).again for _ in range(5))
    assert not attempts.decide("trial", "memory", now=0.0).again
