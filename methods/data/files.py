"""Finding data files and telling their contents apart."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from methods.data.base import DataError


def folder(root: str) -> Path:
    """``root`` as a path, or a DataError that says what is there instead."""
    path = Path(root).expanduser()
    if path.is_dir():
        return path
    found = "is a file, not a folder" if path.exists() else "does not exist"
    nearest = next((parent for parent in path.absolute().parents if parent.is_dir()), None)
    raise DataError(
        f"data root {path} {found} (it exists up to {nearest}): set data.root to the folder of the data"
    )


def listing(path: Path, limit: int = 10) -> str:
    """A few names in a folder, for an error that says what was found."""
    names = sorted(entry.name + ("/" if entry.is_dir() else "") for entry in path.iterdir())
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return (", ".join(names[:limit]) or "nothing") + more


def content_digest(files: Iterable[Path]) -> str:
    """SHA-256 over the bytes of the files in their order, whatever their names. Read once per process."""
    digest = hashlib.sha256()
    for file in files:
        state = file.stat()
        digest.update(_file_digest(file, state.st_size, state.st_mtime_ns))
    return digest.hexdigest()


def combined_digest(*parts: object) -> str:
    """SHA-256 over the ``repr`` of plain values."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()


@lru_cache(maxsize=1 << 16)
def _file_digest(file: Path, num_bytes: int, modified_ns: int) -> bytes:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").digest()
