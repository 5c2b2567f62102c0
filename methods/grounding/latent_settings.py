"""Settings of Latent-VG: sizes, latent expressions, contrast, concepts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from methods.checks import check_choice, check_positive, check_weights
from methods.grounding.latent_expressions import Denominator, DropUnit
from methods.grounding.multiway import MultiwaySettings
from methods.grounding.settings import GroundingSettings, without_effect

LATENT = {
    *("word_drop", "drop_unit", "margin", "contrast_temperature", "contrast_weight", "denominator"),
    *("num_concepts", "concept_temperature", "slot_temperature", "inject", "inject_at"),
    *("use_subject_distributor", "use_concept_injector"),
}
CONTRAST = {"margin", "contrast_temperature", "denominator"}
INJECTOR = {"num_concepts", "concept_temperature", "slot_temperature", "inject"}


@dataclass(frozen=True, kw_only=True)
class LatentVGSettings(GroundingSettings, MultiwaySettings):
    """Settings of ``latent_vg``. The defaults are the paper's size; preset ``latent_vg_small`` is for two cores."""

    attribute_lengths: tuple[int, ...] = (4, 10)
    """Attribute tokens of each latent expression; its length is their number (N). Empty: no latent expressions."""
    word_drop: tuple[float, ...] = (0.2, 0.15)
    """Rate at which each latent expression misses words in training; the last one stands for all that follow."""
    drop_unit: DropUnit = "word"
    """Whether whole words are missed, or single numbers of their vectors."""
    margin: float = 0.2
    """How far below 1 the cosine of a sentence and its own expressions may stay for free (gamma)."""
    contrast_weight: float = 0.1
    """Weight of the positive-margin contrast (lambda). 0 turns it off."""
    contrast_temperature: float = 0.07
    """Divides the cosines of the contrast (tau)."""
    denominator: Denominator = "with_margin"
    """What the contrast is normalised by, beside other samples: the own pair with or without margin, or nothing."""
    num_concepts: int = 100
    """Rows of the bank of visual concepts, at most the width."""
    concept_temperature: float = 0.1
    """Divides the cosines of concepts and patches."""
    slot_temperature: float = 0.1
    """Divides the cosines of attribute slots and concepts."""
    inject: Literal["residual", "replace"] = "residual"
    """Whether what is injected is added to the attributes or takes their place."""
    inject_at: Literal["layer_end", "after_attention"] = "layer_end"
    """Where in a layer subject and concepts reach the latent expressions."""
    use_subject_distributor: bool = True
    """Overwrite each expression's subject with what vision has made of it, in every layer."""
    use_concept_injector: bool = True
    """Give attributes visual concepts, in every layer."""
    pyramid: bool = True
    """Decode pixels by a pyramid of three strides; else patches are doubled twice, which small grids need."""

    def __post_init__(self) -> None:
        GroundingSettings.__post_init__(self)
        MultiwaySettings.__post_init__(self)
        check_weights(self, "contrast_weight", "margin")
        check_positive(
            self, "contrast_temperature", "num_concepts", "concept_temperature", "slot_temperature"
        )
        check_choice(
            self,
            denominator=("with_margin", "raw", "negatives_only"),
            drop_unit=("word", "element"),
            inject=("residual", "replace"),
            inject_at=("layer_end", "after_attention"),
        )
        self._check_latent()

    def _check_latent(self) -> None:
        if any(length < 1 for length in self.attribute_lengths):
            raise ValueError(f"attribute_lengths must be at least 1 each, got {self.attribute_lengths!r}")
        if not self.word_drop or not all(0 <= rate < 1 for rate in self.word_drop):
            raise ValueError(f"word_drop must be rates of at least 0 and below 1, got {self.word_drop!r}")
        if self.margin > 2:
            raise ValueError(f"margin must be at most 2, the span of a cosine, got {self.margin!r}")
        if self.num_concepts > self.width:
            raise ValueError(
                f"num_concepts must be at most the width ({self.width}), got {self.num_concepts!r}"
            )

    @property
    def num_expressions(self) -> int:
        """N"""
        return len(self.attribute_lengths)

    @property
    def word_drop_rates(self) -> tuple[float, ...]:
        """A rate for each latent expression."""
        last = len(self.word_drop) - 1
        return tuple(self.word_drop[min(number, last)] for number in range(self.num_expressions))


def latent_without_effect(settings: LatentVGSettings) -> frozenset[str]:
    """Names of the settings that change nothing at these values."""
    names = set(without_effect(settings))
    if settings.num_expressions == 0:
        return frozenset(names | LATENT)
    if settings.contrast_weight == 0:
        names |= CONTRAST
    if not settings.use_concept_injector:
        names |= INJECTOR
    if not settings.use_concept_injector and not settings.use_subject_distributor:
        names |= {"inject_at"}
    if not any(settings.word_drop_rates):
        names |= {"drop_unit"}
    return frozenset(names)
