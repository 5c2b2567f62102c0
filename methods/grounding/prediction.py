"""What a trained grounder finds in one picture: masks at the picture's own size, for any number of texts.

Shape legend: H, W = sides of the picture, S = side of the square input, B = texts of a batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from methods.data.augment import Normalise
from methods.data.base import DataError
from methods.grounding.boxes import box_of_mask, corners
from methods.grounding.contracts import GroundingBatch, GroundingOutput, GroundingTask
from methods.grounding.fit import FITS, Fit, Frame, fitted_photo, frame_of, picture_corners
from methods.grounding.metrics import picture_mask
from methods.grounding.protocols import protocol_named
from methods.grounding.vocabulary import Vocabulary, encode, vocabulary_from, words_of

MAX_BATCH = 8
"""Texts that go through the network together."""
_CORNERS = tuple[float, float, float, float]


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What one text names."""

    text: str
    mask: np.ndarray
    """Bool ``[H, W]``; empty where the data set's protocol empties the masks of texts that name nothing."""
    box: _CORNERS
    """Left, top, right, bottom in pixels, half open; zeros for an empty mask without a box head."""
    box_from: Literal["box head", "mask"]
    """A box that is not predicted is that of the mask's largest part."""
    names_nothing: bool
    """The network says so by its head; without one, by an empty mask."""
    no_target_probability: float | None
    """None without a no-target head."""
    unknown_words: tuple[str, ...]
    """Words that the vocabulary does not have; the network read a placeholder."""
    num_tokens_left_out: int
    """Tokens at the end for which the network has no room."""


class Grounder:
    """A trained network with all that stands between it and an image with a sentence."""

    def __init__(
        self, network: nn.Module, task: GroundingTask, described: Mapping[str, Any], device: torch.device
    ) -> None:
        """Take a network into use.

        Args:
            network: Maps a ``GroundingBatch`` to its ``GroundingOutput``; in evaluation mode.
            task: What it was trained for.
            described: What its data set said of itself (``GroundingData.described``): vocabulary, normalisation, fit.
            device: Where to compute.

        Raises:
            DataError: The description is incomplete, or its vocabulary is not the network's.
        """
        self.task, self.device = task, device
        self.rules = protocol_named(task.protocol)
        try:
            mean, std = (tuple(map(float, described["normalisation"][name])) for name in ("mean", "std"))
            self.vocabulary: Vocabulary = vocabulary_from(described["vocabulary"])
        except (KeyError, TypeError) as error:
            raise DataError(f"vocabulary or normalisation are not described: {error!r}") from error
        self._fit: Fit = described.get("fit", "stretch")  # older artifacts know no other
        if self._fit not in FITS:
            raise DataError(f"pictures are to be fitted by {self._fit!r}, which is none of {', '.join(FITS)}")
        self._margin = mean
        if len(self.vocabulary) != task.vocabulary_size:
            raise DataError(
                f"the vocabulary {self.vocabulary.name!r} has {len(self.vocabulary)} entries, but the network was trained "
                f"with {task.vocabulary_size}: the tokenizer is another one by now"
            )
        self._network = network.to(device)
        self._normalise = Normalise(mean, std, device)

    def predict(self, pixels_HW3: np.ndarray, texts: Sequence[str]) -> Iterator[Prediction]:
        """What each text names in a picture of uint8 pixels.

        Raises:
            DataError: A text holds no word.
        """
        for text in texts:
            encode(self.vocabulary, [text], self.task.text_length)  # refuses an empty one before any work
        for start in range(0, len(texts), MAX_BATCH):
            part = texts[start : start + MAX_BATCH]
            output = self._output(pixels_HW3, part)
            yield from (self._prediction(output, row, text, pixels_HW3.shape[:2]) for row, text in enumerate(part))  # fmt: skip

    @torch.no_grad()
    def _output(self, pixels_HW3: np.ndarray, texts: Sequence[str]) -> GroundingOutput:
        num_texts, side, device = len(texts), self.task.image_size, self.device
        tokens = encode(self.vocabulary, texts, self.task.text_length)
        square = fitted_photo(pixels_HW3, side, self._fit, self._margin)
        image = self._normalise(torch.tensor(np.ascontiguousarray(square), device=device)[None])
        batch = GroundingBatch(
            images=image.repeat(num_texts, 1, 1, 1),
            token_ids=torch.from_numpy(tokens.ids).to(device),
            token_mask=torch.from_numpy(tokens.mask).to(device),
            masks=torch.zeros(num_texts, 1, side, side, device=device),
            boxes=torch.zeros(num_texts, 4, device=device),
            is_empty=torch.zeros(num_texts, dtype=torch.bool, device=device),
            indices=torch.arange(num_texts, device=device),
            original_sizes=torch.tensor([pixels_HW3.shape[:2]], device=device).expand(num_texts, -1),
        )
        output: GroundingOutput = self._network(batch)
        return output

    def _prediction(self, output: GroundingOutput, row: int, text: str, size: Sequence[int]) -> Prediction:
        height, width = size
        frame = frame_of(height, width, self.task.image_size, self._fit)
        mask = picture_mask(output.mask_logits[row], frame, torch.Size(size), self.rules).cpu().numpy()
        says_none, cleared = self._rejection(output, row, mask)
        if cleared:
            mask = np.zeros_like(mask)
        pieces, num_unknown = self.vocabulary.pieces(text)
        head = output.empty_logit
        return Prediction(
            text=text,
            mask=mask,
            box=_box(output, row, mask, frame),
            box_from="mask" if output.boxes is None else "box head",
            names_nothing=says_none,
            no_target_probability=None if head is None else float(head[row].float().sigmoid()),
            unknown_words=self._unknown(text) if num_unknown else (),
            num_tokens_left_out=max(0, len(pieces) - (self.task.text_length - 2)),
        )

    def _rejection(self, output: GroundingOutput, row: int, mask: np.ndarray) -> tuple[bool, bool]:
        """Whether the network says that nothing is named, and whether its mask is emptied for that, as metrics have it."""
        if self.rules.none_rule == "area":
            small = int(mask.sum()) < max(1, self.rules.min_area)
            return small, small
        says_none = not mask.any() if output.empty_logit is None else bool(output.empty_logit[row] > 0)
        return says_none, says_none and self.rules.none_rule == "flag_clears_mask"

    def _unknown(self, text: str) -> tuple[str, ...]:
        """The words of which the vocabulary knows no, or not every, piece; each once."""
        words = dict.fromkeys(words_of(text))
        return tuple(word for word in words if self.vocabulary.pieces(word)[1])


def _box(output: GroundingOutput, row: int, mask_HW: np.ndarray, frame: Frame) -> _CORNERS:
    if output.boxes is None:
        return box_of_mask(mask_HW, largest_component=True)
    height, width = mask_HW.shape
    inside = corners(output.boxes[row : row + 1].cpu(), *output.mask_logits.shape[-2:])
    left, top, right, bottom = picture_corners(inside, torch.tensor(frame), height, width)[0].tolist()
    return left, top, right, bottom
