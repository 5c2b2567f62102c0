"""Shapes and choices of pixel decoder and shared heads."""

from __future__ import annotations

import math

import pytest
import torch

from methods.grounding.heads import BoxHead, DotHead, EmptyHead, attended
from methods.grounding.pixel_decoder import PixelDecoder, Pyramid, as_map


@pytest.mark.parametrize(
    ("is_pyramid", "num_taps", "grid"),
    [(True, 1, 6), (True, 3, 6), (True, 3, 7), (False, 1, 5), (False, 2, 8)],
)
def test_pixels_are_at_a_quarter_of_the_patch_size(is_pyramid: bool, num_taps: int, grid: int) -> None:
    decoder = PixelDecoder(24, 16, num_taps=num_taps, is_pyramid=is_pyramid)
    pixels = decoder([torch.randn(2, grid * grid, 24) for _ in range(num_taps)])
    assert pixels.shape == (2, 16, 4 * grid, 4 * grid)
    pixels.sum().backward()
    assert all(parameter.grad is not None for parameter in decoder.parameters())


def test_levels_of_the_pyramid() -> None:
    fine, same, coarse = Pyramid(16)(*torch.randn(3, 2, 16, 30, 30))
    assert [level.shape[-1] for level in (fine, same, coarse)] == [60, 30, 15]


def test_two_layers_make_no_pyramid() -> None:
    with pytest.raises(ValueError, match="one layer or three, got 2"):
        PixelDecoder(24, 16, num_taps=2)


def test_patches_lie_row_by_row() -> None:
    tokens = torch.arange(9.0).view(1, 9, 1)
    assert as_map(tokens)[0, 0].tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]


def test_dot_head_equals_a_loop() -> None:
    head = DotHead(6, 4, bias=-2.0).double()
    pixels, vectors = torch.randn(2, 4, 3, 3).double(), torch.randn(2, 5, 6).double()
    logits = head(pixels, vectors)
    for sample in range(2):
        for number in range(5):
            key = head.vectors(vectors[sample, number])
            for row in range(3):
                for column in range(3):
                    expected = float(key @ pixels[sample, :, row, column]) / math.sqrt(4) - 2
                    assert float(logits[sample, number, row, column]) == pytest.approx(expected, rel=1e-9)


def test_heads_give_a_box_and_a_logit() -> None:
    pixels, sentence = torch.randn(3, 8, 5, 5), torch.randn(3, 8)
    boxes = BoxHead(8)(pixels, sentence)
    assert boxes.shape == (3, 4)
    assert bool(((boxes > 0) & (boxes < 1)).all())
    assert EmptyHead(8)(pixels, sentence).shape == (3,)
    constant = torch.ones(1, 8, 2, 2) * torch.arange(8.0).view(1, 8, 1, 1)
    assert torch.allclose(attended(constant, torch.randn(1, 8)), torch.arange(8.0)[None], atol=1e-5)
