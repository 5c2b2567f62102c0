"""Files on a local disk or a mounted network disk, written so that a crash leaves the old content or the new."""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import suppress

from orchestrator.filesystem import Entry, Files, storage_errors

__all__ = ["LocalFiles"]

DELETE_ATTEMPTS = 3
NO_HARD_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


class LocalFiles(Files):
    """Folder on this machine. Names that start with a dot are unfinished writes and are never listed."""

    def read(self, path: str) -> bytes | None:
        with storage_errors(self._full(path), "read"):
            try:
                with open(self._full(path), "rb") as file:
                    return file.read()
            except FileNotFoundError:
                return None

    def write(self, path: str, data: bytes, *, durable: bool = True) -> None:
        full = self._full(path)
        with storage_errors(full, "write"):
            temporary = self._write_temporary(full, data, durable)
            try:
                os.replace(temporary, full)
            except BaseException:
                _unlink(temporary)
                raise
            if durable:
                _sync_folder(os.path.dirname(full))

    def create(self, path: str, data: bytes, *, durable: bool = True) -> bool:
        full = self._full(path)
        with storage_errors(full, "create"):
            temporary = self._write_temporary(full, data, durable)
            try:
                won = _link_exclusively(temporary, full, data)
            finally:
                _unlink(temporary)
            if won and durable:
                _sync_folder(os.path.dirname(full))
            return won

    def exists(self, path: str) -> bool:
        with storage_errors(self._full(path), "look for"):
            try:
                os.stat(self._full(path))
            except (FileNotFoundError, NotADirectoryError):
                return False
            return True

    def names(self, path: str) -> list[str]:
        with storage_errors(self._full(path), "list"):
            try:
                return sorted(name for name in os.listdir(self._full(path)) if not name.startswith("."))
            except FileNotFoundError:
                return []

    def walk(self, path: str) -> Iterator[Entry]:
        for name in self.names(path):
            child = f"{path}/{name}" if path else name
            if os.path.isdir(self._full(child)):
                yield from self.walk(child)
            else:
                with storage_errors(self._full(child), "look at"):
                    try:
                        found = os.stat(self._full(child))
                    except FileNotFoundError:
                        continue
                yield Entry(child, found.st_size, found.st_mtime)

    def delete(self, path: str) -> None:
        full = self._full(path)
        with storage_errors(full, "delete"):
            if not os.path.isdir(full):
                _unlink(full)
                return
            for _ in range(DELETE_ATTEMPTS):
                # Others may add to the folder or delete the same one meanwhile; what is left is tried again.
                shutil.rmtree(full, ignore_errors=True)
                if not os.path.isdir(full):
                    return
            shutil.rmtree(full)

    def move(self, source: str, target: str) -> None:
        full_target = self._full(target)
        with storage_errors(self._full(source), f"move to {full_target}"):
            _make_folder(os.path.dirname(full_target))
            try:
                os.rename(self._full(source), full_target)
            except FileNotFoundError:
                return
            _sync_folder(os.path.dirname(full_target))

    def _full(self, path: str) -> str:
        return os.path.join(self.url, path) if path else self.url

    def _write_temporary(self, full: str, data: bytes, durable: bool) -> str:
        folder, name = os.path.split(full)
        temporary = os.path.join(folder, f".{name}.{uuid.uuid4().hex}.tmp")
        try:
            file = open(temporary, "xb")  # noqa: SIM115 -- opened again below when the folder was missing
        except FileNotFoundError:
            _make_folder(folder, durable)
            file = open(temporary, "xb")  # noqa: SIM115
        try:
            with file:
                file.write(data)
                file.flush()
                if durable:
                    os.fsync(file.fileno())
        except BaseException:
            _unlink(temporary)
            raise
        return temporary


def _link_exclusively(temporary: str, full: str, data: bytes) -> bool:
    """Give the finished file its name unless the name is taken. A hard link is atomic also on NFS."""
    try:
        os.link(temporary, full)
        return True
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in NO_HARD_LINKS:
            raise
    # Without hard links (FAT, some mounts) the name is taken first and filled at once: still one winner, but a
    # power cut in between leaves a short file, which readers report as damaged.
    try:
        with open(full, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError:
        return False
    return True


def _make_folder(folder: str, durable: bool = True) -> None:
    """Create a folder and make the names of new parents and, if ``durable``, its own survive a power cut."""
    if os.path.isdir(folder):
        return
    parent = os.path.dirname(folder)
    if parent != folder:
        _make_folder(parent)  # others may keep durable files there
    try:
        os.mkdir(folder)
    except FileExistsError:
        if not os.path.isdir(folder):
            raise
    if durable:
        _sync_folder(parent)


def _sync_folder(folder: str) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some mounts cannot sync a folder; they order their own metadata.
        if error.errno not in {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}:
            raise
    finally:
        os.close(descriptor)


def _unlink(path: str) -> None:
    with suppress(FileNotFoundError, NotADirectoryError):
        os.unlink(path)
