"""A storage that fills up during a sweep: told by name, nothing damaged, and the same command goes on after."""

from __future__ import annotations

import logging
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import pytest

from orchestrator import Experiment
from orchestrator.journal import DAMAGED, read_records
from orchestrator.store import Store

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.usefixtures("local_ray")]

TIMES = ["seconds", "shared_seconds", "latency_ms", "cpu_hours", "shared_cpu_hours"]
NUM_STAGES, NUM_TRIALS = 1 + 2 + 3, 3


@contextmanager
def small_disk(place: Path, size: str) -> Iterator[Path]:
    """A file system of its own."""
    place.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small file system needs root")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


@contextmanager
def filled(place: Path, after: Callable[[], bool], seconds: float = 600.0) -> Iterator[threading.Event]:
    """Fills ``place`` to the last byte once ``after`` holds, and keeps it full for so long or until the end."""
    ended, was_full = threading.Event(), threading.Event()
    ballast = place / "ballast"

    def fill() -> None:
        while not after():
            if ended.wait(0.01):
                return
        deadline = time.monotonic() + seconds
        with ballast.open("wb", buffering=0) as file:
            while time.monotonic() < deadline and not ended.is_set():
                try:
                    file.write(bytes(4096))
                except OSError:
                    was_full.set()
                    ended.wait(0.02)
        ballast.unlink()

    thread = threading.Thread(target=fill, daemon=True)
    thread.start()
    try:
        yield was_full
    finally:
        ended.set()
        thread.join(30)


def table(result) -> pd.DataFrame:
    return result.table().drop(columns=TIMES, errors="ignore")


def contents(storage: Path) -> dict[str, bytes]:
    """Weights of every finished stage, each file checked against its checksum."""
    store = Store(str(storage))
    keys = list(store.keys())
    for key in keys:
        store.verify(key)
    return {key: store.read(key, "weights.safetensors") for key in keys}


def has_stages(storage: Path, number: int) -> Callable[[], bool]:
    return lambda: len(list(storage.glob("artifacts/*/*/manifest.json"))) >= number


@pytest.fixture(scope="module")
def undisturbed(
    local_ray: None, sweep_of: Callable[..., Experiment], tmp_path_factory: pytest.TempPathFactory
):
    storage = tmp_path_factory.mktemp("undisturbed") / "runs"
    result = sweep_of(storage).run(quiet=True)
    assert [row.status for row in result.rows] == ["done"] * NUM_TRIALS
    return result


def test_a_full_storage_fails_trials_by_name_and_damages_nothing(
    undisturbed, sweep_of, tmp_path, capsys
) -> None:
    with small_disk(tmp_path / "disk", "4m") as disk:
        storage = disk / "runs"
        made = sweep_of(storage, tracking=f"sqlite:///{tmp_path / 'mlflow.db'}")
        with filled(disk, has_stages(storage, 1)) as was_full:
            result = made.run()
            told = capsys.readouterr().err
            before = contents(storage)
        assert was_full.is_set()
        assert 1 <= len(before) < NUM_STAGES
        failed = [row for row in result.rows if row.status == "failed"]
        assert failed
        for row in failed:
            assert row.reason.startswith("Storage: cannot ")
            assert f"{storage}/" in row.reason
            assert "0.0 of 4.0 MiB are free; disk full: free space or set run.storage" in row.reason
        assert "the report cannot be written" in told
        assert not list(storage.rglob("*.tmp"))

        again = made.run(quiet=True)
        assert [row.status for row in again.rows] == ["done"] * NUM_TRIALS
        assert before.items() <= contents(storage).items()
        assert contents(storage) == contents(Path(undisturbed.store.url))
        pd.testing.assert_frame_equal(table(again), table(undisturbed))
        assert not any(path.is_file() for path in (storage / "work").rglob("*"))
        records = [record for record, _ in read_records(storage / "sweeps" / "faults" / "journal.jsonl")]
        assert DAMAGED not in {record["op"] for record in records}


def test_a_disk_that_is_full_for_a_moment_is_waited_out(undisturbed, sweep_of, tmp_path) -> None:
    with small_disk(tmp_path / "disk", "4m") as disk:
        storage = disk / "runs"
        made = sweep_of(storage, tracking=f"sqlite:///{tmp_path / 'mlflow.db'}")
        with filled(disk, has_stages(storage, 1), seconds=2.5) as was_full:
            result = made.run(quiet=True)
        assert was_full.is_set()
        assert [row.status for row in result.rows] == ["done"] * NUM_TRIALS
        pd.testing.assert_frame_equal(table(result), table(undisturbed))


def test_a_full_disk_of_the_journal_only_costs_no_trial(
    undisturbed, sweep_of, tmp_path, caplog, capsys
) -> None:
    storage = tmp_path / "runs"
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    with small_disk(storage / "sweeps", "1m") as disk, caplog.at_level(logging.WARNING):
        made = sweep_of(storage, tracking=uri)
        with filled(disk, has_stages(storage, 1)) as was_full:
            result = made.run()
            told = capsys.readouterr().err
        assert was_full.is_set()
        assert [row.status for row in result.rows] == ["done"] * NUM_TRIALS
        pd.testing.assert_frame_equal(table(result), table(undisturbed))
        assert caplog.text.count("journal.jsonl cannot be written: [Errno 28]") == 1
        assert "tracking records could not be written" in told
    assert not (storage / "sweeps" / "faults" / "journal.jsonl").exists(), (
        "unmounted: the whole journal is lost"
    )
    made.run(quiet=True)
    assert count_runs(uri) == {"sweep": 1, "trial": NUM_TRIALS, "stage": NUM_STAGES}


def count_runs(uri: str) -> dict[str, int]:
    """Runs that are FINISHED in MLflow, by kind."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("faults")
    runs = client.search_runs([experiment.experiment_id], max_results=100)
    kinds = [
        run.data.tags["stillhouse.id"].partition(":")[0] for run in runs if run.info.status == "FINISHED"
    ]
    return {kind: kinds.count(kind) for kind in ("sweep", "trial", "stage")}
