"""Which files of a store nobody needs any more: reachability from the roots, tempered by leases and a grace period."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from orchestrator.errors import DamagedArtifactError, MissingArtifactError
from orchestrator.filesystem import Entry, Files
from orchestrator.sealed import MANIFEST, is_key

if TYPE_CHECKING:
    from orchestrator.store import Store

__all__ = ["collect", "reachable"]


def collect(store: Store, files: Files, roots: Iterable[str], grace_seconds: float) -> list[tuple[str, str]]:
    """Pairs of key and path to delete, markers before the files they vouch for."""
    if grace_seconds < 0:
        raise ValueError(f"grace_seconds must not be negative, got {grace_seconds}")
    needed = reachable(store, roots)
    oldest_kept = store.clock.time() - grace_seconds
    doomed: list[tuple[str, str]] = []
    for key, entries in _by_key(files, "artifacts", depth=2).items():
        doomed += [
            (key, path) for path in _doomed_of_artifact(store, key, entries, key in needed, oldest_kept)
        ]
    for key, entries in _by_key(files, "work", depth=1).items():
        unneeded = key not in needed or store.has(key)
        if unneeded and _is_old(entries, oldest_kept) and store.holder(key) is None:
            doomed.append((key, f"work/{key}"))
    for key, entries in _by_key(files, "leases", depth=1).items():
        if _is_old(entries, oldest_kept) and store.holder(key) is None:
            doomed.append((key, f"leases/{key}"))
    return doomed


def reachable(store: Store, roots: Iterable[str]) -> set[str]:
    """The roots and everything they were made from. Roots that are not made yet are fine.

    A damaged manifest stops the collection: nobody can say what it needs.
    """
    found: set[str] = set()
    waiting = list(roots)
    while waiting:
        key = waiting.pop()
        if key in found:
            continue
        found.add(key)
        try:
            waiting += store.manifest(key).get("inputs", {}).values()
        except DamagedArtifactError as error:
            raise DamagedArtifactError(
                f"{error}; until then gc cannot tell what it needs and removes nothing"
            ) from error
        except MissingArtifactError:
            continue
    return found


def _doomed_of_artifact(
    store: Store, key: str, entries: list[Entry], needed: bool, oldest_kept: float
) -> list[str]:
    folder = f"artifacts/{key[:2]}/{key}"
    marker = f"{folder}/{MANIFEST}"
    complete = any(entry.path == marker for entry in entries)
    if complete and not needed:
        gone = _is_old(entries, oldest_kept) and store.holder(key) is None
        return [marker, folder] if gone else []
    kept = store.manifest(key)["attempt"] if complete else None
    attempts: dict[str, list[Entry]] = {}
    for entry in entries:
        if entry.path != marker:
            attempts.setdefault(entry.path.split("/")[3], []).append(entry)
    old = [name for name, part in attempts.items() if name != kept and _is_old(part, oldest_kept)]
    return [f"{folder}/{name}" for name in old] if old and store.holder(key) is None else []


def _by_key(files: Files, folder: str, *, depth: int) -> dict[str, list[Entry]]:
    found: dict[str, list[Entry]] = {}
    for entry in files.walk(folder):
        parts = entry.path.split("/")
        if len(parts) > depth + 1 and is_key(parts[depth]):
            found.setdefault(parts[depth], []).append(entry)
    return found


def _is_old(entries: list[Entry], oldest_kept: float) -> bool:
    return all(entry.modified < oldest_kept for entry in entries)
