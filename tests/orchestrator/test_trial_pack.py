"""Trials that share a process, on a real store, with stages that only pretend to train."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from experiment_cases import planner_of

from orchestrator import trial_pack
from orchestrator.dispatch import Outcome
from orchestrator.errors import DamagedArtifactError, DivergedError, OutOfMemoryError, StorageError
from orchestrator.micro_batch import memory_path
from orchestrator.pack_board import PackBoard
from orchestrator.plan import PlannedStage, Point, Trial
from orchestrator.spec import Objective
from orchestrator.store import Store
from orchestrator.training import Observer, Row, StopTraining
from orchestrator.trial import failure_path, stop_path
from orchestrator.trial_pack import PackRunner, StageReport

TOP1 = Objective(name="student.top1", maximize=True)
EPOCHS = 3
DONE = Outcome(status="done", values=(42.0,))


class Bench:
    """A runner whose trainings note what they made; ``before`` may raise, by stage and epoch."""

    def __init__(
        self,
        store: Store,
        before: Callable[[PlannedStage, int], None] | None = None,
        *,
        is_scheduled: bool = False,
    ) -> None:
        self.store = store
        self.before = before or (lambda stage, epoch: None)
        self.made: list[list[str]] = []
        self.rows: list[float] = []
        self.pack = uuid.uuid4().hex
        self.board = PackBoard(store, self.pack)
        self.runner = PackRunner(
            store, self.execute, (TOP1,), "run", execute_all=self.execute_all, is_scheduled=is_scheduled
        )

    def execute(self, stage: PlannedStage, report: Observer) -> None:
        failure = self.execute_all([(stage, report)])[0]
        if failure is not None:
            raise failure

    def execute_all(self, reports: Sequence[StageReport]) -> list[Exception | None]:
        self.made.append([stage.name for stage, _ in reports])
        failures: dict[str, Exception | None] = {stage.key: None for stage, _ in reports}
        for epoch in range(1, EPOCHS + 1):
            for stage, report in reports:
                if failures[stage.key] is None:
                    failures[stage.key] = self._epoch(stage, report, epoch)
        return list(failures.values())

    def _epoch(self, stage: PlannedStage, report: Observer, epoch: int) -> Exception | None:
        try:
            self.before(stage, epoch)
            if report({"epoch": epoch, "top1": 40.0 + epoch}):
                return StopTraining(f"after {epoch}")
        except Exception as error:
            return error
        if epoch == EPOCHS:
            cost = {"peak_memory_bytes": 6e8, "memory_share_bytes": 6e9}
            manifest = {"inputs": dict(stage.inputs), "metrics": {"top1": 42.0}, "cost": cost}
            self.store.put(stage.key, {"weights": b"0123"}, manifest)
        return None

    def lead(self, trials: Sequence[Trial]) -> Outcome:
        return self.runner.lead(self.pack, trials, lambda row: self.rows.append(row["epoch"]))

    def told(self, trials: Sequence[Trial]) -> list[Outcome | None]:
        return [self.board.told(trial.key).outcome for trial in trials]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


@pytest.fixture
def trials() -> list[Trial]:
    """Two students on one views stage, and one on another."""
    train = {"epochs": EPOCHS}
    planner = planner_of({"baselines": {}, "search/seeds": 1, "stages/student/train": train})
    points: list[dict[str, Any]] = [
        {"student.kd_weight": 0.5},
        {"student.kd_weight": 0.7},
        {"student.kd_weight": 0.5, "views.margin": 0.4},
    ]
    return [planner.trial(Point(values), 0) for values in points]


def in_stage(
    wanted: PlannedStage, error: BaseException, epoch: int = 2
) -> Callable[[PlannedStage, int], None]:
    def before(stage: PlannedStage, now: int) -> None:
        if stage.key == wanted.key and now == epoch:
            raise error

    return before


def test_a_pack_walks_its_chains_side_by_side(store: Store, trials: list[Trial]) -> None:
    bench = Bench(store)
    assert bench.lead(trials) == DONE
    assert bench.told(trials[1:]) == [DONE, DONE]
    assert bench.made == [["teacher"], ["views", "views"], ["student"] * 3]
    assert bench.rows == [1, 2, 3]
    assert [row["epoch"] for row in bench.board.told(trials[2].key).rows] == [1, 2, 3]
    for key in {bench.pack, *(stage.key for trial in trials for stage in trial.stages)}:
        assert store.holder(key) is None
    costs = store.read_json(f"costs/{trials[0].final.signature}.json")
    assert len(costs["seconds_per_epoch"]) == 3
    assert costs["memory_share"] == [pytest.approx(0.1 / 3)] * 3


def test_what_is_stored_is_used(store: Store, trials: list[Trial]) -> None:
    Bench(store).runner.run(trials[1], lambda row: None)
    bench = Bench(store)
    assert bench.lead(trials) == DONE
    assert bench.told(trials[1:]) == [DONE, DONE]
    assert bench.made == [["views"], ["student"] * 2]


ERRORS = [
    (DivergedError("nan"), Outcome(status="failed", reason="Diverged: nan"), True),
    (ValueError("odd"), Outcome(status="failed", reason="Value: odd"), True),
    (OutOfMemoryError("too big"), Outcome(status="deferred", alone=True), False),
    (DamagedArtifactError("bytes"), Outcome(status="deferred", alone=True), False),
    (StorageError("full"), Outcome(status="deferred", alone=True), False),
    (StopTraining("taken over"), Outcome(status="deferred"), False),
]


@pytest.mark.parametrize(("error", "outcome", "is_recorded"), ERRORS)
def test_one_that_fails_leaves_the_others(
    store: Store, trials: list[Trial], error: Exception, outcome: Outcome, is_recorded: bool
) -> None:
    bench = Bench(store, in_stage(trials[1].final, error))
    assert bench.lead(trials) == DONE
    assert bench.told(trials[1:]) == [outcome, DONE]
    failure = store.read_json(failure_path(trials[1].key))
    assert (failure is not None) == is_recorded
    if is_recorded:
        assert failure["reason"] == str(error)
        assert "in_stage" in failure["traceback"] or "before" in failure["traceback"]


def test_all_who_need_a_failed_stage_fail_with_it(store: Store, trials: list[Trial]) -> None:
    bench = Bench(store, in_stage(trials[0].stages[1], DivergedError("nan")))
    assert bench.lead(trials) == Outcome(status="failed", reason="Diverged: nan")
    assert bench.told(trials[1:]) == [Outcome(status="failed", reason="Diverged: nan"), DONE]
    assert bench.rows == []


def test_a_shared_stage_that_fails_ends_the_pack(store: Store, trials: list[Trial]) -> None:
    bench = Bench(store, in_stage(trials[0].stages[0], ValueError("odd")))
    failed = Outcome(status="failed", reason="Value: odd")
    assert [bench.lead(trials), *bench.told(trials[1:])] == [failed] * 3


def test_known_failures_and_stages_of_others_are_left_out(store: Store, trials: list[Trial]) -> None:
    Bench(store, in_stage(trials[0].final, DivergedError("nan"))).lead(trials[:1])
    bench = Bench(store)
    lease = store.lease(trials[1].key)
    assert lease is not None
    with lease:
        outcome = bench.lead(trials)
    assert outcome.status == "failed"
    assert "nan" in outcome.reason
    assert bench.told(trials[1:]) == [Outcome(status="deferred"), DONE]


def test_stages_that_have_run_out_of_memory_are_left_to_themselves(store: Store) -> None:
    changes = {"baselines": {}, "search/seeds": 1, "stages/student/train": {"min_micro_batch": 2}}
    planner = planner_of(changes)
    trials = [planner.trial(Point({"student.kd_weight": weight}), 0) for weight in (0.5, 0.7, 0.9)]
    store.write_json(memory_path(trials[1].key), {"accumulate": 4, "events": []})
    bench = Bench(store)
    assert bench.lead(trials) == DONE
    assert bench.told(trials[1:]) == [Outcome(status="deferred", alone=True), DONE]


def test_a_leader_that_is_stopped_defers_the_others(store: Store, trials: list[Trial]) -> None:
    bench = Bench(store)

    def stop(row: Row) -> None:
        if row["epoch"] == 2:
            raise SystemExit

    with pytest.raises(SystemExit):
        bench.runner.lead(bench.pack, trials, stop)
    assert bench.told(trials[1:]) == [Outcome(status="deferred")] * 2
    assert store.holder(bench.pack) is None
    assert all(store.holder(trial.key) is None for trial in trials)


def test_a_run_that_is_interrupted_defers_everything(
    store: Store, trials: list[Trial], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.trial.time.monotonic", iter(range(0, 10**6, 2)).__next__)
    store.write_json(stop_path("run"), {})
    bench = Bench(store)
    deferred = Outcome(status="deferred")
    assert [bench.lead(trials), *bench.told(trials[1:])] == [deferred] * 3


class Follower(threading.Thread):
    """A trial that follows, in a thread of its own; ``stop_at`` raises there as Tune does."""

    def __init__(self, bench: Bench, trial: Trial, stop_at: int = 0) -> None:
        super().__init__(daemon=True)
        self.bench, self.trial, self.stop_at = bench, trial, stop_at
        self.rows: list[float] = []
        self.outcome: Outcome | None = None
        self.was_stopped = False

    def run(self) -> None:
        def report(row: Row) -> None:
            self.rows.append(row["epoch"])
            if row["epoch"] == self.stop_at:
                raise SystemExit

        try:
            self.outcome = self.bench.runner.follow(
                self.bench.pack, self.trial, report, pause=lambda seconds: time.sleep(0.005)
            )
        except SystemExit:
            self.bench.runner.stop_follower(self.bench.pack, self.trial)
            self.was_stopped = True


def test_followers_report_what_the_leader_tells(store: Store, trials: list[Trial]) -> None:
    bench = Bench(store, lambda stage, epoch: time.sleep(0.03))
    followers = [Follower(bench, trial) for trial in trials[1:]]
    for follower in followers:
        follower.start()
    assert bench.lead(trials) == DONE
    for follower in followers:
        follower.join(30)
        assert follower.outcome == DONE
        assert follower.rows == [1, 2, 3]
    assert store.list_json("packs/") == []


def test_a_follower_that_is_stopped_leaves_the_others(store: Store, trials: list[Trial]) -> None:
    bench = Bench(store)
    stopped = Follower(bench, trials[1], stop_at=1)

    def wait_for_the_sign(stage: PlannedStage, epoch: int) -> None:
        if stage.key == trials[1].key and epoch == 2:
            stopped.join(30)

    bench.before = wait_for_the_sign
    stopped.start()
    assert bench.lead(trials) == DONE
    assert stopped.was_stopped
    assert not store.has(trials[1].key)
    assert store.has(trials[2].key)
    assert bench.told(trials[1:]) == [None, DONE]  # nobody is there to read it


def test_a_stop_that_comes_after_the_last_epoch_still_stops(store: Store, trials: list[Trial]) -> None:
    """Whoever is quicker, a trial that its scheduler stopped leaves no artifact, and is not done in the next run."""
    bench = Bench(store, is_scheduled=True)
    late, through = Follower(bench, trials[1], stop_at=1), Follower(bench, trials[2])

    def start_late(stage: PlannedStage, epoch: int) -> None:
        if stage.key == trials[0].key and epoch == EPOCHS:
            for follower in (late, through):
                threading.Timer(0.3, follower.start).start()

    bench.before = start_late
    assert bench.lead(trials) == DONE
    late.join(30)
    through.join(30)
    assert late.was_stopped
    assert not store.has(trials[1].key)
    assert store.read_json(failure_path(trials[1].key)) is None
    assert (through.outcome, through.rows) == (DONE, [1, 2, 3])
    assert store.list_json("packs/") == []


def test_a_stop_that_cannot_be_written_is_said_and_ends_nothing(
    store: Store, trials: list[Trial], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise StorageError("the disk is full")

    bench = Bench(store)
    with monkeypatch.context() as patch:
        patch.setattr(Store, "write_json", full)
        bench.runner.stop_follower(bench.pack, trials[1])
    assert (
        f"trial {trials[1].key[:8]} was stopped, but its stage may be finished: the disk is full"
        in caplog.text
    )


def test_a_follower_that_never_answers_is_not_waited_for_without_end(
    store: Store, trials: list[Trial], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(trial_pack, "ANSWER_SECONDS", 0.01)
    bench = Bench(store, is_scheduled=True)
    assert bench.lead(trials) == DONE
    assert bench.told(trials[1:]) == [DONE, DONE]
    assert f"{trials[1].key[:8]} does not say whether it was stopped" in caplog.text


def test_a_follower_whose_leader_is_gone_is_deferred(
    store: Store, trials: list[Trial], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(store)
    lease = store.lease(bench.pack)
    assert lease is not None
    follower = Follower(bench, trials[1])
    follower.start()
    time.sleep(0.1)
    assert follower.is_alive()
    lease.release()
    follower.join(30)
    assert follower.outcome == Outcome(status="deferred")
    monkeypatch.setattr(trial_pack, "LEADER_BEGINS_SECONDS", 0.05)
    waiting = Follower(Bench(store), trials[1])
    waiting.start()
    waiting.join(30)
    assert waiting.outcome == Outcome(status="deferred")
