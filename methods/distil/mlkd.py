"""MLKD: probabilities are matched per sample, between samples and between classes, at several temperatures.

Jin, Wang, Lin: "Multi-Level Logit Distillation", CVPR 2023. Two views of each image, a weak and a strong one:

    L = ce_weight (CE_weak + CE_strong) + kd_weight (instance + batch + class)
    instance: sum over T of T^2 KL(target_T || p_T)     batch: |P P' differences|^2 / B     class: |P' P differences|^2 / C

``released`` is what the authors' code computes. Its masks of samples and classes with a confidence up to the median multiply
losses that are scalars already, so each is but a factor of about one half; batch and class terms look at the weak view
only; the instance term takes the middle temperatures on the strong view and the outer ones on the weak view again, without
mask. ``clean`` is what was described: low-confidence samples (rows) and classes are really selected, every term sees both
views at all temperatures.

Defaults are the authors' (T 2 to 6, 0.9, 0.1). They train for 480 epochs from a learning rate of 0.025 (0.01 for mobile
students): set that in ``train`` to compare with their 77.08 for resnet32x4 -> resnet8x4. All terms see the
samples of all workers, unless ``across_workers`` is off. ``standardise: true`` is the MLKD + LSKD of arXiv 2403.01427.

Shape legend: B = batch, C = classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from methods.base import Batch, Loss
from methods.checks import check_choice, check_learns
from methods.distil.across import rows_of_all
from methods.distil.lskd import standardised, standardised_soften
from methods.distil.settings import DistilledSettings
from methods.distil.student import DistilledStudent
from methods.distil.teaching import Outputs, Teaching
from methods.losses import SMALLEST_PROBABILITY, cross_entropy, in_full_precision, soften

Variant = Literal["released", "clean"]


class Levels(NamedTuple):
    """The three levels, scalars, or the parts of which they are means."""

    instance: Tensor
    """``[B]``, or their mean."""
    batch: Tensor
    """``[B]``, or their mean."""
    classes: Tensor
    """``[C]``, or their mean."""


@in_full_precision
def level_parts(student_logits_BC: Tensor, target_BC: Tensor, temperature: float) -> Levels:
    """Contribution of each sample (instance, batch) and of each class; a level's loss is the mean of its parts.

    The target is softened with ``temperature`` already.
    """
    log_student_BC = (student_logits_BC / temperature).log_softmax(dim=-1)
    log_target_BC = target_BC.clamp_min(SMALLEST_PROBABILITY).log()
    instance_B = temperature**2 * (target_BC * (log_target_BC - log_student_BC)).sum(dim=-1)
    student_BC = log_student_BC.exp()
    batch_B = (target_BC @ target_BC.T - student_BC @ student_BC.T).square().sum(dim=-1)
    class_C = (target_BC.T @ target_BC - student_BC.T @ student_BC).square().sum(dim=-1)
    return Levels(instance_B, batch_B, class_C)


@in_full_precision
def up_to_median(values: Tensor) -> Tensor:
    """1.0 where a value is at most the median (that of an even number lies between the middle two), else 0.0."""
    return (values <= values.quantile(0.5)).to(values.dtype)


@dataclass(frozen=True, kw_only=True)
class MultiLevelSettings(DistilledSettings):
    """Settings of ``mlkd``."""

    kd_weight: float = 0.9
    """Weight of the three levels together. 0 turns them off."""
    ce_weight: float = 0.1
    """Weight of the cross-entropy of either view with the labels. 0 turns both off."""
    temperatures: tuple[float, ...] = (2.0, 3.0, 4.0, 5.0, 6.0)
    """Temperatures, rising, over which each level is summed."""
    variant: Variant = "released"
    """``released``: what the authors' code computes; ``clean``: what was described."""
    standardise: bool = False
    """Standardise logits first, as ``lskd`` does."""
    across_workers: bool = True
    """Relate the samples of all workers; False: only those of the worker's own share of a batch."""

    def __post_init__(self) -> None:
        DistilledSettings.__post_init__(self)
        check_choice(self, variant=("released", "clean"))
        check_learns(self, "kd_weight", "ce_weight")
        before = 0.0
        for temperature in self.temperatures:
            if not before < temperature < float("inf"):
                raise ValueError(f"temperatures must rise from above 0, got {self.temperatures!r}")
            before = temperature
        if not self.temperatures:
            raise ValueError("temperatures must name at least one, got none")


class MultiLevelDistillation(DistilledStudent):
    """Matches samples, batches and classes on two views. Losses ``ce``, ``ce_strong``, ``instance``, ``batch``, ``class``."""

    Settings = MultiLevelSettings
    needs_strong: ClassVar[bool] = True
    settings: MultiLevelSettings

    @classmethod
    def inactive(cls, settings: Any) -> frozenset[str]:
        names = super().inactive(settings)
        return (
            names | {"temperatures", "variant", "standardise", "across_workers"}
            if settings.kd_weight == 0
            else names
        )

    def criterion(self, student: Outputs, teaching: Teaching, batch: Batch) -> dict[str, Loss]:
        if batch.strong is None:
            raise ValueError("mlkd needs a strong view of each image: make the stream with strong=True")
        strong_student, strong_teaching = self.student(batch.strong), self.teaching(batch.strong)
        weak, strong = self._parts(student, teaching), self._parts(strong_student, strong_teaching)
        confident_BC = self._rows(teaching.target(1.0))
        masks = up_to_median(confident_BC.amax(dim=-1)), up_to_median(confident_BC.sum(dim=0))
        combine = released_levels if self.settings.variant == "released" else clean_levels
        levels = combine(weak, strong, *masks)
        weight = self.kd_weight(batch) * teaching.mass
        return {
            "ce_strong": Loss(cross_entropy(strong_student.logits, batch.labels), self.settings.ce_weight),
            "instance": Loss(levels.instance, weight),
            "batch": Loss(levels.batch, weight),
            "class": Loss(levels.classes, weight),
        }

    def _parts(self, student: Outputs, teaching: Teaching) -> list[Levels]:
        """For each temperature."""
        is_standard = self.settings.standardise
        logits_BC = self._rows(standardised(student.logits) if is_standard else student.logits)
        transform = standardised_soften if is_standard else soften
        targets = ((T, self._rows(teaching.target(T, transform))) for T in self.settings.temperatures)
        return [level_parts(logits_BC, target_BC, T) for T, target_BC in targets]

    def _rows(self, rows: Tensor) -> Tensor:
        return rows_of_all(rows) if self.settings.across_workers else rows


def released_levels(
    weak: Sequence[Levels], strong: Sequence[Levels], samples_B: Tensor, classes_C: Tensor
) -> Levels:
    """The levels as the release computes them: masks act as the factors that their means are."""
    num_outer = min(1, (len(weak) - 1) // 2)
    middle = slice(num_outer, len(weak) - num_outer)
    outer = [*weak[: middle.start], *weak[middle.stop :]]
    unmasked = [levels.instance.mean() for levels in (*strong[middle], *outer)]
    masked = torch.stack([levels.instance.mean() for levels in weak]).sum() * samples_B.mean()
    return Levels(
        instance=masked + torch.stack(unmasked).sum(),
        batch=torch.stack([levels.batch.mean() for levels in weak]).sum() * samples_B.mean(),
        classes=torch.stack([levels.classes.mean() for levels in weak]).sum() * classes_C.mean(),
    )


def clean_levels(
    weak: Sequence[Levels], strong: Sequence[Levels], samples_B: Tensor, classes_C: Tensor
) -> Levels:
    """The levels as described: only samples and classes of low confidence, both views, all temperatures."""
    both = (*weak, *strong)
    return Levels(
        instance=torch.stack([(levels.instance * samples_B).mean() for levels in both]).sum(),
        batch=torch.stack([(levels.batch * samples_B).mean() for levels in both]).sum(),
        classes=torch.stack([(levels.classes * classes_C).mean() for levels in both]).sum(),
    )
