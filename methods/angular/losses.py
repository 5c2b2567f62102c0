"""Angular diversity losses: views stay near the teacher, yet point and deviate in different directions.

Shape legend: B = batch, N = views, K = width of a level (feature width D or classes C). At the feature level K
are pooled features; at the logit level they are softened probabilities. The reference is always detached.
Equations follow "Single-Teacher View Augmentation", arXiv 2510.22480, sections on inter- and intra-angle loss.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from methods.losses import in_full_precision

SMALLEST_LENGTH = 1e-6
"""eps of ``unit``. A smaller one turns a view that equals its teacher into gradients of 1e11."""

Geometry = Literal["cosine", "coordinate", "product"]
"""How closeness is measured: "cosine" between views. The others are slips of the authors' release: "coordinate"
normalises over the views instead of over K in the diversity term and its gate, "product" never normalises."""
Constraint = Literal["contrastive", "hinge"]
Reduction = Literal["batch_mean", "per_sample"]
OffsetSpace = Literal["raw", "unit"]


class InterLosses(NamedTuple):
    """The two parts of the inter-angle loss, and for which samples the second part is switched on."""

    proximity: Tensor
    """L_con, scalar."""
    diversity: Tensor
    """L_div, scalar."""
    gate: Tensor
    """Boolean, ``[B]``: every view of the sample lies inside the margin."""


def unit(vectors: Tensor, *, dim: int = -1) -> Tensor:
    """``x / sqrt(|x|^2 + eps^2)``: unit length, with a bounded gradient where ``x`` is 0."""
    return vectors / (vectors.square().sum(dim=dim, keepdim=True) + SMALLEST_LENGTH**2).sqrt()


@in_full_precision
def inter_loss(
    reference_BK: Tensor,
    views_BNK: Tensor,
    *,
    margin: float,
    contrast_temperature: float,
    constraint: Constraint = "contrastive",
    extra_branch_division: bool = True,
    geometry: Geometry = "cosine",
) -> InterLosses:
    """Keep every view within ``margin`` (gamma) of its teacher, and spread those of a sample that are inside.

    One view or a closed gate gives a diversity of 0, a batch of one a contrastive proximity of 0; all stay
    connected to the views, so that their gradients are zero tensors.
    """
    reference_BK = reference_BK.detach()
    if geometry != "product":
        anchors_BK, near_BNK = unit(reference_BK), unit(views_BNK)
    else:
        anchors_BK, near_BNK = reference_BK, views_BNK
    spread_BNK = unit(views_BNK, dim=1) if geometry == "coordinate" else near_BNK
    if constraint == "hinge":
        proximity = F.relu(1 - margin - _own_similarity(anchors_BK, near_BNK)).mean()
    else:
        proximity = _contrast(anchors_BK, near_BNK, margin, contrast_temperature)
        proximity = proximity / views_BNK.shape[1] if extra_branch_division else proximity
    gate_B = _own_similarity(anchors_BK, spread_BNK.detach()).amin(dim=1) > 1 - margin
    return InterLosses(proximity, _gated_closeness(spread_BNK, gate_B), gate_B)


@in_full_precision
def intra_loss(
    reference_BK: Tensor,
    views_BNK: Tensor,
    *,
    reduction: Reduction = "batch_mean",
    offset_space: OffsetSpace = "raw",
) -> Tensor:
    """Mean closeness of the directions in which the views of a sample leave their teacher.

    ``batch_mean`` averages the cosines over the batch before the softplus, ``per_sample`` afterwards (never
    smaller). One view gives 0.
    """
    offset_directions_BNK = unit(view_offsets(reference_BK, views_BNK, offset_space=offset_space))
    cosine_BNN = offset_directions_BNK @ offset_directions_BNK.transpose(1, 2)
    if reduction == "batch_mean":
        cosine_BNN = cosine_BNN.mean(dim=0, keepdim=True)
    return _mean_over_pairs(F.softplus(cosine_BNN)).mean()


@in_full_precision
def label_loss(view_logits_BNC: Tensor, labels_B: Tensor) -> Tensor:
    """Cross-entropy of each view with the labels, averaged over the batch and *summed* over the views."""
    return F.cross_entropy(
        view_logits_BNC.transpose(1, 2),
        labels_B[:, None].expand(-1, view_logits_BNC.shape[1]),
        reduction="sum",
    ) / len(labels_B)


def view_offsets(reference_BK: Tensor, views_BNK: Tensor, *, offset_space: OffsetSpace = "raw") -> Tensor:
    """Teacher minus view, ``[B, N, K]``; ``unit`` compares directions instead of the raw vectors."""
    reference_BK = reference_BK.detach()
    if offset_space == "unit":
        reference_BK, views_BNK = unit(reference_BK), unit(views_BNK)
    return reference_BK[:, None] - views_BNK


def _own_similarity(anchors_BK: Tensor, views_BNK: Tensor) -> Tensor:
    """Similarity of each view to the teacher of its own sample, ``[B, N]``."""
    return (views_BNK * anchors_BK[:, None]).sum(dim=-1)


def _contrast(anchors_BK: Tensor, views_BNK: Tensor, margin: float, temperature: float) -> Tensor:
    """Cross-entropy of finding the own teacher among the batch; views inside the margin count as perfect."""
    batch_size, num_views, _ = views_BNK.shape
    similarity_BNB = torch.einsum("bnk,ck->bnc", views_BNK, anchors_BK)
    own_BN = _own_similarity(anchors_BK, views_BNK)
    saturated_BN = torch.where(own_BN >= 1 - margin, torch.ones_like(own_BN), own_BN)
    is_own_B1B = torch.eye(batch_size, dtype=torch.bool, device=own_BN.device)[:, None]
    logits_BNB = torch.where(is_own_B1B, saturated_BN[..., None], similarity_BNB) / temperature
    targets = torch.arange(batch_size, device=own_BN.device).repeat_interleave(num_views)
    return F.cross_entropy(logits_BNB.flatten(0, 1), targets)


def _gated_closeness(directions_BNK: Tensor, gate_B: Tensor) -> Tensor:
    """Mean pairwise closeness of the views, over *all* samples; those with a closed gate add 0."""
    similarity_BNN = directions_BNK @ directions_BNK.transpose(1, 2)
    closeness_B = _mean_over_pairs(F.softplus(similarity_BNN))
    return (closeness_B * gate_B).mean()


def _mean_over_pairs(values_BNN: Tensor) -> Tensor:
    """Mean of the entries off the diagonal, ``[B]``; 0, with a zero gradient, when N is 1."""
    num_views = values_BNN.shape[-1]
    on_diagonal_NN = torch.eye(num_views, dtype=torch.bool, device=values_BNN.device)
    total_B = values_BNN.masked_fill(on_diagonal_NN, 0.0).sum(dim=(1, 2))
    return total_B / max(1, num_views * (num_views - 1))
