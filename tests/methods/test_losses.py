"""Shared losses and sums against values computed by hand or one number at a time."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from methods.losses import cross_entropy, in_full_precision, soften, softened_kl
from methods.measures import classification_sums


def softmax(row: list[float], temperature: float) -> list[float]:
    exponentials = [math.exp(z / temperature) for z in row]
    return [e / sum(exponentials) for e in exponentials]


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_softened_kl_equals_the_loop(temperature: float) -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 7, dtype=torch.float64).unbind()
    expected = 0.0
    for z_student, z_teacher in zip(student.tolist(), teacher.tolist(), strict=True):
        q, p = softmax(z_student, temperature), softmax(z_teacher, temperature)
        expected += sum(pi * math.log(pi / qi) for pi, qi in zip(p, q, strict=True))
    actual = softened_kl(student, soften(teacher, temperature), temperature)
    assert float(actual) == pytest.approx(temperature**2 * expected / 3, abs=1e-12)


def test_softened_kl_of_equal_logits_is_zero() -> None:
    logits = torch.randn(4, 9)
    assert float(softened_kl(logits, soften(logits, 4.0), 4.0)) == pytest.approx(0.0, abs=1e-5)


def test_softened_kl_of_a_certain_target_is_the_cross_entropy() -> None:
    logits, labels = torch.randn(6, 5, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 4, 0])
    target = F.one_hot(labels, 5).double()
    target.requires_grad_()
    loss = softened_kl(logits, target, 1.0)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(F.cross_entropy(logits, labels)), abs=1e-12)
    assert target.grad is not None
    assert target.grad.isfinite().all()


def test_cross_entropy_spreads_the_smoothed_share() -> None:
    logits, labels = torch.randn(4, 5, dtype=torch.float64), torch.tensor([0, 1, 4, 2])
    log_probs = logits.log_softmax(-1)
    hard = -log_probs[torch.arange(4), labels].mean()
    assert float(cross_entropy(logits, labels)) == pytest.approx(float(hard), abs=1e-12)
    expected = 0.9 * hard - 0.1 * log_probs.mean()
    assert float(cross_entropy(logits, labels, label_smoothing=0.1)) == pytest.approx(
        float(expected), abs=1e-12
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_losses_are_float32_for_half_inputs_and_under_autocast(dtype: torch.dtype) -> None:
    labels = torch.tensor([0, 1])
    half = torch.tensor([[6e4, -6e4, 0.0], [1.0, 2.0, 3.0]], dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = [cross_entropy(half, labels), softened_kl(half, soften(half, 4.0), 4.0)]
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses)


def test_in_full_precision_switches_autocast_off_inside() -> None:
    @in_full_precision
    def product(a: torch.Tensor, *, b: torch.Tensor) -> torch.Tensor:
        return a @ b

    a = torch.rand(4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (a @ a).dtype == torch.bfloat16
        assert product(a, b=a.bfloat16()).dtype == torch.float32


def test_classification_sums() -> None:
    logits = torch.tensor([[9.0, 8, 7, 6, 5, 4, 3], [9, 8, 7, 6, 5, 4, 3], [9, 8, 7, 6, 5, 4, 3]])
    labels = torch.tensor([0, 4, 6])
    sums = classification_sums(logits, labels)
    assert {name: float(value) for name, value in sums.items() if name != "loss"} == {
        "count": 3.0,
        "top1": 100.0,
        "top5": 200.0,
    }
    assert float(sums["loss"]) == pytest.approx(3 * float(F.cross_entropy(logits, labels)), rel=1e-6)


def test_top5_of_three_classes_is_certain() -> None:
    sums = classification_sums(torch.randn(4, 3), torch.tensor([0, 1, 2, 0]))
    assert float(sums["top5"]) == 400.0
