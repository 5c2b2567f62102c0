"""Students of a pack against the same students alone: equal bits, whatever happens to their neighbours."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pytest
import torch
from loop_doubles import CPU, Killed, MemorySlot, assert_same_bits, make_method, make_stream, without_time
from torch import Tensor, nn

from methods import BUILTIN, METHODS
from methods.base import Method, ModelSettings, Source, Task, Teacher
from methods.data.stream import Stream
from methods.models import MapTaps
from orchestrator.checkpoint import from_bytes
from orchestrator.errors import DivergedError
from orchestrator.loop import StopTraining, train
from orchestrator.optimisation import TrainSettings
from orchestrator.pack import PackMember, train_pack
from orchestrator.training import Row, Training

TASK = Task(num_classes=3, in_channels=3, image_size=4)
EPOCHS, NUM_BATCHES = 2, 3


class Dropped(nn.Module):
    """Draws random numbers in every step."""

    classifier_path = "classifier"
    map_taps = MapTaps(stages=("features.0", "features.2"))

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(in_channels, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.4)
        )
        self.classifier = nn.Linear(6, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.features(images).mean(dim=(2, 3)))
        return logits


CATALOG = BUILTIN.extended(models={"dropped": Dropped})
NETWORK = ModelSettings(name="mini_cnn")


def source(method: str, settings: Any = None, teacher: Source | None = None) -> Source:
    """An untrained artifact, always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        made = METHODS[method](
            settings or METHODS[method].Settings(),
            task=TASK,
            model=CATALOG.build_model(NETWORK, TASK) if teacher is None else None,
            inputs={} if teacher is None else {"teacher": teacher.teacher()},
        )
    return Source(
        key=method,
        method=method,
        settings=made.settings,
        model=NETWORK if teacher is None else None,
        task=TASK,
        weights=made.artifact().state_dict(),
        inputs={} if teacher is None else {"teacher": teacher},
        catalog=CATALOG,
    )


PLAIN = source("supervised")
VIEWS = source("angular_views", METHODS["angular_views"].Settings(num_branches=2), PLAIN)
SOURCES = {"plain": PLAIN, "views": VIEWS, "noise": source("tekap", teacher=PLAIN)}


@dataclass(frozen=True, kw_only=True)
class Case:
    """What the members of a pack are, and what tells them apart."""

    method: str
    teacher: str
    settings: Sequence[dict[str, Any]]
    train: Sequence[dict[str, Any]] = field(default_factory=lambda: [{}, {"learning_rate": 0.2}, {}])

    def teacher_of(self) -> Teacher:
        return SOURCES[self.teacher].teacher()

    def build(self, number: int, teacher: Teacher) -> Method:
        method = METHODS[self.method]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            model = CATALOG.build_model(ModelSettings(name="dropped"), TASK) if method.needs_model else None
            made = method(
                method.Settings(**self.settings[number]), task=TASK, model=model, inputs={"teacher": teacher}
            )
        made.prepare(torch.zeros(22, dtype=torch.int64), num_epochs=EPOCHS)
        return made

    def options(self, number: int) -> TrainSettings:
        return TrainSettings(**{"epochs": EPOCHS, "batch_size": 8, **self.train[number]})

    def streams(self) -> dict[str, Stream]:
        training = make_stream()
        training.strong = METHODS[self.method].needs_strong
        return {"training": training, "validation": make_stream(13, shuffle=False, seed=5)}

    def alone(self, number: int, **arguments: Any) -> Training:
        return train(
            self.build(number, self.teacher_of()), settings=self.options(number), **self.streams(), seed=1,
            device=CPU, checkpoint_seconds=0.0, **arguments,
        )  # fmt: skip

    def member(self, number: int, teacher: Teacher, **changes: Any) -> PackMember:
        return PackMember(
            **{
                "build": lambda: self.build(number, teacher),
                "settings": self.options(number),
                "seed": 1,
                "checkpoints": MemorySlot(),
                "observe": lambda row: None,
                **changes,
            }
        )

    def pack(self, members: Sequence[PackMember]) -> list[Training | Exception]:
        return train_pack(members, **self.streams(), device=CPU, checkpoint_seconds=0.0)


KD = Case(
    method="kd",
    teacher="plain",
    settings=[{}, {"kd_weight": 3.0, "temperature": 2.0}, {"kd_weight": 0.5}],
)
CASES = {
    "kd": KD,
    "kd-average": replace(KD, train=[{"ema_decay": 0.9}, {"clip_norm": 0.1}, {"optimizer": "adamw"}]),
    "kd-micro-batches": replace(KD, train=[{"accumulate": 2}, {"accumulate": 2}, {"accumulate": 2}]),
    "kd-bf16": replace(KD, train=[{"precision": "bf16"}] * 3),
    "kd-of-noise": replace(KD, teacher="noise"),
    "mlkd": replace(KD, method="mlkd", settings=[{}, {"kd_weight": 3.0}, {"ce_weight": 0.3}]),
    "attention": replace(
        KD, method="attention", settings=[{}, {"attention_weight": 3.0}, {"ce_weight": 0.3}]
    ),
    "joint-heads": Case(
        method="angular_kd",
        teacher="views",
        settings=[{}, {"kd_weight": 3.0}, {"heads": "frozen"}],
    ),
    "views": Case(
        method="angular_views",
        teacher="plain",
        settings=[{"num_branches": 1}, {"num_branches": 3, "margin": 0.4}, {"label_weight": 0.3}],
    ),
}


def shared_teacher(case: Case) -> tuple[Teacher, Callable[[], int]]:
    """A teacher whose passes are remembered, and how many batches it has really computed."""
    teacher = case.teacher_of()
    network: Any = teacher.network
    network.remember_passes()
    seen: list[int] = []
    network.network.register_forward_hook(lambda module, images, output: seen.append(len(images[0])))
    return teacher, lambda: sum(size > 1 for size in seen)  # a blank image tells the shapes of maps


def state_in(slot: Any) -> dict[str, Any]:
    tree = from_bytes(slot.files)
    return {name: value for name, value in tree.items() if name not in ("seconds", "history", "best")}


def assert_same_tree(found: Any, expected: Any) -> None:
    assert type(found) is type(expected)
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name in expected:
            assert_same_tree(found[name], expected[name])
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same_tree(one, other)
    elif isinstance(expected, Tensor):
        assert torch.equal(found, expected)
    else:
        assert found == expected


def assert_same_training(found: Training | Exception, expected: Training) -> None:
    assert isinstance(found, Training), found
    assert_same_bits(found.weights, expected.weights)
    assert without_time(found.history) == without_time(expected.history)
    assert found.metrics == expected.metrics


@pytest.mark.parametrize("name", CASES)
def test_packed_students_get_the_bits_that_they_get_alone(name: str) -> None:
    case = CASES[name]
    slots = [MemorySlot() for _ in case.settings]
    expected = [case.alone(number, checkpoints=slot) for number, slot in enumerate(slots)]
    assert (
        not torch.equal(*(next(iter(training.weights.values())) for training in expected[:2]))
        or name == "views"
    )
    teacher, num_passes = shared_teacher(case)
    members = [case.member(number, teacher) for number in range(3)]
    found = case.pack(members)
    for one, other, member, slot in zip(found, expected, members, slots, strict=True):
        assert_same_training(one, other)
        assert_same_tree(state_in(member.checkpoints), state_in(slot))  # optimizer and random stream too
    per_epoch = {"kd-micro-batches": 2 * NUM_BATCHES, "mlkd": 2 * NUM_BATCHES, "views": NUM_BATCHES + 2}
    assert num_passes() == EPOCHS * per_epoch.get(name, NUM_BATCHES)


def test_students_of_any_length_and_evaluation_share_a_stream() -> None:
    case = replace(KD, train=[{"epochs": 4}, {"epochs": 1}, {"epochs": 3, "evaluate_every": 2}])
    found = case.pack([case.member(number, case.teacher_of()) for number in range(3)])
    for number, training in enumerate(found):
        assert_same_training(training, case.alone(number))


def test_a_diverging_student_fails_alone() -> None:
    case = replace(KD, train=[{}, {"learning_rate": 1e30}, {}])
    first, broken, last = case.pack([case.member(number, case.teacher_of()) for number in range(3)])
    assert isinstance(broken, DivergedError)
    assert "learning rate 1e+30" in str(broken)
    assert_same_training(first, case.alone(0))
    assert_same_training(last, case.alone(2))


def test_a_student_that_cannot_be_built_fails_alone() -> None:
    def refuse() -> Method:
        raise ValueError("no such thing")

    members = [KD.member(0, KD.teacher_of()), KD.member(1, KD.teacher_of(), build=refuse)]
    first, broken = KD.pack(members)
    assert str(broken) == "no such thing"
    assert_same_training(first, KD.alone(0))


def test_a_stopped_student_leaves_the_others_and_goes_on_later() -> None:
    teacher, num_passes = shared_teacher(KD)
    stop: Callable[[Row], bool | None] = lambda row: row["epoch"] == 1  # noqa: E731
    members = [KD.member(0, teacher), KD.member(1, teacher, observe=stop), KD.member(2, teacher)]
    first, stopped, last = KD.pack(members)
    assert isinstance(stopped, StopTraining)
    assert_same_training(first, KD.alone(0))
    assert_same_training(last, KD.alone(2))
    assert num_passes() == EPOCHS * NUM_BATCHES
    (resumed,) = KD.pack([replace(members[1], observe=lambda row: None)])
    assert_same_training(resumed, KD.alone(1))


@pytest.mark.parametrize("save", [1, 2, 4])
def test_an_interrupted_pack_goes_on_to_the_same_bits(save: int) -> None:
    """Wherever one of them dies the others keep a checkpoint first; those behind catch up, then passes are shared."""
    teacher, num_passes = shared_teacher(KD)
    slots = [MemorySlot(), MemorySlot(die_after=save), MemorySlot()]
    members = [KD.member(number, teacher, checkpoints=slot) for number, slot in enumerate(slots)]
    with pytest.raises(Killed):
        KD.pack(members)
    assert all(slot.files is not None for slot in slots[:2])
    slots[1].die_after = None
    found = KD.pack(members)
    for number, training in enumerate(found):
        assert_same_training(training, KD.alone(number))
    assert num_passes() <= EPOCHS * NUM_BATCHES + 1


def test_members_at_different_places_meet() -> None:
    behind, ahead = MemorySlot(), MemorySlot()
    stop: Callable[[Row], bool | None] = lambda row: row["epoch"] == 1  # noqa: E731
    with pytest.raises(StopTraining):
        KD.alone(0, checkpoints=ahead, observe=stop)
    teacher, num_passes = shared_teacher(KD)
    found = KD.pack([KD.member(0, teacher, checkpoints=ahead), KD.member(1, teacher, checkpoints=behind)])
    for number, training in enumerate(found):
        assert_same_training(training, KD.alone(number))
    assert num_passes() == EPOCHS * NUM_BATCHES


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError("can't allocate memory")],
)
def test_a_pack_that_outgrows_the_memory_splits_and_continues(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    teacher = KD.teacher_of()
    in_memory: weakref.WeakSet[Method] = weakref.WeakSet()

    def build(number: int) -> Method:
        method = KD.build(number, teacher)
        in_memory.add(method)
        return method

    def observe(row: Row) -> None:
        if len(in_memory) > 2:
            raise type(error)(*error.args)

    members = [
        KD.member(number % 3, teacher, build=partial(build, number % 3), observe=observe)
        for number in range(5)
    ]
    for number, training in enumerate(KD.pack(members)):
        assert_same_training(training, KD.alone(number % 3))
    messages = [record.getMessage() for record in caplog.records]
    assert [message[:2] for message in messages] == ["5 ", "3 "]
    assert "side by side" in messages[0]
    assert "splits in halves" in messages[0]


def test_one_that_does_not_even_fit_alone_fails_and_the_others_are_trained() -> None:
    def observe(row: Row) -> None:
        raise MemoryError("never fits")

    teacher = KD.teacher_of()
    found = KD.pack([KD.member(0, teacher), KD.member(1, teacher, observe=observe), KD.member(2, teacher)])
    assert isinstance(found[1], MemoryError)
    for number in (0, 2):
        assert_same_training(found[number], KD.alone(number))


def test_time_is_shared_among_the_members() -> None:
    clock = iter(range(10_000))
    found = train_pack(
        [KD.member(number, KD.teacher_of()) for number in range(3)],
        **KD.streams(), device=CPU, checkpoint_seconds=1e9, clock=lambda: float(next(clock)),
    )  # fmt: skip
    trainings = [training for training in found if isinstance(training, Training)]
    assert len(trainings) == 3
    longest = max(training.seconds for training in trainings)
    total = sum(training.worker_seconds for training in trainings)
    assert 0.6 * longest < total < 1.4 * longest


def test_what_finishing_raises_is_the_members_own_failure() -> None:
    done: list[str] = []

    def refuse(method: Method, training: Training) -> None:
        raise OSError("disk full")

    teacher = KD.teacher_of()
    failed, fine = KD.pack(
        [
            KD.member(0, teacher, finish=refuse),
            KD.member(1, teacher, finish=lambda method, training: done.append("fine")),
        ]
    )
    assert isinstance(failed, OSError)
    assert_same_training(fine, KD.alone(1))
    assert done == ["fine"]


def test_the_random_state_of_the_caller_is_left_alone() -> None:
    before = torch.get_rng_state()
    KD.pack([KD.member(number, KD.teacher_of()) for number in range(2)])
    assert torch.equal(torch.get_rng_state(), before)


def test_a_pack_of_methods_without_a_teacher_shares_the_stream() -> None:
    settings = TrainSettings(epochs=2, batch_size=8)
    streams = {"training": make_stream(), "validation": None}
    members = [
        PackMember(
            build=lambda dropout=dropout: make_method(dropout=dropout),  # type: ignore[misc]
            settings=settings, seed=1, checkpoints=None, observe=lambda row: None,
        )
        for dropout in (0.0, 0.5)
    ]  # fmt: skip
    found = train_pack(members, **streams, device=CPU)  # type: ignore[arg-type]
    for training, dropout in zip(found, (0.0, 0.5), strict=True):
        expected = train(make_method(dropout=dropout), settings=settings, **streams, seed=1, device=CPU)  # type: ignore[arg-type]
        assert_same_training(training, expected)
