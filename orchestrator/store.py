"""The artifact store: finished stages by content key, on any file system URL.

Layout below the root::

    artifacts/<key[:2]>/<key>/<attempt>/<file>      what a stage left
    artifacts/<key[:2]>/<key>/manifest.json         the completeness marker: created last, exclusively, with checksums
    work/<key>/<number>-<id>/...                    checkpoints of unfinished stages
    leases/<key>/<generation>.json                  who works on what
    damaged/<key>-<id>/...                          set aside, kept for inspection
    failures/ costs/ sweeps/ ...                    small JSON documents

An artifact never changes. Of several writers of one key the first to create the marker wins, and the others' equal
work is dropped. Nothing here is ever unpickled.
"""

from __future__ import annotations

import json
import logging
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from typing import Any

from orchestrator.checkpoint import Checkpoints
from orchestrator.clock import SYSTEM_CLOCK, Clock, SystemClock
from orchestrator.errors import ConfigurationError, DamagedArtifactError, MissingArtifactError, StorageError
from orchestrator.filesystem import absolute_url, open_files
from orchestrator.garbage import collect
from orchestrator.lease import Holder, Lease, Leases, newest_generation
from orchestrator.redact import redact
from orchestrator.sealed import (
    MANIFEST,
    check_file_names,
    is_key,
    load_manifest,
    read_sealed,
    seal,
    write_contents,
)

__all__ = ["SYSTEM_CLOCK", "Checkpoints", "Clock", "Holder", "Lease", "Store", "SystemClock"]

logger = logging.getLogger(__name__)

PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._=+-]*")
OWN_FOLDERS = {"artifacts", "work", "leases", "damaged"}
OWN_FIELDS = {"files", "attempt", "created", "checksum"}
PROBE_BYTES = 2**20
SHORTEST_PREFIX_FOLDER = 2
SHOWN_DIGITS = 8
"""Of keys that are near a misspelt one."""


class Store:
    """Artifacts, leases, checkpoints and small documents below one URL. Picklable; connects when first used."""

    def __init__(self, url: str, *, clock: Clock = SYSTEM_CLOCK, lease_seconds: float = 30.0) -> None:
        self.url = absolute_url(url)
        self.clock = clock
        self.lease_seconds = lease_seconds
        self._files = open_files(self.url)
        self._leases = Leases(self._files, clock, lease_seconds)

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url, "clock": self.clock, "lease_seconds": self.lease_seconds}

    def __setstate__(self, state: dict[str, Any]) -> None:
        Store.__init__(self, state["url"], clock=state["clock"], lease_seconds=state["lease_seconds"])

    def __repr__(self) -> str:
        return f"Store({redact(self.url)!r})"

    def check_writable(self) -> None:
        """Write, read back and delete a megabyte: ``StorageError`` with url, cause and remedy if that fails."""
        path, data = f"probe-{uuid.uuid4().hex}", bytes(PROBE_BYTES)
        self._files.write(path, data)
        try:
            if self._files.read(path) != data:
                raise StorageError(
                    f"{self.url} does not give back what was written: set run.storage to another place"
                )
            if self._files.create(path, b"another"):
                logger.warning(
                    "%s replaces files that it was asked only to create: two workers may run the same stage",
                    redact(self.url),
                )
        finally:
            self._tidy(path)

    def has(self, key: str) -> bool:
        """Whether the artifact is there and complete. One look at the storage."""
        return self._files.exists(_marker(key))

    def put(self, key: str, files: Mapping[str, bytes], manifest: Mapping[str, Any]) -> None:
        """Keep an artifact, all or nothing. If the key is complete already the newcomer is dropped: equal key, equal work.

        ``manifest["inputs"]`` (role -> key) says what it was made from: ``gc`` keeps those too.
        """
        check_file_names(files)
        self._check_manifest(key, manifest)
        if self.has(key):
            return
        attempt = f"{int(self.clock.time())}-{uuid.uuid4().hex[:12]}"
        details = {**manifest, "key": key, "attempt": attempt, "created": self.clock.time()}
        marker, folder = seal(files, details), f"{_folder(key)}/{attempt}"
        won = False
        try:
            write_contents(self._files, folder, files)
            won = self._files.create(_marker(key), marker)
        finally:
            if not won:
                self._tidy(folder)

    def manifest(self, key: str) -> dict[str, Any]:
        """What the artifact's maker said about it, plus ``files``, ``attempt``, ``created``, ``key``, ``checksum``."""
        data = self._files.read(_marker(key))
        if data is None:
            raise MissingArtifactError(f"no artifact {key} in {self.url}: run the stage that makes it")
        manifest = load_manifest(data, self._name(key))
        if manifest.get("key") != key:
            raise DamagedArtifactError(
                f"{self._name(key)} is damaged: its manifest is that of {manifest.get('key')}. Set it aside and build it again"
            )
        return manifest

    def read(self, key: str, name: str, manifest: Mapping[str, Any] | None = None) -> bytes:
        """One file, verified against its checksum. A ``manifest`` that was just read spares reading it again."""
        return self._read(key, name, self.manifest(key) if manifest is None else manifest)

    def verify(self, key: str) -> None:
        """Read every file: ``DamagedArtifactError`` names the first that is not what was written."""
        manifest = self.manifest(key)
        for name in manifest["files"]:
            self._read(key, name, manifest)

    def set_aside(self, key: str, reason: str) -> None:
        """Move a damaged artifact to ``damaged/`` so that it can be built again. Fine if it is gone already.

        Verify it just before: what is there is moved, also what another process has rebuilt meanwhile.
        """
        marker = self._files.read(_marker(key))
        if marker is None:
            return
        place = f"damaged/{key}-{uuid.uuid4().hex[:8]}"
        note = {"key": key, "reason": reason, "time": self.clock.time()}
        self._files.write(f"{place}/reason.json", json.dumps(note).encode())
        self._files.write(f"{place}/{MANIFEST}", marker)
        # The marker goes first: from here on the key is free, whatever happens to the rest of the move.
        self._files.delete(_marker(key))
        for attempt in self._files.names(_folder(key)):
            self._files.move(f"{_folder(key)}/{attempt}", f"{place}/{attempt}")
        logger.warning("%s is set aside in %s/%s: %s", self._name(key), redact(self.url), place, reason)

    def keys(self) -> Iterator[str]:
        """Keys of all complete artifacts, in order."""
        return self._keys("artifacts")

    def find(self, prefix: str) -> str:
        """The one key that starts so. ``MissingArtifactError`` if none does, ``ConfigurationError`` if several do."""
        if not re.fullmatch("[0-9a-f]+", prefix):
            raise ConfigurationError(f"the start of a key is lower-case hexadecimal, got {prefix!r}")
        folder = f"artifacts/{prefix[:2]}" if len(prefix) >= SHORTEST_PREFIX_FOLDER else "artifacts"
        found = [key for key in self._keys(folder) if key.startswith(prefix)]
        if not found:
            raise MissingArtifactError(
                f"no artifact in {self.url} has a key that starts with {prefix}{self._near(prefix)}"
            )
        if len(found) > 1:
            raise ConfigurationError(
                f"{len(found)} artifacts have keys that start with {prefix}: {', '.join(found[:10])}"
            )
        return found[0]

    def _near(self, prefix: str) -> str:
        """Keys whose beginning looks alike, in words; an empty text when none does."""
        starts = {key[: max(len(prefix), SHOWN_DIGITS)]: key for key in self.keys()}
        near = get_close_matches(prefix, [start[: len(prefix)] for start in starts], n=3)
        shown = [start for start in starts if start[: len(prefix)] in near][:3]
        return f"; near it are {', '.join(shown)}" if shown else ""

    def lease(self, key: str, *, watch: bool = False) -> Lease | None:
        """The right to work on a key, or None while a live holder has it.

        With ``watch``, a holder on another machine is first watched for up to ``lease_seconds``: is it alive?
        """
        acquire = self._leases.acquire_from_silent if watch else self._leases.acquire
        return acquire(_checked(key))

    def holder(self, key: str) -> Holder | None:
        """Who works on a key now, or None."""
        return self._leases.holder(_checked(key))

    def generation(self, key: str) -> int:
        """Number of the newest lease on a key, 0 for none: it grows with each taker, and tells a former one so."""
        return newest_generation(self._files, _checked(key))

    def checkpoints(self, key: str) -> Checkpoints:
        """Where the unfinished work on a key is kept."""
        return Checkpoints(self._files, _checked(key), self.clock)

    def write_json(self, path: str, value: Any, *, durable: bool = True) -> None:
        """Write or replace a small document, for example ``failures/<key>.json``, in one step.

        Without ``durable`` a power cut may take it back; the disk is not waited for.
        """
        self._files.write(_document(path), json.dumps(value, indent=1).encode(), durable=durable)

    def read_json(self, path: str) -> Any | None:
        """A document, or None if there is none."""
        data = self._files.read(_document(path))
        if data is None:
            return None
        try:
            return json.loads(data)
        except ValueError as error:
            raise DamagedArtifactError(
                f"{self.url}/{path} is no JSON document ({error}): delete it"
            ) from error

    def delete_json(self, path: str) -> None:
        """Remove a document. Fine if there is none."""
        self._files.delete(_document(path))

    def list_json(self, prefix: str) -> list[str]:
        """Paths of the documents that start with ``prefix``, which names at least their top folder, in order."""
        _document(prefix.rstrip("/"))
        folder = prefix.rpartition("/")[0] or prefix
        return [entry.path for entry in self._files.walk(folder) if entry.path.startswith(prefix)]

    def gc(self, roots: Iterable[str], *, dry_run: bool = False, grace_seconds: float = 86400) -> list[str]:
        """Remove what no root needs, and give the paths removed (or, dry, those that would be).

        Kept: every root and what it was made from, all that is leased, and all that is younger than ``grace_seconds``.
        Removed: other artifacts, attempts that never got a marker, checkpoints of finished or unneeded stages, old
        released leases. Documents and ``damaged/`` are left alone.
        """
        doomed = collect(self, self._files, [_checked(key) for key in roots], grace_seconds)
        if dry_run:
            return [path for _, path in doomed]
        removed = []
        for key, path in doomed:
            if self.holder(key) is None:  # asked again: the look at a large store takes its time
                self._files.delete(path)
                removed.append(path)
        return removed

    def _check_manifest(self, key: str, manifest: Mapping[str, Any]) -> None:
        _checked(key)
        if taken := OWN_FIELDS & set(manifest):
            raise ValueError(f"the store writes {sorted(taken)} into the manifest itself; rename yours")
        if manifest.get("key", key) != key:
            raise ValueError(f"manifest of {manifest['key']} put under the key {key}")
        for role, source in dict(manifest.get("inputs", {})).items():
            if not is_key(source):
                raise ValueError(f"inputs map roles to keys, got {role!r}: {source!r}")

    def _read(self, key: str, name: str, manifest: Mapping[str, Any]) -> bytes:
        if not PART.fullmatch(str(manifest["attempt"])):  # whoever writes to the storage may have made it up
            raise DamagedArtifactError(
                f"{self._name(key)} is damaged: its manifest names the attempt {manifest['attempt']!r}, which leaves its folder. Set it aside and build it again"
            )
        return read_sealed(
            self._files, f"{_folder(key)}/{manifest['attempt']}", name, manifest, self._name(key)
        )

    def _keys(self, folder: str) -> Iterator[str]:
        for entry in self._files.walk(folder):
            parts = entry.path.split("/")
            if len(parts) == 4 and parts[3] == MANIFEST and is_key(parts[2]):
                yield parts[2]

    def _name(self, key: str) -> str:
        return f"artifact {key} in {redact(self.url)}"

    def _tidy(self, path: str) -> None:
        """Remove our own leftovers; the storage may be failing just now, and then ``gc`` finds them later."""
        try:
            self._files.delete(path)
        except StorageError as error:
            logger.warning("left behind until the next gc: %s", error)


def _checked(key: str) -> str:
    if not is_key(key):
        raise ValueError(f"a key is 4 to 128 lower-case hexadecimal digits, got {key!r}")
    return key


def _folder(key: str) -> str:
    return f"artifacts/{_checked(key)[:2]}/{key}"


def _marker(key: str) -> str:
    return f"{_folder(key)}/{MANIFEST}"


def _document(path: str) -> str:
    """The path of a document, refused if it could leave the root or touch what the store keeps itself."""
    parts = path.split("/")
    if not all(PART.fullmatch(part) for part in parts) or parts[0] in OWN_FOLDERS:
        raise ValueError(f"a document lies in a folder of its own, like failures/<key>.json; got {path!r}")
    return path
