"""What teaches for one batch: the members' signals, and how they are weighted into one target.

Shape legend: B = batch, N = members besides the first, C = classes, D = pooled feature width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from methods.angular.ensemble import Normalisation, ensemble_feature, mass, mixture
from methods.angular.heads import with_views
from methods.base import Signals, Teacher
from methods.distil.noise import noisy_copies
from methods.losses import soften

Transform = Callable[[Tensor, float], Tensor]
"""All that a criterion does to a member's logits ``[..., C]`` at a temperature: probabilities of the same shape."""


class Outputs(NamedTuple):
    """What the student emits for a batch."""

    logits: Tensor
    """``[B, C]``"""
    pooled: Tensor
    """``[B, D_student]``"""
    maps: tuple[Tensor, ...] = ()
    """Feature maps, for criteria that asked for them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Weighting:
    """How members are put together. The first always has weight 1."""

    view_weight: float = 1.0
    """Weight of each other member in the target."""
    normalisation: Normalisation = "sum"
    """What the weighted sum is divided by."""
    pooled: Literal["mean", "each"] = "mean"
    """Pooled criteria compare with the ``mean`` feature, or add up one term for ``each`` member (TeKAP)."""
    pooled_weight: float = 1.0
    """Weight of each other member's term, with ``each``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Teaching:
    """The teacher side of one batch, whoever teaches. Detached unless the settings of the student say otherwise."""

    signals: Signals
    """The first member (a network itself), and as views the others."""
    weighting: Weighting = Weighting()

    @property
    def mass(self) -> float:
        """What a row of ``mixture`` sums to: how much stronger the members pull together than one distribution."""
        weighting = self.weighting
        return mass(self._num_others, weighting.view_weight, weighting.normalisation)

    def mixture(self, temperature: float, transform: Transform = soften) -> Tensor:
        """Weighted sum of the members' probabilities, ``[B, C]``; rows sum to ``mass``.

        Probabilities are mixed after softening, never logits. ``transform`` is all that a criterion does to logits
        on the teacher's side; it is applied to every member by itself.
        """
        first_BC = transform(self.signals.logits, temperature)
        if self.signals.view_logits is None:
            return first_BC
        others_BNC = transform(self.signals.view_logits, temperature)
        return mixture(first_BC, others_BNC, self.weighting.view_weight, self.weighting.normalisation)

    def target(self, temperature: float, transform: Transform = soften) -> Tensor:
        """The mixture as a distribution, ``[B, C]``: rows sum to 1. ``mass`` belongs into the weight of the loss."""
        mixture_BC = self.mixture(temperature, transform)
        return mixture_BC if self.mass == 1 else mixture_BC / self.mass

    @property
    def pooled(self) -> Tensor:
        """Weighted mean of the members' pooled features, ``[B, D]``."""
        if self.signals.view_logits is None:
            return self.signals.pooled
        if self.signals.view_pooled is None:
            raise ValueError(
                "the teachers' pooled features differ in width, so they have no mean: "
                "use a criterion on logits, or teachers of one width"
            )
        weighting = self.weighting
        return ensemble_feature(
            self.signals.pooled,
            self.signals.view_pooled,
            view_weight=weighting.view_weight,
            normalisation="length" if weighting.normalisation == "length" else "sum",
        )

    @property
    def pooled_terms(self) -> tuple[tuple[float, Tensor], ...]:
        """Weighted targets ``[B, D]`` of a criterion on pooled features: it is the sum of its value at each."""
        view_pooled_BND = self.signals.view_pooled
        if self.weighting.pooled == "mean" or view_pooled_BND is None:
            return ((1.0, self.pooled),)
        others = ((self.weighting.pooled_weight, feature_BD) for feature_BD in view_pooled_BND.unbind(1))
        return ((1.0, self.signals.pooled), *others)

    @property
    def maps(self) -> tuple[Tensor, ...]:
        """Feature maps of the network itself: no member changes them."""
        return self.signals.maps

    @property
    def _num_others(self) -> int:
        return 0 if self.signals.view_logits is None else self.signals.view_logits.shape[1]


def member_signals(teachers: tuple[Teacher, ...], heads: nn.Module | None, images: Tensor) -> Signals:
    """What all members say about ``images``: one pass of each network, ``heads`` in place of the first one's own."""
    first, *others = teachers
    signals = first(images)
    if others:
        return _side_by_side([signals, *(teacher(images) for teacher in others)])
    if heads is not None:
        return with_views(signals, heads)
    with torch.no_grad():
        if first.heads is not None:
            return with_views(signals, first.heads)
        return signals if first.noise is None else noisy_copies(signals, first.noise)


def detached(signals: Signals) -> Signals:
    """The same numbers without the way back to the branches."""
    if signals.view_logits is None:
        return signals
    view_pooled = None if signals.view_pooled is None else signals.view_pooled.detach()
    return signals._replace(view_logits=signals.view_logits.detach(), view_pooled=view_pooled)


def _side_by_side(members: list[Signals]) -> Signals:
    first, *others = members
    has_one_width = len({member.pooled.shape for member in members}) == 1
    return first._replace(
        view_logits=torch.stack([member.logits for member in others], dim=1),
        view_pooled=torch.stack([member.pooled for member in others], dim=1) if has_one_width else None,
    )
