"""What holds for every test: its Ray keeps to itself, whatever other clusters this machine runs."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
"""Before torch is there: threads of several test processes wait for each other by turning in circles."""

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # so is it for what a shell starts with `&`
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # else Ctrl-C would reach nothing that a test starts


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Modules that take long come first, so that no process is left with one at the end."""
    long = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in long)


@pytest.fixture(scope="session", autouse=True)
def own_ray_folder() -> Iterator[None]:
    """A folder of this test process for Ray's sessions, and for its note of the cluster that was started last."""
    folder = tempfile.mkdtemp(prefix="sh-")  # a short path: sockets lie in it
    with pytest.MonkeyPatch.context() as monkey:
        monkey.setenv("RAY_TMPDIR", folder)
        monkey.setenv("RAY_worker_niceness", "0")  # else Ray's processes starve beside tests that compute
        monkey.delenv("RAY_ADDRESS", raising=False)
        yield
        if ray := sys.modules.get("ray"):
            ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def local_ray() -> None:
    """Ray on this machine. It stays up for later modules, until one shuts it down to join a cluster of its own."""
    from orchestrator.ray_tune import connect

    connect()


@pytest.fixture(scope="session")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database with its tables, to be copied: making them takes seconds."""
    from orchestrator.journal import Journal
    from orchestrator.tracking import Mirror

    folder = tmp_path_factory.mktemp("migrated")
    mirror = Mirror(folder / "j.jsonl", f"sqlite:///{folder}/mlflow.db", "other")
    Journal(folder / "j.jsonl").run("x", name="x", parent=None, kind="sweep")
    mirror.start()
    assert mirror.close(300.0) == 0
    return folder / "mlflow.db"
