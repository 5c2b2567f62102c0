"""Promise 1: kill the driver, run the same command, get the same table. And an interruption that ends cleanly."""

from __future__ import annotations

import random
import signal
import subprocess
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
from driver import alive, finish, kill, start, wait_until, write_experiment

from orchestrator.store import Store

pytestmark = [pytest.mark.slow, pytest.mark.ray]

NUM_STAGES = 1 + 3 + 8
ONE_AT_A_TIME = "run.concurrent_trials=1"
TIMES = ["seconds", "shared_seconds", "latency_ms", "cpu_hours", "shared_cpu_hours"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    process = start(write_experiment(folder, folder / "runs"), ONE_AT_A_TIME)
    assert finish(process) == 0, (folder / "output.txt").read_text()
    return folder / "runs"


def ended_or_reached(process: subprocess.Popen[bytes], storage: Path, target: int) -> bool:
    return process.poll() is not None or len(list(Store(str(storage)).keys())) >= target


def table(storage: Path) -> pd.DataFrame:
    return pd.read_csv(storage / "sweeps" / "faults" / "report" / "table.csv").drop(
        columns=TIMES, errors="ignore"
    )


def contents(storage: Path) -> dict[str, tuple[bytes, float]]:
    """Key -> weights and time of creation."""
    store = Store(str(storage))
    keys = list(store.keys())
    return {key: (store.read(key, "weights.safetensors"), store.manifest(key)["created"]) for key in keys}


def test_killed_three_times_gives_the_same_table(undisturbed: Path, tmp_path: Path) -> None:
    storage = tmp_path / "runs"
    experiment = write_experiment(tmp_path, storage)
    generator = random.Random(20)
    finished: dict[str, tuple[bytes, float]] = {}
    orphans: set[tuple[int, str]] = set()
    for target in sorted(generator.sample(range(1, NUM_STAGES - 1), 3)):
        process = start(experiment)
        moment = generator.uniform(0.0, 0.6)
        wait_until(partial(ended_or_reached, process, storage, target), 600, f"{target} finished stages")
        assert process.poll() is None, (tmp_path / "output.txt").read_text()
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(moment)
        orphans |= kill(process)
        assert orphans, "the driver had no Ray below it"
        now = contents(storage)
        assert finished.items() <= now.items(), "a finished stage was repeated"
        finished = now
    assert finish(start(experiment)) == 0, (tmp_path / "output.txt").read_text()
    final = contents(storage)
    assert finished.items() <= final.items()
    expected = contents(undisturbed)
    assert {key: weights for key, (weights, _) in final.items()} == {
        key: weights for key, (weights, _) in expected.items()
    }
    pd.testing.assert_frame_equal(table(storage), table(undisturbed))
    wait_until(lambda: not any(map(alive, orphans)), 300, "what ran below the killed drivers to end")
    assert not (storage / "work").exists() or not any(
        path.is_file() for path in (storage / "work").rglob("*")
    )


def test_interrupted_once_ends_cleanly_and_goes_on(undisturbed: Path, tmp_path: Path) -> None:
    storage = tmp_path / "runs"
    experiment = write_experiment(tmp_path, storage)
    process = start(experiment, ONE_AT_A_TIME)
    wait_until(lambda: len(list(Store(str(storage)).keys())) >= 2, 300, "two finished stages")
    process.send_signal(signal.SIGINT)
    assert finish(process, 90) == 130
    output = (tmp_path / "output.txt").read_text()
    assert "interrupted" in output
    assert "Traceback" not in output
    store = Store(str(storage))
    before = contents(storage)
    assert len(before) < NUM_STAGES
    assert all(store.holder(key) is None for key in contents(undisturbed))
    assert finish(start(experiment, ONE_AT_A_TIME)) == 0, (tmp_path / "output.txt").read_text()
    assert before.items() <= contents(storage).items()
    pd.testing.assert_frame_equal(table(storage), table(undisturbed))
