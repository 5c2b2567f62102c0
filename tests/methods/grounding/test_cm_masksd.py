"""CM-MaskSD: what its masked branches see, cost and change, and what is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from grounding_builds import cm_masksd, num_parameters, rows, values
from grounding_samples import TASK, make_batch
from torch import Tensor, nn

from methods.grounding.clip_encoder import ClipEncoder
from methods.grounding.cm_masksd import CmMaskSD
from methods.grounding.contracts import GroundingBatch
from methods.grounding.text_decoder import DynamicHead, sine_positions

OFF = {"vision_weight": 0.0, "language_weight": 0.0}
NONE_HIDDEN = {"vision_mask_ratio": 0.01, "text_mask_ratio": 0.01}


def gradients(method: nn.Module, batch: GroundingBatch) -> dict[str, Tensor]:
    method.zero_grad()
    method(batch).total.backward()
    return {name: item.grad.clone() for name, item in method.named_parameters() if item.grad is not None}


def test_the_branches_cost_two_vectors_and_nothing_in_use() -> None:
    full, plain = cm_masksd(), cm_masksd(**OFF)
    assert num_parameters(full) - num_parameters(plain) == 2 * 64
    assert num_parameters(full.network) == num_parameters(plain.network) == 1_108_962
    batch = make_batch()
    with torch.no_grad():
        full.eval(), plain.eval()
        assert torch.equal(full.network(batch).mask_logits, plain.network(batch).mask_logits)


def test_masked_branches_hide_patches_and_words_by_correlation() -> None:
    method, batch = cm_masksd(), make_batch(4)
    output = method.network(batch)
    patches, words = (method.hidden(branch, output, batch) for branch in ("vision", "language"))
    assert patches.sum(dim=1).tolist() == [32] * 4
    num_words = batch.token_mask.sum(dim=1) - 2
    assert words.sum(dim=1).tolist() == [int(0.3 * int(count)) for count in num_words]
    cosine = torch.cosine_similarity(output.extras["patches"], output.extras["sentence"][:, None], dim=-1)
    for row in range(4):
        assert cosine[row][patches[row]].min() >= cosine[row][~patches[row]].max()


def test_without_a_weight_the_decoder_runs_once() -> None:
    for changes, calls in ((OFF, 1), ({"language_weight": 0.0}, 2), ({}, 3), ({"text_mask_ratio": 0.0}, 2)):
        method, seen = cm_masksd(**changes), []
        method.network.fusion.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        step = method(make_batch())
        assert len(seen) == calls
        assert ("language_agreement" in step.losses) == (
            not changes.keys() & {"language_weight", "text_mask_ratio"}
        )


def test_hiding_nothing_costs_nothing_and_moves_nothing() -> None:
    method, plain, batch = cm_masksd(**NONE_HIDDEN), cm_masksd(**OFF), make_batch(3)
    step = method(batch)
    assert abs(float(step.losses["vision_agreement"].value.detach())) < 1e-6
    assert abs(float(step.losses["language_agreement"].value.detach())) < 1e-6
    found, expected = gradients(method, batch), gradients(plain, batch)
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, atol=1e-5, rtol=1e-3), name


def test_agreement_reaches_shared_weights_but_not_the_main_logits() -> None:
    method, batch = cm_masksd(), make_batch()
    output = method.network(batch)
    output.mask_logits.retain_grad()
    losses = method.compute_losses(output, batch)
    (losses["vision_agreement"] + losses["language_agreement"]).backward()
    assert output.mask_logits.grad is None
    assert all(item.grad is not None for item in method.network.mask_head.parameters())
    assert all(item.grad is not None and item.grad.abs().sum() > 0 for item in method.stand_ins.values())


@pytest.mark.parametrize("mask_at", ["decoder_input", "encoder_input"])
@pytest.mark.parametrize("distill_on", ["logits", "features"])
def test_every_form_of_agreement_is_positive_and_trains_its_stand_ins(mask_at: str, distill_on: str) -> None:
    method = cm_masksd(mask_at=mask_at, distill_on=distill_on)
    step = method(make_batch())
    assert float(step.losses["vision_agreement"].value.detach()) > 0
    step.total.backward()
    assert all(item.grad is not None and item.grad.isfinite().all() for item in method.stand_ins.values())


def test_a_hidden_patch_before_the_encoder_leaves_no_trace() -> None:
    """Another picture under the hidden patches gives the same patches; the same under shown ones does not."""
    method, batch = cm_masksd(mask_at="encoder_input").eval(), make_batch(1)
    encoder, stand_in = method.network.encoder, method.stand_ins["vision"]
    hidden = torch.zeros(1, 64, dtype=torch.bool)
    hidden[0, 0] = True
    changed = batch.images.clone()
    changed[:, :, :6, :6] += 5
    with torch.no_grad():
        seen = encoder.encode_images(batch.images, hidden, stand_in).patches
        assert torch.equal(encoder.encode_images(changed, hidden, stand_in).patches, seen)
        assert not torch.equal(
            encoder.encode_images(changed).patches, encoder.encode_images(batch.images).patches
        )
        none = torch.zeros_like(hidden)
        whole = encoder.encode_images(batch.images)
        assert torch.allclose(encoder.encode_images(batch.images, none, stand_in).patches, whole.patches)


def test_supervised_branches_add_their_mask_losses() -> None:
    method, batch = (
        cm_masksd(supervise_masked=True, distill_on="features", mask_dice_weight=1.0),
        make_batch(),
    )
    step = method(batch)
    assert set(step.losses) == {
        *("mask_bce", "mask_dice", "vision_agreement", "language_agreement"),
        *("vision_bce", "vision_dice", "language_bce", "language_dice"),
    }
    assert step.losses["vision_bce"].weight == 0.5 * 2.0
    assert step.losses["language_dice"].weight == 0.5 * 1.0


def test_weights_ramp_up_over_their_share_of_the_run_and_go_on_after_a_restart() -> None:
    method = cm_masksd(ramp_fraction=0.5)
    method.prepare(torch.zeros(8), num_epochs=2)
    weights = [method(make_batch(2)).losses["vision_agreement"].weight for _ in range(3)]
    assert weights == pytest.approx([0.0, 0.25, 0.5])
    resumed = cm_masksd(ramp_fraction=0.5)
    resumed.prepare(torch.zeros(8), num_epochs=2)
    resumed.load_state_dict(method.state_dict())
    assert resumed(make_batch(2)).losses["vision_agreement"].weight == pytest.approx(0.75)
    assert resumed(make_batch(2)).losses["vision_agreement"].weight == 1.0


def test_the_dynamic_head_is_one_convolution_per_sample() -> None:
    torch.manual_seed(0)
    head = DynamicHead(6, 4, bias=-2.0)
    pixels, sentences = torch.randn(3, 4, 5, 5), torch.randn(3, 6)
    kernels, biases = head.kernels(sentences)
    for row in range(3):
        alone = nn.functional.conv2d(
            pixels[row : row + 1], kernels[row : row + 1], biases[row : row + 1], padding=1
        )
        assert torch.allclose(head(pixels, sentences)[row], alone[0], atol=1e-6)
    assert torch.allclose(head.kernels(torch.zeros(1, 6))[1], torch.tensor([-2.0]))


def test_positions_differ_everywhere_and_are_the_same_along_an_axis() -> None:
    positions = sine_positions(5, 16).view(5, 5, 16)
    assert torch.equal(positions[2, :, :8], positions[2, :1, :8].expand(5, 8))
    assert torch.equal(positions[:, 3, 8:], positions[:1, 3, 8:].expand(5, 8))
    assert len({tuple(row.tolist()) for row in positions.view(25, 16)}) == 25
    with pytest.raises(ValueError, match="multiple of 4"):
        sine_positions(5, 6)


@pytest.mark.parametrize(
    "changes", [{"mask_strategy": "sampled"}, {"distill_on": "features", "supervise_masked": True}]
)
def test_losses_of_a_batch_are_those_of_its_shares(changes: dict[str, Any]) -> None:
    """So that two workers train as one."""
    method, batch = cm_masksd(**changes), make_batch(5)
    whole, first, second = (values(method, rows(batch, part)) for part in (slice(5), slice(3), slice(3, 5)))
    for name, value in whole.items():
        assert (3 * first[name] + 2 * second[name]) / 5 == pytest.approx(value, rel=1e-4), name


def test_the_published_size_is_that_of_the_published_checkpoint() -> None:
    settings = CmMaskSD.Settings(**{**CmMaskSD.presets["cm_masksd_base"], "checkpoint": ""})
    words = dataclasses.replace(TASK, image_size=480, vocabulary_size=49_408, start_id=49_406, end_id=49_407)
    with torch.device("meta"):
        encoder = ClipEncoder(settings, words)
    assert num_parameters(encoder) == 149_620_737


INACTIVE: list[tuple[dict[str, Any], set[str]]] = [
    ({}, {"sampling_temperature", "supervised_weight"}),
    ({"vision_weight": 0.0}, {"vision_mask_ratio"}),
    ({"text_mask_ratio": 0.0}, {"language_weight"}),
    (
        OFF,
        {
            "mask_strategy",
            "distill_temperature",
            "ramp_fraction",
            "distill_on",
            "mask_at",
            "supervise_masked",
        },
    ),
    ({"vision_mask_ratio": 0.0, "text_mask_ratio": 0.0}, {"mask_strategy", "distill_temperature"}),
    ({"distill_on": "features"}, {"distill_temperature"}),
]


@pytest.mark.parametrize(("changes", "names"), INACTIVE)
def test_settings_that_cannot_matter_are_known(changes: dict[str, Any], names: set[str]) -> None:
    settings = CmMaskSD.Settings(**changes)
    assert names <= CmMaskSD.inactive(settings)
    everything = {field.name for field in dataclasses.fields(settings)}
    assert CmMaskSD.inactive(settings) <= everything
    active = {"mask_strategy", "vision_weight", "distill_on"}
    assert bool(changes) or not active & CmMaskSD.inactive(settings)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vision_mask_ratio": 1.0}, "vision_mask_ratio must be at least 0 and below 1"),
        ({"mask_strategy": "best"}, "mask_strategy must be one of"),
        ({"vision_heads": 5}, "vision_width must be a multiple of vision_heads"),
        ({"decoder_heads": 5}, "decoder_heads 5 does not fit shared_width"),
        ({"distill_temperature": 0.0}, "distill_temperature must be"),
        ({"table_text_length": -1}, "table_image_size and table_text_length"),
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        CmMaskSD.Settings(**{**CmMaskSD.presets["cm_masksd_small"], **changes})


@pytest.mark.parametrize(
    ("task", "changes", "words"),
    [
        ({"end_id": 2}, {}, "end token of the vocabulary has id 2"),
        ({"image_size": 50}, {}, "patch_size 6 does not divide"),
        ({}, {"table_text_length": 8}, "table_text_length is 8, but sentences have 12"),
    ],
)
def test_data_that_does_not_fit_is_refused(task: dict[str, Any], changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        cm_masksd(task=dataclasses.replace(TASK, **task), **changes)
