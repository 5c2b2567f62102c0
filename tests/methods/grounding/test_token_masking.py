"""Which tokens a masked branch hides: counts, strategies, and what is never hidden."""

from __future__ import annotations

import math

import pytest
import torch

from methods.grounding.draws import Draws
from methods.grounding.token_masking import choose_hidden, content_words, correlations, end_positions, hide

STRATEGIES = ("high", "low", "random", "sampled")


def mask_of(*lengths: int, length: int = 9) -> torch.Tensor:
    return torch.arange(length) < torch.tensor(lengths)[:, None]


def test_words_are_real_tokens_without_start_and_end() -> None:
    words = content_words(mask_of(5, 3, 2, 9))
    assert words.int().tolist() == [
        [0, 1, 1, 1, 0, 0, 0, 0, 0],
        [0, 1, 0, 0, 0, 0, 0, 0, 0],
        [0] * 9,
        [0, 1, 1, 1, 1, 1, 1, 1, 0],
    ]
    assert end_positions(mask_of(5, 3, 2, 9)).tolist() == [4, 2, 1, 8]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.3, 0.29, 0.5, 0.9])
def test_each_row_hides_the_floor_of_its_share(strategy: str, ratio: float) -> None:
    generator = torch.Generator().manual_seed(3)
    scores, draws = torch.rand(2, 4, 100, generator=generator)
    valid = torch.arange(100) < torch.tensor([100, 7, 1, 0])[:, None]
    hidden = choose_hidden(scores, valid, draws, ratio=ratio, strategy=strategy)
    assert hidden.sum(dim=1).tolist() == [round(100 * ratio), math.floor(7 * ratio), 0, 0]
    assert not (hidden & ~valid).any()


@pytest.mark.parametrize(("strategy", "sign"), [("high", 1), ("low", -1)])
def test_high_and_low_take_the_ends_of_the_ranking(strategy: str, sign: int) -> None:
    scores = torch.tensor([[0.3, -0.2, 0.9, 0.1, 0.8, -0.7]])
    valid = torch.tensor([[True, True, False, True, True, True]])
    hidden = choose_hidden(scores, valid, torch.zeros(1, 6), ratio=0.5, strategy=strategy)
    ranked = sorted((i for i in range(6) if valid[0, i]), key=lambda i: -sign * float(scores[0, i]))
    assert sorted(hidden[0].nonzero()[:, 0].tolist()) == sorted(ranked[:2])


def test_random_ignores_the_scores_and_sampled_follows_their_softmax() -> None:
    num_rows = 20_000
    draws = Draws(seed=torch.tensor(5), indices=torch.arange(num_rows)).uniform("hidden", 4)
    scores = torch.tensor([0.1, 0.0, -0.1, 0.05]).expand(num_rows, 4)
    valid = torch.ones(num_rows, 4, dtype=torch.bool)
    counts = {
        strategy: choose_hidden(scores, valid, draws, ratio=0.25, strategy=strategy).float().mean(dim=0)
        for strategy in ("random", "sampled")
    }
    assert torch.allclose(counts["random"], torch.full((4,), 0.25), atol=0.015)
    assert torch.allclose(counts["sampled"], (scores[0] / 0.1).softmax(dim=0), atol=0.015)


def test_hidden_tokens_are_replaced_and_others_kept() -> None:
    tokens = torch.randn(2, 3, 4, requires_grad=True)
    hidden = torch.tensor([[True, False, False], [False, False, True]])
    stand_in = torch.ones(4, requires_grad=True)
    shown = hide(tokens, hidden, stand_in)
    assert torch.equal(shown[hidden], torch.ones(2, 4))
    assert torch.equal(shown[~hidden], tokens[~hidden])
    shown.sum().backward()
    assert tokens.grad is not None
    assert stand_in.grad is not None
    assert torch.equal(tokens.grad[hidden], torch.zeros(2, 4))
    assert stand_in.grad.tolist() == [2.0] * 4


def test_correlations_are_cosines_without_gradient() -> None:
    tokens = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    other = torch.randn(2, 4, dtype=torch.float64)
    found = correlations(tokens, other)
    assert not found.requires_grad
    for row in range(2):
        for place in range(5):
            one, two = tokens[row, place].tolist(), other[row].tolist()
            dot = sum(a * b for a, b in zip(one, two, strict=True))
            expected = dot / math.hypot(*one) / math.hypot(*two)
            assert float(found[row, place]) == pytest.approx(expected, abs=1e-12)
