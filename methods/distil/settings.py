"""Settings that every distilled student has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from methods.checks import check_choice, check_positive, check_weights

HeadTraining = Literal["joint", "frozen"]


@dataclass(frozen=True, kw_only=True)
class DistilledSettings:
    """What a student takes from labels and from its teacher's members. Symbols in brackets are of the Angular-KD paper."""

    kd_weight: float = 1.0
    """Weight of what compares the student's probabilities with the target (alpha_kd). 0 turns it off."""
    ce_weight: float = 1.0
    """Weight of the cross-entropy with the labels (alpha_ce). 0 turns it off."""
    view_weight: float = 1.0
    """Weight of each view beside the teacher's 1, where the teacher is an ``angular_views`` stage. 0 ignores views."""
    heads: HeadTraining = "joint"
    """``joint``: branches keep training with the student; ``frozen``: as stage 1 left them, in evaluation mode."""
    detach_target: bool = True
    """Keep the student's gradient out of the branches. False is what part of the Angular-KD release does."""

    def __post_init__(self) -> None:
        check_weights(self, "kd_weight", "ce_weight", "view_weight")
        check_choice(self, heads=("joint", "frozen"))


@dataclass(frozen=True, kw_only=True)
class TemperedSettings(DistilledSettings):
    """Those of a student that compares probabilities at one temperature."""

    temperature: float = 4.0
    """T: divides the logits of teacher and student."""

    def __post_init__(self) -> None:
        DistilledSettings.__post_init__(self)
        check_positive(self, "temperature")


def without_effect(settings: DistilledSettings) -> frozenset[str]:
    """Names of the shared settings that change nothing at these values, whatever teaches."""
    names: set[str] = set()
    if settings.view_weight == 0 or settings.heads == "frozen":
        names |= {"detach_target"}
    if settings.kd_weight == 0 and isinstance(settings, TemperedSettings):
        names |= {"temperature"}
    return frozenset(names)


def warmup_factor(epoch: int, warmup_epochs: int) -> float:
    """How much of its weight a loss has in ``epoch`` (counted from 0): it grows linearly, and the first is not 0."""
    return min((epoch + 1) / max(warmup_epochs, 1), 1.0)
