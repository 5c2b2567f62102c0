"""Swin and BERT, fused stage by stage in both directions (MagNet).

Published: the pairing, four groups of text layers, fusion from unfused inputs on both sides, and that patch merging takes
the gated map onwards. timm's Swin merges patches at the start of a stage, which is exactly where that is needed. Swin's
final norm and the last stage's image gate feed nothing, so they are left out.

Shape legend: B = batch, H, W = image sides, L = text length, D = text width, c, h, w = width and sides of a stage's map.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from methods.checks import check_positive
from methods.grounding.contracts import GroundingTask
from methods.grounding.gated_fusion import AlignmentModule, TextFusion
from methods.grounding.pretrained import copy_part, copy_weights, load_pretrained
from methods.models.weights import load_weights

NUM_STAGES = 4


@dataclass(frozen=True, kw_only=True)
class SwinShape:
    """The size of the image encoder, and where its first weights come from. The defaults are Swin-B."""

    patch_size: int = 4
    """Side of a patch in pixels, the stride of the first stage."""
    width: int = 128
    """Width of the first stage; each further one has twice that of the one before."""
    depths: tuple[int, ...] = (2, 2, 18, 2)
    """Blocks of each stage."""
    heads: tuple[int, ...] = (4, 8, 16, 32)
    """Attention heads of each stage."""
    window_size: int = 12
    """Side of an attention window in patches."""
    drop_path: float = 0.3
    """Rate at which the last block is skipped in training; it rises from 0 over the blocks."""
    weights: str = ""
    """Local file, or ``timm/NAME`` for timm's published weights. Empty: random weights."""

    def __post_init__(self) -> None:
        check_positive(self, "patch_size", "width", "window_size")
        if len(self.depths) != NUM_STAGES or len(self.heads) != NUM_STAGES:
            raise ValueError(
                f"depths and heads must each name {NUM_STAGES} stages, got {self.depths!r} and {self.heads!r}"
            )
        if self.width % 4 or any(self.stage_widths[i] % heads for i, heads in enumerate(self.heads)):
            raise ValueError(
                f"width must be a multiple of 4, and each stage's width one of its heads, got {self.width!r} "
                f"with heads {self.heads!r}"
            )
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path must be at least 0 and below 1, got {self.drop_path!r}")

    @property
    def stage_widths(self) -> tuple[int, ...]:
        return tuple(self.width * 2**stage for stage in range(NUM_STAGES))


@dataclass(frozen=True, kw_only=True)
class BertShape:
    """The size of the text encoder, and where its first weights come from. The defaults are BERT-base."""

    width: int = 768
    """Width of words (D)."""
    layers: int = 12
    """Layers, a quarter of them in each stage."""
    heads: int = 12
    """Attention heads."""
    table_text_length: int = 512
    """Tokens that the table of word positions is made for. 0: the data's text length."""
    dropout: float = 0.1
    """Dropout in embeddings, attention and feed-forward."""
    weights: str = ""
    """Folder or hub name of a BERT checkpoint in safetensors. Empty: random weights."""

    def __post_init__(self) -> None:
        check_positive(self, "width", "layers", "heads")
        if self.layers % NUM_STAGES:
            raise ValueError(f"layers must be a multiple of {NUM_STAGES}, got {self.layers!r}")
        if self.width % self.heads:
            raise ValueError(f"width must be a multiple of heads ({self.heads}), got {self.width!r}")
        if self.table_text_length < 0 or not 0 <= self.dropout < 1:
            raise ValueError(
                "table_text_length must be at least 0, and dropout at least 0 and below 1, "
                f"got {self.table_text_length!r} and {self.dropout!r}"
            )


class FusedFeatures(NamedTuple):
    """What the trunk gives."""

    maps: tuple[Tensor, ...]
    """Decoder features, fine to coarse, ``[B, c, h, w]`` each."""
    words: Tensor
    """``[B, L, D]``, after all fusions."""


class FusedStage(nn.Module):
    """One stage of Swin, a group of BERT layers, and what each side gathers from the other."""

    def __init__(
        self, image: nn.Module, text: nn.ModuleList, alignment: AlignmentModule, text_fusion: TextFusion
    ) -> None:
        super().__init__()
        self.image, self.text = image, text
        self.alignment, self.text_fusion = alignment, text_fusion

    def forward(
        self, map_Bhwc: Tensor, words_BLD: Tensor, attention_mask: Tensor | None, token_mask_BL: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Decoder feature ``[B, c, h, w]``, gated map ``[B, h, w, c]`` and fused words, both from unfused inputs."""
        map_Bhwc = self.image(map_Bhwc)
        for layer in self.text:
            words_BLD = layer(words_BLD, attention_mask)
        feature_Bchw, gated_Bhwc = self.alignment(map_Bhwc, words_BLD, token_mask_BL)
        return feature_Bchw, gated_Bhwc, self.text_fusion(words_BLD, map_Bhwc.flatten(1, 2))


class SwinBertEncoder(nn.Module):
    """The fused trunk: ``stages.<i>`` are its taps."""

    def __init__(
        self, swin: SwinShape, bert: BertShape, task: GroundingTask, *, pool_sizes: tuple[int, ...]
    ) -> None:
        """Build both encoders, with the weights that their shapes name, and the fusions between them.

        Raises:
            ValueError: The sizes do not fit the data, or the weights do not fit the sizes.
        """
        super().__init__()
        image, text = build_swin(swin, task), build_bert(bert, task)
        self.text_config = text.config
        self.patch_embed, self.word_embed = image.patch_embed, text.embeddings
        group = bert.layers // NUM_STAGES
        self.stages = nn.ModuleList(
            FusedStage(
                image.layers[number],
                nn.ModuleList(text.encoder.layer[group * number : group * (number + 1)]),
                AlignmentModule(
                    width, bert.width, pool_sizes=pool_sizes, is_last=number == NUM_STAGES - 1
                ),
                TextFusion(bert.width, width),
            )
            for number, width in enumerate(swin.stage_widths)
        )

    @property
    def vocabulary(self) -> Tensor:
        """The word embedding, ``[V, D]``."""
        weight: Tensor = self.word_embed.word_embeddings.weight
        return weight

    def forward(self, images_B3HW: Tensor, token_ids_BL: Tensor, token_mask_BL: Tensor) -> FusedFeatures:
        from transformers.masking_utils import create_bidirectional_mask

        map_Bhwc, words_BLD = self.patch_embed(images_B3HW), self.word_embed(input_ids=token_ids_BL)
        attention_mask = create_bidirectional_mask(
            config=self.text_config, inputs_embeds=words_BLD, attention_mask=token_mask_BL
        )
        maps = []
        for stage in self.stages:
            feature_Bchw, map_Bhwc, words_BLD = stage(map_Bhwc, words_BLD, attention_mask, token_mask_BL)
            maps.append(feature_Bchw)
        return FusedFeatures(maps=tuple(maps), words=words_BLD)


def build_swin(shape: SwinShape, task: GroundingTask) -> Any:
    """timm's Swin for the pictures of ``task``, with first weights where ``shape`` names some."""
    from timm.models.swin_transformer import SwinTransformer, checkpoint_filter_fn

    if task.image_size % (shape.patch_size * 2 ** (NUM_STAGES - 1)):
        raise ValueError(
            f"pictures of side {task.image_size} cannot be halved {NUM_STAGES - 1} times after patches of "
            f"{shape.patch_size}: choose a multiple of {shape.patch_size * 2 ** (NUM_STAGES - 1)}"
        )
    swin = SwinTransformer(
        img_size=task.image_size,
        patch_size=shape.patch_size,
        num_classes=0,
        embed_dim=shape.width,
        depths=shape.depths,
        num_heads=shape.heads,
        window_size=shape.window_size,
        drop_path_rate=shape.drop_path,
    )
    if shape.weights:
        weights = checkpoint_filter_fn(_swin_weights(shape.weights), swin)
        for part in ("patch_embed", "layers"):
            copy_part(weights, f"{part}.", getattr(swin, part), shape.weights)
    return swin


def _swin_weights(name: str) -> dict[str, Tensor]:
    if not name.startswith("timm/"):
        return load_weights(name)
    from methods.models.timm_factory import timm_factory

    published = timm_factory(name)(num_classes=0, pretrained=True)
    return dict(published.state_dict())


def build_bert(shape: BertShape, task: GroundingTask) -> Any:
    """transformers' BERT for the sentences of ``task``, with first weights where ``shape`` names some."""
    from transformers import BertConfig, BertModel

    if 0 < shape.table_text_length < task.text_length:
        raise ValueError(
            f"bert.table_text_length is {shape.table_text_length}, but sentences have {task.text_length} tokens: "
            "lower data.text_length, or raise it where the weights are random"
        )
    bert = BertModel(
        BertConfig(
            vocab_size=task.vocabulary_size,
            hidden_size=shape.width,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            intermediate_size=4 * shape.width,
            max_position_embeddings=shape.table_text_length or task.text_length,
            hidden_dropout_prob=shape.dropout,
            attention_probs_dropout_prob=shape.dropout,
            pad_token_id=task.pad_id,
        ),
        add_pooling_layer=False,
    )
    if shape.weights:
        copy_weights(load_pretrained(BertModel, shape.weights, add_pooling_layer=False), bert, shape.weights)
    return bert
