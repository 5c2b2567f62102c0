"""CLIP, BERT and Swin inside our networks: the same numbers as outside, with and without a checkpoint."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from grounding_builds import cm_masksd, magnet
from grounding_samples import TASK, make_batch
from safetensors.torch import save_file

from methods.grounding.clip_encoder import ClipEncoder, clip_config
from methods.grounding.cm_masksd import CmMaskSD
from methods.grounding.magnet import MagNet
from methods.grounding.pretrained import transformers_part
from methods.grounding.swin_bert import build_bert, build_swin

CLIP_SETTINGS = CmMaskSD.Settings(**CmMaskSD.presets["cm_masksd_small"])
MAGNET_SETTINGS = MagNet.Settings(**MagNet.presets["magnet_small"])


def clip_of(seed: int, **changes: Any) -> Any:
    from transformers import CLIPModel

    torch.manual_seed(seed)
    return CLIPModel(clip_config(dataclasses.replace(CLIP_SETTINGS, **changes), TASK)).eval()


def test_patches_and_words_are_those_of_clip() -> None:
    encoder, batch = ClipEncoder(CLIP_SETTINGS, TASK).eval(), make_batch(3)
    with torch.no_grad():
        image, text = encoder.encode_images(batch.images), encoder.encode_sentences(*batch[1:3])
        known = encoder.clip(
            pixel_values=batch.images, input_ids=batch.token_ids, attention_mask=batch.token_mask.long()
        )
    cosines = (
        torch.nn.functional.normalize(image.whole, dim=1),
        torch.nn.functional.normalize(text.whole, dim=1),
    )
    assert torch.allclose(cosines[0], known.image_embeds, atol=1e-6)
    assert torch.allclose(cosines[1], known.text_embeds, atol=1e-6)
    assert image.patches.shape == (3, 64, 64)
    assert text.words.shape == (3, 12, 64)


def test_the_pooled_word_is_the_end_token_whatever_the_ids_of_words() -> None:
    """Position 4 holds the end token (id 3), position 2 the largest id."""
    encoder = ClipEncoder(CLIP_SETTINGS, TASK).eval()
    ids = torch.tensor([[1, 7, 33, 9, 3, 0, 0, 0]])
    with torch.no_grad():
        text = encoder.encode_sentences(ids, ids != 0)
    assert torch.equal(text.whole[0], text.words[0, 4])
    assert not torch.allclose(text.whole[0], text.words[0, 2])


def test_padding_with_the_end_token_itself_pools_at_the_first_one() -> None:
    encoder = ClipEncoder(CLIP_SETTINGS, dataclasses.replace(TASK, pad_id=3)).eval()
    ids = torch.tensor([[1, 7, 33, 9, 3, 3, 3, 3]])
    mask = torch.arange(8)[None] < 5
    with torch.no_grad():
        text = encoder.encode_sentences(ids, mask)
        known = encoder.clip.text_model(input_ids=ids, attention_mask=mask.long()).pooler_output
        assert torch.allclose(text.whole, encoder.clip.text_projection(known), atol=1e-5)


def test_the_only_frozen_parameter_is_the_scale() -> None:
    frozen = [name for name, item in cm_masksd().named_parameters() if not item.requires_grad]
    assert frozen == ["network.encoder.clip.logit_scale"]


def test_layers_and_stages_are_found_by_the_paths_that_all_grounders_share() -> None:
    for network in (cm_masksd().network, magnet().network):
        for path in ("encoder", "pixel_decoder", "mask_head"):
            network.get_submodule(path)
    assert cm_masksd().network.get_submodule("encoder.layers.3") is not None
    assert magnet().network.get_submodule("encoder.stages.3") is not None


def test_a_clip_checkpoint_is_laid_over_random_weights(tmp_path: Path) -> None:
    published = clip_of(5)
    published.save_pretrained(tmp_path)
    settings = dataclasses.replace(CLIP_SETTINGS, checkpoint=str(tmp_path))
    encoder = ClipEncoder(settings, TASK)
    for name, value in published.state_dict().items():
        assert torch.equal(encoder.clip.state_dict()[name], value), name
    rebuilt = ClipEncoder(CmMaskSD.without_sources(settings), TASK)
    assert not torch.equal(rebuilt.clip.visual_projection.weight, published.visual_projection.weight)


def test_positions_made_for_another_size_are_interpolated(tmp_path: Path) -> None:
    clip_of(5, table_image_size=24).save_pretrained(tmp_path)
    settings = dataclasses.replace(CLIP_SETTINGS, table_image_size=24, checkpoint=str(tmp_path))
    encoder = ClipEncoder(settings, TASK)
    assert encoder.clip.vision_model.embeddings.position_embedding.weight.shape == (17, 96)
    assert encoder.encode_images(make_batch(1).images).patches.shape == (1, 64, 64)


def test_a_checkpoint_of_other_sizes_or_in_no_safe_format_is_refused(tmp_path: Path) -> None:
    clip_of(5, vision_layers=2).save_pretrained(tmp_path)
    settings = dataclasses.replace(CLIP_SETTINGS, checkpoint=str(tmp_path))
    with pytest.raises(ValueError, match=r"missing: vision_model\.encoder\.layers\.2"):
        ClipEncoder(settings, TASK)
    weights = tmp_path / "model.safetensors"
    weights.rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match=r"could not be loaded as CLIPModel.*model\.safetensors"):
        ClipEncoder(settings, TASK)


def test_bert_and_swin_checkpoints_reach_the_stages(tmp_path: Path) -> None:
    torch.manual_seed(5)
    text, image = build_bert(MAGNET_SETTINGS, TASK), build_swin(MAGNET_SETTINGS, TASK)
    text.save_pretrained(tmp_path / "bert")
    save_file({**image.state_dict(), "head.fc.weight": torch.zeros(2, 128)}, tmp_path / "swin.safetensors")
    method = magnet(
        bert_checkpoint=str(tmp_path / "bert"), swin_checkpoint=str(tmp_path / "swin.safetensors")
    )
    for number, stage in enumerate(method.network.encoder.stages):
        for mine, known in ((stage.image, image.layers[number]), (stage.text[0], text.encoder.layer[number])):
            for name, value in known.state_dict().items():
                assert torch.equal(mine.state_dict()[name], value), name
    assert torch.equal(method.network.encoder.vocabulary, text.embeddings.word_embeddings.weight)


def test_a_swin_of_another_window_is_resized_and_one_of_another_width_refused(tmp_path: Path) -> None:
    other = dataclasses.replace(MAGNET_SETTINGS, window_size=4)
    save_file(build_swin(other, TASK).state_dict(), tmp_path / "window.safetensors")
    assert magnet(swin_checkpoint=str(tmp_path / "window.safetensors")) is not None
    wide = dataclasses.replace(MAGNET_SETTINGS, swin_width=24)
    save_file(build_swin(wide, TASK).state_dict(), tmp_path / "wide.safetensors")
    with pytest.raises(ValueError, match="of another shape"):
        magnet(swin_checkpoint=str(tmp_path / "wide.safetensors"))


def test_a_missing_package_is_named() -> None:
    with pytest.raises(
        ValueError, match=r"CLIPModel needs the package transformers .*stillhouse\[grounding\]"
    ):
        transformers_part("transformers_of_another_world", "CLIPModel")
