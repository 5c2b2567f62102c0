"""Shared-RIS: what is shared, what order means, and what its settings do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from grounding_samples import TASK, make_batch

from methods.grounding.shared_decoder import SharedMaskDecoder, SharedProjection
from methods.grounding.shared_ris import SharedRIS, SharedRISNetwork, SharedRISSettings

SMALL = SharedRIS.presets["shared_ris_small"]
TINY: dict[str, Any] = {**SMALL, "width": 48, "num_layers": 3, "channels": 16, "taps": (2, 3)}
PYRAMID: dict[str, Any] = {**TINY, "pyramid": True, "taps": (1, 2, 3)}


def network(*, seed: int = 0, **changes: Any) -> SharedRISNetwork:
    torch.manual_seed(seed)
    return SharedRISNetwork(SharedRISSettings(**{**TINY, **changes}), TASK)


def num_parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_a_shared_projection_is_one_for_pixels_and_words() -> None:
    shared, own = (SharedProjection(8, 6, is_shared=is_shared) for is_shared in (True, False))
    vector = torch.randn(1, 1, 8)
    pixels, words = shared(vector, vector)
    assert torch.equal(pixels, words)
    assert not torch.equal(*own(vector, vector))
    assert num_parameters(shared) == 2 * 8 + 8 * 6 + 6
    assert num_parameters(own) == 2 * num_parameters(shared)


@torch.no_grad()
def test_the_mask_decoder_knows_no_order_of_pixels_and_no_pads() -> None:
    torch.manual_seed(0)
    decoder = SharedMaskDecoder(16, 4, 2)
    maps, words, mask = (
        torch.randn(2, 16, 3, 3),
        torch.randn(2, 5, 16),
        torch.arange(5) < torch.tensor([[3], [5]]),
    )
    pixels, text = decoder(maps, words, mask)
    order = torch.randperm(9)
    turned = maps.flatten(2)[..., order].view(2, 16, 3, 3)
    again, _ = decoder(turned, words, mask)
    assert torch.allclose(again.flatten(2), pixels.flatten(2)[..., order], atol=1e-5)
    others, text_again = decoder(maps, torch.where(mask[..., None], words, 50.0), mask)
    assert torch.equal(others, pixels)
    assert torch.equal(text_again[mask], text[mask])


@torch.no_grad()
def test_without_decoder_layers_language_still_reaches_the_mask() -> None:
    built, batch = network(decoder_layers=0).eval(), make_batch(2)
    assert num_parameters(built.mask_decoder) == 0
    other = batch.token_ids.clone()
    other[0, 1] = other[0, 1] % 20 + 6
    before, after = built(batch).pixel_embed, built(batch._replace(token_ids=other)).pixel_embed
    assert not torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])


@torch.no_grad()
def test_two_towers_have_the_same_weights_and_meet_in_the_mask_decoder() -> None:
    single, dual = network().eval(), network(encoder="dual").eval()
    dual.load_state_dict(single.state_dict())
    batch = make_batch(2)
    assert not torch.equal(dual(batch).mask_logits, single(batch).mask_logits)
    apart = network(encoder="dual", decoder_layers=0).eval()
    for built, is_reached in ((dual, True), (apart, False)):
        before = built(batch).pixel_embed
        after = built(
            batch._replace(token_ids=batch.token_ids.roll(1, 0), token_mask=batch.token_mask.roll(1, 0))
        )
        assert torch.equal(before, after.pixel_embed) != is_reached


@torch.no_grad()
@pytest.mark.parametrize(("stride", "length"), [(16, 64), (32, 16)])
def test_the_decoded_level(stride: int, length: int) -> None:
    built = network(**PYRAMID, decoder_stride=stride).eval()
    seen: list[int] = []
    built.mask_decoder.layers[0].register_forward_hook(
        lambda module, arguments, tokens: seen.append(tokens.shape[1])
    )
    output = built(make_batch(2))
    assert seen == [length + 12]
    assert output.pixel_embed.shape == (2, 16, 32, 32)


@torch.no_grad()
def test_the_mean_of_words_leaves_pads_out() -> None:
    built, batch = network(sentence="mean_of_words").eval(), make_batch(2)
    words = torch.randn(2, 12, 16)
    real = [words[row][batch.token_mask[row]].mean(dim=0) for row in range(2)]
    assert torch.allclose(built._sentence(words, batch.token_mask), torch.stack(real), atol=1e-6)


@pytest.mark.parametrize(("preset", "millions"), [("shared_ris_small", 1.02), ("shared_ris_small_64", 1.81)])
def test_small_sizes(preset: str, millions: float) -> None:
    """Within 2 %: the reference's decoder is a little leaner than the form that is described."""
    size = 64 if "64" in preset else 48
    task = type(TASK)(**{**{name: getattr(TASK, name) for name in TASK.__slots__}, "image_size": size})
    built = SharedRISNetwork(SharedRISSettings(**SharedRIS.presets[preset]), task)
    assert num_parameters(built) / 1e6 == pytest.approx(millions, rel=0.02)


def test_published_size() -> None:
    task = type(TASK)(**{**{name: getattr(TASK, name) for name in TASK.__slots__}, "image_size": 480})
    with torch.device("meta"):
        built = SharedRISNetwork(SharedRISSettings(**SharedRIS.presets["shared_ris_base"]), task)
    around = num_parameters(built) - num_parameters(built.encoder)
    assert around / 1e6 == pytest.approx(5, abs=1)


@pytest.mark.parametrize(
    ("base", "setting", "other"),
    [
        ({**PYRAMID, "decoder_layers": 0}, "decoder_stride", 32),
        ({**TINY, "decoder_layers": 0}, "decoder_heads", 4),
        (TINY, "decoder_stride", 32),
        (TINY, "box_giou_weight", 1.0),
    ],
)
def test_what_has_no_effect_is_known_and_has_none(base: dict[str, Any], setting: str, other: Any) -> None:
    assert setting in SharedRIS.inactive(SharedRISSettings(**base))
    first, second = network(**base), network(**{**base, setting: other})
    assert torch.equal(first(make_batch(2)).mask_logits, second(make_batch(2)).mask_logits)


def test_what_has_an_effect_is_not_called_idle() -> None:
    settings = SharedRISSettings(**PYRAMID, encoder="dual", box_head=True, empty_head=True)
    assert SharedRIS.inactive(settings) == frozenset()


def test_a_single_encoder_keeps_the_keys_from_before_there_was_a_choice() -> None:
    assert SharedRIS.inactive(SharedRISSettings(**PYRAMID)) >= {"encoder"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"taps": ()}, "taps must be rising layers"),
        ({"taps": (3, 2)}, "taps must be rising layers"),
        ({"taps": (1, 2)}, "end with the last one"),
        ({"pyramid": True}, "three layers for a pyramid"),
        ({"decoder_layers": 4}, "decoder_layers"),
        ({"decoder_heads": 5}, "decoder_heads must divide"),
        ({"decoder_stride": 8}, "decoder_stride"),
        ({"sentence": "last"}, "sentence must be one of"),
        ({"encoder": "triple"}, "encoder must be one of"),
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SharedRISSettings(**{**TINY, **changes})
