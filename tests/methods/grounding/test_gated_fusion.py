"""MagNet's attention, gate and alignment module: counts, closed at first, and blind to padding."""

from __future__ import annotations

import math

import pytest
import torch
from grounding_builds import num_parameters
from torch import nn

from methods.grounding.gated_fusion import AlignmentModule, CrossAttention, Gate, TextFusion


def test_attention_equals_a_plain_loop_over_real_keys() -> None:
    torch.manual_seed(0)
    attention = CrossAttention(8, 5).double()
    queries, source = torch.randn(2, 3, 8).double(), torch.randn(2, 4, 5).double()
    real = torch.tensor([[True, True, False, True], [True, False, False, False]])
    found = attention(queries, source, real)
    for row in range(2):
        for place in range(3):
            query = attention.query_norm(attention.query(queries[row, place]))
            kept = [index for index in range(4) if real[row, index]]
            scores = [float(query @ attention.key(source[row, index])) / math.sqrt(8) for index in kept]
            total = sum(math.exp(score) for score in scores)
            gathered = sum(
                math.exp(score) / total * attention.value(source[row, index])
                for score, index in zip(scores, kept, strict=True)
            )
            own = nn.functional.gelu(attention.own(queries[row, place]))
            expected = nn.functional.gelu(
                attention.mixed(own * attention.attended_norm(attention.attended(gathered)))
            )
            assert torch.allclose(found[row, place], expected, atol=1e-10)


def test_words_do_not_attend_evenly() -> None:
    torch.manual_seed(0)
    fusion = TextFusion(96, 32)
    weights = fusion.attention.weights(torch.randn(2, 6, 96), torch.randn(2, 144, 32), None)
    entropy = -(weights * weights.log()).sum(dim=-1)
    assert entropy.max() < math.log(144) - 1e-3


@pytest.mark.parametrize("activation", [nn.GELU(), nn.ReLU()])
def test_a_gate_starts_closed_and_can_open(activation: nn.Module) -> None:
    torch.manual_seed(0)
    gate, values, gathered = Gate(6, activation), torch.randn(2, 3, 6), torch.randn(2, 3, 6)
    assert torch.equal(gate(values, gathered), values)
    gate(values, gathered).square().sum().backward()
    outer, inner = gate.outer.weight.grad, gate.inner.weight.grad
    assert outer is not None
    assert inner is not None
    assert outer.abs().sum() > 0
    assert inner.abs().sum() == 0
    with torch.no_grad():
        gate.outer.weight -= 0.1 * outer
    gate.zero_grad()
    gate(values, gathered).square().sum().backward()
    assert gate.inner.weight.grad is not None
    assert gate.inner.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(("width", "millions"), [(128, 1.1), (256, 3.6), (512, 12.9), (1024, 48.3)])
def test_alignment_modules_have_the_published_size(width: int, millions: float) -> None:
    with torch.device("meta"):
        module = AlignmentModule(width, 768, pool_sizes=(1, 2, 3, 6))
        last = AlignmentModule(width, 768, pool_sizes=(1, 2, 3, 6), is_last=True)
    assert round(num_parameters(module) / 1e6, 1) == millions
    assert num_parameters(module) - num_parameters(last) == 2 * width**2


def test_the_text_side_has_the_published_size() -> None:
    with torch.device("meta"):
        sides = [TextFusion(768, width) for width in (128, 256, 512, 1024)]
    assert round(sum(num_parameters(side.attention) for side in sides) / 1e6, 1) == 12.4
    assert round(sum(num_parameters(side.gate) for side in sides) / 1e6, 1) == 4.7


@pytest.mark.parametrize("pool_sizes", [(), (1,), (1, 2, 3, 6)])
def test_padded_words_change_nothing_and_pools_may_exceed_the_map(pool_sizes: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    module = AlignmentModule(8, 5, pool_sizes=pool_sizes)
    pixels, words = torch.randn(2, 4, 4, 8), torch.randn(2, 6, 5)
    real = torch.tensor([[True] * 4 + [False] * 2, [True] * 6])
    feature, gated = module(pixels, words, real)
    assert feature.shape == (2, 8, 4, 4)
    assert torch.equal(gated, pixels)
    changed = words.clone()
    changed[0, 4:] += 7
    assert torch.equal(module(pixels, changed, real)[0], feature)
    changed[0, 1] += 7
    again = module(pixels, changed, real)[0]
    assert not torch.equal(again[0], feature[0])
    assert torch.equal(again[1], feature[1])
