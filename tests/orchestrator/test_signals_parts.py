"""The parts of recorded signals by themselves: format, chunks, table, shelves, the thread behind, the window."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from store_battery import ManualClock

from methods.base import Batch
from orchestrator.errors import DamagedArtifactError, StorageError
from orchestrator.signals_behind import MAX_WAITING_BYTES, Behind
from orchestrator.signals_chunk import MAGIC, Table, map_chunk, to_chunk
from orchestrator.signals_codec import REST_TEMPERATURE, SignalFormat
from orchestrator.signals_network import NUM_REMEMBERED, Window
from orchestrator.signals_recording import Place, Recording, Tally
from orchestrator.signals_shelf import IN_USE_SECONDS, LOOK_SECONDS, Shelf, is_network_mount, open_shelves

KEY = "ab" * 16
B, C, D = 6, 10, 4


def signals(kind: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple((3 * torch.randn(B, width, generator=generator)).to(kind) for width in (C, D))  # type: ignore[return-value]


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_by_default_the_very_bits_come_back(tmp_path: Path, kind: torch.dtype) -> None:
    form, given = SignalFormat(), signals(kind)
    path = tmp_path / "chunk"
    path.write_bytes(to_chunk(KEY, np.arange(B), form.encode(*given)))
    logits, pooled = form.decode(map_chunk(str(path), KEY).columns, C)
    assert (logits.dtype, pooled.dtype) == (kind, kind)
    assert torch.equal(logits, given[0])
    assert torch.equal(pooled, given[1])


def test_float16_rounds() -> None:
    form, given = SignalFormat(precision="float16"), signals()
    columns = form.encode(*given)
    assert {column.dtype for column in columns.values()} == {torch.float16}
    for found, true in zip(form.decode(columns, C), given, strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, true, rtol=2**-11, atol=1e-6)


def test_float16_never_becomes_infinite() -> None:
    form, large = SignalFormat(precision="float16"), torch.tensor([[1e6, -1e6]])
    assert form.decode(form.encode(large, large), 2)[0].tolist() == [[65504.0, -65504.0]]


@pytest.mark.parametrize("top_k", [1, 3, 9])
def test_top_k_keeps_the_largest_and_the_share_of_the_rest(top_k: int) -> None:
    form, (logits, pooled) = SignalFormat(top_k=top_k), signals()
    rebuilt, same = form.decode(form.encode(logits, pooled), C)
    kept = logits >= logits.topk(top_k).values[:, -1:]
    assert torch.equal(rebuilt[kept], logits[kept])
    assert torch.equal(same, pooled)
    true, found = ((values / REST_TEMPERATURE).softmax(1) for values in (logits, rebuilt))
    torch.testing.assert_close(found[kept], true[kept])
    torch.testing.assert_close(found.masked_fill(kept, 0).sum(1), true.masked_fill(kept, 0).sum(1))
    assert all(len(set(row[~mask].tolist())) == 1 for row, mask in zip(rebuilt, kept, strict=True))


def test_top_k_of_all_classes_is_all_of_them() -> None:
    logits, pooled = signals()
    assert torch.equal(
        SignalFormat(top_k=C).decode(SignalFormat(top_k=C).encode(logits, pooled), C)[0], logits
    )


@pytest.mark.parametrize("form", [SignalFormat(), SignalFormat(precision="float16"), SignalFormat(top_k=3), SignalFormat(precision="float16", top_k=3), SignalFormat(top_k=50)])  # fmt: skip
def test_the_size_of_a_row_is_known_before(form: SignalFormat) -> None:
    columns = form.encode(*signals())
    assert form.row_bytes(C, D) == 8 + sum(column.nbytes for column in columns.values()) // B


def test_a_format_of_no_logit_is_refused() -> None:
    with pytest.raises(ValueError, match="top_k must be at least 1, got 0"):
        SignalFormat(top_k=0)


def change_header(data: bytes, **described: Any) -> bytes:
    """The same chunk, sealed again, with another description of its column."""
    start = len(MAGIC) + 40
    length = int.from_bytes(data[start - 8 : start], "little")
    header = json.loads(data[start : start + length])
    header["columns"]["ids"] |= described
    text = json.dumps(header).encode()
    text += b" " * (-(start + len(text)) % 64)
    rest = len(text).to_bytes(8, "little") + text + data[start + length :]
    return MAGIC + hashlib.blake2b(rest, digest_size=32).digest() + rest


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (lambda data: data[:20], "no chunk of signals"),
        (lambda data: b"x" + data[1:], "no chunk of signals"),
        (lambda data: data[:-1], "expected digest"),
        (lambda data: data + b"x", "expected digest"),
        (lambda data: change_header(data, offset=10**9), "beyond its end"),
        (lambda data: change_header(data, offset=-8), "beyond its end"),
        (lambda data: change_header(data, shape=[10**12]), "beyond its end"),
        (lambda data: change_header(data, shape=[-1]), "beyond its end"),
        (lambda data: change_header(data, shape=[2]), "differ in length"),
        (lambda data: change_header(data, kind="object"), "object"),
    ],
)
def test_a_file_that_is_no_chunk_is_refused(tmp_path: Path, spoil: Any, text: str) -> None:
    path = tmp_path / "chunk"
    path.write_bytes(spoil(to_chunk(KEY, np.arange(B), SignalFormat().encode(*signals()))))
    with pytest.raises(DamagedArtifactError, match=text):
        map_chunk(str(path), KEY)


def test_a_chunk_stays_readable_when_its_file_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "chunk"
    path.write_bytes(to_chunk(KEY, np.arange(B), SignalFormat().encode(*signals())))
    chunk = map_chunk(str(path), KEY)
    path.unlink()
    assert torch.equal(chunk.columns["logits"], signals()[0])


def test_a_table_finds_rows_in_any_order_over_chunks(tmp_path: Path) -> None:
    logits, pooled = signals()
    ids, table = np.array([7, 3, 11, 0, 5, 2]), Table(12)
    for number, part in enumerate((slice(0, 2), slice(2, 6))):
        path = tmp_path / str(number)
        path.write_bytes(to_chunk(KEY, ids[part], {"logits": logits[part], "pooled": pooled[part]}))
        table.add(map_chunk(str(path), KEY))
    for asked in ([3, 7], [0, 7, 2, 3, 11], [5]):
        rows = [list(ids).index(one) for one in asked]
        assert not table.is_missing(np.array(asked)).any()
        found = table.rows(np.array(asked))
        assert torch.equal(found["logits"], logits[rows])
        assert torch.equal(found["pooled"], pooled[rows])
    assert table.is_missing(np.array([3, 4, 1])).tolist() == [False, True, True]
    path.write_bytes(to_chunk(KEY, np.array([12]), {"logits": logits[:1]}))
    with pytest.raises(DamagedArtifactError, match="names sample 12; there are 12"):
        table.add(map_chunk(str(path), KEY))


@dataclass
class Kept:
    shelf: Shelf
    clock: ManualClock

    def add(self, recording: str, num_bytes: int, name: str = "chunk") -> None:
        self.shelf.add(recording, "all", name, bytes(num_bytes))

    def held(self) -> list[str]:
        folder = Path(self.shelf.url) / "signals"
        return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


@pytest.fixture
def kept(tmp_path: Path) -> Kept:
    clock = ManualClock()
    return Kept(Shelf(str(tmp_path), 1000, clock), clock)


def test_the_recording_that_was_used_longest_ago_makes_room(kept: Kept) -> None:
    for age, name in enumerate("cab"):
        kept.add(name, 300)
        os.utime(kept.shelf.path(name, "all", "chunk"), (age, age))
    kept.add("new", 500)
    assert kept.held() == ["b", "new"]


def test_a_recording_in_use_never_makes_room(kept: Kept) -> None:
    kept.add("used", 600)
    kept.shelf.use("used")
    kept.clock.seconds += IN_USE_SECONDS - 1
    with pytest.raises(StorageError, match=r"no room for 600 bytes more .* raise run.signals_gigabytes"):
        kept.add("new", 600)
    assert kept.held() == ["used"]
    kept.clock.seconds += 2
    kept.add("new", 600)
    assert kept.held() == ["new"]


def test_its_own_chunks_make_no_room_for_a_recording(kept: Kept) -> None:
    kept.add("own", 600, "first")
    with pytest.raises(StorageError, match="they take 600 of 1000 bytes"):
        kept.add("own", 600, "second")


def test_what_others_add_is_seen_after_a_while(kept: Kept) -> None:
    kept.add("own", 100)
    other = Shelf(kept.shelf.url, 1000, kept.clock)
    other.add("other", "all", "chunk", bytes(800))
    other.use("other")
    kept.clock.seconds += LOOK_SECONDS
    with pytest.raises(StorageError, match="no room"):
        kept.add("own", 200, "second")


def test_a_tenth_of_the_disk_stays_free(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(10_000, 8_800, 1_200))
    kept.add("a", 200)
    with pytest.raises(StorageError, match="1200 of 10000 bytes of the disk are free"):
        kept.add("a", 201, "second")


def test_where_recordings_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    local, remote = str(tmp_path / "runs"), "memory://runs"
    assert [shelf.url for shelf in open_shelves(local, None, 1)] == [local]
    assert [shelf.url for shelf in open_shelves(local, "/node", 1)] == ["/node", local]
    assert [shelf.url for shelf in open_shelves(remote, None, 1)] == [str(tmp_path / "cache" / "stillhouse"), remote]  # fmt: skip


@pytest.mark.parametrize(
    ("path", "expected"), [("/a/b/c", True), ("/a", False), ("/a/bc", False), ("/x y/z", True)]
)
def test_network_mounts_are_known_by_their_kind(tmp_path: Path, path: str, expected: bool) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text("disk / ext4 rw 0 0\nserver:/b /a/b nfs4 rw 0 0\nserver:/x /x\\040y cifs rw 0 0\n")
    assert is_network_mount(path, mounts) == expected
    assert not is_network_mount(path, tmp_path / "absent")


def test_work_is_done_behind_in_order() -> None:
    done: list[int] = []
    gate = threading.Event()
    behind = Behind(lambda: None)
    assert behind.submit(lambda: gate.wait(10) and None, MAX_WAITING_BYTES - 1)  # type: ignore[func-returns-value]
    assert not behind.submit(lambda: done.append(0), 2)
    assert behind.submit(lambda: done.append(1))
    assert done == []
    gate.set()
    behind.wait()
    assert behind.submit(lambda: done.append(2), MAX_WAITING_BYTES)
    behind.close()
    assert done == [1, 2]


@pytest.mark.parametrize("way", ["check", "wait", "close"])
def test_a_mistake_behind_is_raised_in_front(way: str) -> None:
    behind = Behind(lambda: None)
    behind.submit(lambda: 1 / 0 and None)
    behind._waiting.join()
    with pytest.raises(ZeroDivisionError):
        getattr(behind, way)()
    if way != "close":
        with pytest.raises(ZeroDivisionError):
            behind.close()


def test_a_beat_is_heard_while_there_is_nothing_to_do() -> None:
    beaten = threading.Event()
    behind = Behind(beaten.set, beat_seconds=0.01)
    assert beaten.wait(10)
    behind.close()


def batch(number: int, strong: bool = False) -> Batch:
    images = torch.full((4, 1, 2, 2), float(number))
    return Batch(images, torch.zeros(4), torch.zeros(4), 0, images + 1 if strong else None)


def test_a_window_knows_a_batch_and_its_parts_by_their_memory() -> None:
    window, one, other = Window(), batch(1), batch(2, strong=True)
    for number, given in enumerate((one, other)):
        window.add(given, Place(0, number, np.arange(4) + 10 * number))
    assert other.strong is not None
    for images, expected in [
        (one.images, ("weak", 0, [0, 1, 2, 3])),
        (other.images, ("weak", 1, [10, 11, 12, 13])),
        (other.strong, ("strong", 1, [10, 11, 12, 13])),
        (one.images[1:3], ("weak", 0, [1, 2])),
        (one.images.tensor_split(2)[1], ("weak", 0, [2, 3])),
        (other.strong[3:], ("strong", 1, [13])),
    ]:
        found = window.find(images)
        assert found is not None
        assert (found[0], found[1].number, found[1].ids.tolist()) == expected
    for images in (
        one.images.clone(),
        one.images + 0,
        one.images[::2],
        one.images[:, :, :1],
        one.images.flip(0),
    ):
        assert window.find(images) is None


def test_a_window_forgets() -> None:
    window, given = Window(), [batch(number) for number in range(2 * NUM_REMEMBERED + 1)]
    for number, one in enumerate(given):
        window.add(one, Place(0, number, np.arange(4)))
    assert window.find(given[0].images) is None
    assert window.find(given[-1].images) is not None


class Recorder:
    """Somebody who records batches of two samples, with two batches to a chunk."""

    def __init__(self, folder: Path) -> None:
        self.behind, self.tally = Behind(lambda: None), Tally()
        self.recording = Recording(
            KEY, [Shelf(str(folder), 1e6)], self.behind, self.tally, num_ids=20, rank=0, batches_per_chunk=2,
            is_fixed=False, is_writable=True,
        )  # fmt: skip

    def place(self, number: int, epoch: int = 0) -> Place:
        return Place(epoch, number, np.array([2 * number, 2 * number + 1]))

    def step(self, number: int, value: float, epoch: int = 0) -> float:
        """What the batch is learnt from: what was recorded, else ``value``, which then is."""
        place = self.place(number, epoch)
        found = self.recording.read(place)
        if found is None:
            found = {"logits": torch.full((2, 3), value)}
            self.recording.keep(place, found)
        return float(found["logits"][0, 0])

    def finish(self) -> None:
        self.recording.flush()
        self.behind.wait()


def test_who_is_a_little_behind_reads_what_the_other_has_just_recorded(tmp_path: Path) -> None:
    ahead, after = Recorder(tmp_path), Recorder(tmp_path)
    assert [ahead.step(number, 1.0) for number in range(3)] == [1.0, 1.0, 1.0]
    ahead.behind.wait()  # the first two batches are a chunk, the third waits for the fourth
    assert [after.step(number, 2.0) for number in range(3)] == [1.0, 1.0, 2.0]
    ahead.finish()
    assert [after.step(number, 2.0) for number in range(3, 5)] == [2.0, 2.0]


def test_of_two_who_record_the_same_the_first_to_finish_wins(tmp_path: Path) -> None:
    one, other = Recorder(tmp_path), Recorder(tmp_path)
    assert [(one.step(number, 1.0), other.step(number, 2.0)) for number in range(2)] == [(1.0, 2.0)] * 2
    other.finish()
    one.finish()
    late = Recorder(tmp_path)
    assert [late.step(number, 3.0) for number in range(2)] == [2.0, 2.0]
    assert len(list(tmp_path.rglob("*.chunk"))) == 1
    assert [recorder.tally.notes for recorder in (one, other, late)] == [[], [], []]
    for recorder in (one, other, late):
        recorder.behind.close()


def test_rows_that_an_interrupted_epoch_lacks_are_added(tmp_path: Path) -> None:
    first = Recorder(tmp_path)
    for number in (0, 1, 4):
        first.step(number, 1.0)
    first.finish()
    second = Recorder(tmp_path)
    assert [second.step(number, 2.0) for number in range(6)] == [1.0, 1.0, 2.0, 2.0, 1.0, 2.0]
    second.finish()
    third = Recorder(tmp_path)
    assert [third.step(number, 3.0) for number in range(6)] == [1.0, 1.0, 2.0, 2.0, 1.0, 2.0]
    assert third.step(0, 3.0, epoch=1) == 3.0


def test_a_trouble_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    tally = Tally()
    for number in range(3):
        tally.note(f"no room for {number} bytes", subject="room")
    tally.note("other")
    assert tally.notes == [record.message for record in caplog.records] == ["no room for 0 bytes", "other"]
