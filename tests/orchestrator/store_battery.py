"""What every storage must do. Test files derive from ``StoreBattery`` and say at which URL."""

from __future__ import annotations

import json
import pickle
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from orchestrator.errors import ConfigurationError, DamagedArtifactError, MissingArtifactError
from orchestrator.store import Lease, Store

KEY, OTHER_KEY, THIRD_KEY = "ab12" * 8, "ab13" * 8, "cd34" * 8
WEIGHTS, METRICS = bytes(range(256)) * 40, b'{"top1": 71.5}'
FILES = {"weights.safetensors": WEIGHTS, "metrics.json": METRICS}
DAY_SECONDS = 86400.0


class ManualClock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.start = time.time()

    def time(self) -> float:
        return self.start + self.seconds

    def monotonic(self) -> float:
        return 1000.0 + self.seconds


def flip(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def path_of(store: Store, key: str, name: str) -> str:
    folder = f"artifacts/{key[:2]}/{key}"
    return (
        f"{folder}/{name}" if name == "manifest.json" else f"{folder}/{store.manifest(key)['attempt']}/{name}"
    )


def change(store: Store, path: str, how: Callable[[bytes], bytes | None]) -> None:
    data = store._files.read(path)
    assert data is not None
    changed = how(data)
    if changed is None:
        store._files.delete(path)
    else:
        store._files.write(path, changed)


DAMAGES: dict[str, tuple[str, Callable[[bytes], bytes | None]]] = {
    "flipped bit": ("weights.safetensors", flip),
    "truncated": ("weights.safetensors", lambda data: data[:-1]),
    "emptied": ("weights.safetensors", lambda data: b""),
    "longer": ("weights.safetensors", lambda data: data + b"x"),
    "gone": ("weights.safetensors", lambda data: None),
    "a pickle": ("weights.safetensors", lambda data: pickle.dumps({"weights": [1.0]})),
    "flipped bit in the manifest": ("manifest.json", flip),
    "emptied manifest": ("manifest.json", lambda data: b""),
    "changed metric in the manifest": ("manifest.json", lambda data: data.replace(b"71.5", b"99.9")),
    "JSON without fields as manifest": ("manifest.json", lambda data: b"[1, 2]"),
    "a checksum that is no text": ("manifest.json", lambda data: b'{"checksum": "\\ud800"}'),
    "a manifest printed anew": ("manifest.json", lambda data: json.dumps(json.loads(data)).encode()),
}


class StoreBattery:
    @pytest.fixture
    def url(self) -> str:
        raise NotImplementedError

    @pytest.fixture
    def clock(self) -> ManualClock:
        return ManualClock()

    @pytest.fixture
    def store(self, url: str, clock: ManualClock) -> Store:
        return Store(url, clock=clock)

    def test_is_empty_before_anything_is_written(self, store: Store) -> None:
        assert not store.has(KEY)
        assert list(store.keys()) == []
        assert store.holder(KEY) is None
        assert store.checkpoints(KEY).load() is None
        assert store.read_json("failures/x.json") is None
        assert store.list_json("failures") == []
        assert store.gc([]) == []
        with pytest.raises(MissingArtifactError, match=KEY):
            store.manifest(KEY)
        with pytest.raises(MissingArtifactError, match="run the stage"):
            store.read(KEY, "weights.safetensors")

    def test_gives_back_what_was_put(self, store: Store) -> None:
        store.check_writable()
        manifest = {
            "name": "teacher",
            "inputs": {},
            "metrics": {"top1": 71.5, "loss": float("nan"), "tiny": 1e-300},
        }
        store.put(KEY, {**FILES, "empty": b""}, manifest)
        assert store.has(KEY)
        found = store.manifest(KEY)
        assert found["name"] == "teacher"
        assert found["key"] == KEY
        assert repr(found["metrics"]) == repr(manifest["metrics"])
        assert set(found["files"]) == {*FILES, "empty"}
        assert {name: store.read(KEY, name) for name in FILES} == FILES
        assert store.read(KEY, "empty") == b""
        store.verify(KEY)
        assert list(store.keys()) == [KEY]

    def test_survives_a_pickle_round_trip(self, store: Store) -> None:
        store.put(KEY, FILES, {})
        copy = pickle.loads(pickle.dumps(store))
        assert (copy.url, copy.lease_seconds) == (store.url, store.lease_seconds)
        assert copy.read(KEY, "metrics.json") == METRICS

    def test_drops_a_second_put_of_the_same_key(self, store: Store) -> None:
        store.put(KEY, FILES, {"writer": 1})
        store.put(KEY, {"other.json": b"{}"}, {"writer": 2})
        assert store.manifest(KEY)["writer"] == 1
        assert len(list(store._files.walk("artifacts"))) == len(FILES) + 1

    def test_has_one_winner_among_threads(self, store: Store) -> None:
        barrier = threading.Barrier(6)

        def put(writer: int) -> None:
            barrier.wait()
            store.put(KEY, {"a": b"%d" % writer}, {"writer": writer})

        with ThreadPoolExecutor(6) as pool:
            list(pool.map(put, range(6)))
        assert store.read(KEY, "a") == b"%d" % store.manifest(KEY)["writer"]
        assert len(list(store._files.walk("artifacts"))) == 2

    @pytest.mark.parametrize("damage", DAMAGES)
    def test_names_damage_and_rebuilds(self, store: Store, damage: str) -> None:
        name, how = DAMAGES[damage]
        store.put(KEY, FILES, {"metrics": {"top1": 71.5}})
        change(store, path_of(store, KEY, name), how)
        with pytest.raises(DamagedArtifactError) as caught:
            store.verify(KEY)
        for part in (KEY, name, "expected", "found", store.url):
            assert part in str(caught.value)
        with pytest.raises(DamagedArtifactError):
            store.read(KEY, "weights.safetensors")
        store.set_aside(KEY, f"found {damage}")
        assert not store.has(KEY)
        store.put(KEY, FILES, {})
        store.verify(KEY)
        reasons = [entry.path for entry in store._files.walk("damaged") if entry.path.endswith("reason.json")]
        assert damage in json.loads(store._files.read(reasons[0]) or b"")["reason"]
        assert len(list(store._files.walk("artifacts"))) == len(FILES) + 1

    def test_a_missing_marker_means_no_artifact(self, store: Store) -> None:
        store.put(KEY, FILES, {})
        store._files.delete(path_of(store, KEY, "manifest.json"))
        assert not store.has(KEY)
        with pytest.raises(MissingArtifactError):
            store.verify(KEY)
        store.put(KEY, FILES, {})
        store.verify(KEY)

    def test_an_artifact_under_a_wrong_key_is_damaged(self, store: Store) -> None:
        store.put(KEY, FILES, {})
        marker = store._files.read(path_of(store, KEY, "manifest.json"))
        store._files.write(path_of(store, OTHER_KEY, "manifest.json"), marker or b"")
        with pytest.raises(DamagedArtifactError, match="its manifest is that of"):
            store.manifest(OTHER_KEY)

    def test_setting_aside_twice_harms_nothing(self, store: Store) -> None:
        store.set_aside(KEY, "never existed")
        store.put(KEY, FILES, {})
        store.set_aside(KEY, "bad")
        store.set_aside(KEY, "bad")
        assert len([entry for entry in store._files.walk("damaged") if "reason" in entry.path]) == 1

    def test_finds_by_prefix(self, store: Store) -> None:
        for key in (KEY, OTHER_KEY, THIRD_KEY):
            store.put(key, FILES, {})
        assert store.find("c") == THIRD_KEY
        assert store.find("ab12a") == KEY
        assert store.find(OTHER_KEY) == OTHER_KEY
        with pytest.raises(ConfigurationError, match=f"{KEY}, {OTHER_KEY}"):
            store.find("ab1")
        with pytest.raises(MissingArtifactError, match="starts with ee"):
            store.find("ee")
        with pytest.raises(ConfigurationError, match="hexadecimal"):
            store.find("../x")
        assert list(store.keys()) == [KEY, OTHER_KEY, THIRD_KEY]

    def test_leases_have_one_holder_at_a_time(self, store: Store, url: str) -> None:
        other = Store(url, clock=store.clock)
        with store.lease(KEY) as lease:
            assert lease is not None
            assert other.lease(KEY) is None
            assert store.lease(KEY) is None
            with other.lease(OTHER_KEY) as independent:
                assert independent is not None
            assert not lease.lost
        assert other.holder(KEY) is None
        again = other.lease(KEY)
        assert again is not None
        again.release()

    def test_a_lease_has_one_winner_among_threads(self, store: Store, url: str) -> None:
        for key in (KEY, OTHER_KEY, THIRD_KEY):
            barrier = threading.Barrier(5)

            def acquire(_: int, key: str = key, barrier: threading.Barrier = barrier) -> Lease | None:
                barrier.wait()
                return Store(url, clock=store.clock).lease(key)

            with ThreadPoolExecutor(5) as pool:
                won = [lease for lease in pool.map(acquire, range(5)) if lease is not None]
            assert len(won) == 1
            won[0].release()

    def test_a_stale_lease_is_taken_over_and_its_holder_notices(
        self, store: Store, url: str, clock: ManualClock
    ) -> None:
        old, other = store.lease(KEY), Store(url, clock=clock)
        assert old is not None
        clock.seconds += 29.0
        assert other.lease(KEY) is None
        clock.seconds += 2.0
        assert other.holder(KEY) is None
        new = other.lease(KEY)
        assert new is not None
        assert old.lost
        assert not old.refresh()
        old.release()
        assert not new.lost
        assert new.refresh()
        holder = store.holder(KEY)
        assert holder is not None
        assert holder.since == clock.time()
        new.release()

    def test_shows_progress(self, store: Store) -> None:
        lease = store.lease(KEY)
        assert lease is not None
        rows = [{"epoch": 1.0, "loss": float("inf")}]
        lease.update({"epoch": 1, "rows": rows})
        lease.refresh()
        holder = store.holder(KEY)
        assert holder is not None
        assert holder.progress == {"epoch": 1, "rows": rows}
        with pytest.raises(TypeError):
            lease.update({"tensor": object()})
        lease.release()

    def test_keeps_two_checkpoints_and_falls_back(
        self, store: Store, caplog: pytest.LogCaptureFixture
    ) -> None:
        slot = store.checkpoints(KEY)
        for epoch in range(4):
            slot.save({"epoch": epoch, "weights": torch.full((3,), float(epoch))})
        folders = store._files.names(f"work/{KEY}")
        assert [folder[:8] for folder in folders] == ["00000003", "00000004"]
        assert slot.load()["epoch"] == 3
        change(store, f"work/{KEY}/{folders[1]}/tensors.safetensors", flip)
        assert slot.load()["epoch"] == 2
        assert folders[1] in caplog.text
        assert "SHA-256" in caplog.text
        change(store, f"work/{KEY}/{folders[0]}/manifest.json", lambda data: None)
        assert slot.load() is None
        assert "incomplete" in caplog.text
        slot.save({"epoch": 9})
        assert slot.load() == {"epoch": 9}
        slot.delete()
        assert slot.load() is None
        assert store._files.names(f"work/{KEY}") == []

    def test_keeps_small_documents(self, store: Store) -> None:
        store.write_json("failures/b.json", {"reason": "NaN"})
        store.write_json("failures/a.json", [1, 2.5, None])
        store.write_json("sweeps/s1/trial-1.json", 1)
        store.write_json("failures/a.json", "replaced")
        assert store.read_json("failures/a.json") == "replaced"
        assert store.list_json("failures") == ["failures/a.json", "failures/b.json"]
        assert store.list_json("failures/") == ["failures/a.json", "failures/b.json"]
        assert store.list_json("sweeps/s1/trial-") == ["sweeps/s1/trial-1.json"]
        store.delete_json("failures/a.json")
        store.delete_json("failures/a.json")
        assert store.read_json("failures/a.json") is None
        store._files.write("failures/c.json", b"{half")
        with pytest.raises(DamagedArtifactError, match=r"failures/c\.json"):
            store.read_json("failures/c.json")

    def test_gc_keeps_what_is_reachable_young_or_leased(self, store: Store, clock: ManualClock) -> None:
        teacher, views, student, orphan, busy = (f"{number:02x}" * 8 for number in range(1, 6))
        store.put(teacher, FILES, {})
        store.put(views, FILES, {"inputs": {"teacher": teacher}})
        store.put(student, FILES, {"inputs": {"teacher": views}})
        for key in (orphan, busy):
            store.put(key, FILES, {})
        assert store.gc([]) == []
        clock.seconds += 2 * DAY_SECONDS
        lease = store.lease(busy)
        assert lease is not None
        unmade = "ff" * 8
        assert store.gc([student, unmade], dry_run=True) == store.gc([student, unmade])
        assert set(store.keys()) == {teacher, views, student, busy}
        store.verify(teacher)
        assert store._files.names(f"artifacts/{orphan[:2]}/{orphan}") == []
        assert not any(orphan in entry.path for entry in store._files.walk("artifacts"))
        lease.release()
        assert store.gc([views]) != []
        assert set(store.keys()) == {teacher, views}

    def test_gc_asks_again_before_it_deletes(
        self, store: Store, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A lease that was acquired while gc looked at the rest of the store."""
        store.put(KEY, FILES, {})
        clock.seconds += 2 * DAY_SECONDS
        holder, num_calls = store.holder, 0

        def late(key: str) -> object:
            nonlocal num_calls
            num_calls += 1
            return None if num_calls == 1 else holder(key)

        with store.lease(KEY):
            monkeypatch.setattr(store, "holder", late)
            assert store.gc([]) == []
        store.verify(KEY)

    def test_gc_removes_leftovers(self, store: Store, clock: ManualClock) -> None:
        finished, wanted, dropped = "01" * 8, "02" * 8, "03" * 8
        store.put(finished, FILES, {})
        store._files.write(f"artifacts/01/{finished}/100-abandoned/weights.safetensors", b"half")
        store._files.write(f"artifacts/04/{'04' * 8}/100-abandoned/weights.safetensors", b"half")
        for key in (finished, wanted, dropped):
            store.checkpoints(key).save({"epoch": 1})
            with store.lease(key):
                pass
        assert store.gc([finished, wanted]) == []
        clock.seconds += 2 * DAY_SECONDS
        with store.lease(dropped):
            store.gc([finished, wanted])
            assert store.checkpoints(dropped).load() == {"epoch": 1}
        store.gc([finished, wanted])
        assert store.checkpoints(wanted).load() == {"epoch": 1}
        assert store.checkpoints(finished).load() is None
        assert store.checkpoints(dropped).load() is None
        store.verify(finished)
        assert len(list(store._files.walk("artifacts"))) == len(FILES) + 1
        with store.lease(wanted) as lease:
            assert lease is not None

    def test_gc_stops_at_a_damaged_manifest(self, store: Store, clock: ManualClock) -> None:
        store.put(KEY, FILES, {})
        store.put(OTHER_KEY, FILES, {"inputs": {"teacher": KEY}})
        change(store, path_of(store, OTHER_KEY, "manifest.json"), flip)
        clock.seconds += 2 * DAY_SECONDS
        with pytest.raises(DamagedArtifactError, match="removes nothing"):
            store.gc([OTHER_KEY])
        assert store.has(KEY)
