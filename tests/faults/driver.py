"""Start, watch and end the command line as a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

EXPERIMENT = """
name: faults
data: {{dataset: digits, validation: 0.2}}
stages:
  teacher: {{method: supervised, model: tiny_mlp, train: {{epochs: 4}}}}
  views: {{method: angular_views, teacher: $teacher, train: {{epochs: 3}}}}
  student: {{method: angular_kd, model: tiny_mlp, teacher: $views, train: {{epochs: 8}}}}
baselines:
  kd: {{student: {{method: kd, teacher: $teacher}}}}
search:
  space: {{views.num_branches: {{grid: [1, 2, 3]}}}}
  objective: {{maximize: student.top1}}
  seeds: 2
run: {{storage: {storage}, checkpoint_seconds: 0, lease_seconds: 20}}
"""


def write_experiment(folder: Path, storage: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "experiment.yaml"
    path.write_text(EXPERIMENT.format(storage=storage))
    return path


def start(experiment: Path, *overrides: str) -> subprocess.Popen[bytes]:
    """``stillhouse run`` in its own session, its output in ``output.txt`` beside the experiment."""
    with (experiment.parent / "output.txt").open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "orchestrator.cli", "run", str(experiment), *overrides],
            stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
        )  # fmt: skip


def finish(process: subprocess.Popen[bytes], timeout_seconds: float = 240) -> int:
    try:
        return process.wait(timeout_seconds)
    finally:
        if process.poll() is None:
            process.kill()


def wait_until(condition: Callable[[], bool], timeout_seconds: float, what: str) -> None:
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_seconds} s for {what}"
        time.sleep(0.05)


def descendants(pid: int) -> set[tuple[int, str]]:
    """All processes below ``pid`` with their start times."""
    parents: dict[int, list[tuple[int, str]]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (fields := stat(int(entry.name))) is not None:
            parents.setdefault(int(fields[1]), []).append((int(entry.name), fields[19]))
    found: set[tuple[int, str]] = set()
    todo = [pid]
    while todo:
        for child in parents.get(todo.pop(), []):
            found.add(child)
            todo.append(child[0])
    return found


def stat(pid: int) -> list[str] | None:
    """Fields of /proc/PID/stat behind the name: state, parent, ... start time; None when it is gone or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields


def alive(process: tuple[int, str]) -> bool:
    fields = stat(process[0])
    return fields is not None and fields[19] == process[1]


def kill(process: subprocess.Popen[bytes]) -> set[tuple[int, str]]:
    """kill -9 of the driver alone; returns what ran below it."""
    below = descendants(process.pid)
    os.kill(process.pid, signal.SIGKILL)
    process.wait(120)
    return below
