"""Losses of masks, boxes and empty answers against plain loops in float64, and the worked values."""

from __future__ import annotations

import math

import pytest
import torch
from torchvision.ops import generalized_box_iou_loss

from methods.grounding.draws import Draws
from methods.grounding.mask_losses import (
    average_of_probabilities,
    box_giou,
    box_l1,
    corners,
    empty_bce,
    mask_bce,
    mask_dice,
)


def logits_and_masks() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(3, 1, 5, 4, generator=generator, dtype=torch.float64)
    return logits, (torch.rand(3, 1, 5, 4, generator=generator) > 0.6).double()


def test_cross_entropy_of_pixels_equals_a_loop() -> None:
    logits, masks = logits_and_masks()
    terms = []
    for logit, mask in zip(logits.flatten().tolist(), masks.flatten().tolist(), strict=True):
        probability = 1 / (1 + math.exp(-logit))
        terms.append(-(mask * math.log(probability) + (1 - mask) * math.log(1 - probability)))
    assert float(mask_bce(logits, masks)) == pytest.approx(sum(terms) / len(terms), rel=1e-12)


def test_dice_equals_a_loop() -> None:
    logits, masks = logits_and_masks()
    losses = []
    for sample_logits, sample_masks in zip(
        logits.flatten(1).tolist(), masks.flatten(1).tolist(), strict=True
    ):
        probabilities = [1 / (1 + math.exp(-logit)) for logit in sample_logits]
        overlap = sum(p * m for p, m in zip(probabilities, sample_masks, strict=True))
        losses.append(1 - (2 * overlap + 1) / (sum(probabilities) + sum(sample_masks) + 1))
    assert float(mask_dice(logits, masks)) == pytest.approx(sum(losses) / len(losses), rel=1e-12)


@pytest.mark.parametrize(("logit", "expected"), [(-30.0, 0.0), (30.0, 0.985)])
def test_dice_of_an_empty_target(logit: float, expected: float) -> None:
    loss = mask_dice(torch.full((2, 1, 8, 8), logit), torch.zeros(2, 1, 8, 8))
    assert float(loss) == pytest.approx(expected, abs=1e-3)


def test_boxes_equal_torchvision_and_empty_samples_are_skipped() -> None:
    generator = torch.Generator().manual_seed(3)
    found, target = torch.rand(2, 6, 4, generator=generator, dtype=torch.float64) * 0.8 + 0.1
    is_empty = torch.tensor([False, True, False, False, True, False])
    kept = ~is_empty
    expected = generalized_box_iou_loss(corners(found[kept]), corners(target[kept])).mean()
    assert float(box_giou(found, target, is_empty)) == pytest.approx(float(expected), rel=1e-5)
    distances = [
        sum(abs(a - b) for a, b in zip(row, other, strict=True))
        for row, other in zip(found[kept].tolist(), target[kept].tolist(), strict=True)
    ]
    assert float(box_l1(found, target, is_empty)) == pytest.approx(sum(distances) / 4, rel=1e-12)


def test_boxes_without_any_target_cost_nothing_and_stay_finite() -> None:
    boxes = torch.zeros(2, 4, requires_grad=True)
    is_empty = torch.ones(2, dtype=torch.bool)
    total = box_giou(boxes, torch.zeros(2, 4), is_empty) + box_l1(boxes, torch.zeros(2, 4), is_empty)
    total.backward()
    assert float(total.detach()) == 0
    assert boxes.grad is not None
    assert boxes.grad.isfinite().all()


def test_empty_answer() -> None:
    loss = empty_bce(torch.tensor([0.0, 2.0]), torch.tensor([True, False]))
    assert float(loss) == pytest.approx((math.log(2) + math.log(1 + math.exp(2))) / 2)


def test_probabilities_are_averaged_not_logits() -> None:
    logits = torch.tensor([4.0, -6.0, 1.0]).view(1, 3, 1, 1)
    assert float(average_of_probabilities(logits).sigmoid()) == pytest.approx(0.572, abs=5e-4)
    assert float(logits.mean().sigmoid()) == pytest.approx(0.417, abs=5e-4)
    random = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    difference = average_of_probabilities(random).sigmoid() - random.sigmoid().mean(1, keepdim=True)
    assert float(difference.abs().max()) < 1e-6
    extreme = average_of_probabilities(torch.tensor([200.0, -200.0]).view(2, 1, 1, 1))
    assert extreme.isfinite().all()


def test_half_precision_is_raised() -> None:
    logits, masks = logits_and_masks()
    assert mask_dice(logits.half(), masks.half()).dtype == torch.float32


def test_draws_depend_on_seed_epoch_sample_and_purpose_only() -> None:
    def drawn(seed: int = 1, epoch: int = 0, first: int = 0, purpose: str = "words") -> torch.Tensor:
        indices = torch.arange(first, first + 4000)
        return Draws(seed=torch.tensor(seed), indices=indices, epoch=epoch).uniform(purpose, 5)

    base = drawn()
    assert torch.equal(base[7], drawn(first=7)[0])
    assert torch.equal(base, drawn())
    for other in (drawn(seed=2), drawn(epoch=1), drawn(purpose="gumbel"), drawn(first=1)):
        assert abs(float(torch.corrcoef(torch.stack([base.flatten(), other.flatten()]))[0, 1])) < 0.03
    assert 0 <= float(base.min()) < 0.001
    assert 0.999 < float(base.max()) < 1
    assert float(base.mean()) == pytest.approx(0.5, abs=0.01)
    noise = Draws(seed=torch.tensor(0), indices=torch.arange(20_000)).gumbel("subject", 3)
    assert noise.isfinite().all()
    assert float(noise.mean()) == pytest.approx(0.5772, abs=0.02)
