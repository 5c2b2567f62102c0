"""Latent-VG as a whole: without latent expressions, its exchange, its settings, several workers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from grounding_samples import GENERALISED, TASK, make_batch

from methods.grounding.contracts import GroundingTask
from methods.grounding.heads import DotHead
from methods.grounding.latent_network import LatentVGNetwork
from methods.grounding.latent_settings import LatentVGSettings
from methods.grounding.latent_vg import LatentVG
from methods.grounding.multiway import MultiwayEncoder
from methods.grounding.pixel_decoder import PixelDecoder, resized

SMALL = LatentVG.presets["latent_vg_small"]
TINY: dict[str, Any] = {**SMALL, "width": 48, "num_layers": 3, "channels": 16}


def settings(**changes: Any) -> LatentVGSettings:
    return LatentVGSettings(**{**TINY, **changes})


def network(task: GroundingTask = TASK, *, seed: int = 0, **changes: Any) -> LatentVGNetwork:
    torch.manual_seed(seed)
    return LatentVGNetwork(settings(**changes), task)


def method(*, seed: int = 0, task: GroundingTask = TASK, **changes: Any) -> LatentVG:
    torch.manual_seed(seed)
    return LatentVG(settings(**changes), task=task, model=None, inputs={})


@torch.no_grad()
def test_without_latent_expressions_it_is_encoder_decoder_and_head() -> None:
    built, batch = network(attribute_lengths=(), num_concepts=16), make_batch(2)
    encoder = MultiwayEncoder(settings(), image_size=48, text_length=12, vocabulary_size=34)
    decoder, head = PixelDecoder(48, 16, is_pyramid=False), DotHead(48, 16, bias=-2.0)
    for part, name in ((encoder, "encoder"), (decoder, "pixel_decoder"), (head, "mask_head")):
        part.load_state_dict(built.get_submodule(name).state_dict())
    vision, text = encoder(batch.images, batch.token_ids, batch.token_mask)
    expected = resized(head(decoder([vision[:, 1:]]), text[:, :1]), (48, 48))
    output = built(batch)
    assert torch.equal(output.mask_logits, expected)
    assert output.expression_logits is None
    assert {name.partition(".")[0] for name in built.state_dict()} == {
        "encoder",
        "pixel_decoder",
        "mask_head",
    }


@pytest.mark.parametrize(
    ("preset", "changes", "millions"),
    [
        ("latent_vg_small", {}, 1.06),
        ("latent_vg_small", {"attribute_lengths": ()}, 0.98),
        ("latent_vg_small_64", {}, 1.87),
    ],
)
def test_small_sizes(preset: str, changes: dict[str, Any], millions: float) -> None:
    task = GroundingTask(
        image_size=64 if "64" in preset else 48,
        **{name: getattr(TASK, name) for name in ("text_length", "vocabulary_size", "start_id", "end_id", "pad_id", "mask_id")},
    )  # fmt: skip
    built = LatentVGNetwork(LatentVGSettings(**{**LatentVG.presets[preset], **changes}), task)
    assert sum(p.numel() for p in built.parameters()) / 1e6 == pytest.approx(millions, abs=0.005)


def test_published_size() -> None:
    task = GroundingTask(
        image_size=480, text_length=20, vocabulary_size=64_010, start_id=0, end_id=2, pad_id=1, mask_id=64_001
    )
    with torch.device("meta"):
        built = LatentVGNetwork(LatentVGSettings(**LatentVG.presets["latent_vg_base"]), task)
    branches = [branch.feed_forward for layer in built.branches for branch in layer]
    assert sum(p.numel() for part in branches for p in part[:1].parameters()) / 1e6 == pytest.approx(
        14.2, abs=0.05
    )
    assert sum(p.numel() for p in built.encoder.layers.parameters()) == 170_293_248


@torch.no_grad()
@pytest.mark.parametrize("distributes", [True, False])
def test_after_every_layer_the_subject_is_what_vision_made_of_it(distributes: bool) -> None:
    built, batch = network(use_subject_distributor=distributes).eval(), make_batch(2)
    seen: list[torch.Tensor] = []
    for layer in built.encoder.layers:
        layer.register_forward_hook(lambda module, arguments, tokens: seen.append(tokens))
    built(batch)
    num_vision, num_text = 1 + built.encoder.num_patches, batch.token_ids.shape[1]
    first = num_vision + num_text
    starts = (first, first + 2 + 4)
    assert len(seen) == 3
    for tokens in seen:
        assert tokens.shape[1] == starts[1] + 2 + 10
        for start in starts:
            assert torch.equal(tokens[:, start + 1], tokens[:, 0]) is distributes


@torch.no_grad()
def test_draws_reach_training_only() -> None:
    built, batch = method(), make_batch(2)
    built.network.eval()
    fixed = built(batch).losses["mask_bce"].value
    assert torch.equal(built(batch._replace(epoch=1)).losses["mask_bce"].value, fixed)
    built.network.train()
    first = built(batch).losses["mask_bce"].value
    assert not torch.equal(first, fixed)
    assert torch.equal(built(batch).losses["mask_bce"].value, first)
    assert not torch.equal(built(batch._replace(epoch=1)).losses["mask_bce"].value, first)
    other = method()
    other.seed += 1
    assert not torch.equal(other(batch).losses["mask_bce"].value, first)


@torch.no_grad()
def test_the_mask_is_the_mean_of_probabilities_at_full_size() -> None:
    output = network().eval()(make_batch(2))
    assert output.expression_logits is not None
    assert output.expression_logits.shape == (2, 3, 32, 32)
    mean = resized(output.expression_logits, (48, 48)).sigmoid().mean(dim=1, keepdim=True)
    assert float((output.mask_logits.sigmoid() - mean).abs().max()) < 1e-6


@torch.no_grad()
def test_the_empty_token_is_seen_by_the_rest_and_answers() -> None:
    built, batch = network(GENERALISED, empty_head=True).eval(), make_batch(3)
    before = built(batch)
    assert before.empty_logit is not None
    assert before.empty_logit.shape == (3,)
    built.empty_token += 1
    after = built(batch)
    assert not torch.equal(after.empty_logit, before.empty_logit)
    assert not torch.equal(after.mask_logits, before.mask_logits)


def test_contrast_has_the_weight_it_was_given() -> None:
    step = method(contrast_weight=0.3)(make_batch(4))
    assert step.losses["contrast"].weight == 0.3
    assert set(step.losses) == {"mask_bce", "mask_dice", "contrast"}
    assert set(step.metrics) == {"slot_cosine", "map_difference"}
    without = method(attribute_lengths=())(make_batch(4))
    assert set(without.losses) == {"mask_bce", "mask_dice"}
    assert without.metrics == {}


@pytest.mark.parametrize(
    ("base", "setting", "other"),
    [
        ({"attribute_lengths": ()}, "margin", 0.5),
        ({"attribute_lengths": ()}, "contrast_weight", 0.7),
        ({"attribute_lengths": ()}, "word_drop", (0.4,)),
        ({"attribute_lengths": ()}, "num_concepts", 16),
        ({"attribute_lengths": ()}, "use_concept_injector", False),
        ({"contrast_weight": 0.0}, "margin", 0.5),
        ({"contrast_weight": 0.0}, "contrast_temperature", 0.3),
        ({"contrast_weight": 0.0}, "denominator", "raw"),
        ({"use_concept_injector": False}, "num_concepts", 16),
        ({"use_concept_injector": False}, "slot_temperature", 0.5),
        ({"use_concept_injector": False}, "inject", "replace"),
        ({"use_concept_injector": False, "use_subject_distributor": False}, "inject_at", "after_attention"),
        ({"word_drop": (0.0,)}, "drop_unit", "element"),
        ({}, "box_l1_weight", 1.0),
        ({}, "empty_weight", 1.0),
    ],
)
def test_what_has_no_effect_is_known_and_has_none(base: dict[str, Any], setting: str, other: Any) -> None:
    assert setting in LatentVG.inactive(settings(**base))
    first, second = method(**base), method(**base, **{setting: other})
    assert torch.equal(first(make_batch(2)).total, second(make_batch(2)).total)


def test_what_has_an_effect_is_not_called_idle() -> None:
    idle = LatentVG.inactive(settings(box_head=True, empty_head=True))
    assert idle == frozenset()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attribute_lengths": (4, 0)}, "attribute_lengths must be at least 1"),
        ({"word_drop": ()}, "word_drop must be rates"),
        ({"word_drop": (1.0,)}, "word_drop must be rates of at least 0 and below 1"),
        ({"num_concepts": 49}, "num_concepts must be at most the width"),
        ({"margin": -0.1}, "margin"),
        ({"margin": 2.5}, "margin must be at most 2"),
        ({"contrast_temperature": 0.0}, "contrast_temperature"),
        ({"denominator": "both"}, "denominator must be one of"),
        ({"mask_bce_weight": 0.0, "mask_dice_weight": 0.0}, "both 0"),
        ({"empty_head": True, "empty_weight": 0.0}, "empty_head is on"),
        ({"box_head": True, "box_l1_weight": 0.0, "box_giou_weight": 0.0}, "box_head is on"),
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(**changes)


@pytest.mark.parametrize(
    ("rates", "expected"), [((0.3,), (0.3, 0.3)), ((0.3, 0.1), (0.3, 0.1)), ((0.3, 0.1, 0.5), (0.3, 0.1))]
)
def test_the_last_rate_stands_for_all_that_follow(
    rates: tuple[float, ...], expected: tuple[float, ...]
) -> None:
    assert settings(word_drop=rates).word_drop_rates == expected
