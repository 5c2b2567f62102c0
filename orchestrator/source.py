"""Which Stillhouse this is: its version and a fingerprint of its source, to compare two installations.

Needs nothing but the standard library and imports nothing of ours: this file travels with a submitted job and is
run there before the cluster's own installation is touched.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

__all__ = ["difference", "identity", "source_fingerprint"]

PACKAGES = ("methods", "orchestrator")
ABSENT = "not installed"


def source_fingerprint() -> str:
    """Hash over names and contents of all our Python files, as they would be imported here."""
    digest = hashlib.sha256()
    for package in PACKAGES:
        found = importlib.util.find_spec(package)
        if found is None or found.origin is None:
            return ABSENT
        folder = Path(found.origin).parent
        for path in sorted(folder.rglob("*.py"), key=lambda path: path.relative_to(folder).as_posix()):
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            digest.update(f"{package}/{path.relative_to(folder).as_posix()} {content}\n".encode())
    return digest.hexdigest()[:16]


def identity() -> dict[str, str]:
    """``version`` and ``source`` of the installation here."""
    try:
        found = version("stillhouse")
    except PackageNotFoundError:
        found = ABSENT
    return {"version": found, "source": source_fingerprint()}


def difference(expected: Mapping[str, str], found: Mapping[str, str]) -> str | None:
    """None when both are the same code, else one line that names both and says what to do."""
    if dict(expected) == dict(found):
        return None
    if ABSENT in found.values():
        return f"Stillhouse is not installed there; install {_text(expected)} on every node of the cluster"
    return (
        f"Stillhouse there is {_text(found)}, but here it is {_text(expected)}; "
        "install the same version, or sync the same checkout, on both sides"
    )


def _text(identity: Mapping[str, str]) -> str:
    return f"{identity['version']} (source {identity['source']})"
