"""The Multiway encoder of BEiT-3: one attention over pictures and words, with projections of its own for each.

Wang et al.: "Image as a Foreign Language: BEiT Pretraining for All Vision and Vision-Language Tasks", arXiv 2208.10442.
A pre-norm transformer over [vision tokens ; text tokens]. Every parameter exists once per modality, those of attention
too; what is shared is the attention matrix. Names inside an expert are timm's, so that the vision experts load from a
timm checkpoint as they are.

Published: the layer (sub-norms after the heads and inside the feed-forward, epsilon 1e-5, truncated normal 0.02).

Shape legend: B = batch, L = text length, P = patches, D = encoder width, T = tokens of the joint sequence, H, W = image
sides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methods.checks import check_positive

EPSILON = 1e-5
INITIAL_DEVIATION = 0.02

Exchange = Callable[[Tensor], Tensor]
"""Changes the joint sequence ``[B, T, D]`` between two steps of a layer."""


@dataclass(frozen=True, kw_only=True)
class MultiwaySettings:
    """Size of a Multiway encoder. The defaults are BEiT-3 base."""

    patch_size: int = 16
    """Side of a patch in pixels; must divide the side of the pictures."""
    width: int = 768
    """Numbers per token (D)."""
    num_layers: int = 12
    """Layers of the encoder."""
    num_heads: int = 12
    """Heads of the attention; must divide the width."""
    drop_path: float = 0.1
    """Rate at which the last layer's residual branches are dropped, per sample; it rises linearly from 0."""
    text_positions: int = 0
    """Rows of the table of text positions. 0: as many as sentences are long; BEiT-3's own table has 1,022."""
    vocabulary_rows: int = 0
    """Rows of the table of words. 0: as many as the vocabulary has; BEiT-3's own table has 64,010."""
    checkpoint: str = ""
    """First weights: a BEiT-3 file (all of it, or timm's vision part), or ``timm/NAME`` for timm's vision part."""

    def __post_init__(self) -> None:
        check_positive(self, "patch_size", "width", "num_layers", "num_heads")
        if self.width % self.num_heads:
            raise ValueError(f"width must be a multiple of num_heads ({self.num_heads}), got {self.width}")
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path must be at least 0 and below 1, got {self.drop_path!r}")
        for name in ("text_positions", "vocabulary_rows"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0 (as the data need), got {getattr(self, name)!r}")


class Part(NamedTuple):
    """A run of tokens in the joint sequence: how long it is, and what it uses in a layer."""

    length: int
    expert: Expert
    """Whose projections it uses."""
    norm: nn.Module | None = None
    """Norm before attention, instead of the expert's."""
    feed_forward: nn.Module | None = None
    """Second residual branch, instead of the expert's."""


class Attention(nn.Module):
    """Projections of attention, without the attention: that is joint, see ``MultiwayLayer``."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.norm = nn.LayerNorm(width, eps=EPSILON)
        self.proj = nn.Linear(width, width)

    def split(self, tokens: Tensor) -> Tensor:
        """Queries, keys and values of ``[B, n, D]``: ``[3, B, heads, n, D / heads]``."""
        batch, length, width = tokens.shape
        # The size of a head is spelt out: a -1 cannot be told for a sentence of no tokens.
        heads: Tensor = self.qkv(tokens).reshape(batch, length, 3, self.num_heads, width // self.num_heads)
        return heads.permute(2, 0, 3, 1, 4)


class FeedForward(nn.Module):
    """Two linear layers around GELU and a norm, four times as wide inside."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.norm = nn.LayerNorm(4 * width, eps=EPSILON)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        result: Tensor = self.fc2(self.norm(F.gelu(self.fc1(tokens))))
        return result


class Expert(nn.Module):
    """All weights that one modality has in one layer, under timm's names."""

    def __init__(self, width: int, num_heads: int, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=EPSILON)
        self.attn = Attention(width, num_heads)
        self.norm2 = nn.LayerNorm(width, eps=EPSILON)
        self.mlp = FeedForward(width)
        self.drop_path = DropPath(drop_path)

    def feed_forward(self, tokens: Tensor) -> Tensor:
        """The second residual branch: ``[B, n, D]`` to the same shape."""
        result: Tensor = self.mlp(self.norm2(tokens))
        return result


class DropPath(nn.Module):
    """In training, drops a residual branch for whole samples, and strengthens it for the others."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, branch: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return branch
        kept = torch.rand(len(branch), *(1,) * (branch.dim() - 1), device=branch.device) >= self.rate
        return branch * kept.to(branch.dtype) / (1 - self.rate)


class MultiwayLayer(nn.Module):
    """Joint attention, then a feed-forward, each part of the sequence with the weights it names."""

    def __init__(self, width: int, num_heads: int, drop_path: float) -> None:
        super().__init__()
        self.vision = Expert(width, num_heads, drop_path)
        self.language = Expert(width, num_heads, drop_path)

    def forward(
        self,
        tokens_BTD: Tensor,
        parts: Sequence[Part],
        attended_B11T: Tensor | None,
        between: Exchange | None = None,
        after: Exchange | None = None,
        *,
        is_joint: bool = True,
    ) -> Tensor:
        """The joint sequence after this layer.

        Args:
            tokens_BTD: All parts, one after the other.
            parts: Their lengths and weights, in that order.
            attended_B11T: True where a token may be attended to; None for all.
            between: Applied between attention and feed-forward.
            after: Applied to what the layer gives.
            is_joint: Each token attends to all parts; else to its own part only, which makes separate towers of them.
        """
        tokens_BTD = self._attend(tokens_BTD, parts, attended_B11T, is_joint)
        tokens_BTD = tokens_BTD if between is None else between(tokens_BTD)
        joined = [
            run + part.expert.drop_path((part.feed_forward or part.expert.feed_forward)(run))
            for run, part in _runs(tokens_BTD, parts)
        ]
        tokens_BTD = torch.cat(joined, dim=1)
        return tokens_BTD if after is None else after(tokens_BTD)

    def _attend(
        self, tokens_BTD: Tensor, parts: Sequence[Part], attended_B11T: Tensor | None, is_joint: bool
    ) -> Tensor:
        normed = [(part.norm or part.expert.norm1)(run) for run, part in _runs(tokens_BTD, parts)]
        split = [part.expert.attn.split(run) for run, part in zip(normed, parts, strict=True)]
        groups = [torch.cat(split, dim=3)] if is_joint else split
        masks = [None] * len(groups) if attended_B11T is None else _cut(attended_B11T, groups)
        attended = [
            F.scaled_dot_product_attention(group[0], group[1], group[2], attn_mask=mask)
            for group, mask in zip(groups, masks, strict=True)
        ]
        merged_BTD = torch.cat(attended, dim=2).transpose(1, 2).reshape(tokens_BTD.shape)
        outputs = [
            run + part.expert.drop_path(part.expert.attn.proj(part.expert.attn.norm(output)))
            for (run, part), (output, _) in zip(_runs(tokens_BTD, parts), _runs(merged_BTD, parts), strict=True)
        ]  # fmt: skip
        return torch.cat(outputs, dim=1)


class MultiwayOutput(NamedTuple):
    """What the encoder says, normed."""

    vision: Tensor
    """``[B, 1 + P, D]`` with a class token, else ``[B, P, D]``."""
    text: Tensor
    """``[B, L, D]``"""


class MultiwayEncoder(nn.Module):
    """Embeddings, layers and final norms. ``forward`` is the plain encoder; methods with more parts walk the layers."""

    def __init__(
        self,
        settings: MultiwaySettings,
        *,
        image_size: int,
        text_length: int,
        vocabulary_size: int,
        has_class_token: bool = True,
        has_norms: bool = True,
    ) -> None:
        """Build the encoder with random weights; without what a method never reads, so that all weights are trained.

        Raises:
            ValueError: Patches do not tile the picture, or a table is too small for the data.
        """
        super().__init__()
        _check_fit(settings, image_size, text_length, vocabulary_size)
        width = settings.width
        self.num_patches = (image_size // settings.patch_size) ** 2
        self.patch_embed = nn.Conv2d(3, width, settings.patch_size, stride=settings.patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width)) if has_class_token else None
        self.vision_positions = nn.Parameter(torch.zeros(1, int(has_class_token) + self.num_patches, width))
        self.words = nn.Embedding(settings.vocabulary_rows or vocabulary_size, width)
        self.text_positions = nn.Parameter(torch.zeros(1, settings.text_positions or text_length, width))
        last = max(settings.num_layers - 1, 1)
        rates = [settings.drop_path * number / last for number in range(settings.num_layers)]
        self.layers = nn.ModuleList(MultiwayLayer(width, settings.num_heads, rate) for rate in rates)
        self.vision_norm = nn.LayerNorm(width, eps=EPSILON) if has_norms else nn.Identity()
        self.text_norm = nn.LayerNorm(width, eps=EPSILON) if has_norms else nn.Identity()
        self.apply(_initialise)
        for table in (self.cls_token, self.vision_positions, self.text_positions):
            if table is not None:
                nn.init.trunc_normal_(table, std=INITIAL_DEVIATION)

    def embed_patches(self, images_B3HW: Tensor) -> Tensor:
        """Patches with their positions, without class token, ``[B, P, D]``."""
        patches_BPD: Tensor = self.patch_embed(images_B3HW).flatten(2).transpose(1, 2)
        return patches_BPD + self.vision_positions[:, -self.num_patches :]

    def embed_class(self, num_samples: int) -> Tensor:
        """The class token with its position, ``[B, 1, D]``."""
        assert self.cls_token is not None
        return (self.cls_token + self.vision_positions[:, :1]).expand(num_samples, -1, -1)

    def embed_words(self, token_ids_BL: Tensor) -> Tensor:
        """Words with their positions, ``[B, L, D]``."""
        words_BLD: Tensor = self.words(token_ids_BL)
        return words_BLD + self.text_positions[:, : token_ids_BL.shape[1]]

    def embed(self, images_B3HW: Tensor, token_ids_BL: Tensor) -> Tensor:
        """The joint sequence [class token ; patches ; words], ``[B, 1 + P + L, D]``."""
        vision = [self.embed_patches(images_B3HW)]
        if self.cls_token is not None:
            vision.insert(0, self.embed_class(len(images_B3HW)))
        return torch.cat([*vision, self.embed_words(token_ids_BL)], dim=1)

    def states(
        self, images_B3HW: Tensor, token_ids_BL: Tensor, token_mask_BL: Tensor, *, is_joint: bool = True
    ) -> Iterator[Tensor]:
        """The joint sequence after each layer, ``[B, T, D]``, not normed. See ``MultiwayLayer`` for ``is_joint``."""
        tokens_BTD = self.embed(images_B3HW, token_ids_BL)
        length = token_ids_BL.shape[1]
        attended = attention_mask(tokens_BTD.shape[1] - length, token_mask_BL) if length else None
        for layer in self.layers:
            assert isinstance(layer, MultiwayLayer)
            parts = (Part(tokens_BTD.shape[1] - length, layer.vision), Part(length, layer.language))
            tokens_BTD = layer(tokens_BTD, parts, attended, is_joint=is_joint)
            yield tokens_BTD

    def normed(self, tokens_BTD: Tensor, text_length: int) -> MultiwayOutput:
        """The joint sequence split by modality, each with its final norm."""
        vision, text = torch.split(tokens_BTD, [tokens_BTD.shape[1] - text_length, text_length], dim=1)
        return MultiwayOutput(self.vision_norm(vision), self.text_norm(text))

    def forward(self, images_B3HW: Tensor, token_ids_BL: Tensor, token_mask_BL: Tensor) -> MultiwayOutput:
        *_, last_BTD = self.states(images_B3HW, token_ids_BL, token_mask_BL)
        return self.normed(last_BTD, token_ids_BL.shape[1])


def attention_mask(num_before: int, token_mask_BL: Tensor, num_after: int = 0) -> Tensor:
    """Whether a token may be attended to, ``[B, 1, 1, T]``: words may, their padding may not, all around may."""
    return F.pad(token_mask_BL, (num_before, num_after), value=True)[:, None, None]


def _cut(attended_B11T: Tensor, groups: Sequence[Tensor]) -> Sequence[Tensor]:
    """The mask of each group's keys; groups are ``[3, B, heads, n, D / heads]``."""
    return torch.split(attended_B11T, [group.shape[3] for group in groups], dim=3)


def _runs(tokens_BTD: Tensor, parts: Sequence[Part]) -> Iterator[tuple[Tensor, Part]]:
    lengths = [part.length for part in parts]
    return zip(torch.split(tokens_BTD, lengths, dim=1), parts, strict=True)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding | nn.Conv2d):
        nn.init.trunc_normal_(module.weight, std=INITIAL_DEVIATION)
    bias: Any = getattr(module, "bias", None)
    if isinstance(module, nn.Linear | nn.Conv2d) and bias is not None:
        nn.init.zeros_(bias)


def _check_fit(settings: MultiwaySettings, image_size: int, text_length: int, vocabulary_size: int) -> None:
    if image_size % settings.patch_size:
        raise ValueError(f"patch_size {settings.patch_size} does not divide pictures of side {image_size}")
    for name, found, needed in (
        ("text_positions", settings.text_positions, text_length),
        ("vocabulary_rows", settings.vocabulary_rows, vocabulary_size),
    ):
        if 0 < found < needed:
            raise ValueError(f"{name} is {found}, but the data need {needed}: raise it, or set it to 0")
