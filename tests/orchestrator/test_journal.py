"""The journal: complete lines only, idempotent declarations, quick."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from orchestrator.journal import DAMAGED, Journal, read_records


def records(path: Path) -> list[dict]:
    return [record for record, _ in read_records(path)]


def started(path: Path) -> Journal:
    journal = Journal(path)
    journal.run("sweep:a", name="a", parent=None, kind="sweep")
    journal.run("trial:1", name="t", parent="sweep:a", kind="trial")
    return journal


def test_everything_written_is_read_back(tmp_path: Path) -> None:
    journal = started(tmp_path / "deep" / "journal.jsonl")
    journal.params("trial:1", {"views.margin": 0.2, "freeze": True, "name": None})
    journal.metrics("trial:1", [{"epoch": 3, "time": 12.5, "top1": 70.0, "loss": math.nan, "gap": -math.inf}])
    journal.tags("trial:1", {"device": "cpu"})
    journal.end("trial:1", "FINISHED", 99.0)
    run, _, params, metrics, tags, end = records(journal.path)
    assert (run["op"], run["id"], run["parent"], run["kind"]) == ("run", "sweep:a", None, "sweep")
    assert params["values"] == {"views.margin": "0.2", "freeze": "True", "name": "None"}
    row = metrics["rows"][0]
    assert (row["epoch"], row["time"], row["top1"]) == (3, 12.5, 70.0)
    assert math.isnan(float(row["loss"]))
    assert float(row["gap"]) == -math.inf
    assert tags["values"] == {"device": "cpu"}
    assert (end["status"], end["ended"]) == ("FINISHED", 99.0)


@pytest.mark.parametrize(
    ("status", "kind", "num_runs"),
    [
        (None, "trial", 1),
        ("FINISHED", "trial", 1),
        ("FAILED", "trial", 2),
        ("KILLED", "stage", 2),
        ("FINISHED", "sweep", 2),
    ],
)
def test_declaring_again_opens_only_what_is_not_finished(
    tmp_path: Path, status: str | None, kind: str, num_runs: int
) -> None:
    for _ in range(2):
        journal = Journal(tmp_path / "j.jsonl")
        journal.run("x", name="x", parent=None, kind=kind)
        journal.run("x", name="x", parent=None, kind=kind)
        if status is not None and _ == 0:
            journal.end("x", status)  # type: ignore[arg-type]
            journal.end("x", status)  # type: ignore[arg-type]
        journal.close()
    found = records(journal.path)
    assert [record["op"] for record in found].count("run") == num_runs
    assert [record["op"] for record in found].count("end") == (status is not None)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda journal: journal.run("y", name="y", parent="nobody", kind="trial"),
        lambda journal: journal.params("nobody", {"a": 1}),
        lambda journal: journal.end("nobody", "FINISHED"),
        lambda journal: journal.link("trial:1", "teacher", "nobody"),
        lambda journal: (journal.close(), journal.tags("trial:1", {"a": "b"})),
    ],
)
def test_mistakes_of_the_caller_are_refused(tmp_path: Path, wrong) -> None:
    with pytest.raises(ValueError, match=r"declared|closed"):
        wrong(started(tmp_path / "j.jsonl"))


def test_a_model_is_written_once_per_content_key(tmp_path: Path) -> None:
    for name, key in (("one", "k1"), ("two", "k1"), ("three", "k2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.json").write_text(json.dumps({"key": key}))
    journal = started(tmp_path / "j.jsonl")
    journal.model("trial:1", tmp_path / "one")
    journal.close()
    journal = Journal(tmp_path / "j.jsonl")
    journal.model("trial:1", tmp_path / "two")
    journal.model("trial:1", tmp_path / "three")
    assert [record["key"] for record in records(journal.path) if record["op"] == "model"] == ["k1", "k2"]


@pytest.mark.parametrize("num_bytes", [1, 20, 70_000])
def test_a_torn_last_line_is_dropped(tmp_path: Path, num_bytes: int) -> None:
    path = tmp_path / "j.jsonl"
    started(path).close()
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"op":"tags","id":"trial:1","values":{"x":"' + b"y" * num_bytes)
    assert len(records(path)) == 2
    journal = Journal(path)
    journal.tags("trial:1", {"after": "crash"})
    assert path.read_bytes().startswith(whole)
    assert [record["op"] for record in records(path)] == ["run", "run", "tags"]


def test_a_file_of_one_torn_line_starts_empty(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    path.write_bytes(b'{"op":"ru')
    Journal(path).run("a", name="a", parent=None, kind="sweep")
    assert [record["id"] for record in records(path)] == ["a"]


def test_a_damaged_line_in_the_middle_is_named_and_stepped_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "j.jsonl"
    started(path).close()
    with path.open("ab") as file:
        file.write(b"\0\0\0\n[]\n")
    with caplog.at_level(logging.WARNING):
        journal = Journal(path)
        journal.tags("trial:1", {"a": "b"})
    assert [record["op"] for record in records(path)] == ["run", "run", DAMAGED, DAMAGED, "tags"]
    assert str(path) in caplog.text


def test_reading_goes_on_from_an_offset(tmp_path: Path) -> None:
    journal = started(tmp_path / "j.jsonl")
    *_, (_, offset) = read_records(journal.path)
    assert list(read_records(journal.path, offset)) == []
    journal.tags("trial:1", {"a": "b"})
    journal.tags("trial:1", {"c": "d"})
    ((record, _),) = read_records(journal.path, offset, limit=1)
    assert record["values"] == {"a": "b"}


def test_threads_never_mix_lines(tmp_path: Path) -> None:
    journal = started(tmp_path / "j.jsonl")
    threads = [
        threading.Thread(target=lambda n=n: [journal.tags("trial:1", {"n": str(n) * 400}) for _ in range(50)])
        for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(records(journal.path)) == 202
    assert all(record["op"] != DAMAGED for record in records(journal.path))


def test_a_killed_writer_leaves_a_readable_journal(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    program = textwrap.dedent(
        f"""
        from pathlib import Path
        from orchestrator.journal import Journal
        journal = Journal(Path({str(path)!r}))
        journal.run("a", name="a", parent=None, kind="sweep")
        while True:
            journal.tags("a", {{"x": "y" * 3000}})
        """
    )
    writer = subprocess.Popen([sys.executable, "-c", program], cwd=Path(__file__).parents[2])
    while not path.exists() or path.stat().st_size < 100_000:
        time.sleep(0.01)
    os.kill(writer.pid, signal.SIGKILL)
    writer.wait()
    before = len(records(path))
    journal = Journal(path)
    journal.tags("a", {"after": "kill"})
    assert [record["op"] for record in records(path)] == ["run", *["tags"] * before]


def test_a_record_costs_less_than_a_millisecond(tmp_path: Path) -> None:
    journal = started(tmp_path / "j.jsonl")
    row = {"epoch": 1.0, "time": 1.0, **{f"metric_{index}": index * 0.1 for index in range(20)}}
    started_at = time.perf_counter()
    for _ in range(500):
        journal.metrics("trial:1", [row])
    assert (time.perf_counter() - started_at) / 500 < 1e-3
