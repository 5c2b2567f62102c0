"""The driver of the benchmarks finds them, runs them and makes a table. What they measure is not asserted."""

from __future__ import annotations

import time
from pathlib import Path

import bench
import measurement
import pytest
from measurement import Measurement

GOOD = """
from measurement import Measurement

def measure(quick):
    print("noise of the benchmark")
    yield Measurement(
        name="stub", ours=2.0, theirs=5.0, unit="s", against="x | y", ratio=2.5, at_least=2.0,
        peak_bytes=3_000_000, note=f"quick={quick}",
    )
"""
BROKEN = """
def measure(quick: bool):
    raise OSError("no data here")
"""
HELPER = """
raise SystemExit("imported")

def measure(case, num_pairs):
    pass
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in {"good": GOOD, "broken": BROKEN, "helper": HELPER}.items():
        (tmp_path / f"{name}.py").write_text(text)
    return tmp_path


def test_benchmarks_are_collected_and_printed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = folder / "table.md"
    assert bench.main(["--table", str(table)], folder) == 1
    text = table.read_text()
    assert capsys.readouterr().out.endswith(text + "\n")
    assert "| stub | CPU | 2 s | 5 s | x / y | **2.5** | >= 2: met | 3 | quick=True |" in text.splitlines()
    assert "Failed: broken: OSError: no data here" in text
    assert "cores" in text
    assert "helper" not in text


def test_only_some_leave_the_kept_table_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "RESULTS", folder / "RESULTS.md")
    assert bench.main(["--only", "good", "--full"], folder) == 0
    assert not (folder / "RESULTS.md").exists()


@pytest.mark.parametrize(
    ("ratio", "limits", "expected"),
    [
        (1.4, {"at_least": 1.5}, ">= 1.5: **missed**"),
        (1.5, {"at_least": 1.5}, ">= 1.5: met"),
        (1.05, {"at_most": 1.05}, "<= 1.05: met"),
        (1.06, {"at_most": 1.05}, "<= 1.05: **missed**"),
        (9.0, {}, ""),
    ],
)
def test_targets(ratio: float, limits: dict[str, float], expected: str) -> None:
    item = Measurement(name="", ours=1.0, theirs=1.0, unit="", against="", ratio=ratio, **limits)
    assert item.target == expected


def test_the_machine_is_described_without_its_name() -> None:
    import socket

    assert socket.gethostname() not in "".join(measurement.machine(1.0))


ENDLESS = """
import subprocess, sys, time

def measure(quick):
    sleeper = subprocess.Popen(["sleep", "600"], start_new_session=True)
    with open({note!r}, "w") as file:
        file.write(str(sleeper.pid))
    time.sleep(600)
"""


def is_alive(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_benchmark_that_takes_too_long_is_ended_with_all_that_it_started(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    note = folder / "pid"
    (folder / "endless.py").write_text(ENDLESS.format(note=str(note)))
    monkeypatch.setattr(bench, "QUICK_SECONDS", 6.0)
    with pytest.raises(RuntimeError, match="endless: not ready after 6 s"):
        bench.run_apart(folder / "endless.py", quick=True)
    pid = note.read_text()
    for _ in range(100):
        if not is_alive(pid):
            break
        time.sleep(0.05)
    assert not is_alive(pid)
