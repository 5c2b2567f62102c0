"""Which words are hidden, what predicts them, and the loss over them."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from methods.grounding.draws import Draws
from methods.grounding.mask_grounding import WordPredictor, mask_features, select_words, word_loss

IDS = torch.tensor([[1, 7, 8, 9, 3, 0], [1, 12, 3, 0, 0, 0], [1, 3, 0, 0, 0, 0]])


def draws(num_rows: int, length: int) -> tuple[Tensor, Tensor]:
    source = Draws(seed=torch.tensor(3), indices=torch.arange(num_rows))
    return source.uniform("one", length), source.uniform("two", length)


def test_shares_of_selected_and_replaced_words() -> None:
    ids = IDS[:1].expand(40_000, 6)
    found = select_words(ids, ids != 0, draws(40_000, 6), mask_id=2, probability=0.15, at_least_one=False)
    assert found.selected[:, 1:4].float().mean() == pytest.approx(0.15, abs=0.005)
    assert not found.selected[:, [0, 4, 5]].any()
    replaced = found.token_ids == 2
    assert torch.equal(replaced | (found.token_ids == ids), torch.ones_like(replaced))
    assert not (replaced & ~found.selected).any()
    assert float(replaced.sum() / found.selected.sum()) == pytest.approx(0.9, abs=0.01)


@pytest.mark.parametrize("probability", [0.0, 0.15, 1.0])
def test_at_least_one_word_is_selected_where_there_is_any(probability: float) -> None:
    for seed in range(20):
        source = Draws(seed=torch.tensor(seed), indices=torch.arange(3))
        pair = source.uniform("one", 6), source.uniform("two", 6)
        found = select_words(IDS, IDS != 0, pair, mask_id=2, probability=probability)
        counts = found.selected.sum(dim=1).tolist()
        assert counts[0] >= 1
        assert counts[1:] == [1, 0]
        assert probability > 0 or counts[0] == 1
        assert probability < 1 or counts[0] == 3


def test_the_fallback_reaches_every_word() -> None:
    ids = IDS[:1].expand(200, 6)
    found = select_words(ids, ids != 0, draws(200, 6), mask_id=2, probability=0.0)
    assert (found.selected.sum(dim=1) == 1).all()
    assert (found.selected[:, 1:4].sum(dim=0) > 30).all()


def test_the_loss_is_that_of_selected_words_per_sentence() -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 6, 14, dtype=torch.float64)
    selected = torch.tensor([[0, 1, 0, 1, 0, 0], [0, 1, 0, 0, 0, 0], [0] * 6]).bool()
    expected = 0.0
    for row in range(3):
        places = [place for place in range(6) if selected[row, place]]
        for place in places:
            scores = logits[row, place].tolist()
            expected += (
                math.log(sum(math.exp(score) for score in scores)) - scores[int(IDS[row, place])]
            ) / len(places)
    assert float(word_loss(logits, IDS, selected)) == pytest.approx(expected / 3, rel=1e-9)
    changed = logits.clone()
    changed[~selected] += torch.randn_like(changed[~selected])
    assert torch.equal(word_loss(changed, IDS, selected), word_loss(logits, IDS, selected))
    assert float(word_loss(logits, IDS, torch.zeros_like(selected))) == 0


def test_features_of_a_mask_are_centre_share_and_one() -> None:
    masks = torch.zeros(2, 1, 4, 8)
    masks[0, 0, 1:3, 2:6] = 1
    assert mask_features(masks).tolist() == [[0.5, 0.5, 0.25, 1.0], [0.0, 0.0, 0.0, 1.0]]
    masks[0, 0] = 0
    masks[0, 0, 3, 7] = 1
    assert mask_features(masks)[0].tolist() == pytest.approx([7.5 / 8, 3.5 / 4, 1 / 32, 1.0])


def predictor(inputs: tuple[str, ...]) -> WordPredictor:
    torch.manual_seed(0)
    return WordPredictor(8, 5, 14, num_layers=1, num_heads=2, expansion=2, inputs=inputs)


def logits_of(module: WordPredictor, *, words: Tensor, pixels: Tensor, masks: Tensor) -> Tensor:
    table = torch.randn(14, 8, generator=torch.Generator().manual_seed(1))
    return module(words, torch.arange(6) < torch.tensor([[5], [3]]), pixels, masks, table)


@pytest.mark.parametrize("inputs", [(), ("image",), ("mask",), ("image", "mask")])
def test_the_predictor_sees_what_it_is_given_and_no_padding(inputs: tuple[str, ...]) -> None:
    module = predictor(inputs)
    words, pixels, masks = torch.randn(2, 6, 8), torch.randn(2, 5, 9, 9), torch.zeros(2, 1, 9, 9)
    base = logits_of(module, words=words, pixels=pixels, masks=masks)
    assert base.shape == (2, 6, 14)
    other = {
        "image": logits_of(module, words=words, pixels=pixels + 1, masks=masks),
        "mask": logits_of(module, words=words, pixels=pixels, masks=masks + 1),
    }
    for name, logits in other.items():
        assert torch.equal(logits, base) == (name not in inputs)
    padded = words.clone()
    padded[1, 3:] += 9
    assert torch.allclose(logits_of(module, words=padded, pixels=pixels, masks=masks)[1, :3], base[1, :3])


def test_the_output_matrix_is_the_table_that_it_is_given() -> None:
    module, table = predictor(()), torch.randn(14, 8, requires_grad=True)
    words = torch.randn(2, 6, 8)
    real = torch.ones(2, 6, dtype=torch.bool)
    logits = module(words, real, torch.randn(2, 5, 9, 9), torch.zeros(2, 1, 9, 9), table)
    states = module.layers(words + module.types["words"])
    assert torch.allclose(logits, F.linear(states, table), atol=1e-6)
    logits.sum().backward()
    assert table.grad is not None
