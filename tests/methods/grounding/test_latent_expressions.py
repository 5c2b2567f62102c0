"""Subject, expressions, concepts and contrast of Latent-VG, each alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from methods.grounding.draws import Draws
from methods.grounding.latent_expressions import (
    ConceptInjector,
    ExpressionInitialiser,
    SubjectSelector,
    concept_weights,
    injected_concepts,
    margin_contrast,
    mean_map_difference,
    mean_pairwise_cosine,
    retrieved_concepts,
    subject_weights,
)

MASK = torch.arange(6) < torch.tensor([[4], [6], [3]])


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def draws(seed: int = 0, epoch: int = 0) -> Draws:
    return Draws(seed=torch.tensor(seed), indices=torch.arange(3), epoch=epoch)


def test_subject_weights_lie_on_words_only() -> None:
    scores = noise(3, 6)
    weights = subject_weights(scores, MASK, torch.tensor(0.07))
    assert torch.allclose(weights.sum(dim=1), torch.ones(3))
    assert float(weights[:, 0].abs().max()) == 0
    assert float(weights[~MASK].abs().max()) == 0
    candidates = scores.masked_fill(~MASK, -torch.inf)
    assert torch.equal(weights.argmax(dim=1), candidates[:, 1:].argmax(dim=1) + 1)


@pytest.mark.parametrize("temperature", [0.0, -0.07, 1e-9])
def test_a_temperature_that_wandered_off_stays_usable(temperature: float) -> None:
    assert subject_weights(noise(3, 6), MASK, torch.tensor(temperature)).isfinite().all()


def test_the_subject_is_fixed_without_draws_and_varies_with_them() -> None:
    torch.manual_seed(0)
    selector, words = SubjectSelector(8), noise(3, 6, 8)
    plain = selector(words, MASK, None)
    assert torch.equal(plain, selector(words, MASK, None))
    noisy = selector(words, MASK, draws())
    assert torch.equal(noisy, selector(words, MASK, draws()))
    assert not torch.equal(noisy, plain)
    assert not torch.equal(noisy, selector(words, MASK, draws(epoch=1)))


def initialiser(**changes: Any) -> ExpressionInitialiser:
    torch.manual_seed(0)
    settings = {"attribute_lengths": (2, 3), "word_drop": (0.5, 0.25), "drop_unit": "word"}
    return ExpressionInitialiser(8, text_length=6, **{**settings, **changes})


def test_attributes_are_mixed_along_the_words_and_pads_are_silent() -> None:
    built, words, subject = initialiser(), noise(3, 6, 8), noise(3, 1, 8, seed=1)
    first, second = built(words, MASK, subject, None)
    assert first.shape == (3, 4, 8)
    assert second.shape == (3, 5, 8)
    expected = torch.stack([words[0, 0], subject[0, 0], *(built.mixers[0][:, :3] @ words[0, 1:4])])
    assert torch.allclose(first[0], built.norms[0](expected), atol=1e-6)
    changed = torch.where(MASK[..., None], words, 100 * words)
    assert torch.equal(built(changed, MASK, subject, None)[1], second)


def test_a_shorter_batch_means_the_same() -> None:
    built, words, subject = initialiser(), noise(3, 6, 8), noise(3, 1, 8, seed=1)
    words[:, 4:] = 0
    mask = MASK & (torch.arange(6) < 4)
    long, short = built(words, mask, subject, None), built(words[:, :4], mask[:, :4], subject, None)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(long, short, strict=True))


@pytest.mark.parametrize(("unit", "whole"), [("word", True), ("element", False)])
def test_words_are_missed_at_the_rate_and_survivors_are_stronger(unit: str, whole: bool) -> None:
    built = initialiser(drop_unit=unit)
    heard = built._heard(torch.ones(4000, 5, 8), 0, Draws(seed=torch.tensor(0), indices=torch.arange(4000)))
    assert set(heard.unique().tolist()) == {0.0, 2.0}
    assert float(heard.mean()) == pytest.approx(1, abs=0.03)
    assert bool((heard == heard[..., :1]).all()) is whole


def test_concepts_begin_orthonormal() -> None:
    torch.manual_seed(0)
    bank = ConceptInjector(64, 20, concept_temperature=0.1, slot_temperature=0.1, is_residual=True).bank
    assert float((bank @ bank.T).detach().sub(torch.eye(20)).abs().max()) < 1e-6


def test_concepts_gather_from_fitting_patches_only() -> None:
    bank, patches, sentence = noise(5, 8), noise(2, 9, 8, seed=1), noise(2, 8, seed=2)
    weights = concept_weights(bank, patches, sentence, 0.1)
    fit = torch.cosine_similarity(patches, sentence[:, None], dim=-1)
    is_less = fit < fit.mean(dim=1, keepdim=True)
    assert is_less.any(dim=1).all()
    assert float((weights * is_less[:, None]).max()) == 0
    assert torch.allclose(weights.sum(dim=-1), torch.ones(2, 5))


def test_patches_that_are_all_alike_are_all_targets() -> None:
    patches = torch.full((1, 7, 8), 0.1)
    assert concept_weights(noise(5, 8), patches, noise(1, 8), 0.1).isfinite().all()


def test_injection_equals_a_loop() -> None:
    slots, concepts = noise(1, 4, 8, dtype=torch.float64), noise(1, 5, 8, seed=1, dtype=torch.float64)
    expected = torch.zeros(4, 8, dtype=torch.float64)
    for concept in concepts[0]:
        likeness = [float(torch.cosine_similarity(slot, concept, dim=0)) / 0.1 for slot in slots[0]]
        total = sum(math.exp(value) for value in likeness)
        for number, value in enumerate(likeness):
            expected[number] += math.exp(value) / total * concept
    assert torch.allclose(injected_concepts(slots, concepts, 0.1)[0], expected, atol=1e-12)


def test_what_slots_take_adds_up_to_what_there_is() -> None:
    slots, concepts = noise(3, 14, 8), noise(3, 20, 8, seed=1)
    injected = injected_concepts(slots, concepts, 0.1)
    assert torch.allclose(injected.sum(dim=1), concepts.sum(dim=1), atol=1e-4)


def test_order_of_patches_is_nothing_and_order_of_slots_is_order_of_results() -> None:
    torch.manual_seed(0)
    injector = ConceptInjector(8, 5, concept_temperature=0.1, slot_temperature=0.1, is_residual=True)
    slots, patches, sentence = noise(2, 6, 8), noise(2, 9, 8, seed=1), noise(2, 8, seed=2)
    expected = injector(slots, patches, sentence)
    assert torch.allclose(injector(slots, patches[:, torch.randperm(9)], sentence), expected, atol=1e-5)
    order = torch.randperm(6)
    assert torch.allclose(injector(slots[:, order], patches, sentence), expected[:, order], atol=1e-5)


def test_bare_cosines_make_all_slots_alike_and_sharper_ones_do_not() -> None:
    """The trap of the form that was described: width 128, 64 patches, 100 concepts, 14 slots."""
    torch.manual_seed(0)
    slots, patches, sentence = noise(4, 14, 128), noise(4, 64, 128, seed=1), noise(4, 128, seed=2)
    bank = ConceptInjector(128, 100, concept_temperature=1, slot_temperature=1, is_residual=False).bank

    def likeness(concept_temperature: float, slot_temperature: float) -> tuple[float, float]:
        concepts = retrieved_concepts(bank, patches, sentence, concept_temperature)
        injected = injected_concepts(slots, concepts, slot_temperature)
        return float(mean_pairwise_cosine(concepts)), float(mean_pairwise_cosine(injected))

    assert likeness(1.0, 1.0) == pytest.approx((0.991, 1.0), abs=2e-3)
    concepts, slots_at_01 = likeness(0.1, 0.1)
    assert concepts == pytest.approx(0.51, abs=0.05)
    assert slots_at_01 == pytest.approx(0.978, abs=0.01)
    assert likeness(0.1, 0.05)[1] == pytest.approx(0.929, abs=0.02)


def contrast(sentence: Tensor, expressions: Tensor, **changes: Any) -> Tensor:
    settings = {"margin": 0.2, "temperature": 0.07, "denominator": "with_margin"}
    return margin_contrast(sentence, expressions, **{**settings, **changes})


ANGLES = (0, 15, 30, 45, 60, 75, 90)
PUBLISHED = {
    "with_margin": (0, 0, 0, 1e-5, 3e-4, 0.010, 0.388),
    "raw": (0, -1.85, -3.57, 2e-4, 0.005, 0.167, 3.57),
    "negatives_only": (0, 0, 0, 5.05, 6.19, 6.90, 7.14),
}


@pytest.mark.parametrize("denominator", PUBLISHED)
def test_pull_by_angle(denominator: str) -> None:
    """Two samples with orthogonal sentences; the expression of the first is turned away from its own."""
    sentence = torch.eye(3, dtype=torch.float64)[:2]
    for degrees, expected in zip(ANGLES, PUBLISHED[denominator], strict=True):
        angle = torch.tensor(math.radians(degrees), dtype=torch.float64, requires_grad=True)
        turned = torch.stack([angle.cos(), torch.zeros_like(angle), angle.sin()])
        expressions = torch.stack([turned, sentence[1]])[:, None]
        (pull,) = torch.autograd.grad(contrast(sentence, expressions, denominator=denominator), angle)
        assert float(pull) == pytest.approx(expected, rel=0.06, abs=2e-5), degrees


@pytest.mark.parametrize("denominator", PUBLISHED)
def test_contrast_equals_a_loop(denominator: str) -> None:
    sentence, expressions = noise(4, 6, dtype=torch.float64), noise(4, 3, 6, seed=1, dtype=torch.float64)
    terms = []
    for b in range(4):
        for i in range(3):
            cosines = [
                float(torch.cosine_similarity(sentence[b], expressions[k, i], dim=0)) for k in range(4)
            ]
            positive = min(1, 0.3 + cosines[b]) / 0.1
            logits = [cosine / 0.1 for k, cosine in enumerate(cosines) if k != b]
            logits += {"with_margin": [positive], "raw": [cosines[b] / 0.1], "negatives_only": []}[
                denominator
            ]
            terms.append(math.log(sum(math.exp(logit) for logit in logits)) - positive)
    found = contrast(sentence, expressions, margin=0.3, temperature=0.1, denominator=denominator)
    assert float(found) == pytest.approx(sum(terms) / len(terms), rel=1e-10)


@pytest.mark.parametrize("denominator", ["with_margin", "raw"])
def test_no_margin_is_plain_contrast(denominator: str) -> None:
    sentence, expressions = noise(4, 6), noise(4, 2, 6, seed=1)
    unit = torch.nn.functional.normalize
    logits = torch.einsum("bd,gnd->bng", unit(sentence, dim=-1), unit(expressions, dim=-1)) / 0.07
    own = torch.stack([logits[b, :, b] for b in range(4)])
    assert torch.equal(
        contrast(sentence, expressions, margin=0.0, denominator=denominator),
        (logits.logsumexp(-1) - own).mean(),
    )


def test_a_wider_margin_costs_less_and_is_never_negative() -> None:
    sentence, expressions = noise(8, 16), noise(8, 2, 16, seed=1)
    losses = [float(contrast(sentence, expressions, margin=margin)) for margin in (0, 0.1, 0.2, 0.4, 0.8)]
    assert losses == sorted(losses, reverse=True)
    assert len(set(losses)) == 5
    assert losses[-1] >= 0


def test_inside_the_margin_the_own_pair_is_free() -> None:
    sentence = torch.tensor([[1.0, 0, 0], [0, 1, 0]], dtype=torch.float64)
    near = torch.tensor([[0.95, 0.0, 0.312], [0.0, 0.95, 0.312]], dtype=torch.float64)[
        :, None
    ].requires_grad_()
    assert float(torch.cosine_similarity(sentence[0], near[0, 0].detach(), dim=0)) > 0.8
    (gradient,) = torch.autograd.grad(contrast(sentence, near), near)
    # What is left turns each away from the other sample's sentence only.
    assert float(gradient[0, 0, 0].abs()) < 1e-12
    assert float(gradient[0, 0, 1].abs()) > 0


@pytest.mark.parametrize("denominator", PUBLISHED)
def test_a_single_sample_costs_nothing(denominator: str) -> None:
    sentence, expressions = noise(1, 6).requires_grad_(), noise(1, 2, 6, seed=1).requires_grad_()
    loss = contrast(sentence, expressions, denominator=denominator)
    loss.backward()
    assert float(loss.detach()) == 0
    assert sentence.grad is not None
    assert float(sentence.grad.abs().max()) == 0


def test_shares_of_a_batch_average_to_the_whole() -> None:
    sentence, expressions = noise(6, 8), noise(6, 2, 8, seed=1)
    parts = [
        contrast(sentence[rows], expressions[rows], all_expressions_GND=expressions, first=first)
        for rows, first in ((slice(0, 3), 0), (slice(3, 6), 3))
    ]
    assert float(sum(parts) / 2) == pytest.approx(float(contrast(sentence, expressions)), rel=1e-6)


def test_diagnostics() -> None:
    assert float(mean_pairwise_cosine(torch.ones(2, 5, 3))) == pytest.approx(1)
    assert float(mean_pairwise_cosine(torch.eye(4)[None])) == pytest.approx(0, abs=1e-6)
    logits = torch.tensor([0.0, 0.0, math.log(3)]).view(1, 3, 1, 1)
    assert float(mean_map_difference(logits)) == pytest.approx((0 + 0.25 + 0.25) / 3)
