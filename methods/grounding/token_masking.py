"""Which patches or words are hidden from a masked pass, and what stands in their place (CM-MaskSD).

Published: masking follows the correlation of patches and words inherited from CLIP. Reconstructed: that the highest
correlations are hidden by default, the ratios, and the temperature of ``sampled``.

Shape legend: B = batch, T = tokens (patches or words), L = text length, E = shared width.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from methods.losses import in_full_precision

MaskStrategy = Literal["high", "low", "random", "sampled"]

STRATEGIES = ("high", "low", "random", "sampled")
ROUNDING = 1e-6
"""So that 0.29 of 100 tokens are 29, whatever the product of the two floats is."""
SMALLEST_DRAW = 1e-7


def content_words(token_mask_BL: Tensor) -> Tensor:
    """True at the words themselves, ``[B, L]``: real tokens without the first (start) and the last real one (end)."""
    places_L = torch.arange(token_mask_BL.shape[1], device=token_mask_BL.device)
    last_B1 = end_positions(token_mask_BL)[:, None]
    return token_mask_BL & (places_L > 0) & (places_L < last_B1)


def end_positions(token_mask_BL: Tensor) -> Tensor:
    """Position of the last real token, which is the end token, ``[B]``."""
    places_L = torch.arange(token_mask_BL.shape[1], device=token_mask_BL.device)
    return (token_mask_BL * places_L).amax(dim=1)


@torch.no_grad()
@in_full_precision
def correlations(tokens_BTE: Tensor, other_BE: Tensor) -> Tensor:
    """Cosine of each token with the vector of the other modality, ``[B, T]``, without gradient."""
    return F.cosine_similarity(tokens_BTE, other_BE[:, None], dim=-1)


def choose_hidden(
    scores_BT: Tensor,
    valid_BT: Tensor,
    draws_BT: Tensor,
    *,
    ratio: float,
    strategy: MaskStrategy,
    sampling_temperature: float = 0.1,
) -> Tensor:
    """True at the tokens to hide, ``[B, T]``: in each row ``floor(ratio * valid)`` of the valid ones.

    Args:
        scores_BT: Correlation with the other modality.
        valid_BT: True where a token may be hidden.
        draws_BT: Numbers from [0, 1) for ``random`` and ``sampled``.
        ratio: Share of the valid tokens to hide, from 0 to below 1.
        strategy: ``high`` or ``low`` correlations, ``random``, or ``sampled`` without replacement with probability
            softmax(score / ``sampling_temperature``), by adding Gumbel noise and taking the highest.
    """
    preference_BT = _preferences(scores_BT, draws_BT, strategy, sampling_temperature)
    preference_BT = preference_BT.masked_fill(~valid_BT, -torch.inf)
    ranks_BT = preference_BT.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    num_hidden_B1 = torch.floor(ratio * valid_BT.sum(dim=1, keepdim=True).double() + ROUNDING)
    return (ranks_BT < num_hidden_B1) & valid_BT


def hide(tokens_BTE: Tensor, hidden_BT: Tensor, stand_in_E: Tensor) -> Tensor:
    """``tokens`` with a learned vector in the place of the hidden ones."""
    return torch.where(hidden_BT[:, :, None], stand_in_E.to(tokens_BTE.dtype), tokens_BTE)


def _preferences(scores_BT: Tensor, draws_BT: Tensor, strategy: MaskStrategy, temperature: float) -> Tensor:
    if strategy == "high":
        return scores_BT
    if strategy == "low":
        return -scores_BT
    if strategy == "random":
        return draws_BT
    gumbel_BT = -torch.log(-torch.log(draws_BT.clamp(SMALLEST_DRAW, 1 - SMALLEST_DRAW)))
    return scores_BT / temperature + gumbel_BT
