"""CLIP as the pair of encoders of a grounder: patches and words in one space, before any pooling.

Built from numbers alone, so that a finished grounder is rebuilt without a network; published weights are laid over it.

Shape legend: B = batch, H, W = image sides, P = patches, L = text length, D = width of a tower, E = shared width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from methods.checks import check_positive
from methods.grounding.contracts import GroundingTask
from methods.grounding.pretrained import copy_weights, load_pretrained, transformers_part
from methods.grounding.token_masking import end_positions, hide

POOL_BY_LARGEST_ID = 2
"""transformers' CLIP takes this end token for a sign of an old file, and pools at the largest id instead."""


@dataclass(frozen=True, kw_only=True)
class ClipSettings:
    """Settings of methods that stand on a CLIP pair. The defaults are the sizes of ViT-B/16."""

    patch_size: int = 16
    """Side of a patch in pixels (p)."""
    vision_width: int = 768
    """Width of the vision tower (D)."""
    vision_layers: int = 12
    """Layers of the vision tower."""
    vision_heads: int = 12
    """Attention heads of the vision tower."""
    text_width: int = 512
    """Width of the text tower."""
    text_layers: int = 12
    """Layers of the text tower."""
    text_heads: int = 8
    """Attention heads of the text tower."""
    shared_width: int = 512
    """Width of the space in which patches and words are compared (E)."""
    table_image_size: int = 224
    """Image side that the table of vision positions is made for; other sizes are interpolated. 0: the data's own."""
    table_text_length: int = 77
    """Tokens that the table of word positions is made for. 0: the data's text length."""
    checkpoint: str = ""
    """Folder or hub name of a CLIP checkpoint in safetensors. Empty: random weights."""

    def __post_init__(self) -> None:
        check_positive(self, "patch_size", "vision_width", "vision_layers", "vision_heads")
        check_positive(self, "text_width", "text_layers", "text_heads", "shared_width")
        for name in ("vision", "text"):
            width, heads = getattr(self, f"{name}_width"), getattr(self, f"{name}_heads")
            if width % heads:
                raise ValueError(f"{name}_width must be a multiple of {name}_heads ({heads}), got {width!r}")
        if self.table_image_size < 0 or self.table_text_length < 0:
            raise ValueError(
                "table_image_size and table_text_length must be at least 0, "
                f"got {self.table_image_size!r} and {self.table_text_length!r}"
            )


class EncodedImages(NamedTuple):
    """What the vision tower gives."""

    patches: Tensor
    """``[B, P, E]``"""
    whole: Tensor
    """The pooled class token, ``[B, E]``."""


class EncodedSentences(NamedTuple):
    """What the text tower gives."""

    words: Tensor
    """``[B, L, E]``"""
    whole: Tensor
    """The state at the end token, ``[B, E]``."""


class ClipEncoder(nn.Module):
    """Both towers of ``transformers.CLIPModel``, up to their projections. ``logit_scale`` is unused, hence frozen."""

    def __init__(self, settings: ClipSettings, task: GroundingTask) -> None:
        """Build the towers, with first weights where ``settings`` name a checkpoint.

        Raises:
            ValueError: The end token has id 2, the sizes do not fit the data, or the weights do not fit the sizes.
        """
        super().__init__()
        refuse_misfit(settings, task)
        CLIPModel = transformers_part("transformers", "CLIPModel")

        self.clip = CLIPModel(clip_config(settings, task))
        self.clip.logit_scale.requires_grad_(False)
        if settings.checkpoint:
            copy_weights(load_pretrained(CLIPModel, settings.checkpoint), self.clip, settings.checkpoint)

    @property
    def layers(self) -> nn.ModuleList:
        """Layers of the vision tower, by the path that all grounders share: ``encoder.layers.<i>``."""
        layers: nn.ModuleList = self.clip.vision_model.encoder.layers
        return layers

    def encode_images(
        self, images_B3HW: Tensor, hidden_BP: Tensor | None = None, stand_in_D: Tensor | None = None
    ) -> EncodedImages:
        """Patches and whole of each image; patches of ``hidden`` enter the tower as ``stand_in`` at their position."""
        vision = self.clip.vision_model
        if hidden_BP is None or stand_in_D is None:
            states_BPD = vision(images_B3HW, interpolate_pos_encoding=True).last_hidden_state
        else:
            embedded_BPD = vision.embeddings(images_B3HW, interpolate_pos_encoding=True)
            positions_1PD = vision.embeddings.interpolate_pos_encoding(embedded_BPD, *images_B3HW.shape[2:])
            shown_BPD = torch.where(
                hidden_BP[:, :, None], stand_in_D + positions_1PD[:, 1:], embedded_BPD[:, 1:]
            )
            tokens_BPD = vision.pre_layrnorm(torch.cat([embedded_BPD[:, :1], shown_BPD], dim=1))
            states_BPD = vision.encoder(inputs_embeds=tokens_BPD).last_hidden_state
        projected_BPE = self.clip.visual_projection(vision.post_layernorm(states_BPD))
        return EncodedImages(patches=projected_BPE[:, 1:], whole=projected_BPE[:, 0])

    def encode_sentences(
        self,
        token_ids_BL: Tensor,
        token_mask_BL: Tensor,
        hidden_BL: Tensor | None = None,
        stand_in_D: Tensor | None = None,
    ) -> EncodedSentences:
        """Words and whole of each sentence; words of ``hidden`` enter the tower as ``stand_in`` at their position."""
        text = self.clip.text_model
        if hidden_BL is None or stand_in_D is None:
            states_BLD = text(input_ids=token_ids_BL, attention_mask=token_mask_BL.long()).last_hidden_state
        else:
            with _shown_instead(text.embeddings.token_embedding, hidden_BL, stand_in_D):
                states_BLD = text(
                    input_ids=token_ids_BL, attention_mask=token_mask_BL.long()
                ).last_hidden_state
        projected_BLE = self.clip.text_projection(states_BLD)
        rows_B = torch.arange(len(token_ids_BL), device=token_ids_BL.device)
        return EncodedSentences(
            words=projected_BLE, whole=projected_BLE[rows_B, end_positions(token_mask_BL)]
        )


@contextmanager
def _shown_instead(embedding: nn.Module, hidden_BL: Tensor, stand_in_D: Tensor) -> Iterator[None]:
    """Scope in which an embedding gives a learned vector for hidden tokens."""
    hook = embedding.register_forward_hook(
        lambda module, inputs, embedded_BLD: hide(embedded_BLD, hidden_BL, stand_in_D)
    )
    try:
        yield
    finally:
        hook.remove()


def refuse_misfit(settings: ClipSettings, task: GroundingTask) -> None:
    """Raise ValueError where this vocabulary or picture cannot enter such a CLIP."""
    if task.end_id == POOL_BY_LARGEST_ID:
        raise ValueError(
            "the end token of the vocabulary has id 2: transformers' CLIP would then pool at the largest id of a "
            "sentence, silently. Give the end token another id"
        )
    if task.image_size % settings.patch_size:
        raise ValueError(
            f"patch_size {settings.patch_size} does not divide the pictures' side {task.image_size}"
        )
    if 0 < settings.table_text_length < task.text_length:
        raise ValueError(
            f"table_text_length is {settings.table_text_length}, but sentences have {task.text_length} tokens: "
            "lower data.text_length, or raise it where the weights are random"
        )


def clip_config(settings: ClipSettings, task: GroundingTask) -> Any:
    """The configuration of transformers that says the same."""
    CLIPConfig = transformers_part("transformers", "CLIPConfig")

    return CLIPConfig(
        projection_dim=settings.shared_width,
        vision_config={
            "hidden_size": settings.vision_width,
            "intermediate_size": 4 * settings.vision_width,
            "num_hidden_layers": settings.vision_layers,
            "num_attention_heads": settings.vision_heads,
            "patch_size": settings.patch_size,
            "image_size": settings.table_image_size or task.image_size,
            "projection_dim": settings.shared_width,
        },
        text_config={
            "vocab_size": task.vocabulary_size,
            "hidden_size": settings.text_width,
            "intermediate_size": 4 * settings.text_width,
            "num_hidden_layers": settings.text_layers,
            "num_attention_heads": settings.text_heads,
            "max_position_embeddings": settings.table_text_length or task.text_length,
            "projection_dim": settings.shared_width,
            "bos_token_id": task.start_id,
            "eos_token_id": task.end_id,
            "pad_token_id": task.pad_id,
        },
    )
