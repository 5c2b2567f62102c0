"""The store on a local disk and in memory, and what only a disk can do wrong."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import subprocess
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from store_battery import FILES, KEY, StoreBattery

from orchestrator.errors import StorageError
from orchestrator.store import Store

FORK = multiprocessing.get_context("fork")
NUM_PROCESSES, NUM_ROUNDS = 4, 25


class TestLocal(StoreBattery):
    @pytest.fixture
    def url(self, tmp_path: Path) -> str:
        return str(tmp_path / "store")


class TestMemory(StoreBattery):
    @pytest.fixture
    def url(self) -> str:
        return f"memory://{uuid.uuid4().hex}"

    def test_create_looks_and_writes_in_one_step(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        exists = MemoryFileSystem.exists

        def slowly(*args: Any, **kwargs: Any) -> bool:
            found = exists(*args, **kwargs)
            time.sleep(0.02)
            return bool(found)

        monkeypatch.setattr(MemoryFileSystem, "exists", slowly)
        with ThreadPoolExecutor(4) as pool:
            won = list(
                pool.map(lambda number: store._files.create("failures/x.json", b"%d" % number), range(4))
            )
        assert sum(won) == 1


def test_local_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = Store("somewhere")
    monkeypatch.chdir("/")
    store.put(KEY, FILES, {})
    assert store.url == str(tmp_path / "somewhere")
    assert Store(f"file://{tmp_path}/somewhere/").has(KEY)
    assert Store("~/x").url == str(Path.home() / "x")
    with pytest.raises(ValueError, match="path or URL"):
        Store("")


def test_a_constructed_store_touches_nothing(tmp_path: Path) -> None:
    Store(str(tmp_path / "store"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "key", ["", "abc", "../../etc", "AB12CD", "ab/cd", "ab12\n", "xyz123", "ab12" * 40, "."]
)
def test_keys_that_are_no_keys_are_refused(tmp_path: Path, key: str) -> None:
    store = Store(str(tmp_path))
    calls = (
        lambda: store.put(key, FILES, {}),
        lambda: store.has(key),
        lambda: store.read(key, "a"),
        lambda: store.lease(key),
        lambda: store.holder(key),
        lambda: store.checkpoints(key),
        lambda: store.set_aside(key, "x"),
        lambda: store.gc([key]),
    )
    for call in calls:
        with pytest.raises(ValueError, match="hexadecimal"):
            call()


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "a/b", "/etc/passwd", ".hidden", "manifest.json", "a\0b", "a b"]
)
def test_file_names_that_leave_their_folder_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="file name"):
        Store(str(tmp_path / "store")).put(KEY, {name: b""}, {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "path",
    ["", "/x", "../x.json", "a/../b", "artifacts/x", "work/x.json", "leases/x", "damaged/x", "a//b", ".x"],
)
def test_documents_stay_in_their_folders(tmp_path: Path, path: str) -> None:
    store = Store(str(tmp_path))
    for call in (
        lambda: store.write_json(path, 1),
        lambda: store.read_json(path),
        lambda: store.delete_json(path),
    ):
        with pytest.raises(ValueError, match="folder of its own"):
            call()


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ({"files": {}}, "files"),
        ({"checksum": "x"}, "checksum"),
        ({"key": "ff" * 8}, "put under the key"),
        ({"inputs": {"teacher": "../x"}}, "roles to keys"),
        ({"inputs": {"teacher": None}}, "roles to keys"),
    ],
)
def test_manifests_that_would_mislead_are_refused(tmp_path: Path, manifest: dict, message: str) -> None:
    store = Store(str(tmp_path))
    with pytest.raises(ValueError, match=message):
        store.put(KEY, FILES, manifest)
    with pytest.raises(TypeError, match="must be bytes"):
        store.put(KEY, {"a": "text"}, {})  # type: ignore[dict-item]
    assert not store.has(KEY)


def test_a_put_and_a_look_are_cheap(tmp_path: Path) -> None:
    """Generous limits: they catch an accidental directory scan or a sleep, not a slow disk."""
    store, num_puts = Store(str(tmp_path)), 10
    started = time.perf_counter()
    for number in range(num_puts):
        store.put(f"{number:08x}", {"weights": bytes(300_000)}, {})
    put_seconds = (time.perf_counter() - started) / num_puts
    started = time.perf_counter()
    for _ in range(200):
        store.has("00000003")
    assert put_seconds < 0.5
    assert (time.perf_counter() - started) / 200 < 0.002


def put_many(url: str, writer: int, barrier: multiprocessing.synchronize.Barrier) -> None:
    store = Store(url)
    for number in range(NUM_ROUNDS):
        barrier.wait(30)
        store.put(f"{number:08x}", {"a": b"%d" % writer, "b": bytes([writer]) * 5000}, {"writer": writer})
    os._exit(0)


def test_one_of_many_processes_wins_each_put(tmp_path: Path) -> None:
    barrier = FORK.Barrier(NUM_PROCESSES)
    workers = [FORK.Process(target=put_many, args=(str(tmp_path), n, barrier)) for n in range(NUM_PROCESSES)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0] * NUM_PROCESSES
    store = Store(str(tmp_path))
    keys = list(store.keys())
    assert len(keys) == NUM_ROUNDS
    for key in keys:
        store.verify(key)
        writer = store.manifest(key)["writer"]
        assert store.read(key, "a") == b"%d" % writer
        assert len(store._files.names(f"artifacts/{key[:2]}/{key}")) == 2


def put_for_ever(url: str, first: int) -> None:
    store = Store(url)
    for number in range(first, first + 100_000):
        store.put(f"{number:08x}", {"a": bytes(200_000), "b": b"x"}, {})
        store.checkpoints("abcd").save({"number": number})


def test_killed_at_any_moment_nothing_is_half_there(tmp_path: Path) -> None:
    for attempt, seconds in enumerate((0.05, 0.083, 0.127, 0.191)):
        worker = FORK.Process(target=put_for_ever, args=(str(tmp_path), attempt * 100_000))
        worker.start()
        time.sleep(seconds)
        os.kill(worker.pid or 0, signal.SIGKILL)
        worker.join(10)
    store = Store(str(tmp_path))
    keys = list(store.keys())
    assert keys
    for key in keys:
        store.verify(key)
    assert store.checkpoints("abcd").load() is not None
    assert not any(".tmp" in entry.path for entry in store._files.walk(""))


def test_a_failed_put_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(str(tmp_path))

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for call in (lambda: store.put(KEY, FILES, {}), lambda: store.checkpoints(KEY).save({"epoch": 1})):
        with pytest.raises(StorageError, match=r"disk full: free space or set run\.storage"):
            call()
    monkeypatch.undo()
    assert not store.has(KEY)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    store.put(KEY, FILES, {})
    store.verify(KEY)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte and a half."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1536k", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small file system needs root")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk_is_named_and_harmless(small_disk: Path) -> None:
    store = Store(str(small_disk / "store"))
    store.check_writable()
    store.put(KEY, FILES, {})
    with pytest.raises(StorageError, match=rf"{small_disk}.*No space left.*disk full"):
        store.put("ff" * 8, {"a": b"x", "weights": bytes(3_000_000)}, {})
    assert not store.has("ff" * 8)
    store.verify(KEY)
    (small_disk / "ballast").write_bytes(bytes(900_000))
    with pytest.raises(StorageError, match=r"disk full: free space or set run\.storage"):
        store.check_writable()
    store.put("ee" * 8, {"small": b"x"}, {})
    assert not any(path.name.endswith(".tmp") for path in small_disk.rglob("*"))


def test_a_read_only_disk_is_named(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(StorageError, match=rf"{small_disk}.*read-only file system: remount"):
        Store(str(small_disk / "store")).check_writable()


def test_a_place_that_cannot_be_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    store = Store(str(tmp_path / "file" / "store"))
    with pytest.raises(StorageError, match=r"file/store.*a part of the path is a file"):
        store.check_writable()
    with pytest.raises(StorageError, match="file/store"):
        store.put(KEY, FILES, {})


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_without_permission_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StorageError, match="permission denied: make it writable"):
        Store(str(tmp_path / "store")).check_writable()
    tmp_path.chmod(0o700)


def test_permission_denied_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "mkdir", refuse)
    with pytest.raises(StorageError, match=rf"{tmp_path}.*permission denied: make it writable"):
        Store(str(tmp_path / "a" / "b")).check_writable()


def test_an_unknown_kind_of_url_is_named() -> None:
    with pytest.raises(StorageError, match=r"nonsense://place.*run\.storage"):
        Store("nonsense://place").check_writable()


def test_without_hard_links_there_is_still_one_winner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    store = Store(str(tmp_path))
    store.put(KEY, FILES, {"writer": 1})
    assert not store._files.create(f"artifacts/{KEY[:2]}/{KEY}/manifest.json", b"other")
    store.verify(KEY)
    with store.lease(KEY):
        assert store.lease(KEY) is None
