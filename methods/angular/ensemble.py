"""The mixture of a teacher and its views: the target that a student distils.

Shape legend: B = batch, N = views, C = classes, D = feature width.

Member weights are 1 for the teacher and ``view_weight`` for each view. Divided by their sum they make the target
a distribution (``Normalisation`` "sum"). The authors' release divides by their Euclidean length instead
("length"), so its rows sum to ``(1 + N w) / sqrt(1 + N w^2)``: 2.44 for five views of weight 0.8, which silently
multiplies the weight of the distillation loss. TeKAP adds its terms up undivided ("none"). What a row sums to is
its ``mass``.
"""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor

from methods.losses import SMALLEST_PROBABILITY, in_full_precision, soften

Normalisation = Literal["sum", "length", "none"]


def ensemble_probs(
    teacher_logits_BC: Tensor,
    view_logits_BNC: Tensor,
    temperature: float,
    *,
    view_weight: float = 1.0,
    normalisation: Normalisation = "sum",
) -> Tensor:
    """Mean of the members' softened probabilities, ``[B, C]``.

    Probabilities are averaged after softening, never logits. With ``view_weight`` 0 this is the teacher alone.
    """
    return mixture(
        soften(teacher_logits_BC, temperature),
        soften(view_logits_BNC, temperature),
        view_weight,
        normalisation,
    )


@in_full_precision
def ensemble_feature(
    teacher_pooled_BD: Tensor,
    view_pooled_BND: Tensor,
    *,
    view_weight: float = 1.0,
    normalisation: Normalisation = "sum",
) -> Tensor:
    """Mean of the members' pooled features, ``[B, D]``: the target of feature distillation."""
    return mixture(teacher_pooled_BD, view_pooled_BND, view_weight, normalisation)


@in_full_precision
def pseudo_logits(probs_BC: Tensor, temperature: float) -> Tensor:
    """Logits whose softmax at ``temperature`` is ``probs_BC``, for criteria that insist on logits."""
    return temperature * probs_BC.clamp_min(SMALLEST_PROBABILITY).log()


def mixture(
    teacher_BK: Tensor, views_BNK: Tensor, view_weight: float, normalisation: Normalisation
) -> Tensor:
    """The weighted sum of members, over what the normalisation divides by, ``[B, K]``."""
    divisor = _divisor(views_BNK.shape[1], view_weight, normalisation)
    return (teacher_BK + view_weight * views_BNK.sum(dim=1)) / divisor


def mass(num_views: int, view_weight: float, normalisation: Normalisation) -> float:
    """What a row of mixed probabilities sums to."""
    return (1 + num_views * view_weight) / _divisor(num_views, view_weight, normalisation)


def _divisor(num_views: int, view_weight: float, normalisation: Normalisation) -> float:
    if normalisation == "length":
        return math.sqrt(1 + num_views * view_weight**2)
    return 1 + num_views * view_weight if normalisation == "sum" else 1.0
