"""Where MagNet lets pixels and words meet: attention, a gate that starts closed, and the alignment module.

"Mask Grounding for Referring Image Segmentation", CVPR 2024, arXiv 2312.12198. The block, the gate and the module follow
the published model code, but for two mistakes that are not repeated: its text-side gate starts with both matrices at
zero, which gives no gradient ever, and its text-side attention multiplies queries by an additive mask, which makes the
attention uniform. Padded words are removed from the keys; nothing else is masked.

Shape legend: B = batch, Q = queries, K = keys, c = width of the queries, h, w = sides of a map, L = text length.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CrossAttention(nn.Module):
    """One head of attention, multiplied with the projected query, as in LAVT's pixel-word attention."""

    def __init__(self, width: int, source_width: int) -> None:
        super().__init__()
        self.query = nn.Linear(width, width)
        self.query_norm = nn.LayerNorm(width)
        self.key = nn.Linear(source_width, width)
        self.value = nn.Linear(source_width, width)
        self.attended = nn.Linear(width, width)
        self.attended_norm = nn.LayerNorm(width)
        self.own = nn.Linear(width, width)
        self.mixed = nn.Linear(width, width)

    def weights(self, queries_BQc: Tensor, source_BKs: Tensor, key_mask_BK: Tensor | None) -> Tensor:
        """Attention of each query over the source, ``[B, Q, K]``; rows sum to 1, and padded keys get 0."""
        scale = queries_BQc.shape[-1] ** -0.5
        scores_BQK = self.query_norm(self.query(queries_BQc)) @ self.key(source_BKs).transpose(1, 2) * scale
        if key_mask_BK is not None:
            scores_BQK = scores_BQK.masked_fill(~key_mask_BK[:, None], -torch.inf)
        weights_BQK: Tensor = scores_BQK.softmax(dim=-1)
        return weights_BQK

    def forward(self, queries_BQc: Tensor, source_BKs: Tensor, key_mask_BK: Tensor | None = None) -> Tensor:
        """What each query gathers, ``[B, Q, c]``. ``key_mask`` is True where a key is real; None: all are."""
        gathered_BQc = self.weights(queries_BQc, source_BKs, key_mask_BK) @ self.value(source_BKs)
        gathered_BQc = self.attended_norm(self.attended(gathered_BQc))
        return F.gelu(self.mixed(F.gelu(self.own(queries_BQc)) * gathered_BQc))


class Gate(nn.Module):
    """``x + tanh(W2 act(W1 r)) r``, without biases. Only W2 starts at zero: closed at first, and able to open."""

    def __init__(self, width: int, activation: nn.Module) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width, bias=False)
        self.activation = activation
        self.outer = nn.Linear(width, width, bias=False)
        nn.init.zeros_(self.outer.weight)

    def forward(self, values: Tensor, gathered: Tensor) -> Tensor:
        opening = torch.tanh(self.outer(self.activation(self.inner(gathered))))
        return values + opening * gathered


class TextFusion(nn.Module):
    """The text side of a stage: words gather from the unfused map, through a gate with ReLU."""

    def __init__(self, text_width: int, width: int) -> None:
        super().__init__()
        self.attention = CrossAttention(text_width, width)
        self.gate = Gate(text_width, nn.ReLU())

    def forward(self, words_BLd: Tensor, pixels_BQc: Tensor) -> Tensor:
        fused_BLd: Tensor = self.gate(words_BLd, self.attention(words_BLd, pixels_BQc))
        return fused_BLd


class PooledContext(nn.Module):
    """One level of global context: the map pooled to k x k, made narrow, and asked for words, ``[B, h w, c/4]``."""

    def __init__(self, width: int, text_width: int, pool_size: int) -> None:
        super().__init__()
        self.pool_size = pool_size
        self.widen = nn.Linear(width, 4 * width)
        self.norm = nn.LayerNorm(4 * width)
        self.narrow = nn.Linear(4 * width, width)
        self.reduce = nn.Linear(width, width // 4)
        self.attention = CrossAttention(width // 4, text_width)

    def forward(self, map_Bchw: Tensor, words_BLd: Tensor, token_mask_BL: Tensor) -> Tensor:
        side = self.pool_size
        pooled_BQc = F.adaptive_avg_pool2d(map_Bchw, side).flatten(2).transpose(1, 2)
        pooled_BQc = F.gelu(self.narrow(self.norm(self.widen(pooled_BQc))))
        context_BQc = self.attention(self.reduce(pooled_BQc), words_BLd, token_mask_BL)
        context_Bckk = context_BQc.transpose(1, 2).unflatten(2, (side, side))
        context_Bchw = F.interpolate(
            context_Bckk, size=map_Bchw.shape[2:], mode="bilinear", align_corners=True
        )
        return context_Bchw.flatten(2).transpose(1, 2)


class AlignmentModule(nn.Module):
    """The image side of a stage: pixels and pooled context gather from the words.

    Gives the map for the pixel decoder and the gated map for the next stage. The last stage has no next one, so its
    gate is left out (``is_last``): it could never get a gradient.
    """

    def __init__(
        self, width: int, text_width: int, *, pool_sizes: Sequence[int], is_last: bool = False
    ) -> None:
        super().__init__()
        if width % 4:
            raise ValueError(f"width of a fused stage must be a multiple of 4, got {width!r}")
        self.attention = CrossAttention(width, text_width)
        self.context = nn.ModuleList(PooledContext(width, text_width, size) for size in pool_sizes)
        joint_width = width + len(pool_sizes) * (width // 4)
        self.mixer = nn.Sequential(
            nn.Linear(joint_width, width), nn.LayerNorm(width), nn.Linear(width, width), nn.GELU()
        )
        self.gate = None if is_last else Gate(width, nn.GELU())

    def forward(self, map_Bhwc: Tensor, words_BLd: Tensor, token_mask_BL: Tensor) -> tuple[Tensor, Tensor]:
        """Decoder feature ``[B, c, h, w]`` and gated map ``[B, h, w, c]``, both from the unfused inputs."""
        side = map_Bhwc.shape[1:3]
        pixels_BQc = map_Bhwc.flatten(1, 2)
        gathered_BQc = self.attention(pixels_BQc, words_BLd, token_mask_BL)
        map_Bchw = map_Bhwc.permute(0, 3, 1, 2)
        context = [level(map_Bchw, words_BLd, token_mask_BL) for level in self.context]
        feature_BQc = self.mixer(torch.cat([*context, gathered_BQc], dim=-1))
        gated_BQc = pixels_BQc if self.gate is None else self.gate(pixels_BQc, gathered_BQc)
        return feature_BQc.transpose(1, 2).unflatten(2, side), gated_BQc.unflatten(1, side)
