"""Small masks and batches for the tests of grounding metrics."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from methods.grounding.contracts import GroundingBatch, GroundingOutput


def rectangles(*corners: tuple[int, int, int, int], sides: tuple[int, int] = (4, 6)) -> Tensor:
    """Union of half-open rectangles ``y0, x0, y1, x1``, bool ``[H, W]``."""
    mask = torch.zeros(sides, dtype=torch.bool)
    for top, left, bottom, right in corners:
        mask[top:bottom, left:right] = True
    return mask


NOTHING = rectangles()
CLASSIC = [
    (rectangles((0, 0, 2, 2)), rectangles((0, 0, 2, 2))),
    (rectangles((0, 0, 2, 2)), rectangles((0, 0, 1, 2))),
    (rectangles((0, 0, 2, 3)), rectangles((0, 2, 2, 4))),
    (rectangles((3, 0, 4, 3)), NOTHING),
]
"""Truth and prediction of four expressions in pictures of 4 x 6."""
GENERALISED = [
    (rectangles((0, 0, 2, 4)), rectangles((0, 0, 2, 3)), 0),
    (rectangles((0, 0, 2, 2)), rectangles((0, 0, 1, 2), (1, 0, 2, 1), (3, 0, 4, 2)), 1),
    (NOTHING, NOTHING, 1),
    (NOTHING, rectangles((0, 0, 1, 5)), 0),
    (NOTHING, NOTHING, 0),
    (rectangles((0, 0, 1, 6), (1, 0, 2, 1)), NOTHING, 0),
]
"""Truth, raw mask and no-target flag of six expressions, some of which name nothing."""


def random_pairs(count: int, seed: int = 0) -> tuple[list[torch.Tensor], list[torch.Tensor], list[bool]]:
    generator = torch.Generator().manual_seed(seed)
    masks = torch.rand(count, 7, 9, generator=generator) > torch.rand(count, 1, 1, generator=generator)
    truths = torch.rand(count, 7, 9, generator=generator) > torch.rand(count, 1, 1, generator=generator)
    empty = (torch.rand(count, generator=generator) < 0.2).tolist()
    truths[torch.tensor(empty)] = False
    return list(masks), list(truths), empty


def batch_of(
    truths: Sequence[Tensor], is_empty: Sequence[bool] | None = None, first: int = 0
) -> GroundingBatch:
    masks = torch.stack(list(truths)).float()[:, None]
    count, _, height, width = masks.shape
    empty = torch.tensor(is_empty if is_empty is not None else [False] * count)
    return GroundingBatch(
        images=torch.zeros(count, 3, height, width),
        token_ids=torch.ones(count, 4, dtype=torch.int64),
        token_mask=torch.ones(count, 4, dtype=torch.bool),
        masks=masks,
        boxes=torch.zeros(count, 4),
        is_empty=empty,
        indices=torch.arange(first, first + count),
        original_sizes=torch.tensor([[height, width]] * count),
    )


def output_of(
    masks: Sequence[Tensor], flags: Sequence[int] | None = None, level: float = 3.0
) -> GroundingOutput:
    """A network that is sure of these masks: logits of ``level`` inside and ``-level`` outside."""
    logits = torch.stack([torch.where(mask, level, -level) for mask in masks])[:, None]
    return GroundingOutput(
        mask_logits=logits,
        pixel_embed=torch.zeros(len(masks), 1, 1, 1),
        sentence_embed=torch.zeros(len(masks), 1),
        empty_logit=None if flags is None else torch.tensor(flags).float() - 0.5,
    )
