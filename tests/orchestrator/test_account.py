"""The account of a sweep: what running trials hold, over restarts of the driver, each run once."""

from __future__ import annotations

from pathlib import Path

import pytest
from experiment_cases import spec_of, trial_of
from store_battery import ManualClock

from orchestrator.account import WRITE_SECONDS, Account, read_spent
from orchestrator.cost import NO_TIME, MachineTime, Resources
from orchestrator.errors import DamagedArtifactError, StorageError
from orchestrator.spending import Spending
from orchestrator.store import Store

ONE = Resources(workers=1, cpus_per_worker=1, gpus_per_worker=0)
WIDE = Resources(workers=4, cpus_per_worker=2, gpus_per_worker=1)
STAGE, OTHER = "a" * 64, "b" * 64


def cpu(seconds: float) -> MachineTime:
    return MachineTime(cpu_seconds=seconds)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path))


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


def finish(store: Store, key: str) -> None:
    store.put(key, {"x": b"x"}, {})


def test_time_counts_from_its_place_to_its_end(store: Store, clock: ManualClock) -> None:
    account = Account(store, "sweep", "run1", clock=clock)
    account.hold("trial", STAGE, ONE)
    assert account.spent.total == NO_TIME, "a trial without a place holds nothing"
    account.placed("trial")
    clock.seconds += 10
    account.hold("trial", STAGE, ONE)
    clock.seconds += 2
    account.hold("trial", OTHER, WIDE)
    account.left("trial")
    clock.seconds += 100
    account.hold("trial", OTHER, WIDE)
    assert account.spent.unfinished == MachineTime(cpu_seconds=10 + 16, gpu_seconds=8)
    account.finished(STAGE)
    assert account.spent.finished == cpu(10)
    assert account.spent.unfinished == MachineTime(cpu_seconds=16, gpu_seconds=8)


def test_a_killed_driver_loses_seconds_only_and_every_run_counts_once(
    store: Store, clock: ManualClock
) -> None:
    killed = Account(store, "sweep", "run1", clock=clock)
    killed.placed("trial")
    for _ in range(20):
        clock.seconds += 1
        killed.hold("trial", STAGE, ONE)
        killed.write()
    recorded = read_spent(store, "sweep").total.cpu_seconds
    assert 20 - WRITE_SECONDS <= recorded < 20
    again = Account(store, "sweep", "run2", clock=clock)
    assert again.spent.unfinished == cpu(recorded)
    again.placed("trial")
    clock.seconds += 3
    again.hold("trial", STAGE, ONE)
    again.write(now=True)
    again.write(now=True)
    assert read_spent(store, "sweep").total == cpu(recorded + 3)
    assert read_spent(store, "other").total == NO_TIME
    assert Account(store, "sweep", "run2", clock=clock).spent.total == cpu(recorded), (
        "its own document is not added"
    )


def test_what_was_finished_later_is_not_lost(store: Store, clock: ManualClock) -> None:
    account = Account(store, "sweep", "run1", clock=clock)
    for key in (STAGE, OTHER):
        account.placed("trial")
        clock.seconds += 5
        account.hold("trial", key, ONE)
    account.write(now=True)
    assert read_spent(store, "sweep").unfinished == cpu(10)
    finish(store, STAGE)
    spent = read_spent(store, "sweep")
    assert (spent.finished, spent.unfinished) == (cpu(5), cpu(5))


def test_a_storage_that_fails_is_tried_again(store: Store, clock: ManualClock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:  # fmt: skip
    account = Account(store, "sweep", "run1", clock=clock)
    account.placed("trial")

    def full(*arguments: object, **options: object) -> None:
        raise StorageError("disk full")

    with monkeypatch.context() as patched:
        patched.setattr(Store, "write_json", full)
        for _ in range(4):
            clock.seconds += WRITE_SECONDS
            account.hold("trial", STAGE, ONE)
            account.write()
    assert caplog.text.count("not up to date: disk full") == 1
    clock.seconds += WRITE_SECONDS
    account.write()
    assert read_spent(store, "sweep").total == cpu(4 * WRITE_SECONDS)


@pytest.mark.parametrize("record", [[], {}, {"finished": {"cpu": 1}, "unfinished": {}}, {"finished": {}, "unfinished": {"../x": {}}}])  # fmt: skip
def test_a_foreign_document_is_named(store: Store, record: object) -> None:
    store.write_json("accounts/sweep/run1.json", record)
    with pytest.raises(DamagedArtifactError, match=r"accounts/sweep/run1.json is no account .* delete it"):
        read_spent(store, "sweep")


def test_trials_that_end_in_any_way_are_booked_out(store: Store, clock: ManualClock) -> None:
    run = spec_of({"run/workers": 2, "run/budget": {"cpu_hours": 0.01}}).run
    spending = Spending(Account(store, "sweep", "run1", clock=clock), run, clock.monotonic)
    first, second = trial_of(), trial_of(seed=1)
    for trial in (first, second):
        spending.placed(trial)
    clock.seconds += 5
    spending.at(first, first.stages[0])
    assert spending.exceeded() == []
    spending.left(first.key)
    spending.leave_all_but([])
    clock.seconds += 1000
    spending.at(first, first.stages[1])
    spending.leave_all_but([])
    assert spending.spent.total == cpu(2 * 2 * 5)
    assert spending.elapsed_seconds == 1005


def test_the_budget_is_held_against_all_runs(store: Store, clock: ManualClock) -> None:
    run = spec_of({"run/prices": {"cpu_hour": 36.0}, "run/budget": {"money": 0.1, "hours": 1}}).run
    trial = trial_of()
    for number in range(2):
        spending = Spending(Account(store, "sweep", f"run{number}", clock=clock), run, clock.monotonic)
        assert spending.exceeded() == []
        spending.placed(trial)
        clock.seconds += 6
        spending.at(trial, trial.final)
        spending.write(now=True)
    assert spending.exceeded() == ["0.12 of 0.10 EUR (run.budget.money)"]
    assert spending.overshoot() == "0.12 of 0.10 EUR (run.budget.money), 0.02 over"
    assert spending.text(spending.expected([(trial.final, 12.0)])) == (
        "0.0033 CPU-h, 0.12 EUR of about 0.0067 CPU-h, 0.24 EUR"
    )
    assert spending.numbers(None) == pytest.approx(
        {"spent_cpu_hours": 12 / 3600, "spent_gpu_hours": 0.0, "spent_money": 0.12}
    )
