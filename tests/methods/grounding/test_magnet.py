"""MagNet: what its trunk and auxiliary losses do, cost and leave behind, and what is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from grounding_builds import DEFORMABLE, magnet, num_parameters, rows, values
from grounding_samples import TASK, make_batch
from torch import nn

from methods.grounding.magnet import MagNet
from methods.grounding.scale_decoders import FourScalePyramid

OFF = {"ground_weight": 0.0, "align_pixel_weight": 0.0, "align_text_weight": 0.0}


def test_size_and_share_of_what_is_thrown_away() -> None:
    method = magnet()
    in_use, all_of_it = num_parameters(method.network), num_parameters(method)
    assert in_use == 2_196_673
    assert 0.02 < (all_of_it - in_use) / all_of_it < 0.04
    assert num_parameters(magnet(swin_width=24).network) == pytest.approx(3.86e6, rel=0.01)
    assert not any("predictor" in name for name in method.artifact().state_dict())


def test_at_first_the_trunk_is_that_without_gates() -> None:
    method, batch = magnet().eval(), make_batch()
    with torch.no_grad():
        before = method.network(batch)
        for module in method.modules():
            if hasattr(module, "gate"):
                module.gate = _Open()
        after = method.network(batch)
    assert torch.equal(before.mask_logits, after.mask_logits)
    assert torch.equal(before.sentence_embed, after.sentence_embed)


@torch.no_grad()
def test_the_small_pyramid_knows_where_it_is_on_every_scale() -> None:
    """The same content everywhere comes out differently near the border, whichever scale holds the content."""
    torch.manual_seed(0)
    pyramid = FourScalePyramid((4, 8, 16, 32), 16)
    sizes = ((4, 48), (8, 24), (16, 12), (32, 6))
    for filled in range(1, 4):
        maps = [
            torch.full((1, width, side, side), float(number == filled))
            for number, (width, side) in enumerate(sizes)
        ]
        found = pyramid(maps)
        assert found.shape == (1, 16, 48, 48)
        # Two pixels from the border: further than the padding of the last block itself reaches.
        assert float((found[..., 24, 2] - found[..., 24, 24]).abs().max()) > 1e-3


class _Open(nn.Module):
    def forward(self, values: torch.Tensor, gathered: torch.Tensor) -> torch.Tensor:
        return values


@pytest.mark.parametrize("changes", [{}, DEFORMABLE], ids=["pyramid", "deformable"])
def test_every_parameter_gets_a_gradient_after_one_step(changes: dict[str, Any]) -> None:
    method, batch = magnet(**changes), make_batch()
    optimizer = torch.optim.SGD(method.parameters(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        step = method(batch)
        step.total.backward()
        optimizer.step()
    assert all(loss.value.isfinite() for loss in step.losses.values())
    # A single query attends to itself alone, whatever its query and key projections are.
    still = [
        name
        for name, item in method.named_parameters()
        if item.grad is None or (item.grad.abs().sum() == 0 and "self_attn" not in name)
    ]
    assert still == []


def test_weights_of_zero_leave_their_term_and_its_modules_out() -> None:
    losses = {
        "ground_weight": "ground",
        "align_pixel_weight": "align_pixel",
        "align_text_weight": "align_text",
    }
    for weight, loss in losses.items():
        found = magnet(**{weight: 0.0})(make_batch()).losses
        assert set(found) == {"mask_bce", "mask_dice", *losses.values()} - {loss}
    assert magnet(ground_weight=0.0).word_predictor is None
    assert magnet(word_mask_probability=0.0, select_at_least_one=False).word_predictor is None
    assert set(magnet(**OFF)(make_batch()).losses) == {"mask_bce", "mask_dice"}


def test_a_shared_pass_reads_the_masked_sentence_once_and_a_separate_one_both() -> None:
    batch = make_batch(3)
    for grounding_pass, num_passes in (("shared", 1), ("separate", 2)):
        method, seen = magnet(grounding_pass=grounding_pass), []
        method.network.register_forward_pre_hook(
            lambda _, inputs, seen=seen: seen.append(inputs[0].token_ids)
        )
        step = method(batch)
        assert len(seen) == num_passes
        hidden = method.selection(batch).token_ids
        assert torch.equal(seen[-1], hidden)
        assert not torch.equal(hidden, batch.token_ids)
        assert torch.equal(seen[0], batch.token_ids) == (num_passes == 2)
        step.total.backward()


def test_other_words_are_hidden_in_another_epoch_and_the_same_again_in_this_one() -> None:
    method, batch = magnet(), make_batch(8)
    first, again = method.selection(batch), method.selection(batch)
    later = method.selection(batch._replace(epoch=1))
    assert torch.equal(first.selected, again.selected)
    assert not torch.equal(first.selected, later.selected)
    part = batch._replace(
        **{name: getattr(batch, name)[3:5] for name in ("token_ids", "token_mask", "indices")}
    )
    assert torch.equal(method.selection(part).selected, first.selected[3:5])


def test_padding_and_auxiliary_heads_do_not_change_what_is_seen_in_use() -> None:
    method, plain, batch = magnet().eval(), magnet(**OFF).eval(), make_batch(3)
    plain.network.load_state_dict(method.network.state_dict())
    padded = batch._replace(token_ids=batch.token_ids.masked_fill(~batch.token_mask, 21))
    with torch.no_grad():
        logits = method.network(batch).mask_logits
        assert torch.equal(plain.network(batch).mask_logits, logits)
        assert torch.equal(method.network(padded).mask_logits, logits)


def test_the_deformable_decoder_gives_the_shapes_of_the_pyramid() -> None:
    batch = make_batch(2)
    with torch.no_grad():
        small, large = magnet().eval().network(batch), magnet(**DEFORMABLE).eval().network(batch)
    assert small.mask_logits.shape == large.mask_logits.shape == (2, 1, 48, 48)
    assert small.pixel_embed.shape == (2, 48, 24, 24)
    assert large.pixel_embed.shape == (2, 32, 24, 24)
    assert large.sentence_embed.shape == (2, 32)
    assert torch.allclose(large.sentence_embed.norm(dim=1), torch.ones(2))


def test_first_weights_of_the_deformable_decoder_are_drawn_and_not_left_over() -> None:
    first, again, other = (magnet(seed=seed, **DEFORMABLE).network for seed in (0, 0, 1))
    for name, value in first.state_dict().items():
        assert value.isfinite().all() if value.is_floating_point() else True, name
        assert torch.equal(value, again.state_dict()[name]), name
    assert not torch.equal(first.scales.decoder.level_embed, other.scales.decoder.level_embed)
    offsets = first.scales.decoder.encoder.layers[0].self_attn.sampling_offsets
    assert offsets.weight.abs().sum() == 0
    assert offsets.bias.abs().sum() > 0


def test_losses_of_a_batch_are_those_of_its_shares() -> None:
    """So that two workers train as one, whatever words and pixels are drawn. The last row has too few pixels."""
    method, batch = magnet(), make_batch(5)
    masks = batch.masks.clone()
    masks[4] = 0
    batch = batch._replace(masks=masks)
    whole, first, second = (values(method, rows(batch, part)) for part in (slice(5), slice(3), slice(3, 5)))
    assert len(whole) == 5
    for name, value in whole.items():
        assert (3 * first[name] + 2 * second[name]) / 5 == pytest.approx(value, rel=1e-4), name


INACTIVE: list[tuple[dict[str, Any], set[str]]] = [
    ({}, {"mask_bias"}),
    ({"ground_weight": 0.0}, {"word_mask_probability", "grounding_pass", "predictor_layers"}),
    ({"word_mask_probability": 0.0, "select_at_least_one": False}, {"ground_weight", "predictor_layers"}),
    ({"align_pixel_weight": 0.0, "align_text_weight": 0.0}, {"align_temperature", "num_positives"}),
    ({"decoder": "pyramid"}, {"decoder_layers", "query_layers", "decoder_heads"}),
]


@pytest.mark.parametrize(("changes", "names"), INACTIVE)
def test_settings_that_cannot_matter_are_known(changes: dict[str, Any], names: set[str]) -> None:
    settings = MagNet.Settings(**changes)
    inactive = MagNet.inactive(settings)
    assert names <= inactive <= {field.name for field in dataclasses.fields(settings)}
    assert bool(changes) or not {"align_temperature", "word_mask_probability", "decoder_layers"} & inactive
    assert "align_temperature" not in MagNet.inactive(MagNet.Settings(align_pixel_weight=0.0))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"word_mask_probability": 1.5}, "word_mask_probability must lie between 0 and 1"),
        ({"pool_sizes": (1, 1)}, "pool_sizes must be different sides"),
        ({"ground_inputs": ("words",)}, "ground_inputs must be some of image, mask"),
        ({"predictor_heads": 5}, "predictor_heads must divide bert_width 96"),
        ({"swin_heads": (2, 2, 4)}, "swin_depths and swin_heads must each name 4 stages"),
        ({"swin_heads": (2, 2, 4, 5)}, "each stage's width one of its heads"),
        ({"bert_layers": 5}, "bert_layers must be a multiple of 4"),
        ({"bert_heads": 7}, "bert_width must be a multiple of bert_heads"),
        ({"num_positives": 1}, "num_positives must be at least 2"),
        ({"decoder": "deformable"}, "channels must be a multiple of 32"),
        ({"align_temperature": 0.0}, "align_temperature must be"),
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        MagNet.Settings(**{**MagNet.presets["magnet_small"], **changes})


@pytest.mark.parametrize(
    ("task", "changes", "words"),
    [
        ({"image_size": 40}, {}, "cannot be halved 3 times"),
        ({}, {"table_text_length": 8}, "table_text_length is 8, but sentences have 12"),
        ({"may_be_empty": True}, {}, "set empty_head: true"),
    ],
)
def test_data_that_does_not_fit_is_refused(task: dict[str, Any], changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        magnet(task=dataclasses.replace(TASK, **task), **changes)
