"""Published check values (double precision) of every angular loss, both presets, and loops for random inputs."""

from __future__ import annotations

import angular_reference as slow
import pytest
import torch
from torch import Tensor

from methods.angular.ensemble import ensemble_probs
from methods.angular.losses import inter_loss, intra_loss, label_loss
from methods.angular.objective import branch_losses
from methods.angular.settings import AngularViewsSettings
from methods.base import Signals
from methods.losses import soften

MARGIN, TAU, T = 0.2, 0.07, 4.0

OWN_COSINES = {
    0.2: [[0.994834, 0.997718, 0.998846], [0.994310, 0.998657, 0.997263], [0.990302, 0.981074, 0.985879]],
    1.0: [[0.900613, 0.962233, 0.936704], [0.816467, 0.981559, 0.893960], [0.890158, 0.526966, 0.778556]],
}
INTER = {  # (level, geometry, scale): (proximity, diversity, gate)
    ("feature", "cosine", 0.2): (0.01280972, 1.29860656, [1, 1, 1]),
    ("feature", "cosine", 1.0): (0.22885744, 0.76571974, [1, 1, 0]),
    ("logit", "cosine", 0.2): (0.01726548, 1.29962252, [1, 1, 1]),
    ("logit", "cosine", 1.0): (0.36928450, 0.36531378, [1, 0, 0]),
}
RELEASED_INTER = {  # proximity + diversity
    ("feature", "coordinate", 0.2): 1.29195537,
    ("feature", "coordinate", 1.0): 0.22885744,
    ("logit", "product", 0.2): 0.08240194,
    ("logit", "product", 1.0): 0.27178416,
}
INTRA = {  # (level, reduction, offset space, scale)
    ("feature", "batch_mean", "raw", 0.2): 0.48975727,
    ("feature", "batch_mean", "raw", 1.0): 0.48975727,
    ("feature", "per_sample", "raw", 0.2): 0.49122358,
    ("feature", "per_sample", "raw", 1.0): 0.49122358,
    ("feature", "batch_mean", "unit", 0.2): 0.49675445,
    ("feature", "batch_mean", "unit", 1.0): 0.53633855,
    ("logit", "batch_mean", "raw", 0.2): 0.52302391,
    ("logit", "batch_mean", "raw", 1.0): 0.53136865,
}
ENSEMBLE = {  # (view weight, normalisation, scale): first row
    (1.0, "sum", 0.2): [0.397974, 0.428865, 0.136548, 0.036613],
    (1.0, "sum", 1.0): [0.413993, 0.373437, 0.149357, 0.063213],
    (0.8, "sum", 0.2): [0.397652, 0.429199, 0.136591, 0.036559],
    (0.8, "sum", 1.0): [0.412728, 0.377031, 0.148647, 0.061595],
    (0.8, "length", 0.2): [0.791208, 0.853976, 0.271774, 0.072741],
    (0.8, "length", 1.0): [0.821205, 0.750178, 0.295762, 0.122555],
}


def level_inputs(level: str, scale: float) -> tuple[Tensor, Tensor]:
    reference, views = slow.golden_inputs(scale)
    return (reference, views) if level == "feature" else (soften(6 * reference, T), soften(6 * views, T))


def test_the_inputs_are_the_published_ones() -> None:
    reference, _ = slow.golden_inputs(0.2)
    assert reference[0].tolist() == pytest.approx([1.84147098, 1.90929743, 1.14112001, 0.24319750], abs=1e-8)


@pytest.mark.parametrize("scale", OWN_COSINES)
def test_own_cosines(scale: float) -> None:
    reference, views = slow.golden_inputs(scale)
    cosine = torch.nn.functional.cosine_similarity(views, reference[:, None], dim=-1)
    torch.testing.assert_close(cosine, torch.tensor(OWN_COSINES[scale]).double(), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("level", "geometry", "scale"), INTER)
def test_inter(level: str, geometry: str, scale: float) -> None:
    actual = inter_loss(
        *level_inputs(level, scale), margin=MARGIN, contrast_temperature=TAU, geometry=geometry
    )
    proximity, diversity, gate = INTER[level, geometry, scale]
    assert float(actual.proximity) == pytest.approx(proximity, abs=1e-6)
    assert float(actual.diversity) == pytest.approx(diversity, abs=1e-6)
    assert actual.gate.int().tolist() == gate


@pytest.mark.parametrize(("level", "geometry", "scale"), RELEASED_INTER)
def test_inter_of_the_release(level: str, geometry: str, scale: float) -> None:
    actual = inter_loss(
        *level_inputs(level, scale), margin=MARGIN, contrast_temperature=TAU, geometry=geometry
    )
    expected = RELEASED_INTER[level, geometry, scale]
    assert float(actual.proximity + actual.diversity) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("level", "reduction", "offset_space", "scale"), INTRA)
def test_intra(level: str, reduction: str, offset_space: str, scale: float) -> None:
    actual = intra_loss(*level_inputs(level, scale), reduction=reduction, offset_space=offset_space)
    assert float(actual) == pytest.approx(INTRA[level, reduction, offset_space, scale], abs=1e-6)


@pytest.mark.parametrize(("view_weight", "normalisation", "scale"), ENSEMBLE)
def test_ensemble(view_weight: float, normalisation: str, scale: float) -> None:
    reference, views = slow.golden_inputs(scale)
    actual = ensemble_probs(6 * reference, 6 * views, T, view_weight=view_weight, normalisation=normalisation)
    assert actual[0].tolist() == pytest.approx(ENSEMBLE[view_weight, normalisation, scale], abs=1e-6)


@pytest.mark.parametrize("scale", [0.2, 1.0])
@pytest.mark.parametrize("preset", ["paper", "released"])
def test_each_preset_gives_its_values_through_the_settings(preset: str, scale: float) -> None:
    reference, views = slow.golden_inputs(scale)
    signals = Signals(logits=6 * reference, pooled=reference, view_logits=6 * views, view_pooled=views)
    labels = torch.tensor([0, 1, 2])
    step = branch_losses(AngularViewsSettings(preset=preset, num_branches=3), signals, labels)
    value = {name: float(loss.value) for name, loss in step.losses.items()}
    geometries = {"paper": ("cosine", "cosine"), "released": ("coordinate", "product")}[preset]
    for level, geometry in zip(("feature", "logit"), geometries, strict=True):
        inter = value[f"{level}_contrast"] + value[f"{level}_diversity"]
        if preset == "paper":
            assert inter == pytest.approx(sum(INTER[level, geometry, scale][:2]), abs=1e-6)
        else:
            assert inter == pytest.approx(RELEASED_INTER[level, geometry, scale], abs=1e-6)
        assert value[f"{level}_intra"] == pytest.approx(INTRA[level, "batch_mean", "raw", scale], abs=1e-6)
    assert value["label"] == pytest.approx(slow.label(6 * views, labels), abs=1e-9)
    expected = sum(loss.weight * value[name] for name, loss in step.losses.items())
    assert float(step.total) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("num_views", [1, 2, 5])
@pytest.mark.parametrize("extra", [True, False])
@pytest.mark.parametrize("constraint", ["contrastive", "hinge"])
@pytest.mark.parametrize("geometry", ["cosine", "coordinate", "product"])
def test_inter_equals_the_loop(geometry: str, constraint: str, extra: bool, num_views: int) -> None:
    reference, views = slow.random_inputs(num_samples=6, num_views=num_views, spread=0.3)
    if geometry == "product":
        reference, views = soften(8 * reference, 1.0), soften(8 * views, 1.0)
    actual = inter_loss(
        reference,
        views,
        margin=0.2,
        contrast_temperature=0.1,
        constraint=constraint,
        extra_branch_division=extra,
        geometry=geometry,
    )
    proximity, diversity, gate = slow.inter(
        reference, views, margin=0.2, tau=0.1, constraint=constraint, extra=extra, geometry=geometry
    )
    assert float(actual.proximity) == pytest.approx(proximity, abs=1e-12)
    assert float(actual.diversity) == pytest.approx(diversity, abs=1e-12)
    assert actual.gate.tolist() == gate


def test_the_random_inputs_open_some_gates_and_close_others() -> None:
    gate = inter_loss(*slow.random_inputs(6, 2, spread=0.3), margin=0.2, contrast_temperature=0.1).gate
    assert 0 < gate.sum() < len(gate)


@pytest.mark.parametrize("num_views", [1, 2, 5])
@pytest.mark.parametrize("reduction", ["batch_mean", "per_sample"])
@pytest.mark.parametrize("offset_space", ["raw", "unit"])
def test_intra_equals_the_loop(offset_space: str, reduction: str, num_views: int) -> None:
    reference, views = slow.random_inputs(num_views=num_views)
    expected = slow.intra(
        reference, views, per_sample=reduction == "per_sample", unit_space=offset_space == "unit"
    )
    actual = intra_loss(reference, views, reduction=reduction, offset_space=offset_space)
    assert float(actual) == pytest.approx(expected, abs=1e-12)


def test_label_loss_equals_the_loop() -> None:
    _, view_logits = slow.random_inputs()
    labels = torch.tensor([0, 5, 2, 2, 1])
    assert float(label_loss(view_logits, labels)) == pytest.approx(slow.label(view_logits, labels), abs=1e-12)
