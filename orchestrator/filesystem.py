"""The few file operations that the store stands on, for local disks and for anything that fsspec reaches.

Everything above this module needs only these guarantees: a write is seen whole or not at all, ``create`` has exactly
one winner, and a listing shows what was written before it began. Paths are relative to the root and separated by "/".

``create`` is decided by the file system itself on local disks, NFS and S3 (a conditional put); in memory, by a lock.
On other fsspec file systems it is as exclusive as their ``pipe_file(mode="create")``: some only look first, and then
two processes that create the same path in the same instant may both believe that they won.
"""

from __future__ import annotations

import errno
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from orchestrator.errors import StillhouseError, StorageError
from orchestrator.secrecy import hide

__all__ = ["Entry", "Files", "absolute_url", "open_files", "storage_errors"]

REMEDIES = {
    errno.ENOSPC: "disk full: free space or set run.storage to another place",
    errno.EDQUOT: "disk quota used up: free space or set run.storage to another place",
    errno.EFBIG: "file size limit reached: raise it (ulimit -f) or set run.storage to another place",
    errno.EACCES: "permission denied: make it writable for this user or set run.storage to another place",
    errno.EPERM: "not permitted: make it writable for this user or set run.storage to another place",
    errno.EROFS: "read-only file system: remount it writable or set run.storage to another place",
    errno.ENOTDIR: "a part of the path is a file, not a folder: set run.storage to another place",
    errno.EEXIST: "a file is where a folder is needed: remove it or set run.storage to another place",
    errno.EISDIR: "a folder is where a file is needed: remove it or set run.storage to another place",
    errno.ENAMETOOLONG: "the path is too long: set run.storage to a shorter one",
    errno.EMFILE: "too many open files: raise the limit (ulimit -n)",
    errno.ESTALE: "the network file system went away: check the mount",
}
GENERAL_REMEDY = "check that the storage is reachable and writable, or set run.storage to another place"


class Entry(NamedTuple):
    """One stored file."""

    path: str
    """Relative to the root."""
    size: int
    """Bytes."""
    modified: float
    """Unix seconds, by the clock of the storage."""


class Files(ABC):
    """Whole files below one root. Any failure of the storage is a ``StorageError``; absence is not a failure."""

    def __init__(self, url: str) -> None:
        self.url = url

    @abstractmethod
    def read(self, path: str) -> bytes | None:
        """Content of a file, or None where there is none."""

    @abstractmethod
    def write(self, path: str, data: bytes, *, durable: bool = True) -> None:
        """Write or replace a file in one step. ``durable``: it survives a power cut once this returns."""

    @abstractmethod
    def create(self, path: str, data: bytes, *, durable: bool = True) -> bool:
        """Write a file only if there is none: True for the one winner. Data must be unique to the caller."""

    @abstractmethod
    def exists(self, path: str) -> bool:
        """Whether there is a file."""

    @abstractmethod
    def names(self, path: str) -> list[str]:
        """Names directly below a folder, sorted; empty if there is no such folder."""

    @abstractmethod
    def walk(self, path: str) -> Iterator[Entry]:
        """Every file below a folder, at any depth, in order of path."""

    @abstractmethod
    def delete(self, path: str) -> None:
        """Remove a file, or a folder with all it holds. Fine if there is none."""

    @abstractmethod
    def move(self, source: str, target: str) -> None:
        """Move a folder. In one step on a local disk, file by file elsewhere. Fine if there is none."""


@contextmanager
def storage_errors(place: str, doing: str) -> Iterator[None]:
    """Turn whatever a storage library raises into a ``StorageError`` that says place, cause and next step."""
    try:
        yield
    except StillhouseError:
        raise
    except ImportError as error:
        raise StorageError(f"cannot {doing} {place}: {error}. {_missing_library(place)}") from error
    except Exception as error:
        cause = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        text = f"cannot {doing} {place}: {cause}. {_room(error, place)}{_remedy(error)}"
        # Tracebacks show the library's own text as well, so where that holds a secret the chain ends here.
        raise StorageError(hide(text)) from (error if hide(text) == text else None)


def _room(error: Exception, place: str) -> str:
    """For a full disk, how full it is."""
    if not isinstance(error, OSError) or error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return ""
    folder = next((parent for parent in Path(place).parents if parent.is_dir()), None)
    if folder is None:
        return ""
    found = shutil.disk_usage(folder)
    return f"{found.free / 2**20:.1f} of {found.total / 2**20:.1f} MiB are free; "


def _missing_library(place: str) -> str:
    if place.startswith(("s3://", "s3a://")):
        return 'S3 needs an extra: pip install "stillhouse[s3]"'
    return "install the fsspec library for this kind of URL, or set run.storage to another place"


def _remedy(error: Exception) -> str:
    if isinstance(error, PermissionError) and error.errno is None:
        return "access denied: check the credentials and the permissions of the bucket"
    if isinstance(error, FileNotFoundError) and error.errno is None:
        return "create the bucket first, or set run.storage to another place"
    if type(error).__name__ == "NoCredentialsError":
        return "no credentials found: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile, or a role"
    number = error.errno if isinstance(error, OSError) else None
    return REMEDIES.get(number, GENERAL_REMEDY) if number else GENERAL_REMEDY


def absolute_url(url: str) -> str:
    """The same place, independent of the working directory: local paths become absolute, URLs stay."""
    if not url:
        raise ValueError("storage needs a path or URL, got ''")
    if url.startswith("file://"):
        return os.path.abspath(url.removeprefix("file://"))
    if "://" in url:
        return url.rstrip("/")
    return os.path.abspath(Path(url).expanduser())


def open_files(url: str) -> Files:
    """The file operations for a path or URL. Touches nothing yet."""
    from orchestrator.filesystem_local import LocalFiles
    from orchestrator.filesystem_remote import RemoteFiles

    place = absolute_url(url)
    return RemoteFiles(place) if "://" in place else LocalFiles(place)
