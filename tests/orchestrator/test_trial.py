"""Walking a chain of stages on a real store, with stages that only pretend to train."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from experiment_cases import key_of, spec_of, trial_of

from orchestrator import trial as trial_module
from orchestrator.dispatch import Outcome
from orchestrator.ending import Endings
from orchestrator.errors import ConfigurationError, DivergedError, OutOfMemoryError, StorageError
from orchestrator.loop import Row, StopTraining
from orchestrator.memory_share import host_memory_bytes, memory_share_bytes
from orchestrator.plan import PlannedStage, Trial
from orchestrator.rows import CostHistory
from orchestrator.spec import Objective
from orchestrator.store import Store
from orchestrator.trial import TrialRunner, failure_path, objective_values, stop_path

TOP1 = Objective(name="student.top1", maximize=True)
Before = Callable[[PlannedStage, int], None]


class Bench:
    """A store, a runner, and a pretended training that notes what it made; ``before`` may raise instead."""

    def __init__(
        self, store: Store, before: Before = lambda stage, attempt: None, run_id: str = "run"
    ) -> None:
        self.store = store
        self.before = before
        self.made: list[str] = []
        self.rows: list[Row] = []
        self.runner = TrialRunner(store, self.execute, (TOP1,), run_id)

    def execute(self, stage: PlannedStage, report: Callable[[Row], bool | None]) -> None:
        self.made.append(stage.name)
        for source in stage.inputs.values():
            self.store.read(source, "weights")
        self.before(stage, self.made.count(stage.name))
        for epoch in (1, 2):
            if report({"epoch": epoch, "top1": 40.0 + epoch}):
                raise StopTraining(f"after {epoch}")
        manifest = {"inputs": dict(stage.inputs), "metrics": {"top1": 42.0, "test_top1": 41.0}}
        self.store.put(stage.key, {"weights": b"0123"}, manifest)

    def run(self, trial: Trial) -> Outcome:
        return self.runner.run(trial, self.rows.append)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial_module, "PAUSES_SECONDS", (0.0, 0.0, 0.0))


def raising(name: str, error: BaseException, attempts: int = 99) -> Before:
    def before(stage: PlannedStage, attempt: int) -> None:
        if stage.name == name and attempt <= attempts:
            raise error

    return before


DONE = Outcome(status="done", values=(42.0,))


def test_a_trial_makes_what_is_missing_and_reports_its_last_stage(store: Store) -> None:
    bench = Bench(store)
    assert bench.run(trial_of()) == DONE
    assert bench.made == ["teacher", "views", "student"]
    assert [row["epoch"] for row in bench.rows] == [1, 2]
    assert all(store.holder(stage.key) is None for stage in trial_of().stages)


def test_what_is_stored_is_used(store: Store) -> None:
    bench = Bench(store)
    bench.run(trial_of())
    assert bench.run(trial_of({"stages/student/kd_weight": 0.5})) == DONE
    assert bench.made == ["teacher", "views", "student", "student"]
    assert bench.run(trial_of()) == DONE
    assert len(bench.made) == 4


def test_a_finished_trial_needs_no_inputs(store: Store) -> None:
    bench = Bench(store)
    bench.run(trial_of())
    store.set_aside(key_of("teacher"), "removed")
    assert bench.run(trial_of()) == DONE
    assert len(bench.made) == 3


ERRORS = [
    (ConfigurationError("wrong"), "Configuration: wrong"),
    (OutOfMemoryError("too big"), "OutOfMemory: too big"),
    (DivergedError("nan"), "Diverged: nan"),
    (ValueError("odd"), "Value: odd"),
    (RuntimeError("cuda"), "Runtime: cuda"),
]


@pytest.mark.parametrize(("error", "reason"), ERRORS)
def test_a_failure_is_recorded_once_and_dependants_fail_with_its_reason(
    store: Store, error: Exception, reason: str
) -> None:
    bench = Bench(store, raising("teacher", error))
    assert bench.run(trial_of()) == Outcome(status="failed", reason=reason)
    dependant = bench.run(trial_of({"stages/student/kd_weight": 0.5}))
    assert bench.made == ["teacher"]
    assert dependant.status == "failed"
    assert dependant.reason == f"StageFailed: stage teacher ({key_of('teacher')[:8]}) failed: {error}"
    record = store.read_json(failure_path(key_of("teacher")))
    assert (record["name"], record["kind"], record["run"]) == ("teacher", type(error).__name__, "run")
    assert "in before" in record["traceback"]
    assert store.list_json("failures/") == [failure_path(key_of("teacher"))]
    assert store.holder(key_of("teacher")) is None


@pytest.mark.parametrize("error", [error for error, _ in ERRORS])
def test_only_divergence_outlasts_its_run(store: Store, error: Exception) -> None:
    Bench(store, raising("teacher", error)).run(trial_of())
    later = Bench(store, run_id="later")
    outcome = later.run(trial_of())
    if isinstance(error, DivergedError):
        assert (outcome.status, later.made) == ("failed", [])
        assert Endings(store, spec_of().search).recall(trial_of()) is not None
    else:
        assert outcome == DONE
        assert store.read_json(failure_path(key_of("teacher"))) is None
        assert store.list_json("failures/") == []


@pytest.mark.parametrize("error", [error for error, _ in ERRORS])
def test_reports_know_of_every_failure_and_runs_only_of_divergence(store: Store, error: Exception) -> None:
    Bench(store, raising("views", error)).run(trial_of())
    endings = Endings(store, spec_of().search)
    looked = endings.look_up(trial_of())
    assert looked is not None
    assert (
        looked.reason
        == f"{type(error).__name__.removesuffix('Error')}: stage views ({key_of('views')[:8]}): {error}"
    )
    assert (endings.recall(trial_of()) is None) == (not isinstance(error, DivergedError))


def test_a_passing_trouble_of_the_storage_is_retried(store: Store) -> None:
    bench = Bench(store, raising("views", StorageError("timeout"), attempts=3))
    assert bench.run(trial_of()) == DONE
    assert bench.made == ["teacher", *["views"] * 4, "student"]


def test_a_lasting_trouble_of_the_storage_fails_without_a_record(store: Store) -> None:
    bench = Bench(store, raising("views", StorageError("full")))
    assert bench.run(trial_of()) == Outcome(status="failed", reason="Storage: full")
    assert bench.made == ["teacher", *["views"] * 4]
    assert store.list_json("failures/") == []
    bench.before = lambda stage, attempt: None
    assert bench.run(trial_of()) == DONE


def test_pauses_grow(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(trial_module, "PAUSES_SECONDS", (1.0, 4.0))
    monkeypatch.setattr(trial_module.time, "sleep", slept.append)
    Bench(store, raising("teacher", StorageError("x"))).run(trial_of())
    assert [pause for pause in slept if pause >= 1.0] == [1.0, 4.0]


@pytest.mark.parametrize("kind", ["damaged", "missing"])
@pytest.mark.parametrize("name", ["teacher", "views"])
def test_a_bad_artifact_is_set_aside_and_made_again(
    store: Store, tmp_path: Path, name: str, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    bench = Bench(store)
    bench.run(trial_of())
    key = key_of(name)
    attempt = store.manifest(key)["attempt"]
    weights = tmp_path / "store" / "artifacts" / key[:2] / key / attempt / "weights"
    if kind == "damaged":
        weights.write_bytes(b"0124")
    else:
        weights.unlink()
    bench.made.clear()
    other = trial_of({"stages/student/kd_weight": 0.5, "stages/views/margin": 0.4} if name == "teacher" else {"stages/student/kd_weight": 0.5})  # fmt: skip
    assert bench.run(other) == DONE
    assert bench.made == (
        ["views", "teacher", "views", "student"] if name == "teacher" else ["student", "views", "student"]
    )
    assert store.read(key, "weights") == b"0123"
    assert len(list((tmp_path / "store" / "damaged").iterdir())) == 1
    assert "it is built again" in caplog.text


def test_a_damaged_result_is_made_again(store: Store, tmp_path: Path) -> None:
    bench = Bench(store)
    bench.run(trial_of())
    key = key_of("student")
    (tmp_path / "store" / "artifacts" / key[:2] / key / "manifest.json").write_text("{")
    assert bench.run(trial_of()) == DONE
    assert bench.made == ["teacher", "views", "student", "student"]


def test_repair_comes_to_an_end(store: Store) -> None:
    from orchestrator.errors import DamagedArtifactError

    bench = Bench(store, raising("student", DamagedArtifactError("always")))
    assert bench.run(trial_of()) == Outcome(status="failed", reason="DamagedArtifact: always")
    assert bench.made.count("student") == 4


def test_work_elsewhere_defers(store: Store) -> None:
    lease = store.lease(key_of("views"))
    assert lease is not None
    with lease:
        bench = Bench(Store(store.url))
        assert bench.run(trial_of()) == Outcome(status="deferred")
        assert bench.made == ["teacher"]
    assert bench.run(trial_of()) == DONE


def test_a_stop_document_stops(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(0, 1000, 2))
    monkeypatch.setattr(trial_module.time, "monotonic", lambda: float(next(now)))
    store.write_json(stop_path("run"), {})
    bench = Bench(store)
    assert bench.run(trial_of()) == Outcome(status="deferred")
    assert bench.made == ["teacher"]
    assert not store.has(key_of("teacher"))
    assert store.list_json("failures/") == []
    assert store.holder(key_of("teacher")) is None
    other = Bench(store, run_id="other")
    assert other.run(trial_of()) == DONE


def test_the_scheduler_may_stop_the_last_stage(store: Store) -> None:
    bench = Bench(store)
    stops: list[Row] = []

    def report(row: Row) -> bool:
        stops.append(row)
        return True

    assert bench.runner.run(trial_of(), report) == Outcome(status="deferred")
    assert len(stops) == 1
    assert bench.made == ["teacher", "views", "student"]


def test_a_report_that_raises_leaves_the_trial(store: Store) -> None:
    class Gone(BaseException):
        """What ends a trial's process."""

    def report(row: Row) -> None:
        raise Gone

    with pytest.raises(Gone):
        Bench(store).runner.run(trial_of(), report)
    assert store.holder(key_of("student")) is None


def test_progress_is_published(store: Store) -> None:
    def before(stage: PlannedStage, attempt: int) -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            holder = store.holder(stage.key)
            assert holder is not None
            if holder.progress == {"name": stage.name, "epoch": 0, "epochs": stage.epochs, "rows": []}:
                return
            time.sleep(0.01)
        pytest.fail(f"{stage.name} published {holder.progress}")

    assert Bench(store, before).run(trial_of()) == DONE


def test_a_cost_that_cannot_be_written_fails_nothing(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "costs").write_text("a file where the folder should be")
    assert Bench(store).run(trial_of()) == DONE
    assert "the cost of stage teacher" in caplog.text


@pytest.mark.parametrize("epochs", [0, 1])
def test_costs_are_remembered_per_epoch(store: Store, epochs: int) -> None:
    trial = trial_of({"stages/teacher/train": {"epochs": epochs}})
    assert Bench(store).run(trial) == DONE
    (cost,) = store.read_json(f"costs/{trial.stages[0].signature}.json")["seconds_per_epoch"]
    assert 0 <= cost < 10


def test_what_stages_took_of_their_memory_is_remembered(store: Store) -> None:
    stage = trial_of().final
    runner, history = Bench(store).runner, CostHistory(store)
    assert history.memory_share(stage) is None
    store.put(stage.key, {}, {"metrics": {}, "cost": {"peak_memory_bytes": 3e9, "memory_share_bytes": 12e9}})
    runner.record_cost(stage, 1.0)
    assert history.memory_share(stage) == 0.25
    for _ in range(2):
        runner.record_cost(stage, 1.0, num_together=5)  # a pack: the process was that of five
    history.forget()
    assert history.memory_share(stage) == 0.05
    assert history.seconds(stage) is not None


def test_costs_of_older_versions_tell_no_memory(store: Store) -> None:
    stage = trial_of().final
    store.write_json(f"costs/{stage.signature}.json", {"seconds_per_epoch": [2.0]})
    assert CostHistory(store).memory_share(stage) is None
    assert CostHistory(store).seconds(stage) == 2.0 * stage.epochs


@pytest.mark.parametrize(("text", "expected"), [("max\n", None), ("1048576\n", 2.0**20), (None, None)])
def test_memory_of_a_container_is_what_it_may_use(
    text: str | None, expected: float | None, tmp_path: Path
) -> None:
    limit = tmp_path / "memory.max"
    if text is not None:
        limit.write_text(text)
    whole = host_memory_bytes(tmp_path / "absent")
    assert host_memory_bytes(limit) == (whole if expected is None else expected)
    cpu = torch.device("cpu")
    assert memory_share_bytes(cpu, cpus=10**6, gpus=0) == host_memory_bytes()
    assert 0 < memory_share_bytes(cpu, cpus=0.25, gpus=0) < host_memory_bytes()


def test_the_worth_of_a_trial(store: Store) -> None:
    trial = trial_of()
    metrics = {"top1": 42.0, "test_loss": 1.0}
    store.put(trial.key, {}, {"metrics": metrics})
    loss, other = (
        Objective(name="student.loss", maximize=False),
        Objective(name="student.other", maximize=True),
    )
    metrics = store.manifest(trial.key)["metrics"]
    assert objective_values(metrics, trial, (TOP1,)) == (42.0,)
    (unmeasured,) = objective_values(metrics, trial, (loss,))
    assert math.isnan(unmeasured)  # without a validation split there is only the test split
    with pytest.raises(ConfigurationError, match="reported no other; it has test_loss, top1"):
        objective_values(metrics, trial, (TOP1, other))
