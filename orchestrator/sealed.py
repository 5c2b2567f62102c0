"""Sealed sets of files: a manifest with size and SHA-256 of each file, and a checksum of its own, written last."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from orchestrator.errors import DamagedArtifactError
from orchestrator.filesystem import Files

__all__ = ["MANIFEST", "check_file_names", "is_key", "load_manifest", "read_sealed", "seal", "write_contents"]

MANIFEST = "manifest.json"
KEY = re.compile(r"[0-9a-f]{4,128}")
SEAL = b',\n "checksum": "%s"\n}'
"""How a manifest ends: with the SHA-256 of all that stands before this."""
SAFE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._=+-]*")


def is_key(key: object) -> bool:
    """Whether this can be the key of an artifact: 4 to 128 lower-case hexadecimal digits."""
    return isinstance(key, str) and KEY.fullmatch(key) is not None


def check_file_names(contents: Mapping[str, bytes]) -> None:
    """Refuse names that could leave their folder, hide in it, or pass for the manifest."""
    for name, data in contents.items():
        if not isinstance(name, str) or not SAFE_NAME.fullmatch(name) or name == MANIFEST:
            raise ValueError(f"file name must be plain letters, digits and . _ = + -, got {name!r}")
        if not isinstance(data, bytes):
            raise TypeError(f"content of {name!r} must be bytes, got {type(data).__name__}")


def write_contents(files: Files, folder: str, contents: Mapping[str, bytes]) -> None:
    """Write the files of a set. It counts for nothing until its manifest is there."""
    for name, data in contents.items():
        files.write(f"{folder}/{name}", data)


def seal(contents: Mapping[str, bytes], details: Mapping[str, Any]) -> bytes:
    """The manifest of a set of files: ``details`` plus what is needed to verify files and manifest."""
    described = {
        name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in contents.items()
    }
    text = json.dumps({**details, "files": described}, indent=1).removesuffix("\n}").encode()
    return text + SEAL % hashlib.sha256(text).hexdigest().encode()


def load_manifest(data: bytes, what: str) -> dict[str, Any]:
    """Parse and verify a manifest. ``what`` names its owner in errors."""
    try:
        manifest = json.loads(data)
        expected = manifest["checksum"]
        # Of the text rather than of its values: a report of ten thousand trials checks as many manifests.
        text = data.removesuffix(SEAL % str(expected).encode())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(
            what, MANIFEST, "a JSON manifest", f"{len(data)} bytes that are none ({error})"
        ) from error
    found = hashlib.sha256(text).hexdigest()
    if expected not in (found, _checksum_of_values(manifest)):
        raise _damaged(what, MANIFEST, f"checksum {expected}", f"checksum {found}")
    return dict(manifest)


def read_sealed(files: Files, folder: str, name: str, manifest: Mapping[str, Any], what: str) -> bytes:
    """Content of one file, verified against its manifest."""
    if not SAFE_NAME.fullmatch(name):
        raise _damaged(what, MANIFEST, "names of files in its own folder", f"{name!r}, which was not read")
    described = manifest["files"].get(name)
    if described is None:
        raise _damaged(
            what, name, f"one of the files {sorted(manifest['files'])}", "a request for another one"
        )
    data = files.read(f"{folder}/{name}")
    if data is None:
        raise _damaged(what, name, f"{described['size']} bytes", "no such file")
    if len(data) != described["size"]:
        raise _damaged(what, name, f"{described['size']} bytes", f"{len(data)} bytes")
    found = hashlib.sha256(data).hexdigest()
    if found != described["sha256"]:
        raise _damaged(what, name, f"SHA-256 {described['sha256']}", f"SHA-256 {found}")
    return data


def _checksum_of_values(manifest: Mapping[str, Any]) -> str:
    """What the checksum of older manifests was made of, however they are printed."""
    rest = {key: value for key, value in manifest.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _damaged(what: str, name: str, expected: str, found: str) -> DamagedArtifactError:
    return DamagedArtifactError(
        f"{what} is damaged: file {name!r}, expected {expected}, found {found}. Set it aside and build it again"
    )
