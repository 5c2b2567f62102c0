"""First weights of a Multiway encoder: BEiT-3's official file, or the vision part that timm keeps.

The official file names the vision expert A and the language expert B, splits query, key and value, and lets both
position tables begin with two rows that are never used. timm keeps the vision expert alone: the language expert then
starts as its copy, words and their positions stay random, and a final norm that the file lacks starts as identity.

Shape legend: D = encoder width, n = rows of a position table.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from methods.grounding.multiway import MultiwayEncoder
from methods.models.weights import apply_weights, load_weights

UNUSED_POSITIONS = 2
EXPERTS = {"A": "vision", "B": "language"}
TOP = {
    "beit3.text_embed.weight": "words.weight",
    "beit3.vision_embed.proj.weight": "patch_embed.weight",
    "beit3.vision_embed.proj.bias": "patch_embed.bias",
    "beit3.vision_embed.cls_token": "cls_token",
    "beit3.encoder.layer_norm.A.weight": "vision_norm.weight",
    "beit3.encoder.layer_norm.A.bias": "vision_norm.bias",
    "beit3.encoder.layer_norm.B.weight": "text_norm.weight",
    "beit3.encoder.layer_norm.B.bias": "text_norm.bias",
}
INSIDE = {
    "self_attn.{}_proj": "attn.{}",
    "self_attn.inner_attn_ln": "attn.norm",
    "self_attn.out_proj": "attn.proj",
    "self_attn_layer_norm": "norm1",
    "final_layer_norm": "norm2",
    "ffn.fc1": "mlp.fc1",
    "ffn.fc2": "mlp.fc2",
    "ffn.ffn_layernorm": "mlp.norm",
}
"""Names inside an official layer, without the letter of the expert, and ours."""
VISION_ONLY_TOP = {
    "patch_embed.proj.weight": "patch_embed.weight",
    "patch_embed.proj.bias": "patch_embed.bias",
    "cls_token": "cls_token",
    "norm.weight": "vision_norm.weight",
    "norm.bias": "vision_norm.bias",
    "fc_norm.weight": "vision_norm.weight",
    "fc_norm.bias": "vision_norm.bias",
}
"""timm pools these networks by the mean, so that their final norm is called ``fc_norm``."""


def load_multiway(encoder: MultiwayEncoder, checkpoint: str) -> None:
    """Copy first weights into ``encoder``.

    Args:
        encoder: Built for any picture size: the grid of positions is resized.
        checkpoint: A local file, or ``timm/NAME``, whose weights timm downloads once.

    Raises:
        ValueError: The file cannot be read safely, or does not fit; everything missing or unexpected is listed.
    """
    weights = _timm_weights(checkpoint) if checkpoint.startswith("timm/") else load_weights(checkpoint)
    is_full = any(name.startswith("beit3.") for name in weights)
    renamed = from_full(weights) if is_full else from_vision_only(weights, encoder)
    apply_weights(encoder, fitted(renamed, encoder), f"checkpoint {checkpoint}")


def from_full(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The official layout under our names. What lies outside ``beit3.`` are heads of other tasks, and is left out."""
    own = {name: value for name, value in weights.items() if name.startswith("beit3.")}
    renamed = {TOP.get(name, name): value for name, value in own.items()}
    renamed.pop("beit3.vision_embed.mask_token", None)
    for letter, name in (("A", "vision_positions"), ("B", "text_positions")):
        if (table := renamed.pop(f"beit3.encoder.embed_positions.{letter}.weight", None)) is not None:
            renamed[name] = table[UNUSED_POSITIONS:].unsqueeze(0)
    return _stacked({_layer_name(name): value for name, value in renamed.items()})


def from_vision_only(weights: Mapping[str, Tensor], encoder: MultiwayEncoder) -> dict[str, Tensor]:
    """timm's layout under our names: its vision experts twice, and everything it lacks as ``encoder`` has it."""
    own = encoder.state_dict()
    renamed = {name: own[name] for name in ("words.weight", "text_positions")}
    norms = {name: own[name] for name in own if name.startswith(("vision_norm.", "text_norm."))}
    renamed |= {
        name: (torch.ones_like if name.endswith("weight") else torch.zeros_like)(value)
        for name, value in norms.items()
    }
    for name, value in weights.items():
        if name.startswith("head."):  # a classifier of some other data set
            continue
        if match := re.fullmatch(r"blocks\.(\d+)\.(.*)", name):
            for expert in EXPERTS.values():
                renamed[f"layers.{match[1]}.{expert}.{match[2]}"] = value
        else:
            renamed[{"pos_embed": "vision_positions"}.get(name) or VISION_ONLY_TOP.get(name, name)] = value
    return renamed


def fitted(weights: Mapping[str, Tensor], encoder: MultiwayEncoder) -> dict[str, Tensor]:
    """``weights`` cut to what ``encoder`` has: grid resized, sentences shortened, no class token where there is none."""
    fitting = dict(weights)
    if encoder.cls_token is None:
        fitting.pop("cls_token", None)
    if "vision_norm.weight" not in encoder.state_dict():
        fitting = {
            name: value for name, value in fitting.items() if "_norm." not in name.partition("layers.")[0]
        }
    if "vision_positions" in fitting:
        has_class = encoder.cls_token is not None
        table = resized_positions(fitting["vision_positions"], encoder.num_patches)
        fitting["vision_positions"] = table if has_class else table[:, 1:]
    if "text_positions" in fitting:
        fitting["text_positions"] = fitting["text_positions"][:, : encoder.text_positions.shape[1]]
    return fitting


def resized_positions(table_1nD: Tensor, num_patches: int) -> Tensor:
    """The grid of a table resized bicubically to ``num_patches``; its first row (of the class token) is kept."""
    first, grid = table_1nD[:, :1], table_1nD[:, 1:]
    if grid.shape[1] == num_patches:
        return table_1nD
    old, new = math.isqrt(grid.shape[1]), math.isqrt(num_patches)
    maps = grid.transpose(1, 2).reshape(1, -1, old, old)
    maps = F.interpolate(maps.float(), (new, new), mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([first, maps.flatten(2).transpose(1, 2).to(first.dtype)], dim=1)


def _layer_name(name: str) -> str:
    """Ours for a name inside an official layer; any other comes back as it is."""
    match = re.fullmatch(r"beit3\.encoder\.layers\.(\d+)\.(.*)\.(weight|bias)", name)
    if match is None:
        return name
    number, inside, kind = match.groups()
    letters = [part for part in inside.split(".") if part in EXPERTS]
    bare = ".".join(part for part in inside.split(".") if part not in EXPERTS)
    split = re.fullmatch(r"self_attn\.([qkv])_proj", bare)
    ours = INSIDE["self_attn.{}_proj"].format(split[1]) if split else INSIDE.get(bare)
    return (
        name if ours is None or len(letters) != 1 else f"layers.{number}.{EXPERTS[letters[0]]}.{ours}.{kind}"
    )


def _stacked(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Query, key and value as one; what lacks a third stays under its own name, and is reported by whoever loads."""
    for name in [name for name in weights if re.search(r"\.attn\.q\.(weight|bias)$", name)]:
        thirds = [re.sub(r"\.q\.(?=weight|bias)", f".{letter}.", name) for letter in "qkv"]
        if all(third in weights for third in thirds):
            weights[name.replace(".attn.q.", ".attn.qkv.")] = torch.cat(
                [weights.pop(third) for third in thirds]
            )
    return weights


def _timm_weights(checkpoint: str) -> dict[str, Tensor]:
    import timm

    network = timm.create_model(checkpoint.removeprefix("timm/"), pretrained=True, num_classes=0)
    return dict(network.state_dict())
