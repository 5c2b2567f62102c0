"""What the angular losses must satisfy, whatever their numbers: bounds, invariances, descent directions."""

from __future__ import annotations

import math
from collections.abc import Callable

import angular_reference as slow
import pytest
import torch
from torch import Tensor

from methods.angular.diversity import (
    label_ambiguity,
    member_log_probs,
    mixture_divergence,
    mixture_log_probs,
    view_cosines,
)
from methods.angular.ensemble import ensemble_feature, ensemble_probs, pseudo_logits
from methods.angular.losses import InterLosses, inter_loss, intra_loss, unit
from methods.losses import soften, softened_kl

SP = slow.softplus


def inter(reference: Tensor, views: Tensor, *, margin: float = 0.2, tau: float = 0.07) -> InterLosses:
    return inter_loss(reference, views, margin=margin, contrast_temperature=tau)


def gradient(loss: Callable[[Tensor], Tensor], views: Tensor) -> Tensor:
    leaf = views.clone().requires_grad_()
    loss(leaf).backward()
    assert leaf.grad is not None
    return leaf.grad


def pair_cosine(vectors: Tensor) -> float:
    """Mean cosine over pairs of views, ``[B, N, K]``."""
    directions = unit(vectors)
    num_views = vectors.shape[1]
    total = (directions @ directions.transpose(1, 2)).sum() - num_views * len(vectors)
    return float(total) / (len(vectors) * num_views * (num_views - 1))


@pytest.mark.parametrize("num_views", [2, 3, 5, 8])
def test_01_orthogonal_views_cost_ln_2(num_views: int) -> None:
    views = torch.eye(num_views, dtype=torch.float64)[None]
    assert float(inter(torch.ones(1, num_views).double(), views, margin=1.5).diversity) == pytest.approx(
        math.log(2), abs=1e-9
    )


@pytest.mark.parametrize("num_views", [2, 5])
def test_02_identical_views_inside_cost_softplus_of_1(num_views: int) -> None:
    reference, _ = slow.random_inputs()
    views = reference[:, None].repeat(1, num_views, 1)
    assert float(inter(reference, views).diversity) == pytest.approx(1.313262, abs=1e-6)


def test_03_views_equal_to_orthogonal_teachers() -> None:
    reference = torch.eye(4, dtype=torch.float64)
    views = reference[:, None].repeat(1, 5, 1)
    expected = math.log(1 + 3 * math.exp(-1 / 0.07)) / 5
    assert float(inter(reference, views).proximity) == pytest.approx(expected, abs=1e-10)
    assert expected == pytest.approx(3.7492e-07, rel=1e-4)
    assert float(intra_loss(reference, views)) == pytest.approx(math.log(2), abs=1e-12)


@pytest.mark.parametrize(("num_samples", "num_views"), [(4, 5), (7, 1), (2, 3)])
def test_04_total_collapse_costs_ln_b_over_n(num_samples: int, num_views: int) -> None:
    reference = torch.ones(num_samples, 6, dtype=torch.float64)
    views = torch.ones(num_samples, num_views, 6, dtype=torch.float64)
    assert float(inter(reference, views).proximity) == pytest.approx(
        math.log(num_samples) / num_views, abs=1e-9
    )


def test_05_batch_of_one_has_no_contrast() -> None:
    assert float(inter(*slow.random_inputs(num_samples=1)).proximity) == 0.0


def test_06_one_view_has_no_diversity_but_zero_gradients() -> None:
    reference, views = slow.random_inputs(num_views=1)
    for loss in (lambda v: inter(reference, v).diversity, lambda v: intra_loss(reference, v)):
        assert float(loss(views)) == 0.0
        assert torch.equal(gradient(loss, views), torch.zeros_like(views))
    assert float(inter(reference, views).proximity) > 0


@pytest.mark.parametrize("sign", [1.0, -1.0, 0.3])
def test_07_two_views_cost_softplus_of_their_only_offset_cosine(sign: float) -> None:
    offset = torch.tensor([1.0, 0.0], dtype=torch.float64)
    other = torch.tensor([sign, math.sqrt(1 - sign**2)], dtype=torch.float64)
    views = torch.stack([-offset, -other])[None]
    loss = float(intra_loss(torch.zeros(1, 2).double(), views))
    assert loss == pytest.approx(SP(sign), abs=1e-9)
    assert 0.313261 < loss < 1.313263


SIMPLEX_BOUNDS = {2: 0.313262, 3: 0.474077, 4: 0.540306, 5: 0.575939, 6: 0.598139, 8: 0.624267}


@pytest.mark.parametrize("num_views", SIMPLEX_BOUNDS)
def test_08_simplex_offsets_reach_the_lower_bound_of_intra(num_views: int) -> None:
    reference = torch.ones(1, num_views, dtype=torch.float64)
    best = float(intra_loss(reference, reference[:, None] - slow.simplex(num_views)))
    assert best == pytest.approx(SIMPLEX_BOUNDS[num_views], abs=1e-6)
    assert best == pytest.approx(SP(-1 / (num_views - 1)), abs=1e-9)
    for seed in range(20):
        loss = float(intra_loss(*slow.random_inputs(1, num_views, num_views, seed=seed)))
        assert best - 1e-9 <= loss <= SP(1) + 1e-9


CONES = {  # views: (pair cosine, diversity loss, offset cosine)
    2: (0.28, 0.842915, -0.8),
    3: (0.46, 0.949367, -0.35),
    4: (0.52, 0.986573, None),
    5: (0.55, 1.005493, -0.125),
    6: (0.568, 1.016944, None),
}


@pytest.mark.parametrize("num_views", CONES)
def test_09_best_geometry_inside_the_margin(num_views: int) -> None:
    reference, views = slow.cone(num_views, 0.8 + 1e-9)
    pair, diversity, offset = CONES[num_views]
    measured = view_cosines(reference, views, margin=0.2)
    assert float(measured.pair) == pytest.approx(pair, abs=1e-6)
    assert float(measured.gate) == 1.0
    assert float(inter(reference, views).diversity) == pytest.approx(diversity, abs=1e-6)
    if offset is not None:
        assert float(measured.offset) == pytest.approx(offset, abs=1e-6)


def test_10_the_gate_makes_diversity_jump() -> None:
    assert float(inter(*slow.cone(5, 0.7999)).diversity) == 0.0
    assert float(inter(*slow.cone(5, 0.8001)).diversity) == pytest.approx(1.0056, abs=1e-4)


def rotation(width: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.linalg.qr(torch.randn(width, width, dtype=torch.float64, generator=generator)).Q


def every_loss(reference: Tensor, views: Tensor) -> Tensor:
    proximity, diversity, _ = inter(reference, views, margin=0.5)
    losses = [proximity, diversity, intra_loss(reference, views)]
    return torch.stack([*losses, intra_loss(reference, views, reduction="per_sample")])


INVARIANCES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "views permuted": (lambda r: r, lambda v: v[:, [2, 0, 3, 1]]),
    "batch permuted": (lambda r: r[[4, 2, 0, 1, 3]], lambda v: v[[4, 2, 0, 1, 3]]),
    "rotated together": (lambda r: r @ rotation(6), lambda v: v @ rotation(6)),
    "scaled together": (lambda r: 3 * r, lambda v: 3 * v),
}


@pytest.mark.parametrize("name", INVARIANCES)
def test_11_12_invariances(name: str) -> None:
    reference, views = slow.random_inputs(spread=0.4)
    change_reference, change_views = INVARIANCES[name]
    before = every_loss(reference, views)
    assert before[1] > 0
    torch.testing.assert_close(
        every_loss(change_reference(reference), change_views(views)), before, atol=1e-9, rtol=0
    )


def test_12_inter_ignores_each_length_but_intra_only_a_common_shift_or_scale() -> None:
    reference, views = slow.random_inputs(spread=0.4)
    lengths = torch.rand(5, 4, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.5
    for part in (0, 1):
        scaled = inter(2 * reference, lengths * views, margin=0.5)[part]
        torch.testing.assert_close(scaled, inter(reference, views, margin=0.5)[part], atol=1e-9, rtol=0)
    before = intra_loss(reference, views)
    torch.testing.assert_close(intra_loss(reference + 1, views + 1), before, atol=1e-9, rtol=0)
    assert abs(float(intra_loss(reference, 2 * views) - before)) > 1e-3


def test_13_diversity_gradient_is_tangential_and_descends() -> None:
    reference, views = slow.random_inputs(spread=0.2)
    slope = gradient(lambda v: inter(reference, v, margin=0.9).diversity, views)
    assert float((slope * views).sum(-1).abs().max()) <= 1e-12  # eps of the unit vector leaves 1e-13
    assert float(slope.abs().max()) > 0
    assert pair_cosine(views - 0.1 * slope) < pair_cosine(views)


def test_13_intra_descends() -> None:
    reference, views = slow.random_inputs()
    slope = gradient(lambda v: intra_loss(reference, v), views)
    after = views - 0.1 * slope
    assert pair_cosine(reference[:, None] - after) < pair_cosine(reference[:, None] - views)


def test_14_proximity_pulls_from_outside_and_only_repels_inside() -> None:
    reference, views = slow.random_inputs(spread=1.5)
    slope = gradient(lambda v: inter(reference, v, margin=0.01).proximity, views)
    before = view_cosines(reference, views, margin=0.2).own.mean()
    assert view_cosines(reference, views - 0.05 * slope, margin=0.2).own.mean() > before

    reference, views = slow.random_inputs(num_samples=2, spread=0.01)
    slope = gradient(lambda v: inter(reference, v, tau=0.5).proximity, views)
    assert float(slope.abs().max()) > 0
    alone = gradient(lambda v: inter(reference[:1], v, tau=0.5).proximity, views[:1])
    assert torch.equal(alone, torch.zeros_like(alone))


def test_the_hinge_is_silent_inside_and_constant_pull_outside() -> None:
    def hinge(reference: Tensor, views: Tensor) -> Tensor:
        return inter_loss(
            reference, views, margin=0.2, contrast_temperature=0.07, constraint="hinge"
        ).proximity

    assert float(hinge(*slow.cone(3, 0.85))) == 0.0
    assert float(hinge(*slow.cone(3, 0.5))) == pytest.approx(0.3, abs=1e-9)


def test_15_ensemble_is_a_distribution() -> None:
    logits, view_logits = slow.random_inputs(num_views=5)
    for view_weight in (0.0, 0.3, 1.0):
        probs = ensemble_probs(logits, view_logits, 4.0, view_weight=view_weight)
        torch.testing.assert_close(probs.sum(-1), torch.ones(5).double(), atol=1e-12, rtol=0)
    same = ensemble_probs(logits, logits[:, None].repeat(1, 5, 1), 4.0)
    torch.testing.assert_close(same, soften(logits, 4.0), atol=1e-12, rtol=0)
    assert torch.equal(ensemble_probs(logits, view_logits, 4.0, view_weight=0.0), soften(logits, 4.0))
    feature = ensemble_feature(logits, view_logits)
    torch.testing.assert_close(feature, torch.cat([logits[:, None], view_logits], 1).mean(1))


MASSES = {1: 1.406, 2: 1.722, 3: 1.990, 4: 2.226, 5: 2.440, 6: 2.636}


@pytest.mark.parametrize("num_views", MASSES)
def test_15_released_rows_sum_to_their_mass(num_views: int) -> None:
    logits, view_logits = slow.random_inputs(num_views=num_views)
    probs = ensemble_probs(logits, view_logits, 4.0, view_weight=0.8, normalisation="length")
    assert probs.sum(-1).tolist() == pytest.approx([MASSES[num_views]] * 5, abs=5e-4)


def test_16_target_mass_multiplies_the_student_gradient() -> None:
    student, teacher = slow.random_inputs()[1][:, :2].unbind(1)
    target = soften(teacher, 4.0)
    single = gradient(lambda s: softened_kl(s, target, 4.0), student)
    scaled = gradient(lambda s: softened_kl(s, 2.44 * target, 4.0), student)
    torch.testing.assert_close(scaled, 2.44 * single, atol=1e-15, rtol=1e-12)


def test_17_gradient_of_the_mean_target_is_the_mean_gradient() -> None:
    student, views = slow.random_inputs()
    members = soften(views, 4.0)
    together = gradient(lambda s: softened_kl(s, members.mean(1), 4.0), student)
    each = [gradient(lambda s, m=member: softened_kl(s, m, 4.0), student) for member in members.unbind(1)]
    torch.testing.assert_close(together, torch.stack(each).mean(0), atol=1e-15, rtol=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_18_pseudo_logits_round_trip(temperature: float) -> None:
    probs = soften(slow.random_inputs()[0], 1.0)
    round_trip = soften(pseudo_logits(probs, temperature), temperature)
    torch.testing.assert_close(round_trip, probs, atol=1e-15, rtol=0)


def test_18_decoupled_parts_of_pseudo_logits_are_those_of_the_probabilities() -> None:
    probs, label = soften(slow.random_inputs()[0][0], 1.0), 2
    logits = pseudo_logits(probs, 4.0)
    others = torch.tensor([c for c in range(6) if c != label])
    rest = soften(logits[others], 4.0)
    torch.testing.assert_close(rest, probs[others] / (1 - probs[label]), atol=1e-14, rtol=0)
    torch.testing.assert_close(soften(logits, 4.0)[label], probs[label], atol=1e-15, rtol=0)


def test_ambiguity_decomposition_and_offset_identity() -> None:
    reference, views = slow.random_inputs()
    directions = unit(views)
    mean = directions.mean(1, keepdim=True)
    spread = float((directions - mean).square().sum(-1).mean())
    assert spread == pytest.approx(3 / 4 * (1 - pair_cosine(views)), abs=1e-9)
    error = (directions - unit(reference)[:, None]).square().sum(-1).mean()
    mixture_error = (mean[:, 0] - unit(reference)).square().sum(-1).mean()
    assert float(mixture_error) == pytest.approx(float(error) - spread, abs=1e-9)


def test_mixture_divergence_decomposes_the_members_divergence() -> None:
    logits, view_logits = slow.random_inputs()
    members = member_log_probs(logits, view_logits)
    other = soften(view_logits[:, 0].flip(1), 1.0).log()
    to_other = (members.exp() * (members - other[:, None])).sum(-1).mean(1)
    mixture = mixture_log_probs(members)
    mixture_to_other = (mixture.exp() * (mixture - other)).sum(-1)
    torch.testing.assert_close(mixture_to_other + mixture_divergence(members), to_other)


def test_label_ambiguity_bounds_what_the_mixture_gains() -> None:
    generator = torch.Generator().manual_seed(1)
    members = (3 * torch.randn(2000, 4, 7, dtype=torch.float64, generator=generator)).log_softmax(-1)
    labels = torch.randint(7, (2000,), generator=generator)
    pick = labels[:, None]
    mixture = -mixture_log_probs(members).gather(1, pick)[:, 0]
    mean_member = -members.gather(2, pick[:, None].expand(-1, 4, 1))[..., 0].mean(1)
    ambiguity = label_ambiguity(members, labels)
    assert (mixture <= mean_member - ambiguity + 1e-12).all()
    assert 0 <= ambiguity.min() <= ambiguity.max() <= 1 / 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_view_equal_to_its_teacher_has_finite_gradients(dtype: torch.dtype) -> None:
    reference, views = (tensor.to(dtype) for tensor in slow.random_inputs())
    views[:, 0] = reference[:, None][:, 0]
    for reduction in ("batch_mean", "per_sample"):
        slope = gradient(lambda v, r=reduction: intra_loss(reference, v, reduction=r), views)
        assert slope.isfinite().all()
    everywhere = reference[:, None].repeat(1, 4, 1)
    slope = gradient(lambda v: intra_loss(reference, v), everywhere)
    assert torch.equal(slope, torch.zeros_like(slope))


@pytest.mark.parametrize("scale", [0.0, 1e-8, 6e4])
def test_extreme_lengths_stay_finite_in_float16_input(scale: float) -> None:
    reference, views = (scale * tensor.float().clamp(-1, 1) for tensor in slow.random_inputs())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        parts = [*inter(reference.half(), views.half())[:2], intra_loss(reference.half(), views.half())]
    assert all(part.dtype == torch.float32 and part.isfinite() for part in parts)


def test_the_reference_never_receives_a_gradient() -> None:
    reference, views = slow.random_inputs(spread=0.2)
    reference.requires_grad_()
    views.requires_grad_()
    proximity, diversity, _ = inter(reference, views)
    (proximity + diversity + intra_loss(reference, views, offset_space="unit")).backward()
    assert reference.grad is None
    assert views.grad is not None
