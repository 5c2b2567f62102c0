"""Recorded teacher signals through real stages: stored equals computed, and what cannot be trusted is not used."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from signals_cases import BATCH_SIZE, EPOCHS, NUM_BATCHES, NUM_TRAINING, TEACHERS, Bench, Trained, quick
from torch import Tensor, multiprocessing, nn

from methods.angular.student import AngularDistillation
from methods.base import Batch, Step
from orchestrator import signals as signals_module
from orchestrator import signals_shelf
from orchestrator.errors import ConfigurationError
from orchestrator.signals_chunk import map_chunk, to_chunk
from orchestrator.signals_network import RecordedNetwork
from orchestrator.store import Store
from orchestrator.workers import TorchWorkers

NUM_ROWS = EPOCHS * NUM_TRAINING

KD = quick("kd", model="tiny_mlp", teacher="$teacher")
STUDENTS: dict[str, dict[str, Any]] = {
    "a plain teacher": KD,
    "views whose heads learn": quick("angular_kd", model="tiny_mlp", teacher="$views", heads="joint"),
    "views": quick("angular_kd", model="tiny_mlp", teacher="$views", heads="frozen"),
    "noisy copies": quick("dist", model="tiny_mlp", teacher="$noise"),
    "several teachers": quick("kd", model="tiny_mlp", teacher=["$teacher", "$second"]),
    "two views of each image": quick("mlkd", model="tiny_mlp", teacher="$teacher"),
    "pooled features": quick("rkd", model="tiny_mlp", teacher="$teacher"),
    "micro-batches": quick("kd", model="tiny_mlp", teacher="$teacher", train={"accumulate": 2}),
    "bfloat16": quick("kd", model="tiny_mlp", teacher="$teacher", train={"precision": "bf16"}),
    "a linear probe": quick("linear_probe", teacher="$teacher"),
    "branches that grow": quick("angular_views", teacher="$teacher", num_branches=2),
}
PASSES_PER_BATCH = {"several teachers": 2, "two views of each image": 2}


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A storage with trained teachers."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("teachers")
    bench = Bench(folder)
    for name in ("views", "noise", "second"):
        bench.train(quick("kd", 1, model="tiny_mlp", teacher=f"${name}"), signals="live")
    return folder


@pytest.fixture
def bench(teachers: Path, tmp_path: Path) -> Bench:
    shutil.copytree(teachers, tmp_path / "storage")
    return Bench(tmp_path / "storage")


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many images each pass of a teacher's network was about, counted below everything of ours."""
    counted: list[int] = []

    class Counting(nn.Module):
        def __init__(self, network: nn.Module) -> None:
            super().__init__()
            self.network = network

        def forward(self, images: Tensor) -> Any:
            counted.append(len(images))
            return self.network(images)

    class Counted(RecordedNetwork):
        def __init__(self, network: nn.Module, *arguments: Any) -> None:
            super().__init__(Counting(network), *arguments)

    monkeypatch.setattr(signals_module, "RecordedNetwork", Counted)
    return counted


@pytest.mark.parametrize("name", STUDENTS)
def test_stored_equals_computed(bench: Bench, passes: list[int], name: str) -> None:
    student, factor = STUDENTS[name], PASSES_PER_BATCH.get(name, 1)
    live = bench.train(student, signals="live")
    assert (passes, live.signals) == ([], {})
    first = bench.train(student, signals="record")
    assert first.same_as(live)
    assert (first.signals["computed_rows"], first.signals["read_rows"]) == (factor * NUM_ROWS, 0)
    own_passes = len(passes)
    passes.clear()
    second = bench.train(student, signals="record")
    assert second.same_as(live)
    assert (second.signals["computed_rows"], second.signals["read_rows"]) == (0, factor * NUM_ROWS)
    assert 0 < second.signals["audited_rows"] <= factor * EPOCHS * BATCH_SIZE
    # Only audits, and where a method evaluates its teacher, validation and test.
    assert len(passes) == own_passes - factor * EPOCHS * (NUM_BATCHES - 1) * (
        2 if name == "micro-batches" else 1
    )
    assert first.signals["notes"] == second.signals["notes"] == []


def test_all_criteria_share_what_a_network_says_of_one_stream(bench: Bench) -> None:
    data = {"stream_seed": 3}
    first = bench.train(KD, data=data, signals="record")
    for student in (STUDENTS["views"], STUDENTS["pooled features"], STUDENTS["noisy copies"]):
        for seed in (0, 1):
            read = bench.train(student, data=data, seed=seed, signals="record")
            assert (read.signals["computed_rows"], read.signals["read_rows"]) == (0, NUM_ROWS)
            assert read.signals["recordings"] == first.signals["recordings"]
            assert read.same_as(bench.train(student, data=data, seed=seed, signals="live"))


def test_more_epochs_read_those_that_are_there(bench: Bench) -> None:
    bench.train(KD, signals="record")
    longer = {**KD, "train": {"epochs": EPOCHS + 1, "batch_size": BATCH_SIZE}}
    read = bench.train(longer, signals="record")
    assert (read.signals["read_rows"], read.signals["computed_rows"]) == (NUM_ROWS, NUM_TRAINING)
    assert read.same_as(bench.train(longer, signals="live"))


def test_images_that_stay_alike_are_recorded_once_for_all_epochs_and_seeds(bench: Bench) -> None:
    data = {"augment": {"pad": 0}}
    for seed in (0, 1):
        read = bench.train(KD, data=data, seed=seed, signals="record")
        assert read.same_as(bench.train(KD, data=data, seed=seed, signals="live"))
    # Batches of full size are shared; an image that was in the small one before makes its batch computed again.
    assert read.signals["read_rows"] > NUM_ROWS / 2
    assert {path.parent.name for path in bench.chunks()} == {"all"}


class Killed(BaseException):
    """The process died here."""


class Breaking(AngularDistillation):
    """Angular-KD whose process dies after some steps."""

    steps_left = 0

    def forward(self, batch: Batch) -> Step:
        Breaking.steps_left -= 1
        if Breaking.steps_left == 0:
            raise Killed
        return super().forward(batch)


@pytest.mark.parametrize("is_recorded", [False, True], ids=["while recording", "while reading"])
def test_a_stage_that_dies_within_an_epoch_goes_on_to_the_same_bits(bench: Bench, is_recorded: bool) -> None:
    student = quick("breaking", model="tiny_mlp", teacher="$views", heads="joint")
    options: dict[str, Any] = {"methods": {"breaking": Breaking}, "checkpoint_seconds": 0.0}
    Breaking.steps_left = 0
    live = bench.train(student, signals="live", **options)
    if is_recorded:
        bench.train(student, signals="record", **options)
    Breaking.steps_left = NUM_BATCHES + 3
    with pytest.raises(Killed):
        bench.train(student, signals="record", **options)
    Breaking.steps_left = 0
    resumed = bench.train(student, signals="record", **options)
    assert resumed.same_as(live)
    assert resumed.signals["read_rows"] + resumed.signals["computed_rows"] == BATCH_SIZE + 8
    assert (resumed.signals["computed_rows"] == 0) == is_recorded
    again = bench.train(student, signals="record", **options)
    assert (again.signals["computed_rows"], again.same_as(live)) == (0, True)


def damage_by_cutting(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def damage_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def damage_by_emptying(path: Path) -> None:
    path.write_bytes(b"")


def put_in_place_of_another(path: Path) -> None:
    """A chunk that is intact, but of another recording."""
    own = map_chunk(str(path), path.parts[-3])
    columns = {name: column + 1 for name, column in own.columns.items()}
    path.write_bytes(to_chunk("0" * 32, own.ids.copy(), columns))


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (damage_by_cutting, "expected digest"),
        (damage_a_byte, "expected digest"),
        (damage_by_emptying, "empty"),
        (put_in_place_of_another, "signals of recording 00000000"),
    ],
)
def test_a_chunk_that_is_not_what_was_written_is_computed_again(bench: Bench, damage: Any, text: str) -> None:
    live = bench.train(KD, signals="live")
    bench.train(KD, signals="record")
    first, second = bench.chunks()
    damage(first)
    repaired = bench.train(KD, signals="record")
    assert repaired.same_as(live)
    assert (repaired.signals["computed_rows"], repaired.signals["read_rows"]) == (NUM_TRAINING, NUM_TRAINING)
    (note,) = repaired.signals["notes"]
    assert "a chunk of recorded teacher signals is dropped, to be computed again" in note
    assert text in note
    assert bench.chunks() == [first, second]
    assert bench.train(KD, signals="record").signals["computed_rows"] == 0


def test_an_audit_finds_signals_that_are_not_the_teachers(bench: Bench) -> None:
    """Chunks that are sealed correctly and wrong, as a faulty machine would have written them."""
    live = bench.train(KD, signals="live")
    bench.train(KD, signals="record")
    for path in bench.chunks():
        chunk = map_chunk(str(path), path.parts[-3])
        columns = {name: column.clone() for name, column in chunk.columns.items()}
        columns["logits"][:, 0] += 1e-3
        path.write_bytes(to_chunk(path.parts[-3], chunk.ids.copy(), columns))
    audited = bench.train(KD, signals="record")
    (note,) = audited.signals["notes"]
    assert "is discarded: in epoch 1, batch" in note
    assert "where 0 is allowed; they are computed live" in note
    assert audited.signals["audited_rows"] == 0
    assert audited.signals["computed_rows"] >= NUM_TRAINING
    assert bench.chunks() == []
    clean = bench.train(KD, signals="record")
    assert (clean.signals["read_rows"], clean.same_as(live)) == (0, True)


def test_another_teacher_in_the_same_place_has_another_recording(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.train(KD, signals="record")
    monkeypatch.setitem(TEACHERS, "teacher", quick("supervised", 1, model="mini_cnn", seed=5))
    replaced = bench.train(KD, signals="record")
    assert replaced.signals["read_rows"] == 0
    assert len(list(bench.recordings.iterdir())) == 2


def test_weights_that_were_replaced_under_the_same_key_are_another_teacher(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    first = bench.train(KD, signals="record")
    digest = signals_module.network_digest

    def changed(network: nn.Module) -> str:
        with torch.no_grad():
            next(network.parameters()).mul_(1.5)
        return digest(network)

    monkeypatch.setattr(signals_module, "network_digest", changed)
    second = bench.train(KD, signals="record")
    assert second.signals["recordings"] != first.signals["recordings"]
    assert second.signals["read_rows"] == 0


def test_without_room_training_goes_on_live_and_says_so_once(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    live = bench.train(KD, signals="live")
    full = bench.train(KD, signals="record", signals_gigabytes=1e-6)
    assert full.same_as(live)
    (note,) = full.signals["notes"]
    assert "teacher signals are recorded no further, training goes on live: no room for" in note
    assert [record.message for record in caplog.records].count(note) == 1
    assert bench.chunks() == []


def test_images_that_cannot_be_replayed_are_refused(bench: Bench) -> None:
    data = {"restless": True}
    with pytest.raises(
        ConfigurationError, match="signals cannot be recorded: the first batch has other images"
    ):
        bench.train(KD, data=data, signals="record")
    chosen = bench.train(KD, data=data, signals="auto", shared=True)
    assert chosen.signals["live_because"][0].startswith("the first batch has other images each time")
    assert not bench.recordings.exists()


def test_auto_records_what_several_stages_want_and_reads_what_is_there(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = bench.train(KD)
    assert alone.signals["live_because"] == ["no other stage of the sweep wants the same signals"]
    quickly = bench.train(KD, shared=True)
    (reason,) = quickly.signals["live_because"]
    assert reason.startswith("the teacher takes only ")
    assert not bench.recordings.exists()
    monkeypatch.setattr(signals_module, "SHORTEST_PASS_SECONDS", 0.0)
    large = bench.train(KD, shared=True, signals_gigabytes=1e-6)
    (reason,) = large.signals["live_because"]
    assert "GB are more than run.signals_gigabytes (1e-06)" in reason
    recorded = bench.train(KD, shared=True)
    assert (recorded.signals["computed_rows"], recorded.signals["live_because"]) == (NUM_ROWS, [])
    reading = bench.train(KD)
    assert (reading.signals["read_rows"], reading.same_as(alone)) == (NUM_ROWS, True)


def test_what_only_the_storage_has_is_brought_to_the_node(bench: Bench, tmp_path: Path) -> None:
    live = bench.train(KD, signals="live")
    folder = str(tmp_path / "node")
    options = {"signals": "record", "signals_dir": folder}
    bench.train(KD, **options)
    near = sorted(Path(folder).rglob("*.chunk"))
    assert [path.name for path in near] == [path.name for path in bench.chunks()]
    damage_a_byte(near[0])  # fetched again
    near[1].unlink()
    read = bench.train(KD, **options)
    assert (read.signals["computed_rows"], read.same_as(live)) == (0, True)
    assert len(read.signals["notes"]) == 1
    shutil.rmtree(folder)
    assert bench.train(KD, **options).signals["computed_rows"] == 0


def test_a_disk_that_fills_up_stops_the_recording_and_not_the_training(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signals_shelf, "FREE_SHARE", 0.0)  # to the last byte
    live = bench.train(KD, signals="record")
    num_bytes = bench.chunks()[0].stat().st_size
    shutil.rmtree(bench.recordings)
    place = tmp_path / "small"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes + 3 * 4096}", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small file system needs root")
    try:
        full = bench.train(KD, signals="record", signals_dir=str(place))
        left = list(place.rglob("*.chunk"))
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)
    assert full.same_as(live)
    (note,) = full.signals["notes"]
    assert "no further, training goes on live: " in note
    assert "bytes of the disk are free" in note or "disk full" in note
    assert len(left) == 1  # that of the first epoch


@pytest.mark.parametrize("url", ["memory://signals-test"])
def test_recordings_lie_in_any_storage(bench: Bench, tmp_path: Path, url: str) -> None:
    live = bench.train(KD, signals="live")
    far = Bench(bench.store.url)
    far.store = Store(url)
    options = {"signals": "record", "signals_dir": str(tmp_path / "node")}
    assert far.train(KD, **options).signals["computed_rows"] == NUM_ROWS
    shutil.rmtree(tmp_path / "node")
    far.store._files.delete("artifacts")  # whose student would be in the way
    read = far.train(KD, **options)
    assert (read.signals["computed_rows"], read.signals["notes"], read.same_as(live)) == (0, [], True)


def work(rank: int, folder: str) -> None:
    """What each of two workers does: record, then read."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    workers, bench = TorchWorkers.current(torch.device("cpu")), Bench(Path(folder) / "storage")
    live, first, second = (
        bench.train(STUDENTS["views whose heads learn"], workers=workers, signals=mode)
        for mode in ("live", "record", "record")
    )
    found = {
        "same": first.same_as(live) and second.same_as(live),
        "computed": [first.signals["computed_rows"], second.signals["computed_rows"]],
        "notes": first.signals["notes"] + second.signals["notes"],
    }
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


@pytest.mark.slow
def test_several_workers_record_and_read_one_recording(bench: Bench, tmp_path: Path) -> None:
    multiprocessing.spawn(work, args=(str(tmp_path),), nprocs=2)
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found == {"same": True, "computed": [NUM_ROWS // 2, 0], "notes": []}
    assert {path.name[:4] for path in bench.chunks()} == {"0000", "0001"}
    assert len(list(bench.recordings.iterdir())) == 1


@pytest.mark.parametrize("form", [{"signals_precision": "float16"}, {"signals_top_k": 2}])
def test_compressed_signals_teach_the_same_recorded_or_not(
    bench: Bench, form: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = bench.train(KD, signals="live")
    results: list[Trained] = [
        bench.train(KD, **form),  # auto, which computes live here
        bench.train(KD, signals="record", **form),
        bench.train(KD, signals="record", **form),
    ]
    assert results[-1].signals["read_rows"] == NUM_ROWS
    assert results[-1].signals["notes"] == []
    assert all(result.same_as(results[0]) for result in results)
    assert not results[0].same_as(exact)
