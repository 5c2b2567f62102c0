"""MagNet's alignment loss: pixels of the named object against the others, and against the sentence.

The idea and the projection of the sentence are published; the formulas are recalled and the constants chosen, so both are
reconstructions.

    L_pp = mean over i != j in Pos of -log e^{f_i f_j / tau} / (e^{f_i f_j / tau} + sum_{k in Neg} e^{f_i f_k / tau})
    L_pt = mean over i in Pos      of -log e^{f_i t / tau}   / (e^{f_i t / tau}   + sum_{k in Neg} e^{f_k t / tau})

Vectors have unit length. A picture with fewer than two positive or without a negative pixel adds 0. Both losses are means
over all rows of the batch, so that they do not depend on how workers share it.

Shape legend: B = batch, H, W = image sides, h, w = sides of a map, Q = h * w, C = width, K = positives, M = negatives.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from methods.losses import in_full_precision

INSIDE = 0.5
"""A pixel of the map is positive when more than this share of it is covered by the mask."""
OUTSIDE = 0.05
"""It is negative when less than this share is."""
FEWEST_POSITIVES = 2
NO_SCORE = -1e4
"""Logit of a place that holds no pixel: e to it is 0, and unlike minus infinity it has a gradient."""


class Pixels(NamedTuple):
    """Sampled pixels of unit length; rows with fewer pixels than places are filled up."""

    vectors: Tensor
    """``[B, K, C]``"""
    is_real: Tensor
    """``[B, K]``"""


@in_full_precision
def sample_pixels(
    pixel_embed_BChw: Tensor,
    masks_B1HW: Tensor,
    draws_BQ: Tensor,
    *,
    num_positives: int,
    num_negatives: int,
) -> tuple[Pixels, Pixels]:
    """At most so many pixels inside and outside each mask, those with the highest draws."""
    height, width = pixel_embed_BChw.shape[2:]
    share_BQ = F.adaptive_avg_pool2d(masks_B1HW, (height, width)).flatten(1)
    vectors_BQC = F.normalize(pixel_embed_BChw.flatten(2), dim=1).transpose(1, 2)
    return (
        _drawn(vectors_BQC, share_BQ > INSIDE, draws_BQ, num_positives),
        _drawn(vectors_BQC, share_BQ < OUTSIDE, draws_BQ, num_negatives),
    )


@in_full_precision
def pixel_contrast(
    positives_BKC: Tensor, real_BK: Tensor, negatives_BMC: Tensor, real_BM: Tensor, *, temperature: float
) -> Tensor:
    """L_pp, scalar."""
    scores_BKK = positives_BKC @ positives_BKC.transpose(1, 2) / temperature
    against_BKM = positives_BKC @ negatives_BMC.transpose(1, 2) / temperature
    against_BK1 = against_BKM.masked_fill(~real_BM[:, None], NO_SCORE).logsumexp(dim=2, keepdim=True)
    losses_BKK = F.softplus(against_BK1 - scores_BKK)
    pairs_BKK = real_BK[:, :, None] & real_BK[:, None] & ~_diagonal(scores_BKK)
    return _mean_over_rows(losses_BKK.flatten(1), pairs_BKK.flatten(1), _are_enough(real_BK, real_BM))


@in_full_precision
def text_contrast(
    positives_BKC: Tensor,
    real_BK: Tensor,
    negatives_BMC: Tensor,
    real_BM: Tensor,
    sentence_BC: Tensor,
    *,
    temperature: float,
) -> Tensor:
    """L_pt, scalar. The sentence has unit length."""
    scores_BK = torch.einsum("bkc,bc->bk", positives_BKC, sentence_BC) / temperature
    against_BM = torch.einsum("bmc,bc->bm", negatives_BMC, sentence_BC) / temperature
    against_B1 = against_BM.masked_fill(~real_BM, NO_SCORE).logsumexp(dim=1, keepdim=True)
    return _mean_over_rows(F.softplus(against_B1 - scores_BK), real_BK, _are_enough(real_BK, real_BM))


def _drawn(vectors_BQC: Tensor, candidates_BQ: Tensor, draws_BQ: Tensor, num_places: int) -> Pixels:
    keys_BQ = draws_BQ.masked_fill(~candidates_BQ, -1.0)
    keys_BK, places_BK = keys_BQ.topk(min(num_places, keys_BQ.shape[1]), dim=1)
    indices_BKC = places_BK[:, :, None].expand(-1, -1, vectors_BQC.shape[2])
    return Pixels(vectors=vectors_BQC.gather(1, indices_BKC), is_real=keys_BK >= 0)


def _are_enough(real_BK: Tensor, real_BM: Tensor) -> Tensor:
    return (real_BK.sum(dim=1) >= FEWEST_POSITIVES) & real_BM.any(dim=1)


def _diagonal(scores_BKK: Tensor) -> Tensor:
    return torch.eye(scores_BKK.shape[1], dtype=torch.bool, device=scores_BKK.device)


def _mean_over_rows(losses_BX: Tensor, counted_BX: Tensor, row_counts_B: Tensor) -> Tensor:
    sums_B = (losses_BX * counted_BX).sum(dim=1)
    return (sums_B / counted_BX.sum(dim=1).clamp_min(1) * row_counts_B).mean()
