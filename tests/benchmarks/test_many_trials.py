"""The simulated driver is the real one: what it runs, and that a sweep's size is not felt where it must not be."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import driver_simulation
import many_trials
import pytest
from driver_simulation import CountingMirror, Simulated, new_sweep

from orchestrator.result import Result
from orchestrator.store import Store


@pytest.fixture(autouse=True)
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """No tracking and no pictures; notes which would have been drawn."""
    asked: list[Path] = []
    monkeypatch.setattr(driver_simulation.sweep_module, "Mirror", CountingMirror)
    monkeypatch.setattr(Result, "plot", lambda result, folder=None: asked.append(folder) or [])
    return asked


@pytest.mark.parametrize(("num_trials", "students"), [(12, 3), (12, 12), (5, 1)])
def test_n_students_of_d_teachers_are_d_plus_n_stages(
    tmp_path: Path, num_trials: int, students: int, drawn: list[Path]
) -> None:
    sweep = new_sweep(num_trials, tmp_path, students)
    result = sweep.run(quiet=True)
    assert [row.status for row in result.rows] == ["done"] * num_trials
    assert len(sweep.executed) == num_trials // students + num_trials
    assert set(Counter(sweep.executed).values()) == {1}
    again = new_sweep(num_trials, tmp_path, students)
    assert again.run(quiet=True).table().equals(result.table())
    assert not hasattr(again, "executed")
    assert len(drawn) == 1  # nothing new: the pictures are kept
    (drawn[0] / "pictures.json").write_text("nonsense")
    again.result().write()
    assert len(drawn) == 2


def test_a_trial_asks_the_store_as_often_in_a_large_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seconds depend on the machine; how often the driver looks at an artifact does not."""
    asked: Counter[str] = Counter()
    for name in ("has", "manifest", "holder", "read_json", "write_json"):
        plain = getattr(Store, name)

        def counted(
            store: Store, *arguments: object, plain: object = plain, name: str = name, **options: object
        ) -> object:
            asked[name] += 1
            return plain(store, *arguments, **options)  # type: ignore[operator]

        monkeypatch.setattr(Store, name, counted)
    monkeypatch.setattr(
        driver_simulation.Monitor, "tick", lambda monitor: None
    )  # twice a second, by the clock
    each = []
    for num_trials in (20, 80):
        asked.clear()
        new_sweep(num_trials, tmp_path / str(num_trials)).run(quiet=True)
        each.append({name: number / num_trials for name, number in asked.items()})
    few, many = each
    assert set(many) == {"has", "manifest", "holder", "read_json", "write_json"}
    assert {name: number for name, number in many.items() if number > few[name] + 0.5} == {}
    assert many["manifest"] < 5.5


def test_measurements_say_what_grows() -> None:
    def simulated(num_trials: int, factor: float = 1.0) -> Simulated:
        return Simulated(
            num_trials=num_trials, num_executed=num_trials + 1, num_records=20 * num_trials, plan_seconds=1.0,
            drive_seconds=0.01 * num_trials * factor, trial_seconds=0.002 * num_trials, again_seconds=1.0,
            results_seconds=1.0, resident_bytes=int(50_000_000 + 10_000 * num_trials * factor), peak_bytes=1,
        )  # fmt: skip

    few, some, many = simulated(100), simulated(1000), simulated(10_000)
    drive = many_trials.drive_measurement(few, some, many)
    assert (drive.ours, drive.theirs, drive.ratio) == pytest.approx((10.0, 10.0, 1.0))
    assert many_trials.drive_measurement(few, some, simulated(10_000, 2.0)).ratio == pytest.approx(2.0)
    memory = many_trials.memory_measurement(few, some, many)
    assert (memory.ours, memory.theirs, memory.ratio) == pytest.approx((10.0, 10.0, 1.0))
