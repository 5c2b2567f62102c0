"""L_aug: everything the branches are trained with, in the stage that grows them and jointly with a student."""

from __future__ import annotations

from torch import Tensor

from methods.angular.losses import Geometry, InterLosses, inter_loss, intra_loss, label_loss
from methods.angular.settings import AngularViewsSettings
from methods.base import Loss, Signals, Step
from methods.losses import soften


def branch_losses(settings: AngularViewsSettings, signals: Signals, labels_B: Tensor) -> Step:
    """Named, weighted losses of the views in ``signals``, and the fraction of open gates at each level.

    The feature level compares pooled features, the logit level softened probabilities.
    """
    assert signals.view_logits is not None
    assert signals.view_pooled is not None
    released = settings.preset == "released"
    label = label_loss(signals.view_logits, labels_B)
    feature = _level_losses(
        settings, signals.pooled, signals.view_pooled, geometry="coordinate" if released else "cosine"
    )
    logit = _level_losses(
        settings,
        soften(signals.logits, settings.temperature),
        soften(signals.view_logits, settings.temperature),
        geometry="product" if released else "cosine",
    )
    return Step(
        losses={
            **_named("feature", *feature, settings.feature_inter_weight, settings.feature_intra_weight),
            **_named("logit", *logit, settings.logit_inter_weight, settings.logit_intra_weight),
            "label": Loss(label, settings.label_weight),
        },
        metrics={
            "feature_gate_open_fraction": feature[0].gate.to(label.dtype).mean(),
            "logit_gate_open_fraction": logit[0].gate.to(label.dtype).mean(),
        },
    )


def _level_losses(
    settings: AngularViewsSettings, reference_BK: Tensor, views_BNK: Tensor, *, geometry: Geometry
) -> tuple[InterLosses, Tensor]:
    inter = inter_loss(
        reference_BK,
        views_BNK,
        margin=settings.margin,
        contrast_temperature=settings.contrast_temperature,
        constraint=settings.constraint,
        extra_branch_division=settings.extra_branch_division,
        geometry=geometry,
    )
    intra = intra_loss(
        reference_BK, views_BNK, reduction=settings.intra_reduction, offset_space=settings.offset_space
    )
    return inter, intra


def _named(
    level: str, inter: InterLosses, intra: Tensor, inter_weight: float, intra_weight: float
) -> dict[str, Loss]:
    return {
        f"{level}_contrast": Loss(inter.proximity, inter_weight),
        f"{level}_diversity": Loss(inter.diversity, inter_weight),
        f"{level}_intra": Loss(intra, intra_weight),
    }
