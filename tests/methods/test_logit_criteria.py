"""Logit criteria against plain loops, the identities of their papers, and pinned values."""

from __future__ import annotations

from typing import Any

import criteria_reference as slow
import pytest
import torch
from torch import Tensor

from methods import METHODS
from methods.angular.ensemble import pseudo_logits
from methods.distil.dist import correlation_distance
from methods.distil.dkd import decoupled_losses
from methods.distil.lskd import standardised, standardised_soften
from methods.distil.mlkd import clean_levels, level_parts, released_levels, up_to_median
from methods.distil.pskd import soft_cross_entropy
from methods.distil.settings import warmup_factor
from methods.losses import cross_entropy, soften, softened_kl

T = 4.0


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("num_classes", [2, 7])
def test_dkd_equals_the_loop(temperature: float, num_classes: int) -> None:
    student, teacher, labels = slow.random_inputs(num_classes=num_classes)
    found = decoupled_losses(student, soften(teacher, temperature), labels, temperature)
    label_class, others = slow.decoupled(student, teacher, labels, temperature)
    assert float(found.label_class) == pytest.approx(sum(label_class) / len(labels), abs=1e-12)
    assert float(found.other_classes) == pytest.approx(sum(others) / len(labels), abs=1e-12)


def test_kd_is_the_sum_of_dkds_parts() -> None:
    """Per sample: KD = TCKD + (1 - p_y of the teacher) NCKD."""
    student, teacher, labels = slow.random_inputs(1)
    target = soften(teacher, T)
    label_class, others = decoupled_losses(student, target, labels, T)
    expected = label_class + (1 - target[0, labels[0]]) * others
    assert float(softened_kl(student, target, T)) == pytest.approx(float(expected), abs=1e-12)


def test_dkd_on_pseudo_logits_is_dkd_on_probabilities() -> None:
    student, teacher, labels = slow.random_inputs()
    target = soften(torch.stack([teacher, teacher.flip(0)]), T).mean(0)
    again = pseudo_logits(target, T)
    torch.testing.assert_close(soften(again, T), target, rtol=0, atol=1e-15)
    label_class, others = slow.decoupled(student, again, labels, T)
    found = decoupled_losses(student, target, labels, T)
    assert float(found.label_class) == pytest.approx(sum(label_class) / len(labels), abs=1e-10)
    assert float(found.other_classes) == pytest.approx(sum(others) / len(labels), abs=1e-10)


def test_dkd_of_a_certain_teacher_and_of_huge_logits_is_finite() -> None:
    labels = torch.tensor([0, 1])
    student = torch.tensor([[6e4, -6e4, 0.0], [6e4, -6e4, 0.0]], requires_grad=True)
    target = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    label_class, others = decoupled_losses(student, target, labels, T)
    (label_class + others).backward()
    assert float(others.detach()) == 0.0
    assert label_class.isfinite()
    assert student.grad is not None
    assert student.grad.isfinite().all()


def test_dist_equals_the_loop() -> None:
    student, teacher, _ = slow.random_inputs()
    first, second = soften(student, T), soften(teacher, T)
    inter, intra = slow.dist(first, second)
    assert float(correlation_distance(first, second, dim=-1)) == pytest.approx(inter, abs=1e-12)
    assert float(correlation_distance(first, second, dim=0)) == pytest.approx(intra, abs=1e-12)


@pytest.mark.parametrize("dim", [0, -1])
def test_dist_is_zero_for_what_is_positively_affine(dim: int) -> None:
    _, teacher, _ = slow.random_inputs()
    target = soften(teacher, 1.0)
    assert float(correlation_distance(0.3 * target + 0.1, target, dim=dim)) == pytest.approx(0.0, abs=1e-5)
    assert float(correlation_distance(-target, target, dim=dim)) == pytest.approx(2.0, abs=1e-5)


def test_dist_within_classes_of_a_batch_of_one_teaches_nothing() -> None:
    student = torch.randn(1, 4, requires_grad=True)
    distance = correlation_distance(student.softmax(-1), torch.full((1, 4), 0.25), dim=0)
    distance.backward()
    assert float(distance.detach()) == 1.0
    assert student.grad is not None
    assert student.grad.eq(0).all()


def test_standardisation_equals_the_loop_and_forgets_scale_and_shift() -> None:
    student, _, _ = slow.random_inputs()
    torch.testing.assert_close(standardised(student), slow.standardised(student), rtol=0, atol=1e-12)
    torch.testing.assert_close(
        standardised_soften(5 * student - 3, 2.0), standardised_soften(student, 2.0), rtol=0, atol=1e-6
    )


def test_standardising_equal_logits_gives_zero_and_a_finite_gradient() -> None:
    logits = torch.full((2, 3), 7.0, requires_grad=True)
    result = standardised(logits)
    result.sum().backward()
    assert result.eq(0).all()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("num_samples", [4, 5])
@pytest.mark.parametrize("variant", ["released", "clean"])
@pytest.mark.parametrize("temperatures", [(2.0, 3.0, 4.0, 5.0, 6.0), (1.0, 2.0, 3.0)])
def test_mlkd_equals_the_loop(variant: str, temperatures: tuple[float, ...], num_samples: int) -> None:
    weak, strong = (slow.random_inputs(num_samples, seed=seed)[:2] for seed in (0, 1))
    parts = [[level_parts(view[0], soften(view[1], T), T) for T in temperatures] for view in (weak, strong)]
    confident = soften(weak[1], 1.0)
    combine = released_levels if variant == "released" else clean_levels
    found = combine(*parts, up_to_median(confident.amax(-1)), up_to_median(confident.sum(0)))
    expected = slow.mlkd(weak, strong, temperatures, variant)
    assert [float(level) for level in found] == pytest.approx(expected, abs=1e-11)


def test_mlkd_is_zero_for_a_student_that_equals_its_teacher() -> None:
    _, teacher, _ = slow.random_inputs()
    for part in level_parts(teacher, soften(teacher, T), T):
        torch.testing.assert_close(part, torch.zeros_like(part), rtol=0, atol=1e-12)


def test_soft_cross_entropy_of_a_label_is_cross_entropy() -> None:
    student, _, labels = slow.random_inputs()
    onehot = torch.nn.functional.one_hot(labels, student.shape[1]).double()
    torch.testing.assert_close(soft_cross_entropy(student, onehot), cross_entropy(student, labels))


def test_a_target_of_larger_mass_multiplies_the_gradient() -> None:
    student, teacher, _ = slow.random_inputs()
    gradients = []
    for mass in (1.0, 2.44):
        leaf = student.clone().requires_grad_()
        softened_kl(leaf, mass * soften(teacher, T), T).backward()
        assert leaf.grad is not None
        gradients.append(leaf.grad)
    torch.testing.assert_close(gradients[1], 2.44 * gradients[0], rtol=1e-12, atol=0)


def test_divergence_from_the_mean_has_the_mean_of_the_members_gradients() -> None:
    student, teacher, _ = slow.random_inputs()
    members = [soften(teacher, T), soften(teacher.flip(0), T), soften(-teacher, T)]

    def gradient(target: Tensor) -> Tensor:
        leaf = student.clone().requires_grad_()
        softened_kl(leaf, target, T).backward()
        assert leaf.grad is not None
        return leaf.grad

    mean = torch.stack([gradient(member) for member in members]).mean(0)
    torch.testing.assert_close(gradient(torch.stack(members).mean(0)), mean, rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    ("epoch", "warmup", "factor"), [(0, 20, 0.05), (9, 20, 0.5), (19, 20, 1.0), (99, 20, 1.0), (0, 0, 1.0)]
)
def test_warm_up(epoch: int, warmup: int, factor: float) -> None:
    assert warmup_factor(epoch, warmup) == pytest.approx(factor)


GOLDEN: dict[str, float] = {
    "kd": 8.1513644369,
    "label_class": 1.9095384471,
    "other_classes": 7.2032707984,
    "inter": 1.8168662204,
    "intra": 1.6668875430,
    "lskd": 1.5439710759,
    "instance": 8.1513644369,
    "batch": 0.0000676939,
    "class": 0.0360240731,
}
"""At T = 4 of z_S[b, c] = 3 sin(1 + 7 b + c), z_T[b, c] = 3 cos(2 + 7 b + c), B = 3, C = 7, labels 0, 3, 6."""


def golden() -> dict[str, Tensor]:
    place = torch.arange(21, dtype=torch.float64).view(3, 7)
    student, teacher, labels = 3 * (1 + place).sin(), 3 * (2 + place).cos(), torch.tensor([0, 3, 6])
    target, mine = soften(teacher, T), soften(student, T)
    parts = level_parts(student, target, T)
    return {
        "kd": softened_kl(student, target, T),
        **decoupled_losses(student, target, labels, T)._asdict(),
        "inter": correlation_distance(mine, target, dim=-1),
        "intra": correlation_distance(mine, target, dim=0),
        "lskd": softened_kl(standardised(student), standardised_soften(teacher, 2.0), 2.0),
        "instance": parts.instance.mean(),
        "batch": parts.batch.mean(),
        "class": parts.classes.mean(),
    }


def test_pinned_values() -> None:
    assert {name: float(value) for name, value in golden().items()} == pytest.approx(GOLDEN, abs=1e-9)


@pytest.mark.parametrize(
    ("method", "preset", "expected"),
    [
        ("dkd", "resnet56-resnet20", {"other_classes_weight": 2.0, "temperature": 4.0}),
        ("dkd", "vgg13-vgg8", {"other_classes_weight": 6.0}),
        ("dkd", "resnet32x4-resnet8x4", {"other_classes_weight": 8.0, "label_class_weight": 1.0}),
        ("dkd", "imagenet-resnet34-resnet18", {"temperature": 1.0, "warmup_epochs": 1}),
        ("dkd", "lskd", {"kd_weight": 9.0, "temperature": 2.0, "standardise": True}),
        ("dist", "imagenet", {"temperature": 1.0, "kd_weight": 2.0}),
    ],
)
def test_presets_are_settings(method: str, preset: str, expected: dict[str, Any]) -> None:
    settings = METHODS[method].Settings(**METHODS[method].presets[preset])
    assert {name: getattr(settings, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("kd", {"ce_weight": 0.1, "kd_weight": 0.9, "temperature": 4.0}),
        (
            "dkd",
            {"ce_weight": 1.0, "label_class_weight": 1.0, "other_classes_weight": 8.0, "warmup_epochs": 20},
        ),
        ("mlkd", {"ce_weight": 0.1, "kd_weight": 0.9, "variant": "released"}),
        ("dist", {"ce_weight": 1.0, "kd_weight": 2.0, "temperature": 4.0}),
        ("lskd", {"ce_weight": 0.1, "kd_weight": 9.0, "temperature": 2.0}),
        ("pskd", {"kd_weight": 0.8}),
        ("tekap", {"num_copies": 3, "noise_share": 0.1, "logit_noise": 1.0, "view_weight": 0.8}),
    ],
)
def test_defaults_are_the_published_ones(method: str, expected: dict[str, Any]) -> None:
    settings = METHODS[method].Settings()
    assert {name: getattr(settings, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("dkd", {"kd_weight": 0.0, "ce_weight": 0.0}, "would learn nothing"),
        ("dkd", {"other_classes_weight": -1.0}, "other_classes_weight must be a finite number"),
        ("mlkd", {"variant": "paper"}, "variant must be one of released, clean, got 'paper'"),
        ("mlkd", {"temperatures": (4.0, 2.0)}, "temperatures must rise"),
        ("mlkd", {"temperatures": ()}, "temperatures must name at least one"),
        ("lskd", {"temperature": 0.0}, "temperature must be a finite number above 0"),
        ("pskd", {"kd_weight": 1.5}, "kd_weight must lie between 0 and 1, got 1.5"),
        ("tekap", {"num_copies": 0}, "num_copies must be at least 1, got 0"),
        ("tekap", {"noise_share": 1.2}, "noise_share must lie between 0 and 1"),
        ("dist", {"heads": "half"}, "heads must be one of joint, frozen"),
    ],
)
def test_impossible_settings_are_refused(method: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        METHODS[method].Settings(**settings)
