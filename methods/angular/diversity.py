"""How different the views are: measured in evaluation, one value per sample.

Shape legend: B = batch, N = views, M = N + 1 members (teacher first), C = classes, K = width of a level.
The definitions never depend on preset or loss switches, so that all trials are measured with the same ruler.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from methods.angular.losses import unit, view_offsets
from methods.losses import in_full_precision


class Cosines(NamedTuple):
    """Mean cosines of a sample's views, ``[B]`` each. A single view has pair and offset cosine 1: no spread."""

    own: Tensor
    """Between view and teacher."""
    pair: Tensor
    """Between two views."""
    offset: Tensor
    """Between the directions in which two views leave the teacher."""
    gate: Tensor
    """1 where every view lies inside the margin, else 0."""


@in_full_precision
def view_cosines(reference_BK: Tensor, views_BNK: Tensor, *, margin: float) -> Cosines:
    """Angular measures of one level (features, or softened probabilities)."""
    directions_BNK = unit(views_BNK)
    own_BN = (directions_BNK * unit(reference_BK)[:, None]).sum(dim=-1)
    return Cosines(
        own=own_BN.mean(dim=1),
        pair=_mean_pair_cosine(directions_BNK),
        offset=_mean_pair_cosine(unit(view_offsets(reference_BK, views_BNK))),
        gate=(own_BN.amin(dim=1) > 1 - margin).to(own_BN.dtype),
    )


@in_full_precision
def member_log_probs(teacher_logits_BC: Tensor, view_logits_BNC: Tensor) -> Tensor:
    """Log-probabilities at temperature 1 of the teacher and its views, ``[B, M, C]``."""
    return torch.cat([teacher_logits_BC[:, None], view_logits_BNC], dim=1).log_softmax(dim=-1)


def mixture_log_probs(members_BMC: Tensor) -> Tensor:
    """Log of the mean of the members' probabilities, ``[B, C]``."""
    return members_BMC.logsumexp(dim=1) - math.log(members_BMC.shape[1])


def label_ambiguity(members_BMC: Tensor, labels_B: Tensor) -> Tensor:
    """Variance of the label's probability over members, divided by twice its squared maximum, ``[B]``.

    A lower bound of what the mixture gains in cross-entropy over its mean member (second-order Jensen); between
    0 and 1/8. Computed on ratios to the largest member, so that tiny probabilities do not underflow.
    """
    index_BM1 = labels_B[:, None, None].expand(-1, members_BMC.shape[1], 1)
    log_label_BM = members_BMC.gather(2, index_BM1).squeeze(2)
    ratio_BM = (log_label_BM - log_label_BM.amax(dim=1, keepdim=True)).exp()
    return ratio_BM.var(dim=1, correction=0) / 2


def mixture_divergence(members_BMC: Tensor) -> Tensor:
    """Mean divergence of the members from their mixture, ``mean_i KL(p_i || mean p)``, ``[B]``."""
    surprise_BMC = members_BMC - mixture_log_probs(members_BMC)[:, None]
    return (members_BMC.exp() * surprise_BMC).sum(dim=-1).mean(dim=1)


def disagreement(members_BMC: Tensor) -> Tensor:
    """Share of pairs of members whose most likely classes differ, ``[B]``."""
    guesses_BM = members_BMC.argmax(dim=-1)
    num_members = guesses_BM.shape[1]
    differ_BMM = guesses_BM[:, :, None] != guesses_BM[:, None, :]
    return differ_BMM.sum(dim=(1, 2), dtype=members_BMC.dtype) / (num_members * (num_members - 1))


def _mean_pair_cosine(directions_BNK: Tensor) -> Tensor:
    num_views = directions_BNK.shape[1]
    if num_views == 1:
        return torch.ones_like(directions_BNK[:, 0, 0])
    cosine_BNN = directions_BNK @ directions_BNK.transpose(1, 2)
    on_diagonal_NN = torch.eye(num_views, dtype=torch.bool, device=cosine_BNN.device)
    return cosine_BNN.masked_fill(on_diagonal_NN, 0.0).sum(dim=(1, 2)) / (num_views * (num_views - 1))
