"""Files on anything that fsspec reaches: S3, other object stores, and the in-memory file system of the tests."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from datetime import datetime
from typing import Any

from orchestrator.filesystem import Entry, Files, storage_errors

__all__ = ["RemoteFiles"]

MEMORY_LOCK = threading.Lock()
WITHOUT_FOLDERS = {"s3", "s3a", "gs", "gcs", "abfs", "az", "abfss", "memory"}
CONFLICT_ATTEMPTS = 5
CONFLICT_PAUSE_SECONDS = 0.2
TIME_FIELDS = ("LastModified", "mtime", "modified", "last_modified", "updated", "created")


class RemoteFiles(Files):
    """Objects below a URL. A put is atomic by itself; durability is the storage's business."""

    def read(self, path: str) -> bytes | None:
        with storage_errors(self._place(path), "read"):
            files, root = self._connect()
            try:
                return bytes(files.cat_file(f"{root}/{path}"))
            except FileNotFoundError:
                return None

    def write(self, path: str, data: bytes, *, durable: bool = True) -> None:
        with storage_errors(self._place(path), "write"):
            files, root = self._connect()
            self._make_parent(files, f"{root}/{path}")
            files.pipe_file(f"{root}/{path}", data)

    def create(self, path: str, data: bytes, *, durable: bool = True) -> bool:
        with storage_errors(self._place(path), "create"):
            for attempt in range(CONFLICT_ATTEMPTS):
                try:
                    return self._create_once(path, data)
                except OSError as error:
                    if _error_code(error) != "ConditionalRequestConflict" or attempt == CONFLICT_ATTEMPTS - 1:
                        raise
                    time.sleep(CONFLICT_PAUSE_SECONDS)
        raise AssertionError("unreachable: the last attempt returns or raises")

    def exists(self, path: str) -> bool:
        with storage_errors(self._place(path), "look for"):
            files, root = self._connect()
            try:
                files.info(f"{root}/{path}")
            except FileNotFoundError:
                return False
            return True

    def names(self, path: str) -> list[str]:
        with storage_errors(self._place(path), "list"):
            files, root = self._connect()
            try:
                found = files.ls(f"{root}/{path}", detail=False)
            except (FileNotFoundError, NotADirectoryError):
                return []
            return sorted({str(name).rstrip("/").rpartition("/")[2] for name in found})

    def walk(self, path: str) -> Iterator[Entry]:
        with storage_errors(self._place(path), "list"):
            files, root = self._connect()
            start = f"{root}/{path}".rstrip("/")
            try:
                found = files.find(start, detail=True)
            except FileNotFoundError:
                return
            prefix = files._strip_protocol(root).rstrip("/") + "/"
            entries = [
                Entry(str(name).removeprefix(prefix), int(info.get("size") or 0), _modified(info))
                for name, info in sorted(found.items())
            ]
        yield from entries

    def delete(self, path: str) -> None:
        with storage_errors(self._place(path), "delete"):
            files, root = self._connect()
            try:
                files.rm(f"{root}/{path}", recursive=True)
            except FileNotFoundError:
                return

    def move(self, source: str, target: str) -> None:
        for entry in list(self.walk(source)):
            data = self.read(entry.path)
            if data is not None:
                self.write(target + entry.path.removeprefix(source), data)
        self.delete(source)

    def _place(self, path: str) -> str:
        return f"{self.url}/{path}" if path else self.url

    def _connect(self) -> tuple[Any, str]:
        """The file system (fsspec keeps one per process and settings) without what it remembers of others' files."""
        import fsspec

        files, root = fsspec.core.url_to_fs(self.url)
        files.invalidate_cache()
        return files, str(root).rstrip("/")

    def _make_parent(self, files: Any, full: str) -> None:
        # Object stores have no folders, and asking one to make them may try to create the bucket.
        if _protocol(files) not in WITHOUT_FOLDERS:
            files.makedirs(full.rpartition("/")[0], exist_ok=True)

    def _create_once(self, path: str, data: bytes) -> bool:
        files, root = self._connect()
        full = f"{root}/{path}"
        self._make_parent(files, full)
        try:
            # The in-memory file system looks first and writes then; the others decide by themselves.
            with MEMORY_LOCK if _protocol(files) == "memory" else nullcontext():
                files.pipe_file(full, data, mode="create")
            return True
        except FileExistsError:
            pass
        except OSError as error:
            if _error_code(error) != "PreconditionFailed":
                raise
        # A put whose answer got lost is sent again by the client and then finds its own file.
        return self.read(path) == data


def _protocol(files: Any) -> str:
    return str(files.protocol if isinstance(files.protocol, str) else files.protocol[0])


def _error_code(error: OSError) -> str:
    response = getattr(error.__cause__, "response", None) or {}
    return str(response.get("Error", {}).get("Code", ""))


def _modified(info: dict[str, Any]) -> float:
    """Unix seconds of the last change; "now" where the storage does not tell, so that nothing looks old."""
    for field in TIME_FIELDS:
        value = info.get(field)
        if isinstance(value, datetime):
            return value.timestamp()
        if isinstance(value, int | float):
            return float(value)
    return time.time()
