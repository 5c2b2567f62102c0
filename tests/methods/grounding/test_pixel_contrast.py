"""MagNet's alignment loss against plain float64 loops, and the values that were worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from methods.grounding.draws import Draws
from methods.grounding.pixel_contrast import pixel_contrast, sample_pixels, text_contrast

TAU = 0.1


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


def nll(positive: float, negatives: list[float]) -> float:
    above = math.exp(positive / TAU)
    return -math.log(above / (above + sum(math.exp(value / TAU) for value in negatives)))


def test_both_losses_equal_plain_loops() -> None:
    positives, negatives, sentence = unit(3, 4, 6), unit(3, 5, 6, seed=1), unit(3, 6, seed=2)
    real_k = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 1], [1, 0, 0, 0]]).bool()
    real_m = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
    pixels, texts = 0.0, 0.0
    for row in range(2):  # the third row has a single positive pixel
        pos = [positives[row, place] for place in range(4) if real_k[row, place]]
        neg = [negatives[row, place] for place in range(5) if real_m[row, place]]
        pairs = [(i, j) for i in range(len(pos)) for j in range(len(pos)) if i != j]
        pixels += sum(nll(float(pos[i] @ pos[j]), [float(pos[i] @ k) for k in neg]) for i, j in pairs) / len(
            pairs
        )
        against = [float(k @ sentence[row]) for k in neg]
        texts += sum(nll(float(vector @ sentence[row]), against) for vector in pos) / len(pos)
    found = pixel_contrast(positives, real_k, negatives, real_m, temperature=TAU)
    assert float(found) == pytest.approx(pixels / 3, rel=1e-9)
    found = text_contrast(positives, real_k, negatives, real_m, sentence, temperature=TAU)
    assert float(found) == pytest.approx(texts / 3, rel=1e-9)


@pytest.mark.parametrize("sign", [1, -1])
def test_worked_values_of_equal_and_opposite_pixels(sign: int) -> None:
    vector = unit(1, 1, 6)
    real = torch.ones(1, 9, dtype=torch.bool)
    expected = math.log1p(9 * math.exp((sign - 1) / TAU))
    arguments = vector.expand(1, 4, 6), real[:, :4], sign * vector.expand(1, 9, 6), real
    assert float(pixel_contrast(*arguments, temperature=TAU)) == pytest.approx(expected, rel=1e-6)
    assert float(text_contrast(*arguments, vector[:, 0], temperature=TAU)) == pytest.approx(
        expected, rel=1e-6
    )
    assert expected == pytest.approx(2.3026 if sign == 1 else 9 * math.exp(-20), rel=1e-4)


@pytest.mark.parametrize(("num_positives", "num_negatives"), [(0, 5), (1, 5), (4, 0)])
def test_pictures_with_too_few_pixels_add_nothing(num_positives: int, num_negatives: int) -> None:
    positives, negatives = unit(1, 4, 6).requires_grad_(), unit(1, 5, 6)
    real_k, real_m = torch.arange(4)[None] < num_positives, torch.arange(5)[None] < num_negatives
    loss = pixel_contrast(positives, real_k, negatives, real_m, temperature=TAU)
    loss = loss + text_contrast(positives, real_k, negatives, real_m, unit(1, 6), temperature=TAU)
    loss.backward()
    assert float(loss.detach()) == 0
    assert positives.grad is not None
    assert torch.equal(positives.grad, torch.zeros_like(positives))


def test_pixels_are_drawn_inside_and_outside_the_mask() -> None:
    pixels, masks = torch.randn(2, 6, 8, 8), torch.zeros(2, 1, 16, 16)
    masks[0, 0, 4:8, 4:10] = 1  # 2 x 3 whole pixels of the map
    masks[0, 0, 12, 12] = 1  # a quarter of one: neither inside nor outside
    draws = Draws(seed=torch.tensor(0), indices=torch.arange(2)).uniform("pixels", 64)
    inside, outside = sample_pixels(pixels, masks, draws, num_positives=64, num_negatives=64)
    assert inside.is_real.sum(dim=1).tolist() == [6, 0]
    assert outside.is_real.sum(dim=1).tolist() == [57, 64]
    known = F.normalize(pixels[0, :, 2:4, 2:5].flatten(1), dim=0).T
    found = inside.vectors[0][inside.is_real[0]]
    assert sorted(found[:, 0].tolist()) == pytest.approx(sorted(known[:, 0].tolist()))
    few, others = sample_pixels(pixels, masks, draws, num_positives=4, num_negatives=10)
    assert few.is_real.sum(dim=1).tolist() == [4, 0]
    assert others.vectors.shape == (2, 10, 6)
    assert torch.allclose(others.vectors.norm(dim=2), torch.ones(2, 10))
