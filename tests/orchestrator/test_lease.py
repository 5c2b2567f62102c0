"""Leases between processes: one winner, quick takeover from the dead, and holders that notice their loss."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from store_battery import KEY, ManualClock

from orchestrator.errors import StorageError
from orchestrator.lease import lease_path, newest_generation
from orchestrator.store import Lease, Store

FORK = multiprocessing.get_context("fork")
NUM_PROCESSES, NUM_ROUNDS = 4, 25


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def store(tmp_path: Path, clock: ManualClock) -> Store:
    return Store(str(tmp_path), clock=clock)


def held(store: Store, key: str = KEY) -> Lease:
    lease = store.lease(key)
    assert lease is not None
    return lease


def eventually(condition: Callable[[], bool], timeout_seconds: float = 10.0) -> float:
    """Wait for a condition; seconds that it took."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < timeout_seconds, "the condition did not come true in time"
        time.sleep(0.01)
    return time.monotonic() - started


def edit_record(store: Store, key: str = KEY, **changes: Any) -> None:
    path = lease_path(key, newest_generation(store._files, key))
    record = json.loads(store._files.read(path) or b"")
    store._files.write(path, json.dumps({**record, **changes}).encode())


def hold(url: str, lease_seconds: float, pipe: Connection) -> None:
    """In another process: acquire, say so, answer questions about ``lost``, release when told to."""
    lease = held(Store(url, lease_seconds=lease_seconds))
    pipe.send("holding")
    while pipe.recv() != "release":
        pipe.send(lease.lost)
    lease.release()
    pipe.send("released")
    pipe.recv()


@pytest.fixture
def holder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Any, Connection]]:
    """A process that holds the lease of KEY, and a pipe to it."""
    ours, theirs = FORK.Pipe()
    process = FORK.Process(
        target=hold, args=(str(tmp_path), getattr(request, "param", 30.0), theirs), daemon=True
    )
    process.start()
    assert ours.recv() == "holding"
    yield process, ours
    process.kill()
    process.join(10)


def test_a_killed_holder_is_replaced_at_once(tmp_path: Path, holder: tuple[Any, Connection]) -> None:
    process, _ = holder
    store = Store(str(tmp_path))
    assert store.lease(KEY) is None
    found = store.holder(KEY)
    assert found is not None
    assert found.pid == process.pid
    os.kill(process.pid, signal.SIGKILL)
    # Not reaped yet: a zombie holds nothing either.
    assert eventually(lambda: store.holder(KEY) is None) < 5.0
    with held(store):
        assert newest_generation(store._files, KEY) == 2


@pytest.mark.parametrize("holder", [0.6], indirect=True)
def test_a_suspended_holder_is_replaced_and_notices(tmp_path: Path, holder: tuple[Any, Connection]) -> None:
    process, pipe = holder
    store = Store(str(tmp_path), lease_seconds=0.6)
    time.sleep(1.0)
    assert store.lease(KEY) is None, "it beats, so it holds for longer than one lease"
    os.kill(process.pid, signal.SIGSTOP)
    assert store.lease(KEY) is None
    won: list[Lease] = []
    eventually(lambda: bool(won.extend(filter(None, [store.lease(KEY)])) or won))
    os.kill(process.pid, signal.SIGCONT)
    pipe.send("lost?")
    assert pipe.recv() is True
    pipe.send("release")
    assert pipe.recv() == "released"
    assert not won[0].lost
    assert won[0].refresh()
    won[0].release()


def test_a_released_lease_is_free_for_other_processes(tmp_path: Path, holder: tuple[Any, Connection]) -> None:
    _, pipe = holder
    store = Store(str(tmp_path))
    assert store.lease(KEY) is None
    pipe.send("release")
    assert pipe.recv() == "released"
    held(store).release()


def race(url: str, worker: int, barrier: Any, results: Any) -> None:
    """Everybody wants the same lease, free in even rounds and stale in odd ones; winners keep it."""
    store = Store(url)
    kept = []
    for number in range(NUM_ROUNDS):
        key = f"{number:08x}"
        barrier.wait(30)
        lease = store.lease(key)
        if lease is not None:
            kept.append(lease)
            results.put((number, worker))
    barrier.wait(30)
    results.put(("lost", [lease.key for lease in kept if not lease.refresh()]))
    barrier.wait(30)
    results.close()
    results.join_thread()
    os._exit(0)


def test_one_of_many_processes_wins_each_lease(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    for number in range(1, NUM_ROUNDS, 2):
        key = f"{number:08x}"
        lease = held(store, key)
        lease.release()
        edit_record(store, key, released=False, started=1)
    barrier, results = FORK.Barrier(NUM_PROCESSES), FORK.Queue()
    workers = [
        FORK.Process(target=race, args=(str(tmp_path), n, barrier, results)) for n in range(NUM_PROCESSES)
    ]
    for worker in workers:
        worker.start()
    answers = [results.get(timeout=30) for _ in range(NUM_ROUNDS + NUM_PROCESSES)]
    for worker in workers:
        worker.join(30)
    assert sorted(number for number, _ in answers if number != "lost") == list(range(NUM_ROUNDS))
    assert [keys for number, keys in answers if number == "lost"] == [[]] * NUM_PROCESSES
    assert results.empty()


def test_a_slow_taker_gives_way(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """It looked before others took over, released, and were followed: its late file is older than the newest."""
    held(store).release()
    look = store._leases._live_record

    def look_then_sleep(key: str, generation: int) -> Any:
        seen = look(key, generation)
        monkeypatch.undo()
        other = Store(store.url, clock=store.clock)
        held(other).release()
        winners.append(held(other))
        return seen

    winners: list[Lease] = []
    monkeypatch.setattr(store._leases, "_live_record", look_then_sleep)
    assert store.lease(KEY) is None
    assert winners[0].refresh()
    assert store._files.names(f"leases/{KEY}") == ["00000003.json"]
    winners[0].release()


def test_a_reused_pid_is_not_the_holder(store: Store) -> None:
    lease = held(store)
    edit_record(store, started=12345)
    assert store.holder(KEY) is None
    new = held(store)
    assert lease.refresh() is False
    new.release()


@pytest.mark.parametrize("seconds", [-7200.0, -200.0, 0.0, 200.0, 7200.0])
def test_another_machine_is_judged_by_our_clock(store: Store, clock: ManualClock, seconds: float) -> None:
    """Its clock differs from ours. As long as we see it beat it lives, except far beyond any sane difference."""
    held(store).release()
    beat = 0

    def beats() -> None:
        nonlocal beat
        beat += 1
        changes = {"host": "elsewhere", "machine": "other", "pid": 1, "released": False, "beat": beat}
        edit_record(store, **changes, time=clock.time() + seconds, monotonic=5.0)

    beats()
    if seconds < -300:
        assert store.holder(KEY) is None
        return
    for _ in range(10):
        assert store.lease(KEY) is None
        clock.seconds += 20
        beats()
    assert store.lease(KEY) is None
    clock.seconds += 29
    assert store.lease(KEY) is None
    clock.seconds += 2
    held(store).release()


def watched(store: Store, clock: ManualClock, during: Callable[[], None] = lambda: None) -> Lease | None:
    """What a process that has just begun gets, when ``during`` happens while it watches."""

    def pause(seconds: float) -> None:
        clock.seconds += seconds
        during()

    return Store(store.url, clock=clock)._leases.acquire_from_silent(KEY, pause)


def test_a_new_process_takes_over_from_a_silent_machine_without_waiting_anew(
    store: Store, clock: ManualClock
) -> None:
    held(store).release()
    edit_record(store, host="elsewhere", machine="other", released=False, time=clock.time())
    assert Store(store.url, clock=clock).lease(KEY) is None
    taken = watched(store, clock)
    assert taken is not None
    assert clock.seconds < 40
    taken.release()


def test_a_watched_holder_that_beats_keeps_its_lease(store: Store, clock: ManualClock) -> None:
    held(store).release()
    edit_record(store, host="elsewhere", machine="other", released=False, time=clock.time())
    assert watched(store, clock, lambda: edit_record(store, beat=int(clock.seconds))) is None
    assert clock.seconds < 30


def test_a_holder_of_this_machine_is_not_watched(store: Store, clock: ManualClock) -> None:
    with held(store):
        assert watched(store, clock) is None
        assert clock.seconds == 0


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"holder": "x"}', b"\x80\x04}q\x00."])
def test_an_unreadable_lease_holds_until_it_stops_changing(
    store: Store, clock: ManualClock, content: bytes
) -> None:
    store._files.write(lease_path(KEY, 3), content)
    assert store.lease(KEY) is None
    clock.seconds += 31
    held(store).release()
    assert newest_generation(store._files, KEY) == 4


def test_progress_shows_soon_but_not_often(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(str(tmp_path))
    num_writes = 0
    write = store._files.write

    def counted(*args: Any, **kwargs: Any) -> None:
        nonlocal num_writes
        num_writes += 1
        write(*args, **kwargs)

    monkeypatch.setattr(store._files, "write", counted)
    lease = held(store)
    rows: list[dict[str, float]] = []
    for epoch in range(1, 201):
        rows.append({"epoch": float(epoch), "loss": 1.0 / epoch})
        lease.update({"epoch": epoch, "rows": rows})

    def shown() -> int:
        found = store.holder(KEY)
        return int(found.progress.get("epoch", 0)) if found else 0

    assert eventually(lambda: shown() >= 1) < 0.9
    assert eventually(lambda: shown() == 200) < 3.0
    assert num_writes <= 4
    lease.release()
    assert store.holder(KEY) is None


def test_storage_hiccups_are_survived(
    store: Store, clock: ManualClock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lease = held(store)
    lease.update({"epoch": 1})
    lease.refresh()

    def fail(*_: Any, **__: Any) -> None:
        raise StorageError("the disk is on holiday")

    with monkeypatch.context() as patch:
        patch.setattr(store._files, "write", fail)
        lease.update({"epoch": 2})
        clock.seconds += 29
        assert lease.refresh()
        assert not lease.lost
        assert "on holiday" in caplog.text
    assert lease.refresh()
    found = store.holder(KEY)
    assert found is not None
    assert found.progress == {"epoch": 2}, "what failed to be written is written later"
    with monkeypatch.context() as patch:
        patch.setattr(store._files, "names", fail)
        clock.seconds += 31
        assert lease.lost
        assert "failed for longer than the lease" in caplog.text
    lease.release()


def test_storage_that_hangs_loses_the_lease_without_hanging_its_holder(tmp_path: Path) -> None:
    store = Store(str(tmp_path), lease_seconds=0.3)
    lease = held(store)
    with lease._beating:  # as while the heartbeat waits for an answer
        time.sleep(0.4)
        started = time.monotonic()
        assert lease.lost
        assert time.monotonic() - started < 2.0
    lease.release()


def test_a_removed_lease_file_is_a_lost_lease(store: Store) -> None:
    lease = held(store)
    store._files.delete(f"leases/{KEY}")
    assert not lease.refresh()
    assert lease.lost
    lease.release()
    assert store._files.names(f"leases/{KEY}") == []


def test_an_error_inside_releases_and_twice_is_fine(store: Store) -> None:
    with pytest.raises(RuntimeError, match="stage"), held(store) as lease:
        raise RuntimeError("stage failed")
    lease.release()
    assert store.holder(KEY) is None
    assert lease.refresh()


def test_a_release_that_fails_is_told_and_runs_out(
    store: Store, clock: ManualClock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise StorageError("full")

    lease = held(store)
    with monkeypatch.context() as patch:
        patch.setattr(store._files, "write", fail)
        lease.release()
    assert "will run out" in caplog.text
    assert store.lease(KEY) is None
    clock.seconds += 31
    held(store).release()


@pytest.mark.parametrize("lease_seconds", [0.0, -1.0, float("nan")])
def test_impossible_lease_times_are_refused(tmp_path: Path, lease_seconds: float) -> None:
    with pytest.raises(ValueError, match="lease_seconds must be positive"):
        Store(str(tmp_path), lease_seconds=lease_seconds)
