"""Students that learn from features: what they read, remember and refuse."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from contract_cases import TASK, build, finished, make_batch
from torch import nn

from methods import BUILTIN, METHODS
from methods.base import Batch, InputStage, Method, ModelSettings, Source, Task
from methods.catalog import Catalog
from methods.distil.review import Review
from methods.kd import KnowledgeDistillation
from methods.losses import cross_entropy

# --- a transformer that teaches a convolutional student ------------------------------------------

IMAGE_TASK = Task(num_classes=4, in_channels=3, image_size=32)
TOKENS = ("blocks.0:tokens", "blocks.2:tokens")


def small_vit(num_classes: int, in_channels: int) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    network = VisionTransformer(
        img_size=32,
        patch_size=8,
        in_chans=in_channels,
        num_classes=num_classes,
        embed_dim=24,
        depth=3,
        num_heads=2,
    )
    network.classifier_path = "head"
    return network


CATALOG = BUILTIN.extended(models={"small_vit": small_vit})


def coloured(size: int = 32, seed: int = 0) -> Batch:
    """Noise of a colour that tells the class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(size) % IMAGE_TASK.num_classes
    images = 0.3 * torch.randn(size, 3, 32, 32, generator=generator)
    colours = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]])
    images += colours[labels][:, :, None, None]
    return Batch(images, labels, torch.arange(size))


def trained(method: Method, num_steps: int, *, learning_rate: float) -> list[float]:
    optimizer = torch.optim.Adam(method.parameters(), lr=learning_rate)
    method.train()
    totals = []
    for step in range(num_steps):
        total = method(coloured(seed=step)).total
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(float(total.detach()))
    return totals


@pytest.fixture(scope="module")
def transformer() -> Source:
    """A finished supervised stage whose network is a small vision transformer."""
    torch.manual_seed(0)
    model = ModelSettings(name="small_vit")
    supervised = METHODS["supervised"]
    method = supervised(
        supervised.Settings(), task=IMAGE_TASK, model=CATALOG.build_model(model, IMAGE_TASK), inputs={}
    )
    trained(method, 25, learning_rate=1e-2)
    return Source(
        key="vit", method="supervised", settings=method.settings, model=model, task=IMAGE_TASK,
        weights=method.artifact().state_dict(), inputs={}, catalog=CATALOG,
    )  # fmt: skip


FROM_A_TRANSFORMER: list[tuple[str, Mapping[str, Any]]] = [
    ("kd", {}),
    ("crd", {"num_negatives": 8}),
    ("rkd", {}),
    ("similarity", {"similarity_weight": 10.0}),
    ("attention", {"student_maps": ("stages.1", "stages.2"), "teacher_maps": TOKENS}),
    ("fitnet", {"student_maps": ("stages.1", "stages.2"), "teacher_maps": TOKENS, "hint_weight": 1.0}),
    ("review", {"student_maps": ("stages.1", "stages.2"), "teacher_maps": TOKENS, "warmup_epochs": 0}),
]


@pytest.mark.parametrize(("name", "settings"), FROM_A_TRANSFORMER)
def test_a_transformer_teaches_a_convolutional_student(
    transformer: Source, name: str, settings: Mapping[str, Any]
) -> None:
    teacher = transformer.teacher()
    batch = coloured(seed=99)
    assert float((teacher(batch.images).logits.argmax(1) == batch.labels).float().mean()) > 0.9
    torch.manual_seed(1)
    student = METHODS[name](
        METHODS[name].Settings(**settings),
        task=IMAGE_TASK,
        model=CATALOG.build_model(ModelSettings(name="resnet8"), IMAGE_TASK),
        inputs={"teacher": teacher},
    )
    student.prepare(batch.labels, num_epochs=1)
    losses = trained(student, 12, learning_rate=3e-3)
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    assert float(student.summarise(student.eval().statistics(batch))["top1"]) > 40


def test_a_criterion_on_maps_refuses_a_transformer_with_the_reason(transformer: Source) -> None:
    method = METHODS["attention"]
    with pytest.raises(
        ValueError, match=r"has no feature map at 'blocks.0'.*use a criterion on logits or pooled"
    ):
        method(
            method.Settings(),
            task=IMAGE_TASK,
            model=CATALOG.build_model(ModelSettings(name="resnet8"), IMAGE_TASK),
            inputs={"teacher": transformer.teacher()},
        )


# --- what is refused before anything has run -----------------------------------------------------


def input_stage(model: str, catalog: Catalog = CATALOG) -> InputStage:
    return InputStage(
        name="teacher", method=METHODS["supervised"], settings=METHODS["supervised"].Settings(),
        model=ModelSettings(name=model), inputs={}, catalog=catalog,
    )  # fmt: skip


PAIRS = [
    ("attention", {}, "resnet8", "resnet20", None),
    ("attention", {}, "tiny_mlp", "resnet20", "student tiny_mlp: TinyMLP declares no feature maps"),
    ("attention", {}, "resnet8", "tiny_mlp", "teacher tiny_mlp: TinyMLP declares no feature maps"),
    ("attention", {}, "resnet8", "small_vit", "teacher small_vit: VisionTransformer has no feature map"),
    ("attention", {}, "resnet8", "resnet50", "the student has 3 and the teacher 4: name equally many"),
    (
        "attention",
        {"student_maps": ("stages.0", "stges.1")},
        "resnet8",
        "resnet20",
        "did you mean 'stages.1'",
    ),
    ("review", {}, "vgg8", "mobilenet_v2_half", "offers no feature maps from before an activation"),
    ("review", {}, "mobilenet_v2_half", "vgg13", None),
    ("review", {}, "shuffle_v1", "wrn_40_2", None),
    (
        "fitnet",
        {"hint_layer": 4},
        "resnet8",
        "resnet20",
        "hint_layer is 4, but student or teacher has only 3",
    ),
    ("fitnet", {}, "mobilenet_v2_half", "vgg13", None),
    ("fitnet", {"hint_layer": 1}, "tiny_cnn", "resnet20", None),
    ("fitnet", {"hint_layer": 4}, "mobilenet_v2_half", "resnet50", None),
    ("crd", {}, "tiny_mlp", "small_vit", None),
]


@pytest.mark.parametrize(("method", "settings", "student", "teacher", "reason"), PAIRS)
def test_pairs_that_cannot_be_compared_are_refused_when_planned(
    method: str, settings: dict[str, Any], student: str, teacher: str, reason: str | None
) -> None:
    inputs = {"teacher": input_stage(teacher)}
    chosen = METHODS[method].Settings(**settings)
    reasons = list(METHODS[method].pair_refusals(chosen, ModelSettings(name=student), inputs))
    assert len(reasons) == (0 if reason is None else 1)
    if reason is not None:
        assert reason in reasons[0]


BAD_SETTINGS = [
    (
        "attention",
        {"attention_weight": -1.0},
        "attention_weight must be a finite number of at least 0, got -1.0",
    ),
    ("fitnet", {"hint_layer": 0}, "hint_layer must be at least 1"),
    ("review", {"review_weight": float("nan")}, "review_weight must be a finite number"),
    ("review", {"warmup_epochs": -1}, "warmup_epochs must be a finite number of at least 0"),
    ("rkd", {"angle_weight": -2.0}, "angle_weight must be"),
    ("crd", {"num_negatives": 0}, "num_negatives must be a finite number above 0, got 0"),
    ("crd", {"contrast_temperature": 0.0}, "contrast_temperature must be a finite number above 0"),
    ("crd", {"bank_momentum": 1.0}, "bank_momentum must be below 1, got 1.0"),
]


@pytest.mark.parametrize(("method", "settings", "message"), BAD_SETTINGS)
def test_impossible_settings_are_refused(method: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        METHODS[method].Settings(**settings)


def test_settings_without_effect_leave_the_key() -> None:
    own = {"num_negatives", "num_dimensions", "contrast_temperature", "bank_momentum"}
    crd, review = METHODS["crd"], METHODS["review"]
    assert own <= crd.inactive(crd.Settings(crd_weight=0.0))
    assert not own & crd.inactive(crd.Settings())
    assert "warmup_epochs" in review.inactive(review.Settings(review_weight=0.0))
    assert "temperature" in review.inactive(review.Settings())
    assert "temperature" not in review.inactive(review.Settings(kd_weight=1.0))


# --- ReviewKD, FitNet, AT, RKD -------------------------------------------------------------------


def test_review_grows_to_its_full_weight() -> None:
    method = build("review", warmup_epochs=4, review_weight=8.0)
    weights = [method(make_batch()._replace(epoch=epoch)).losses["review"].weight for epoch in (0, 1, 3, 9)]
    assert weights == [2.0, 4.0, 8.0, 8.0]
    assert build("review", warmup_epochs=0)(make_batch()).losses["review"].weight == 5.0


def test_review_reaches_every_level_and_reads_the_teacher_before_its_activation() -> None:
    method = build("review")
    assert isinstance(method, Review)
    maps = method.teaching(make_batch().images).maps
    assert len(maps) == 2
    assert all(bool((fm < 0).any()) for fm in maps)
    method(make_batch()).losses["review"].value.backward()
    assert all(parameter.grad is not None for parameter in method.fusions.parameters())


@pytest.mark.parametrize("name", sorted(Review.presets))
def test_presets_are_settings(name: str) -> None:
    assert Review.Settings(**Review.presets[name]).review_weight == Review.presets[name]["review_weight"]


FEATURE_CASES = ["attention", "fitnet", "review", "rkd", "similarity", "crd"]


@pytest.mark.parametrize("name", FEATURE_CASES)
def test_a_student_that_is_its_teacher_is_told_so(name: str) -> None:
    """Losses that compare two networks directly vanish; those behind fresh adapters do not."""
    method = build(name)
    method.model.load_state_dict(method.teacher.network.state_dict())
    method.eval()
    losses = method(make_batch()).losses
    compared = [loss.value for key, loss in losses.items() if key not in ("ce", "kd")]
    if name in ("attention", "rkd", "similarity"):
        assert all(float(value.detach()) == pytest.approx(0, abs=1e-6) for value in compared)
    else:
        assert all(float(value.detach()) > 0 for value in compared)


@pytest.mark.parametrize("name", FEATURE_CASES)
def test_distillation_is_added_by_its_weight(name: str) -> None:
    method = build(name, kd_weight=0.7)
    method.eval()
    batch = make_batch()
    step = method(batch)
    plain = KnowledgeDistillation(
        KnowledgeDistillation.Settings(kd_weight=0.7),
        task=TASK,
        model=method.model,
        inputs={"teacher": method.teacher},
    ).eval()
    expected = plain(batch).losses["kd"]
    assert step.losses["kd"].weight == expected.weight == 0.7
    torch.testing.assert_close(step.losses["kd"].value, expected.value)
    torch.testing.assert_close(
        step.losses["ce"].value, cross_entropy(method.model(batch.images)[0], batch.labels)
    )


def test_adapters_are_not_part_of_what_is_kept() -> None:
    for name in FEATURE_CASES:
        method = build(name)
        kept = finished(method, name).weights
        assert set(kept) == set(build("supervised").artifact().state_dict())
