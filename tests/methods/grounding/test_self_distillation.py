"""Agreement of masked and unmasked passes against plain loops, and the values that were worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from methods.grounding.self_distillation import feature_distance, mask_divergence, ramp_factor


def divergence_by_loop(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> float:
    total = 0.0
    for mine, theirs in zip(student.flatten().tolist(), teacher.flatten().tolist(), strict=True):
        p = 1 / (1 + math.exp(-mine / temperature))
        q = 1 / (1 + math.exp(-theirs / temperature))
        total += q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p))
    return temperature**2 * total / student.numel()


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_divergence_of_masks_equals_a_plain_loop(temperature: float) -> None:
    torch.manual_seed(0)
    student, teacher = 3 * torch.randn(2, 2, 1, 4, 4, dtype=torch.float64)
    found = float(mask_divergence(student, teacher, temperature=temperature))
    assert found == pytest.approx(divergence_by_loop(student, teacher, temperature), rel=1e-9)
    assert found > 0


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_near_zero_it_is_an_eighth_of_the_squared_difference(temperature: float) -> None:
    student = torch.full((1, 1, 2, 2), 0.01, dtype=torch.float64)
    assert float(mask_divergence(student, -student, temperature=temperature)) == pytest.approx(5e-5, rel=1e-3)


def test_agreement_costs_nothing_even_at_extreme_logits() -> None:
    logits = torch.tensor([[-90.0, -3.0, 0.0, 2.5, 90.0]]).view(1, 1, 1, 5)
    student = logits.clone().requires_grad_()
    loss = mask_divergence(student, logits, temperature=1.0)
    loss.backward()
    assert abs(float(loss.detach())) < 1e-7
    assert student.grad is not None
    assert student.grad.abs().max() < 1e-7


def test_the_teacher_gets_no_gradient() -> None:
    student, teacher = torch.randn(2, 1, 1, 3, 3).unbind(0)
    student.requires_grad_()
    teacher.requires_grad_()
    mask_divergence(student, teacher, temperature=2.0).backward()
    assert student.grad is not None
    assert teacher.grad is None
    feature_distance(student[0], teacher[0]).backward()
    assert teacher.grad is None


def test_distance_of_features_is_one_minus_the_mean_cosine() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 2, 3, 5, dtype=torch.float64)
    cosines = [
        float(student[row, place] @ teacher[row, place])
        / float(student[row, place].norm() * teacher[row, place].norm())
        for row in range(2)
        for place in range(3)
    ]
    assert float(feature_distance(student, teacher)) == pytest.approx(1 - sum(cosines) / 6, rel=1e-9)
    assert float(feature_distance(teacher, 3 * teacher)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    ("progress", "fraction", "factor"),
    [(0, 0.05, 0), (0.025, 0.05, 0.5), (0.05, 0.05, 1), (0.7, 0.05, 1), (0, 0, 1), (0.1, 0.2, 0.5)],
)
def test_ramp(progress: float, fraction: float, factor: float) -> None:
    assert ramp_factor(progress, fraction) == pytest.approx(factor)
