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
from methods.grounding.pretrained import copy_part, copy_weights, load_pretrained, transformers_part
from methods.models.weights import load_weights

NUM_STAGES = 4


@dataclass(frozen=True, kw_only=True)
class SwinSettings:
    """Settings of methods that stand on Swin. The defaults are the sizes of Swin-B."""

    patch_size: int = 4
    """Side of a patch in pixels, the stride of the first stage."""
    swin_width: int = 128
    """Width of the first stage; each further one has twice that of the one before."""
    swin_depths: tuple[int, ...] = (2, 2, 18, 2)
    """Blocks of each stage."""
    swin_heads: tuple[int, ...] = (4, 8, 16, 32)
    """Attention heads of each stage."""
    window_size: int = 12
    """Side of an attention window in patches."""
    drop_path: float = 0.3
    """Rate at which the last block is skipped in training; it rises from 0 over the blocks."""
    swin_checkpoint: str = ""
    """Local file, or ``timm/NAME`` for timm's published weights. Empty: random weights."""

    def __post_init__(self) -> None:
        check_positive(self, "patch_size", "swin_width", "window_size")
        if (
            len(self.swin_depths) != NUM_STAGES
            or len(self.swin_heads) != NUM_STAGES
            or min(self.swin_depths) < 1
        ):
            raise ValueError(
                f"swin_depths and swin_heads must each name {NUM_STAGES} stages of at least 1, "
                f"got {self.swin_depths!r} and {self.swin_heads!r}"
            )
        if self.swin_width % 4 or any(
            heads < 1 or self.stage_widths[stage] % heads for stage, heads in enumerate(self.swin_heads)
        ):
            raise ValueError(
                f"swin_width must be a multiple of 4, and each stage's width one of its heads, got {self.swin_width!r} "
                f"with heads {self.swin_heads!r}"
            )
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path must be at least 0 and below 1, got {self.drop_path!r}")

    @property
    def stage_widths(self) -> tuple[int, ...]:
        return tuple(self.swin_width * 2**stage for stage in range(NUM_STAGES))


@dataclass(frozen=True, kw_only=True)
class BertSettings:
    """Settings of methods that stand on BERT. The defaults are the sizes of BERT-base."""

    bert_width: int = 768
    """Width of words (D)."""
    bert_layers: int = 12
    """Layers, a quarter of them in each stage."""
    bert_heads: int = 12
    """Attention heads."""
    table_text_length: int = 512
    """Tokens that the table of word positions is made for. 0: the data's text length."""
    bert_dropout: float = 0.1
    """Dropout in embeddings, attention and feed-forward."""
    bert_checkpoint: str = ""
    """Folder or hub name of a BERT checkpoint in safetensors. Empty: random weights."""

    def __post_init__(self) -> None:
        check_positive(self, "bert_width", "bert_layers", "bert_heads")
        if self.bert_layers % NUM_STAGES:
            raise ValueError(f"bert_layers must be a multiple of {NUM_STAGES}, got {self.bert_layers!r}")
        if self.bert_width % self.bert_heads:
            raise ValueError(
                f"bert_width must be a multiple of bert_heads ({self.bert_heads}), got {self.bert_width!r}"
            )
        if self.table_text_length < 0 or not 0 <= self.bert_dropout < 1:
            raise ValueError(
                "table_text_length must be at least 0, and bert_dropout at least 0 and below 1, "
                f"got {self.table_text_length!r} and {self.bert_dropout!r}"
            )


@dataclass(frozen=True, kw_only=True)
class SwinBertSettings(SwinSettings, BertSettings):
    """Both encoders."""

    def __post_init__(self) -> None:
        SwinSettings.__post_init__(self)
        BertSettings.__post_init__(self)


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
        self, settings: SwinBertSettings, task: GroundingTask, *, pool_sizes: tuple[int, ...]
    ) -> None:
        """Build both encoders, with the weights that their settings name, and the fusions between them.

        Raises:
            ValueError: The sizes do not fit the data, or the weights do not fit the sizes.
        """
        super().__init__()
        image, text = build_swin(settings, task), build_bert(settings, task)
        self.text_config = text.config
        self.patch_embed, self.word_embed = image.patch_embed, text.embeddings
        group = settings.bert_layers // NUM_STAGES
        self.stages = nn.ModuleList(
            FusedStage(
                image.layers[number],
                nn.ModuleList(text.encoder.layer[group * number : group * (number + 1)]),
                AlignmentModule(
                    width, settings.bert_width, pool_sizes=pool_sizes, is_last=number == NUM_STAGES - 1
                ),
                TextFusion(settings.bert_width, width),
            )
            for number, width in enumerate(settings.stage_widths)
        )

    @property
    def vocabulary(self) -> Tensor:
        """The word embedding, ``[V, D]``."""
        weight: Tensor = self.word_embed.word_embeddings.weight
        return weight

    def forward(self, images_B3HW: Tensor, token_ids_BL: Tensor, token_mask_BL: Tensor) -> FusedFeatures:
        create_mask = transformers_part("transformers.masking_utils", "create_bidirectional_mask")

        map_Bhwc, words_BLD = self.patch_embed(images_B3HW), self.word_embed(input_ids=token_ids_BL)
        attention_mask = create_mask(
            config=self.text_config, inputs_embeds=words_BLD, attention_mask=token_mask_BL
        )
        maps = []
        for stage in self.stages:
            feature_Bchw, map_Bhwc, words_BLD = stage(map_Bhwc, words_BLD, attention_mask, token_mask_BL)
            maps.append(feature_Bchw)
        return FusedFeatures(maps=tuple(maps), words=words_BLD)


def build_swin(settings: SwinSettings, task: GroundingTask) -> Any:
    """timm's Swin for the pictures of ``task``, with first weights where ``settings`` name some."""
    from timm.models.swin_transformer import SwinTransformer, checkpoint_filter_fn

    if task.image_size % (settings.patch_size * 2 ** (NUM_STAGES - 1)):
        raise ValueError(
            f"pictures of side {task.image_size} cannot be halved {NUM_STAGES - 1} times after patches of "
            f"{settings.patch_size}: choose a multiple of {settings.patch_size * 2 ** (NUM_STAGES - 1)}"
        )
    swin = SwinTransformer(
        img_size=task.image_size,
        patch_size=settings.patch_size,
        num_classes=0,
        embed_dim=settings.swin_width,
        depths=settings.swin_depths,
        num_heads=settings.swin_heads,
        window_size=settings.window_size,
        drop_path_rate=settings.drop_path,
    )
    if settings.swin_checkpoint:
        weights = checkpoint_filter_fn(_swin_weights(settings.swin_checkpoint), swin)
        for part in ("patch_embed", "layers"):
            copy_part(weights, f"{part}.", getattr(swin, part), settings.swin_checkpoint)
    return swin


def _swin_weights(name: str) -> dict[str, Tensor]:
    if not name.startswith("timm/"):
        return load_weights(name)
    from methods.models.timm_factory import timm_factory

    published = timm_factory(name)(num_classes=0, pretrained=True)
    return dict(published.state_dict())


def build_bert(settings: BertSettings, task: GroundingTask) -> Any:
    """transformers' BERT for the sentences of ``task``, with first weights where ``settings`` name some."""
    BertConfig, BertModel = transformers_part("transformers", "BertConfig", "BertModel")

    if 0 < settings.table_text_length < task.text_length:
        raise ValueError(
            f"table_text_length is {settings.table_text_length}, but sentences have {task.text_length} tokens: "
            "lower data.text_length, or raise it where the weights are random"
        )
    bert = BertModel(
        BertConfig(
            vocab_size=task.vocabulary_size,
            hidden_size=settings.bert_width,
            num_hidden_layers=settings.bert_layers,
            num_attention_heads=settings.bert_heads,
            intermediate_size=4 * settings.bert_width,
            max_position_embeddings=settings.table_text_length or task.text_length,
            hidden_dropout_prob=settings.bert_dropout,
            attention_probs_dropout_prob=settings.bert_dropout,
            pad_token_id=task.pad_id,
        ),
        add_pooling_layer=False,
    )
    if settings.bert_checkpoint:
        copy_weights(
            load_pretrained(BertModel, settings.bert_checkpoint, add_pooling_layer=False),
            bert,
            settings.bert_checkpoint,
        )
    return bert
