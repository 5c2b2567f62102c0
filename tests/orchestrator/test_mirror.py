"""The retry rules, with a target that fails on purpose. MLflow itself is in test_tracking.py."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from orchestrator import mirror as mirror_module
from orchestrator.journal import Journal, Record
from orchestrator.mirror import MAX_ATTEMPTS, Failure, Follower, grouped
from orchestrator.tracking_state import MirrorState, state_path


class FakeTarget:
    """Keeps what it gets; ``trouble`` may raise before it does."""

    def __init__(self) -> None:
        self.received: list[tuple[str, str]] = []
        self.trouble: Callable[[Record], Exception | None] = lambda record: None
        self.up = True
        self.failure = Failure.UNAVAILABLE
        self.num_sends = 0
        self.num_settles = 0

    def send(self, group: Sequence[Record]) -> None:
        self.num_sends += 1
        problem = self.trouble(group[0])
        if problem is not None:
            raise problem
        self.received += [(record["op"], record["id"]) for record in group]

    def settle(self) -> None:
        self.num_settles += 1

    def alive(self) -> bool:
        return self.up

    def classify(self, problem: Exception) -> Failure:
        return self.failure


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror_module, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(mirror_module, "MAX_PAUSE_SECONDS", 0.02)


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    journal = Journal(tmp_path / "journal.jsonl")
    journal.run("sweep", name="s", parent=None, kind="sweep")
    journal.run("trial", name="t", parent="sweep", kind="trial")
    journal.params("trial", {"a": 1})
    journal.end("trial", "FINISHED")
    return journal


@pytest.fixture
def follow(journal: Journal) -> Iterator[Callable[[FakeTarget], Follower]]:
    followers: list[Follower] = []

    def start(target: FakeTarget) -> Follower:
        follower = Follower(journal.path, "somewhere", lambda state: target, retry_seconds=0.01)
        followers.append(follower)
        follower.start()
        return follower

    yield start
    for follower in followers:
        follower.close(0.1)


SENT = [("run", "sweep"), ("run", "trial"), ("params", "trial"), ("end", "trial")]


def test_delivers_in_order_and_a_later_follower_goes_on_where_it_stopped(journal: Journal, follow) -> None:
    first, second = FakeTarget(), FakeTarget()
    assert follow(first).close(5) == 0
    journal.tags("sweep", {"b": "c"})
    assert follow(second).close(5) == 0
    assert first.received == SENT
    assert second.received == [("tags", "sweep")]


def test_an_outage_delays_and_loses_nothing(
    journal: Journal, follow, caplog: pytest.LogCaptureFixture
) -> None:
    target = FakeTarget()
    target.trouble = lambda record: ConnectionError("nobody there")
    with caplog.at_level(logging.WARNING):
        follower = follow(target)
        assert follower.drain(0.2) == 4
        target.trouble = lambda record: None
        assert follower.drain(5) == 0
    assert target.received == SENT
    assert caplog.text.count("nobody there") == 1
    assert "tracking is back" in caplog.text


def test_a_refused_record_is_named_once_counted_and_left_out(
    journal: Journal, follow, caplog: pytest.LogCaptureFixture
) -> None:
    target = FakeTarget()
    target.failure = Failure.REJECTED
    target.trouble = lambda record: ValueError("bad name") if record["op"] == "params" else None
    with caplog.at_level(logging.WARNING):
        follower = follow(target)
        assert follower.drain(5) == 0
    assert target.received == [entry for entry in SENT if entry[0] != "params"]
    assert follower.state.num_rejected == 1
    assert caplog.text.count("params of trial") == 1


@pytest.mark.parametrize(("failure", "op", "up", "skipped"), [
    (Failure.UNKNOWN, "params", True, True),
    (Failure.UNKNOWN, "params", False, False),
    (Failure.UNAVAILABLE, "params", True, False),
    (Failure.UNAVAILABLE, "artifact", True, True),
])  # fmt: skip
def test_what_is_uncertain_is_tried_a_few_times(
    journal: Journal, follow, tmp_path: Path, *, failure: Failure, op: str, up: bool, skipped: bool
) -> None:
    journal.artifact("trial", tmp_path)
    target = FakeTarget()
    target.failure, target.up = failure, up
    target.trouble = lambda record: RuntimeError("500") if record["op"] == op else None
    waiting = follow(target).drain(5 if skipped else 0.5)
    assert (waiting == 0) == skipped
    assert target.num_sends > MAX_ATTEMPTS


def test_a_failing_connection_is_tried_again(journal: Journal) -> None:
    target, attempts = FakeTarget(), []

    def connect(state: MirrorState) -> FakeTarget:
        attempts.append(1)
        if len(attempts) < 3:
            raise OSError("migration running")
        return target

    follower = Follower(journal.path, "somewhere", connect, retry_seconds=0.01)
    follower.start()
    assert follower.close(5) == 0
    assert target.received == SENT


def test_two_followers_of_one_journal_do_not_send_at_the_same_time(journal: Journal, follow) -> None:
    first, second = FakeTarget(), FakeTarget()
    one = follow(first)
    assert one.drain(5) == 0
    two = follow(second)
    journal.tags("sweep", {"b": "c"})
    assert one.drain(5) == 0
    two.drain(0.2)
    assert second.received == []
    one.close(1)
    journal.tags("sweep", {"d": "e"})
    assert two.drain(5) == 0
    assert ("tags", "sweep") in second.received


def test_a_follower_waits_for_its_turn_and_goes_on_where_the_one_before_came_to(
    journal: Journal, follow, caplog
) -> None:
    first, second = FakeTarget(), FakeTarget()
    first.trouble = lambda record: time.sleep(0.2)  # type: ignore[func-returns-value, return-value]
    one = follow(first)
    while first.num_sends == 0:
        time.sleep(0.01)
    two = follow(second)
    assert one.close(10) == 0
    journal.tags("sweep", {"b": "c"})
    assert two.drain(10) == 0
    assert (first.received, second.received) == (SENT, [("tags", "sweep")])
    assert not [record for record in caplog.records if "tracking waits" in record.message]


def test_a_closed_follower_sends_no_more(journal: Journal, follow) -> None:
    target = FakeTarget()
    target.trouble = lambda record: time.sleep(0.3)  # type: ignore[func-returns-value, return-value]
    one = follow(target)
    while target.num_sends == 0:
        time.sleep(0.01)
    assert one.close(0.0) == 4
    sent = len(target.received)
    assert sent < len(SENT)
    later = FakeTarget()
    assert follow(later).close(10) == 0
    assert (len(target.received), later.received) == (sent, SENT)


@pytest.mark.parametrize("content", [b"", b"{", b'{"targets": 3}', b"\xff\xfe"])
def test_a_broken_state_only_costs_time(journal: Journal, follow, content: bytes) -> None:
    state_path(journal.path).write_bytes(content)
    target = FakeTarget()
    assert follow(target).close(5) == 0
    assert target.received == SENT


def test_another_target_starts_from_the_beginning_and_keeps_the_first(journal: Journal) -> None:
    for name in ("one", "two", "one"):
        target = FakeTarget()
        follower = Follower(journal.path, name, lambda state, target=target: target, retry_seconds=0.01)
        follower.start()
        assert follower.close(5) == 0
    assert target.received == []
    assert "one" not in state_path(journal.path).read_text()


def test_drain_is_bounded_and_close_does_not_wait_for_a_stuck_server(journal: Journal, follow) -> None:
    target = FakeTarget()
    target.trouble = lambda record: time.sleep(3)  # type: ignore[func-returns-value, return-value]
    started = time.monotonic()
    assert follow(target).close(0.3) == 4
    assert time.monotonic() - started < 2.5


def test_grouping_keeps_the_order_within_a_run() -> None:
    ops = [
        ("run", "a"),
        ("run", "b"),
        ("metrics", "a"),
        ("metrics", "b"),
        ("params", "a"),
        ("end", "a"),
        ("tags", "a"),
        ("tags", "b"),
    ]
    batch = [({"op": op, "id": id}, place) for place, (op, id) in enumerate(ops)]
    groups = [[ops[place] for _, place in group] for group in grouped(batch)]
    assert groups == [
        [("run", "a")],
        [("run", "b")],
        [("metrics", "a"), ("params", "a")],
        [("metrics", "b"), ("tags", "b")],
        [("end", "a")],
        [("tags", "a")],
    ]
