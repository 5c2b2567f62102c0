"""What grounding data, networks and methods pass to each other.

Shape legend: B = batch, H, W = image sides, L = text length, h, w = sides of a feature map, C = decoder width,
D = encoder width, N = latent expressions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor


class GroundingBatch(NamedTuple):
    """What the loop hands to a grounding method: each row is one picture with one sentence."""

    images: Tensor
    """Normalised, ``[B, 3, H, W]`` float32."""
    token_ids: Tensor
    """``[B, L]`` int64; position 0 is the sentence-start token in every vocabulary."""
    token_mask: Tensor
    """``[B, L]`` bool, True where there is a real token. Other conventions are made from it at a model's edge."""
    masks: Tensor
    """``[B, 1, H, W]`` float32 in {0, 1}: the union of what is named; all zero when nothing is."""
    boxes: Tensor
    """``[B, 4]`` float32, centre x, centre y, width, height in [0, 1]; zeros when nothing is named."""
    is_empty: Tensor
    """``[B]`` bool: nothing in the picture is named."""
    indices: Tensor
    """Position of each expression in its split, ``[B]`` int64: its identity in every epoch."""
    original_sizes: Tensor
    """Height and width of the stored picture, ``[B, 2]`` int64."""
    epoch: int = 0
    """Epoch that this batch belongs to, counted from 0."""
    control_ids: Tensor | None = None
    """Tokens of a sentence about another picture, ``[B, L]``: see ``rolled``. Only in evaluation."""
    control_mask: Tensor | None = None
    """Which of ``control_ids`` are real, ``[B, L]``."""
    original_masks: tuple[Tensor, ...] = ()
    """Truth at the size of each stored picture, uint8 ``[h_i, w_i]``: where a protocol is judged at that size."""
    frames: Tensor | None = None
    """Where pictures lie in the square, ``[B, 4]`` int64 top, left, height, width in pixels; None where they fill it. Only
    in evaluation."""

    def rolled(self) -> GroundingBatch | None:
        """The same pictures, each with the sentence of the next picture of its split; None where there are none.

        The control that tells whether language is used. The sentences come from the data, and are not rolled within a
        batch, so that the number of workers and the size of batches change nothing.
        """
        if self.control_ids is None or self.control_mask is None:
            return None
        return self._replace(token_ids=self.control_ids, token_mask=self.control_mask)


@dataclass(frozen=True, kw_only=True, slots=True)
class GroundingTask:
    """What is to be predicted, and in which vocabulary: fixed by the data set."""

    image_size: int
    """Side of the square pictures that networks see."""
    text_length: int
    """Tokens of a sentence, start, end and padding included (L)."""
    vocabulary_size: int
    start_id: int
    end_id: int
    pad_id: int
    mask_id: int
    tokenizer: str = "words"
    """``words`` (our own word-level vocabulary), or the name or path of a HuggingFace tokenizer."""
    may_be_empty: bool = False
    """Whether sentences occur that name nothing in their picture."""
    protocol: str = "ours"
    """Name of the protocol by which predictions are judged, see ``methods.grounding.protocols``."""

    def __post_init__(self) -> None:
        if self.image_size < 1 or self.text_length < 3:
            raise ValueError(
                f"image_size must be positive and text_length at least 3 (start, a word, end), "
                f"got {self.image_size} and {self.text_length}"
            )

    def example(self, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[GroundingBatch]:
        """What a network of this task is called with, for one blank picture and a sentence of full length."""
        side, length = self.image_size, self.text_length
        ids = torch.full((1, length), self.mask_id, device=device)
        ids[:, 0], ids[:, -1] = self.start_id, self.end_id
        return (
            GroundingBatch(
                images=torch.zeros(1, 3, side, side, device=device, dtype=dtype),
                token_ids=ids,
                token_mask=torch.ones(1, length, dtype=torch.bool, device=device),
                masks=torch.zeros(1, 1, side, side, device=device),
                boxes=torch.zeros(1, 4, device=device),
                is_empty=torch.zeros(1, dtype=torch.bool, device=device),
                indices=torch.zeros(1, dtype=torch.int64, device=device),
                original_sizes=torch.full((1, 2), side, device=device),
            ),
        )


@dataclass(frozen=True, kw_only=True)
class GroundingOutput:
    """What a grounding network emits for a batch."""

    mask_logits: Tensor
    """``[B, 1, H, W]`` at input size; threshold 0 is probability one half."""
    pixel_embed: Tensor
    """What the mask head compares with the sentence, ``[B, C, h, w]``."""
    sentence_embed: Tensor
    """``[B, C]``"""
    expression_logits: Tensor | None = None
    """Of the sentence and each latent expression, ``[B, 1 + N, h, w]`` (Latent-VG)."""
    empty_logit: Tensor | None = None
    """Above 0: no such object, ``[B]``; absent without a no-target head."""
    boxes: Tensor | None = None
    """``[B, 4]`` as in the batch; absent without a box head."""
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    """What only this method's own losses read."""
