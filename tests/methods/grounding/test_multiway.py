"""The Multiway encoder against timm, its padding, its size, and its checkpoints."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from methods.grounding.multiway import Expert, MultiwayEncoder, MultiwaySettings
from methods.grounding.multiway_weights import load_multiway, resized_positions

SMALL = MultiwaySettings(patch_size=4, width=64, num_layers=3, num_heads=4, drop_path=0.0)
SIZES: dict[str, Any] = {"image_size": 16, "text_length": 8, "vocabulary_size": 30}


def encoder(seed: int = 0, **changes: Any) -> MultiwayEncoder:
    torch.manual_seed(seed)
    built = MultiwayEncoder(replace(SMALL, **changes), **SIZES).eval()
    with torch.no_grad():
        for parameter in built.parameters():  # away from the quiet start, where errors would hide
            parameter.add_(0.1 * torch.randn_like(parameter))
    return built


def timm_twin() -> VisionTransformer:
    return VisionTransformer(
        img_size=16, patch_size=4, embed_dim=64, depth=3, num_heads=4, num_classes=0, global_pool="",
        scale_attn_norm=True, scale_mlp_norm=True, norm_layer=partial(nn.LayerNorm, eps=1e-5),
    ).eval()  # fmt: skip


def vision_only(built: MultiwayEncoder) -> dict[str, Tensor]:
    """The vision part under timm's names."""
    own = built.state_dict()
    weights = {"cls_token": own["cls_token"], "pos_embed": own["vision_positions"]}
    for kind in ("weight", "bias"):
        weights[f"patch_embed.proj.{kind}"] = own[f"patch_embed.{kind}"]
        weights[f"norm.{kind}"] = own[f"vision_norm.{kind}"]
    for name, value in own.items():
        if name.startswith("layers.") and ".vision." in name:
            weights[name.replace("layers.", "blocks.").replace(".vision.", ".")] = value
    return weights


def official(built: MultiwayEncoder) -> dict[str, Tensor]:
    """All weights in the layout of BEiT-3's own files, written by hand from its module tree."""
    own, width = built.state_dict(), SMALL.width
    weights = {
        "beit3.text_embed.weight": own["words.weight"],
        "beit3.vision_embed.cls_token": own["cls_token"],
        "beit3.vision_embed.mask_token": torch.zeros(1, 1, width),
        "beit3.vision_embed.proj.weight": own["patch_embed.weight"],
        "beit3.vision_embed.proj.bias": own["patch_embed.bias"],
        "beit3.encoder.embed_positions.A.weight": torch.cat([torch.full((2, width), 9.0), own["vision_positions"][0]]),
        "beit3.encoder.embed_positions.B.weight": torch.cat([torch.full((2, width), 9.0), own["text_positions"][0]]),
        "mlm_head.weight": torch.zeros(30, width),
    }  # fmt: skip
    for letter, expert in (("A", "vision"), ("B", "language")):
        final = "vision_norm" if letter == "A" else "text_norm"
        for kind in ("weight", "bias"):
            weights[f"beit3.encoder.layer_norm.{letter}.{kind}"] = own[f"{final}.{kind}"]
            for number in range(3):
                ours, theirs = f"layers.{number}.{expert}", f"beit3.encoder.layers.{number}"
                thirds = own[f"{ours}.attn.qkv.{kind}"].chunk(3)
                for third, value in zip("qkv", thirds, strict=True):
                    weights[f"{theirs}.self_attn.{third}_proj.{letter}.{kind}"] = value.clone()
                weights[f"{theirs}.self_attn.inner_attn_ln.{letter}.{kind}"] = own[f"{ours}.attn.norm.{kind}"]
                weights[f"{theirs}.self_attn.out_proj.{letter}.{kind}"] = own[f"{ours}.attn.proj.{kind}"]
                weights[f"{theirs}.self_attn_layer_norm.{letter}.{kind}"] = own[f"{ours}.norm1.{kind}"]
                weights[f"{theirs}.final_layer_norm.{letter}.{kind}"] = own[f"{ours}.norm2.{kind}"]
                weights[f"{theirs}.ffn.{letter}.fc1.{kind}"] = own[f"{ours}.mlp.fc1.{kind}"]
                weights[f"{theirs}.ffn.{letter}.fc2.{kind}"] = own[f"{ours}.mlp.fc2.{kind}"]
                weights[f"{theirs}.ffn.{letter}.ffn_layernorm.{kind}"] = own[f"{ours}.mlp.norm.{kind}"]
    return weights


def inputs(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 30, (2, 8), generator=generator)
    mask = torch.arange(8) < torch.tensor([[5], [8]])
    return torch.randn(2, 3, 16, 16, generator=generator), ids * mask, mask


def test_without_text_it_is_the_plain_vision_transformer() -> None:
    built, twin = encoder(), timm_twin()
    twin.load_state_dict(vision_only(built))
    images, ids, mask = inputs()
    with torch.no_grad():
        assert torch.equal(built(images, ids[:, :0], mask[:, :0]).vision, twin.forward_features(images))


@torch.no_grad()
def test_padding_changes_nothing() -> None:
    built = encoder()
    images, ids, mask = inputs()
    expected, found = built(images, ids, mask), built(images, torch.where(mask, ids, 17), mask)
    assert torch.equal(expected.vision, found.vision)
    assert torch.equal(expected.text[mask], found.text[mask])


@torch.no_grad()
def test_masked_text_is_no_text() -> None:
    built = encoder()
    images, ids, mask = inputs()
    masked, without = built(images, ids, mask & False), built(images, ids[:, :0], mask[:, :0])
    assert torch.allclose(masked.vision, without.vision, atol=1e-5)


@torch.no_grad()
def test_a_word_reaches_its_own_picture_only() -> None:
    built = encoder()
    images, ids, mask = inputs()
    changed = ids.clone()
    changed[0, 2] = (ids[0, 2] + 1) % 29 + 1
    before, after = built(images, ids, mask).vision, built(images, changed, mask).vision
    assert float((before[0] - after[0]).abs().max()) > 1e-3
    assert torch.equal(before[1], after[1])


@torch.no_grad()
def test_two_towers_are_the_same_layers_without_each_other() -> None:
    built = encoder()
    images, ids, mask = inputs()
    towers = list(built.states(images, ids, mask, is_joint=False))
    alone = list(built.states(images, ids[:, :0], mask[:, :0]))
    assert len(towers) == len(alone) == 3
    for both, vision in zip(towers, alone, strict=True):
        assert torch.allclose(both[:, : vision.shape[1]], vision, atol=1e-5)
    length, joint = ids.shape[1], list(built.states(images, ids, mask))[-1]
    other, padded = (
        list(built.states(*changed, is_joint=False))[-1][:, -length:]
        for changed in ((-images, ids, mask), (images, torch.where(mask, ids, 17), mask))
    )
    words = towers[-1][:, -length:]
    assert torch.equal(other, words)
    assert torch.equal(padded[mask], words[mask])
    assert float((joint[:, -length:] - words)[mask].abs().max()) > 1e-3


def test_every_weight_of_a_layer_exists_once_per_modality() -> None:
    width = 64
    attention, feed_forward = 4 * width**2 + 4 * width, 8 * width**2 + 5 * width
    norms = 3 * 2 * width + 2 * 4 * width
    assert count(Expert(width, 4, 0.0)) == attention + feed_forward + norms
    assert count(encoder().layers[0]) == 2 * (attention + feed_forward + norms)


def test_size_of_the_published_encoder() -> None:
    settings = MultiwaySettings(text_positions=1024)
    with torch.device("meta"):
        built = MultiwayEncoder(settings, image_size=224, text_length=20, vocabulary_size=64_010)
    assert count(built.layers[0].vision) * 12 == 85_146_624
    assert count(built.layers) == 170_293_248
    assert count(built.words) == 49_159_680
    assert count(built) == 170_293_248 + 49_159_680 + 590_592 + 768 + (197 + 1024) * 768 + 2 * 2 * 768
    assert count(built) / 1e6 == pytest.approx(221.0, abs=0.05)


def test_drop_path_drops_whole_samples_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    expert = Expert(8, 2, 0.25)
    dropped = expert.drop_path(torch.ones(4000, 2, 8))
    values = dropped.flatten(1)
    assert bool((values == values[:, :1]).all())
    assert float(dropped.mean()) == pytest.approx(1, abs=0.05)
    assert torch.equal(expert.eval().drop_path(torch.ones(3, 2, 8)), torch.ones(3, 2, 8))


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_the_official_layout_gives_the_same_network(tmp_path: Path) -> None:
    built, other = encoder(), encoder(seed=1)
    torch.save({"model": official(built)}, tmp_path / "beit3.pth")
    load_multiway(other, str(tmp_path / "beit3.pth"))
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in built.state_dict().items())


def test_without_class_token_and_norms_the_rest_is_loaded(tmp_path: Path) -> None:
    built = encoder()
    save_file(official(built), tmp_path / "beit3.safetensors")
    bare = MultiwayEncoder(SMALL, **SIZES, has_class_token=False, has_norms=False)
    load_multiway(bare, str(tmp_path / "beit3.safetensors"))
    assert torch.equal(bare.vision_positions, built.vision_positions[:, 1:])
    assert torch.equal(bare.layers[2].language.mlp.fc2.weight, built.layers[2].language.mlp.fc2.weight)


def test_the_vision_part_alone_starts_both_experts(tmp_path: Path) -> None:
    built, other = encoder(), encoder(seed=1)
    words = other.words.weight.clone()
    weights = {name: value for name, value in vision_only(built).items() if not name.startswith("norm.")}
    save_file({**weights, "head.weight": torch.zeros(5, 64)}, tmp_path / "timm.safetensors")
    load_multiway(other, str(tmp_path / "timm.safetensors"))
    for expert in (other.layers[1].vision, other.layers[1].language):
        assert torch.equal(expert.attn.qkv.weight, built.layers[1].vision.attn.qkv.weight)
    assert torch.equal(other.words.weight, words)
    assert torch.equal(other.vision_norm.weight, torch.ones(64))
    assert torch.equal(other.text_norm.bias, torch.zeros(64))


def test_a_grid_of_another_size_is_resized_and_the_class_row_kept(tmp_path: Path) -> None:
    built = encoder()
    save_file(official(built), tmp_path / "beit3.safetensors")
    larger = MultiwayEncoder(SMALL, **{**SIZES, "image_size": 24})
    load_multiway(larger, str(tmp_path / "beit3.safetensors"))
    assert larger.vision_positions.shape == (1, 37, 64)
    assert torch.equal(larger.vision_positions[:, 0], built.vision_positions[:, 0])
    rows, columns = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    ramp = torch.cat([torch.zeros(1, 1, 2), torch.stack([rows, columns], dim=-1).view(1, 64, 2)], dim=1)
    halved = resized_positions(ramp, 16)[0, 1:].view(4, 4, 2)
    assert torch.allclose(halved[1, 1:3, 1], torch.tensor([2.5, 4.5]), atol=0.2)
    assert torch.allclose(halved[1:3, 1, 0], torch.tensor([2.5, 4.5]), atol=0.2)


def without(weights: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {name: value for name, value in weights.items() if name not in names}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: without(w, "beit3.encoder.layers.1.ffn.B.fc1.bias"), "missing: layers.1.language.mlp.fc1.bias"),
        (lambda w: without(w, "beit3.encoder.layers.0.self_attn.k_proj.A.weight"), "layers.0.vision.attn.qkv.weight"),
        (lambda w: without(w, "beit3.text_embed.weight"), "missing: words.weight"),
        (lambda w: {**w, "beit3.encoder.layers.7.ffn.A.fc1.bias": torch.zeros(3)}, "not in the network: layers.7"),
        (lambda w: {**w, "beit3.encoder.relative.weight": torch.zeros(3)}, "not in the network: beit3.encoder.relative"),
        (lambda w: {**w, "beit3.text_embed.weight": torch.zeros(31, 64)}, r"words.weight \[31, 64\] for \[30, 64\]"),
    ],
)  # fmt: skip
def test_a_file_that_does_not_fit_is_refused_by_name(tmp_path: Path, change: Any, message: str) -> None:
    save_file(change(official(encoder())), tmp_path / "beit3.safetensors")
    with pytest.raises(ValueError, match=message):
        load_multiway(encoder(seed=1), str(tmp_path / "beit3.safetensors"))


class Surprise:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("this must never run",)


def test_a_file_that_would_run_code_is_not_opened(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"model": Surprise()}, tmp_path / "beit3.pth")
    with pytest.raises(ValueError, match="only be read by running code"):
        load_multiway(encoder(), str(tmp_path / "beit3.pth"))
    assert "must never run" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 65}, "width must be a multiple of num_heads"),
        ({"drop_path": 1.0}, "drop_path"),
        ({"text_positions": -1}, "text_positions"),
        ({"patch_size": 5}, "patch_size 5 does not divide"),
        ({"text_positions": 4}, "text_positions is 4, but the data need 8"),
        ({"vocabulary_rows": 29}, "vocabulary_rows is 29, but the data need 30"),
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encoder(**changes)
