"""Shelves: folders of recordings, bounded by a budget. Whole recordings that nobody uses make room for newer ones.

Layout below the root::

    signals/<recording>/identity.json            what it is a recording of, for people
    signals/<recording>/used.json                when somebody last said that he uses it
    signals/<recording>/<epoch>/<chunk>          immutable

There is one shelf in the storage of the experiment and, where chunks cannot be mapped from there, one on each node.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

from orchestrator.clock import SYSTEM_CLOCK, Clock
from orchestrator.errors import StorageError
from orchestrator.filesystem import absolute_url, open_files

__all__ = ["Shelf", "is_network_mount", "open_shelves"]

FOLDER = "signals"
IN_USE_SECONDS = 900.0
"""A recording of which somebody said so recently is never evicted."""
LOOK_SECONDS = 60.0
"""How long a look at how full the shelf is holds; in between, what this process adds is counted."""
FREE_SHARE = 0.1
"""Share of a disk that recordings leave free: for checkpoints and artifacts."""


class Shelf:
    """Recordings below one URL."""

    def __init__(self, url: str, budget_bytes: float, clock: Clock = SYSTEM_CLOCK) -> None:
        self.url, self.budget_bytes, self.clock = absolute_url(url), budget_bytes, clock
        self._files = open_files(self.url)
        self._used_bytes = 0
        self._looked = -float("inf")

    @property
    def is_local(self) -> bool:
        """Whether its files can be mapped into memory."""
        return "://" not in self.url

    def path(self, recording: str, folder: str, name: str) -> str:
        """Where a chunk lies on a local disk."""
        return os.path.join(self.url, FOLDER, recording, folder, name)

    def has(self, recording: str) -> bool:
        """Whether anything was recorded."""
        return any(name != "used.json" for name in self._files.names(f"{FOLDER}/{recording}"))

    def has_any(self) -> bool:
        """Whether there is a recording."""
        return bool(self._files.names(FOLDER))

    def names(self, recording: str, folder: str) -> list[str]:
        """Chunks of a folder."""
        return self._files.names(f"{FOLDER}/{recording}/{folder}")

    def read(self, recording: str, folder: str, name: str) -> bytes | None:
        return self._files.read(f"{FOLDER}/{recording}/{folder}/{name}")

    def describe(self, recording: str, identity: Any) -> None:
        """Say for people what the recording is of."""
        path = f"{FOLDER}/{recording}/identity.json"
        if not self._files.exists(path):
            self._files.write(path, json.dumps(identity, indent=1).encode(), durable=False)

    def use(self, recording: str) -> None:
        """Say that it is in use."""
        note = json.dumps({"at": self.clock.time()}).encode()
        self._files.write(f"{FOLDER}/{recording}/used.json", note, durable=False)

    def add(self, recording: str, folder: str, name: str, data: bytes) -> None:
        """Keep a chunk; one of that name that is there already stays. ``StorageError`` where there is no room."""
        self._make_room(len(data), recording)
        if self._files.create(f"{FOLDER}/{recording}/{folder}/{name}", data, durable=False):
            self._used_bytes += len(data)

    def drop(self, recording: str, folder: str = "", name: str = "") -> None:
        """Remove a chunk, or the whole recording. Fine if it is gone."""
        self._files.delete("/".join(part for part in (FOLDER, recording, folder, name) if part))

    def _make_room(self, num_bytes: int, recording: str) -> None:
        if self.clock.monotonic() - self._looked >= LOOK_SECONDS:
            self._look()
        if self._fits(num_bytes):
            return
        for other, size in self._look():
            if other != recording and not self._is_in_use(other):
                self.drop(other)
                self._used_bytes -= size
                if self._fits(num_bytes):
                    return
        raise StorageError(
            f"no room for {num_bytes} bytes more of recorded signals in {self.url}/{FOLDER}: they take "
            f"{self._used_bytes} of {self.budget_bytes:.0f} bytes and none is out of use"
            f"{self._free_text()}; raise run.signals_gigabytes, free space, or set run.signals_dir to another disk"
        )

    def _fits(self, num_bytes: int) -> bool:
        if self._used_bytes + num_bytes > self.budget_bytes:
            return False
        disk = self._disk()
        return disk is None or disk.free - num_bytes >= FREE_SHARE * disk.total

    def _look(self) -> list[tuple[str, int]]:
        """Recordings and their sizes, least recently used first."""
        sizes: dict[str, int] = defaultdict(int)
        modified: dict[str, float] = defaultdict(float)
        for entry in self._files.walk(FOLDER):
            recording = entry.path.split("/")[1]
            sizes[recording] += entry.size
            modified[recording] = max(modified[recording], entry.modified)
        self._used_bytes, self._looked = sum(sizes.values()), self.clock.monotonic()
        return sorted(sizes.items(), key=lambda item: modified[item[0]])

    def _is_in_use(self, recording: str) -> bool:
        note = self._files.read(f"{FOLDER}/{recording}/used.json")
        try:
            return note is not None and self.clock.time() - float(json.loads(note)["at"]) < IN_USE_SECONDS
        except (ValueError, KeyError, TypeError):  # half of a note: nobody wrote it lately
            return False

    def _disk(self) -> Any:
        folder = next((path for path in (Path(self.url), *Path(self.url).parents) if path.is_dir()), None)
        return shutil.disk_usage(folder) if self.is_local and folder is not None else None

    def _free_text(self) -> str:
        disk = self._disk()
        return "" if disk is None else f"; {disk.free} of {disk.total} bytes of the disk are free"


NETWORK_KINDS = ("nfs", "cifs", "smb", "fuse.sshfs", "fuse.s3fs", "fuse.gcsfuse", "ceph", "lustre", "9p")


def is_network_mount(path: str, mounts: Path = Path("/proc/mounts")) -> bool:
    """Whether a local path lies on a network file system, where a file that another host deletes cannot stay mapped."""
    if not mounts.exists():
        return False
    lines = [line.split(" ") for line in mounts.read_text().splitlines()]
    above = [line for line in lines if Path(path).is_relative_to(line[1].replace("\\040", " "))]
    return max(above, key=lambda line: len(line[1]))[2].startswith(NETWORK_KINDS) if above else False


def open_shelves(storage_url: str, node_folder: str | None, gigabytes: float) -> list[Shelf]:
    """The shelf to map chunks from, then the storage's own where that is another."""
    storage = Shelf(storage_url, gigabytes * 1e9)
    if node_folder is None and storage.is_local and not is_network_mount(storage.url):
        return [storage]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stillhouse"
    return [Shelf(node_folder or str(cache), gigabytes * 1e9), storage]
