"""The local record of everything that tracking will be told: one append-only file of JSON lines per sweep.

Writing here is all that a sweep ever waits for. ``orchestrator.tracking.Mirror`` reads the same file and sends it
to MLflow, now or in a later process. Pure files: no MLflow, no network. Where the disk does not take a record (it is
full), the record waits in memory for the next one: training is worth more than what is told about it.

Every line is ``{"op": ..., "id": ..., "at": unix seconds, ...}``. Ids are ours and stable (``sweep:NAME``,
``trial:KEY``, ``stage:KEY``), so the same sweep run twice speaks of the same runs.
"""

from __future__ import annotations

import json
import logging
import math
import os
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from orchestrator.secrecy import hide_plain

__all__ = ["DAMAGED", "EndStatus", "Journal", "Record", "read_records"]

logger = logging.getLogger(__name__)

EndStatus = Literal["FINISHED", "FAILED", "KILLED"]
Record = dict[str, Any]
DAMAGED = "damaged"
MAX_WAITING = 100_000
"""Records that wait in memory for a full disk; beyond it rows of numbers are left out."""
FILES = frozenset({"artifact", "model"})
"""Operations whose fields are paths of ours: they have to lead to the files."""


class Journal:
    """The writing end. One writer at a time; any number of threads of that process.

    Each call is one ``write`` of one complete line, so a killed process leaves at most one torn last line, which the
    next ``Journal`` on the same path drops. Nothing here waits for a server or for the disk to flush.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        _drop_torn_line(path)
        self._lock = threading.Lock()
        self._declared: dict[str, str | None] = {}
        """Our id -> status of its last ``end``, or None while it is open."""
        self._models: set[tuple[str, str]] = set()
        for record, _ in read_records(path):
            self._remember(record)
        self._waiting: deque[bytes] = deque()
        """Lines that the disk has not taken."""
        self._trouble = ""
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def run(
        self,
        id: str,
        *,
        name: str,
        parent: str | None,
        kind: str,
        tags: Mapping[str, str] | None = None,
        started: float | None = None,
    ) -> None:
        """Declare a run below ``parent`` (our id, declared before) or at the top.

        Declaring an open or finished run again changes nothing. A sweep that had ended, and any run that had ended
        as FAILED or KILLED, is opened again.
        """
        if parent is not None and parent not in self._declared:
            raise ValueError(f"run {id!r} names the parent {parent!r}, which was not declared before it")
        ended = self._declared.get(id)
        if id in self._declared and (ended is None or (ended == "FINISHED" and kind != "sweep")):
            return
        started = time.time() if started is None else started
        fields = {
            "name": name,
            "parent": parent,
            "kind": kind,
            "tags": _texts(tags or {}),
            "started": started,
        }
        self._write("run", id, fields)

    def params(self, id: str, values: Mapping[str, Any]) -> None:
        """Settings of a run. MLflow keeps the first value of each name."""
        if values:
            self._write("params", id, {"values": _texts(values)})

    def metrics(self, id: str, rows: Sequence[Mapping[str, float]]) -> None:
        """Rows of numbers. ``epoch`` becomes the step, ``time`` (unix seconds) the timestamp; NaN and inf are kept."""
        now = time.time()
        plain = [{"time": now, **{name: _number(value) for name, value in row.items()}} for row in rows]
        if plain:
            self._write("metrics", id, {"rows": plain})

    def tags(self, id: str, values: Mapping[str, Any]) -> None:
        """Tags of a run; a later value replaces an earlier one."""
        if values:
            self._write("tags", id, {"values": _texts(values)})

    def link(self, id: str, name: str, target: str) -> None:
        """Say that run ``id`` uses run ``target`` (for instance a shared stage) under ``name``."""
        if target not in self._declared:
            raise ValueError(f"run {id!r} links to {target!r}, which was not declared with run() before")
        self._write("link", id, {"name": name, "target": target})

    def artifact(self, id: str, local_path: Path, artifact_path: str = "") -> None:
        """Attach a file or folder, read when it is sent, below ``artifact_path`` inside the run."""
        self._write(
            "artifact", id, {"local_path": str(local_path.absolute()), "artifact_path": artifact_path}
        )

    def model(self, id: str, bundle: Path) -> None:
        """Attach a model bundle (``model.json`` and ``weights.safetensors``) as an MLflow model; once per content key."""
        bundle = bundle.absolute()
        if (id, _bundle_key(bundle)) not in self._models:
            self._write("model", id, {"bundle": str(bundle), "key": _bundle_key(bundle)})

    def end(self, id: str, status: EndStatus, ended: float | None = None) -> None:
        """Close a run. Closing it again with the same status changes nothing."""
        if self._declared.get(id) != status:
            self._write("end", id, {"status": status, "ended": time.time() if ended is None else ended})

    def has_finished(self, id: str) -> bool:
        """Whether this run was closed as FINISHED, now or by an earlier process."""
        return self._declared.get(id) == "FINISHED"

    def close(self) -> int:
        """Flush to the disk and close; the number of records that it never took. Idempotent."""
        with self._lock:
            if self._file >= 0:
                self._write_waiting()
                os.fsync(self._file)
                os.close(self._file)
            self._file = -1
            return len(self._waiting)

    def _write(self, op: str, id: str, fields: Record) -> None:
        if op != "run" and id not in self._declared:
            raise ValueError(f"{op} for run {id!r}, which was not declared with run() before")
        shown = fields if op in FILES else hide_plain(fields)
        record = {"op": op, "id": id, "at": time.time(), **shown}
        line = (json.dumps(record, allow_nan=False, separators=(",", ":")) + "\n").encode()
        with self._lock:
            if self._file < 0:
                raise ValueError(f"the journal {self.path} is closed")
            if len(self._waiting) < MAX_WAITING or op != "metrics":
                self._waiting.append(line)
            self._write_waiting()
            self._remember(record)

    def _write_waiting(self) -> None:
        """Write as many lines as the disk takes, in their order; say once when it takes none, and when it does again."""
        try:
            while self._waiting:
                self._append(self._waiting[0])
                self._waiting.popleft()
        except OSError as error:
            if not self._trouble:
                logger.warning(
                    "the journal %s cannot be written: %s. The sweep goes on, and what tracking is to be told waits in "
                    "memory; free space on that disk",
                    self.path, error,
                )  # fmt: skip
            self._trouble = str(error)
        else:
            if self._trouble:
                logger.warning("the journal %s can be written again: nothing is lost", self.path)
            self._trouble = ""

    def _append(self, line: bytes) -> None:
        """Write the whole line or, when the disk is full, nothing: a torn line must not swallow the next one."""
        start = os.fstat(self._file).st_size
        try:
            written = 0
            while written < len(line):
                written += os.write(self._file, line[written:])
        except OSError:
            os.ftruncate(self._file, start)
            raise

    def _remember(self, record: Record) -> None:
        if record["op"] == "run":
            self._declared[record["id"]] = None
        elif record["op"] == "end":
            self._declared[record["id"]] = record["status"]
        elif record["op"] == "model":
            self._models.add((record["id"], record["key"]))


def read_records(path: Path, offset: int = 0, *, limit: int | None = None) -> Iterator[tuple[Record, int]]:
    """Complete records from byte ``offset`` on, each with the offset behind it. A torn last line is left for later.

    A line in the middle that cannot be read (a damaged disk) is named in a warning and comes as a record with the
    op ``DAMAGED``, so that readers can step over it.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n") or limit == 0:
                return
            offset += len(line)
            try:
                record = json.loads(line)
                record["op"], record["id"]
            except (ValueError, KeyError, TypeError) as problem:
                logger.warning("%s: the line that ends at byte %d is damaged (%s)", path, offset, problem)
                record = {"op": DAMAGED, "id": ""}
            yield record, offset
            limit = None if limit is None else limit - 1


def _drop_torn_line(path: Path) -> None:
    """Cut what follows the last line end, left behind by a writer that was killed."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        size = file.seek(0, os.SEEK_END)
        keep = size
        while keep > 0:
            start = max(0, keep - 65536)
            file.seek(start)
            position = file.read(keep - start).rfind(b"\n")
            if position >= 0:
                keep = start + position + 1
                break
            keep = start
        if keep < size:
            file.truncate(keep)


def _bundle_key(bundle: Path) -> str:
    """The content key that a bundle states, or its path when it states none."""
    try:
        return str(json.loads((bundle / "model.json").read_text())["key"])
    except (OSError, ValueError, KeyError):
        return str(bundle)


def _texts(values: Mapping[str, Any]) -> dict[str, str]:
    return {str(name): str(value) for name, value in values.items()}


def _number(value: float) -> float | str:
    """JSON knows no NaN: it travels as text, which ``float`` reads back."""
    value = float(value)
    return value if math.isfinite(value) else repr(value)
