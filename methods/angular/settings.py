"""Settings of the branches, shared by the stage that grows them and the students that learn from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from methods.angular.losses import Constraint, OffsetSpace, Reduction
from methods.checks import check_choice, check_positive, check_weights

Preset = Literal["paper", "released"]
WeightInit = Literal["orthogonal", "stacked_qr"]
NormInit = Literal["released", "standard"]

RELEASED_DROPOUT = (0.15, 0.20, 0.25, 0.30, 0.35, 0.40)
RELEASED_VIEW_WEIGHT = 0.8


@dataclass(frozen=True, kw_only=True, slots=True)
class AngularViewsSettings:
    """Settings of ``angular_views``. Symbols in brackets are those of the paper."""

    num_branches: int = 5
    """How many branches grow from the frozen teacher (N)."""
    feature_inter_weight: float = 0.1
    """Weight of proximity and diversity of the views' features (lambda_Fi). 0 turns both off."""
    feature_intra_weight: float = 1.0
    """Weight of the spread of the features' offsets from the teacher (lambda_Fa). 0 turns it off."""
    logit_inter_weight: float = 1.0
    """Weight of proximity and diversity of the views' probabilities (lambda_Zi). 0 turns both off."""
    logit_intra_weight: float = 1.0
    """Weight of the spread of the probabilities' offsets from the teacher (lambda_Za). 0 turns it off."""
    label_weight: float = 0.8
    """Weight of the label loss, which is summed over branches (lambda_gt). Above 0: else logits mean nothing."""
    margin: float = 0.2
    """A view is inside when its cosine with the teacher is at least 1 - margin (gamma); fixed, not learnt."""
    contrast_temperature: float = 0.07
    """Temperature of the contrastive proximity term (tau)."""
    temperature: float = 4.0
    """Temperature of the probabilities at the logit level, and of the distillation that follows (T)."""
    dropout_low: float = 0.2
    """Dropout rate before the first branch (p_0). Inactive with preset ``released``."""
    dropout_high: float = 0.4
    """Dropout rate before the last branch (p_N-1); evenly spaced between. Inactive with preset ``released``."""
    init: WeightInit = "orthogonal"
    """First W_i: one random orthogonal matrix per branch, or the release's QR across branches, which preset
    ``released`` always takes."""
    bn_init: NormInit = "released"
    """First batch norm of branch i: weight and bias each one draw of Normal(1 - 0.1 i, 0.1 + 0.1 i), or 1, 0."""
    constraint: Constraint = "contrastive"
    """Proximity term: contrast with the batch's other teacher vectors, or a hinge on the own cosine (ours)."""
    extra_branch_division: bool = True
    """Divide the contrastive proximity by N once more, as the release does."""
    intra_reduction: Reduction = "batch_mean"
    """Average offset cosines over the batch before the softplus, or afterwards."""
    offset_space: OffsetSpace = "raw"
    """Offsets between raw vectors, or between vectors of unit length."""
    preset: Preset = "paper"
    """``paper``: the published idea. ``released``: the losses, dropout, init and target of the authors' code."""

    def __post_init__(self) -> None:
        self._check_choices()
        if self.num_branches < 1:
            raise ValueError(f"num_branches must be at least 1, got {self.num_branches!r}")
        if self.preset == "released" and self.num_branches > len(RELEASED_DROPOUT):
            raise ValueError(
                f"num_branches must be at most {len(RELEASED_DROPOUT)} with preset 'released', "
                f"got {self.num_branches!r}"
            )
        if not 0 < self.margin < 1:
            raise ValueError(f"margin must lie between 0 and 1 (1 - cosine), got {self.margin!r}")
        if not 0 <= self.dropout_low <= self.dropout_high < 1:
            raise ValueError(
                "dropout must satisfy 0 <= dropout_low <= dropout_high < 1, "
                f"got dropout_low={self.dropout_low!r} and dropout_high={self.dropout_high!r}"
            )
        check_positive(self, "label_weight", "contrast_temperature", "temperature")
        check_weights(self, "feature_inter_weight", "feature_intra_weight")
        check_weights(self, "logit_inter_weight", "logit_intra_weight")

    def _check_choices(self) -> None:
        check_choice(self, preset=("paper", "released"), init=("orthogonal", "stacked_qr"))
        check_choice(self, bn_init=("released", "standard"), constraint=("contrastive", "hinge"))
        check_choice(self, intra_reduction=("batch_mean", "per_sample"), offset_space=("raw", "unit"))

    @property
    def dropout_rates(self) -> tuple[float, ...]:
        """One rate per branch. A single branch takes ``dropout_low``."""
        if self.preset == "released":
            return RELEASED_DROPOUT[: self.num_branches]
        step = (self.dropout_high - self.dropout_low) / max(1, self.num_branches - 1)
        return tuple(self.dropout_low + step * branch for branch in range(self.num_branches))

    @property
    def weight_init(self) -> WeightInit:
        """The initialisation that is really used."""
        return "stacked_qr" if self.preset == "released" else self.init

    def inactive(self) -> frozenset[str]:
        """Names of settings that change no loss at this point. ``temperature`` always acts: students use it."""
        names: set[str] = set()
        if self.preset == "released":
            names |= {"dropout_low", "dropout_high", "init"}
        if self.feature_inter_weight == self.logit_inter_weight == 0:
            names |= {"margin", "contrast_temperature", "constraint", "extra_branch_division"}
        if self.constraint == "hinge":
            names |= {"contrast_temperature", "extra_branch_division"}
        if self.feature_intra_weight == self.logit_intra_weight == 0:
            names |= {"intra_reduction", "offset_space"}
        if self.num_branches == 1:
            names |= {"feature_intra_weight", "logit_intra_weight", "intra_reduction", "offset_space"}
            names |= {"extra_branch_division", "dropout_high"}
        return frozenset(names)
