"""What a grounder says of a batch, recorded and read again: its students get the same bits as from the live one."""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from signals_cases import Bench

from methods import BUILTIN
from methods.base import Source, Teacher
from methods.data.base import Augment, StreamSettings
from methods.grounding.contracts import GroundingOutput
from methods.grounding.shapes_ref import ShapesRef
from orchestrator.errors import ConfigurationError
from orchestrator.keys import Facts
from orchestrator.plan import Planner, Point, make_plan
from orchestrator.reader import parse_experiment
from orchestrator.signals_codec import SignalFormat
from orchestrator.signals_form import PartsForm
from orchestrator.signals_network import Window
from orchestrator.signals_plan import signal_lines
from orchestrator.signals_recording import Place

CPU = torch.device("cpu")
NUM_TRAINING, BATCH_SIZE, EPOCHS = 20, 8, 2
NUM_ROWS = EPOCHS * NUM_TRAINING
TINY: dict[str, Any] = {
    "patch_size": 6, "width": 16, "num_layers": 2, "num_heads": 2, "channels": 8, "pyramid": False, "drop_path": 0.1,
}  # fmt: skip
FLIPPED = {"augment": {"flip": True}}


def stage(
    method: str, epochs: int = EPOCHS, train: Mapping[str, Any] | None = None, **settings: Any
) -> dict[str, Any]:
    return {
        "method": method,
        "train": {"epochs": epochs, "batch_size": BATCH_SIZE, **(train or {})},
        **TINY,
        **settings,
    }


TEACHER = stage("latent_vg", 1, num_concepts=8, channels=12)
SHARED: dict[str, Any] = {"taps": [1, 2], "decoder_heads": 2, "teacher": "$teacher"}
KD = stage("shared_ris_kd", **SHARED)


def planner_of(
    student: Mapping[str, Any],
    run: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
    methods: Mapping[str, Any] | None = None,
) -> Planner:
    """``methods``: what else ``Catalog.extended`` takes."""
    sizes = {"num_train": NUM_TRAINING, "num_validation": 4, "num_test": 4, "image_size": 24}
    document = {
        "name": "grounding-signals",
        "data": {"dataset": "shapes_ref", **sizes, **(data or {})},
        "stages": {"teacher": TEACHER, "student": student},
        "search": {"objective": {"maximize": "student.miou"}},
        "run": {"storage": "unused", **(run or {})},
    }
    catalog = BUILTIN.extended(**(methods or {}))
    facts = Facts(data=defaultdict(lambda: "f0"), code=defaultdict(lambda: "c0"))
    return Planner(parse_experiment(document, catalog), facts)


class Grounders(Bench):
    """A storage in which students of one grounder are trained."""

    plan = staticmethod(planner_of)


@pytest.fixture(scope="module", autouse=True)
def unmeasured() -> Iterator[None]:
    """Artifacts are not measured: that takes longer than to train them."""
    with pytest.MonkeyPatch.context() as monkey:
        monkey.setattr("orchestrator.stage.size_and_speed", lambda *arguments: {})
        yield


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A storage with trained teachers, on pictures as they are and on mirrored ones."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("grounders")
    for data in ({}, FLIPPED):
        Grounders(folder).train({**KD, "train": {"epochs": 0}}, data=data, signals="live")
    return folder


@pytest.fixture
def bench(taught: Path, tmp_path: Path) -> Grounders:
    shutil.copytree(taught, tmp_path / "storage")
    return Grounders(tmp_path / "storage")


STUDENTS: dict[str, dict[str, Any]] = {
    "all parts": KD,
    "micro-batches in bfloat16": stage(
        "shared_ris_kd", train={"accumulate": 2, "precision": "bf16"}, **SHARED
    ),
    "mask probabilities alone": stage(
        "latent_vg_kd", num_concepts=8, teacher="$teacher", pixel_weight=0.0, sentence_weight=0.0
    ),
}


@pytest.mark.parametrize("name", STUDENTS)
def test_stored_equals_computed(bench: Grounders, name: str) -> None:
    student = STUDENTS[name]
    live, first, second = (
        bench.train(student, data=FLIPPED, signals=mode) for mode in ("live", "record", "record")
    )
    assert live.signals == {}
    assert first.same_as(live)
    assert second.same_as(live)
    assert (first.signals["computed_rows"], first.signals["read_rows"]) == (NUM_ROWS, 0)
    assert (second.signals["computed_rows"], second.signals["read_rows"]) == (0, NUM_ROWS)
    assert 0 < second.signals["audited_rows"] < NUM_ROWS
    assert first.signals["notes"] == second.signals["notes"] == []


def test_pictures_that_stay_alike_are_recorded_once_for_all_epochs_and_seeds(bench: Grounders) -> None:
    for seed in (0, 1):
        read = bench.train(KD, seed=seed, signals="record")
        assert read.same_as(bench.train(KD, seed=seed, signals="live"))
    assert {path.parent.name for path in bench.chunks()} == {"all"}
    assert read.signals["read_rows"] >= BATCH_SIZE


def test_one_stream_serves_all_students_of_a_teacher(bench: Grounders) -> None:
    data = {**FLIPPED, "stream_seed": 3}
    first = bench.train(KD, data=data, signals="record")
    other = stage("latent_vg_kd", num_concepts=8, teacher="$teacher", temperature=4.0)
    read = bench.train(other, data=data, seed=1, signals="record")
    assert (read.signals["computed_rows"], read.signals["read_rows"]) == (0, NUM_ROWS)
    assert read.signals["recordings"] == first.signals["recordings"]
    alone = bench.train(STUDENTS["mask probabilities alone"], data=data, signals="record")
    assert alone.signals["recordings"] != first.signals["recordings"]


def test_rounded_signals_teach_the_same_recorded_or_not(bench: Grounders) -> None:
    exact = bench.train(KD, signals="live")
    results = [
        bench.train(KD, signals=mode, signals_precision="float16") for mode in ("auto", "record", "record")
    ]
    assert results[-1].signals["read_rows"] > 0
    assert all(result.same_as(results[0]) for result in results)
    assert not results[0].same_as(exact)


def test_a_student_on_masks_alone_asks_for_nothing(bench: Grounders) -> None:
    alone = bench.train(
        {**KD, "kd_weight": 0.0, "pixel_weight": 0.0, "sentence_weight": 0.0}, signals="record"
    )
    assert alone.signals == {}
    assert not bench.recordings.exists()


def lines_of(run: Mapping[str, Any], student: Mapping[str, Any] = KD) -> list[str]:
    planner = planner_of(student, run)
    plan = make_plan(planner, [Point({})], has=lambda key: False, cost=lambda stage: None)
    return signal_lines(plan)


def test_the_plan_says_what_becomes_of_them() -> None:
    (line,) = lines_of({"signals": "record"})
    assert (
        line
        == "Teacher signals: 1 student stage (shared_ris_kd) recorded in 1 recording, as run.signals says."
    )


class Silent(BUILTIN.method("shared_ris_kd")):  # type: ignore[misc]
    """A student that does not tell what it reads."""

    @classmethod
    def asks(cls, settings: Any) -> None:
        return None


@pytest.mark.parametrize(
    ("run", "student", "message"),
    [
        ({"signals_top_k": 3}, KD, "what teaches shared_ris_kd tells no classes apart; leave it out"),
        ({"signals": "record"}, {**KD, "method": "silent"}, "silent does not tell what it reads of its teacher's answer"),
    ],
)  # fmt: skip
def test_what_cannot_be_recorded_is_refused_by_the_plan(run: Any, student: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        planner_of(student, run, methods={"methods": {"silent": Silent}}).trial(Point({}), 0)


class Vague(BUILTIN.method("latent_vg")):  # type: ignore[misc]
    """A teacher that does not tell what it reads: another sentence about the same picture would pass for the first."""

    @classmethod
    def emit(cls, source: Source) -> Teacher:
        return replace(super().emit(source), reads=("images",))


class Unlisted(ShapesRef):
    """A data set whose streams do not tell which samples come up."""

    def load(self) -> Any:
        data = super().load()
        plain = SimpleNamespace(task=data.task, described=data.described)
        plain.streams = lambda settings: {
            **data.streams(settings),
            "training": _without_ids(data.streams(settings)["training"]),
        }
        return plain


def _without_ids(stream: Any) -> Any:
    names = ("batch_size", "num_batches", "num_samples", "known_labels", "batches")
    return SimpleNamespace(**{name: getattr(stream, name) for name in names})


@pytest.mark.parametrize(
    ("methods", "datasets", "message"),
    [
        ({"latent_vg": Vague}, {}, "teacher does not tell which fields of a batch it reads"),
        ({}, {"shapes_ref": Unlisted}, "streams of its data set do not tell which samples come up"),
    ],
)
def test_what_only_shows_at_the_start_is_refused_or_computed(
    bench: Grounders, methods: Any, datasets: Any, message: str
) -> None:
    options: dict[str, Any] = {"methods": {"methods": methods, "datasets": datasets}}
    with pytest.raises(ConfigurationError, match=message):
        bench.train(KD, signals="record", **options)
    live = bench.train(KD, shared=True, **options)
    assert not bench.recordings.exists()
    assert live.same_as(bench.train(KD, signals="live"))


def test_precision_is_in_the_keys_of_students_and_recording_is_not() -> None:
    plain, recorded, rounded = (
        planner_of(KD, run).trial(Point({}), 0).key
        for run in ({}, {"signals": "record"}, {"signals_precision": "float16"})
    )
    assert plain == recorded != rounded


def test_a_stream_tells_which_expressions_come_up() -> None:
    data = ShapesRef(num_train=21, num_validation=4, num_test=4, image_size=24).load()
    for rank in (0, 1):
        stream = data.streams(StreamSettings(
            batch_size=8, evaluation_batch_size=4, seed=1, augment=Augment(), validation=0.1, device=CPU, rank=rank,
            num_workers=2,
        ))["training"]  # fmt: skip
        for epoch in (0, 1):
            told = stream.sample_ids(epoch)
            given = [batch.indices.numpy() for batch in stream.batches(epoch)]
            assert len(told) == len(given) == stream.num_batches
            assert all(np.array_equal(one, other) for one, other in zip(told, given, strict=True))


def test_a_window_knows_pictures_with_their_own_sentences_only() -> None:
    data = ShapesRef(num_train=8, num_validation=4, num_test=4, image_size=24).load()
    settings = StreamSettings(
        batch_size=4, evaluation_batch_size=4, seed=1, augment=Augment(), validation=0.1, device=CPU
    )
    batch = next(iter(data.streams(settings)["training"].batches(0)))
    window, reads = Window(), ("images", "token_ids", "token_mask")
    window.add(batch, Place(0, 0, np.arange(4)))
    half = batch._replace(**{name: getattr(batch, name)[2:] for name in reads})
    found, part = window.find(batch, reads), window.find(half, reads)
    assert found is not None
    assert found[1].ids.tolist() == [0, 1, 2, 3]
    assert part is not None
    assert part[1].ids.tolist() == [2, 3]
    others = batch.token_ids.roll(1, 0)
    for changed in (
        {"token_ids": others},
        {"images": batch.images.clone()},
        {"token_ids": batch.token_ids.clone()},
    ):
        assert window.find(batch._replace(**changed), reads) is None
    mixed = half._replace(token_ids=batch.token_ids[:2], token_mask=batch.token_mask[:2])
    assert window.find(mixed, reads) is None


@pytest.mark.parametrize("is_last", [False, True])
def test_parts_come_back_as_they_lay_in_memory(is_last: bool) -> None:
    """A sum over a channels-last map may differ in its last bits from one over the same map in another order."""
    layout = torch.channels_last if is_last else torch.contiguous_format
    said = GroundingOutput(
        mask_logits=torch.randn(3, 1, 6, 6).to(memory_format=layout),
        pixel_embed=torch.randn(3, 5, 4, 4).to(memory_format=layout), sentence_embed=torch.randn(3, 2, 5)[:, 0],
    )  # fmt: skip
    form = PartsForm(form=SignalFormat(), parts=("mask_logits", "pixel_embed", "sentence_embed"))
    columns = form.encode(said)
    again = form.decode({name: column.clone() for name, column in columns.items()})
    for part in form.parts:
        assert torch.equal(getattr(again, part), getattr(said, part))
    assert again.pixel_embed.stride() == said.pixel_embed.stride()
    assert form.row_bytes(lambda: columns) == 8 + 4 * (36 + 80 + 5)
    assert not hasattr(again, "boxes")
