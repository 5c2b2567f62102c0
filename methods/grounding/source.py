"""What grounding data sets have in common: their settings, and the loaded data as a stage uses it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

import numpy as np

from methods.data.base import Augment, SampleStream, StreamSettings
from methods.grounding.contracts import GroundingTask
from methods.grounding.expressions import Expressions, split_by_picture
from methods.grounding.protocols import protocol_named
from methods.grounding.stream import GroundingStream
from methods.grounding.vocabulary import Vocabulary

NORMALISATIONS: Mapping[str, tuple[tuple[float, float, float], tuple[float, float, float]]] = {
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
}
"""Mean and deviation per channel of pixels scaled to 0..1."""
EVALUATION_PIXELS = 1 << 22
"""Pixels of a batch that is only evaluated: large pictures come in smaller batches."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GroundingSource:
    """Settings of every grounding data set."""

    image_size: int = 48
    """Side of the square to which pictures are stretched."""
    text_length: int = 12
    """Tokens of a sentence, start and end included. What is longer loses words from its end."""
    normalisation: Literal["half", "imagenet", "clip"] = "half"
    """Statistics that pixels are normalised by: those with which the image encoder was trained."""
    protocol: str = "ours"
    """How predictions are judged: ``ours``, ``lavt``, ``cris``, ``rela``, ... A number is quoted with it."""

    default_augment: ClassVar[Augment] = Augment()
    task_type: ClassVar[type] = GroundingTask

    def __post_init__(self) -> None:
        if self.image_size < 8:
            raise ValueError(f"image_size must be at least 8 pixels, got {self.image_size}")
        if self.text_length < 3:
            raise ValueError(f"text_length must be at least 3 (start, a word, end), got {self.text_length}")
        if self.normalisation not in NORMALISATIONS:
            raise ValueError(
                f"normalisation must be one of {', '.join(NORMALISATIONS)}, got {self.normalisation!r}"
            )
        protocol_named(self.protocol)

    @property
    def may_be_empty(self) -> bool:
        """Whether sentences occur that name nothing in their picture."""
        return False

    def refusals(self, section: Any) -> Iterable[str]:
        """Settings of the data section that only make sense where there are classes."""
        if section.fraction != 1.0 or section.imbalance != 1.0:
            yield (
                f"fraction and imbalance thin out classes, and sentences have none: leave both at 1, got "
                f"{section.fraction} and {section.imbalance}"
            )
        if section.augment is not None and section.augment.pad:
            yield (
                f"augment.pad must be 0 for pictures with sentences (a crop could cut off what is named), got {section.augment.pad}"
            )


def not_default(source: GroundingSource) -> list[tuple[str, Any]]:
    """Settings that were changed, and which revision of the protocol judges: a setting that is added later leaves the fingerprints of older experiments alone."""
    changed = ((item, getattr(source, item.name)) for item in fields(source))
    settings = [(item.name, value) for item, value in changed if value != item.default]
    version = protocol_named(source.protocol).version
    return settings if version == 1 else [*settings, ("protocol_version", version)]


@dataclass(frozen=True, kw_only=True)
class GroundingData:
    """A loaded grounding data set."""

    source: GroundingSource
    vocabulary: Vocabulary
    train: Expressions
    validation: Expressions | None
    """None where the data set has none of its own: then pictures of ``train`` are held out."""
    test: Expressions
    one_sentence: bool = False
    """In training, an epoch shows each object once, with one of its sentences; else every sentence is a sample."""
    notes: Mapping[str, Any] | None = None
    """What else the manifest says of the data."""

    def task(self) -> GroundingTask:
        source, words = self.source, self.vocabulary
        return GroundingTask(
            image_size=source.image_size,
            text_length=source.text_length,
            vocabulary_size=len(words),
            start_id=words.start_id,
            end_id=words.end_id,
            pad_id=words.pad_id,
            mask_id=words.mask_id,
            tokenizer=words.name,
            may_be_empty=source.may_be_empty,
            protocol=source.protocol,
        )

    def streams(self, settings: StreamSettings) -> Mapping[str, SampleStream]:
        """Training, validation and test expressions. With two workers each gets every second row of a batch."""
        kept, held_out = np.arange(len(self.train)), None
        if self.validation is None:
            kept, held_out = split_by_picture(self.train.pictures, settings.validation, settings.split_seed)
        judged = self.train if self.validation is None else self.validation
        return {
            "training": self._training(kept, settings),
            "validation": self._evaluation(judged, held_out, settings),
            "test": self._evaluation(self.test, None, settings),
        }

    def described(self) -> dict[str, Any]:
        mean, std = NORMALISATIONS[self.source.normalisation]
        return {
            "normalisation": {"mean": list(mean), "std": list(std)},
            "vocabulary": self.vocabulary.described(),
            "protocol": self.source.protocol,
            "fit": getattr(self.source, "fit", "stretch"),
            **(self.notes or {}),
        }

    def _training(self, kept: np.ndarray, settings: StreamSettings) -> GroundingStream:
        return GroundingStream(
            self.train, self.vocabulary, self.source, NORMALISATIONS[self.source.normalisation],
            indices=kept, batch_size=settings.batch_size, seed=settings.seed, shuffle=True,
            flip=settings.augment.flip, one_sentence=self.one_sentence, device=settings.device,
            rank=settings.rank, num_workers=settings.num_workers,
        )  # fmt: skip

    def _evaluation(
        self, split: Expressions, indices: np.ndarray | None, settings: StreamSettings
    ) -> GroundingStream:
        most = max(1, EVALUATION_PIXELS // self.source.image_size**2)
        return GroundingStream(
            split, self.vocabulary, self.source, NORMALISATIONS[self.source.normalisation],
            indices=np.arange(len(split)) if indices is None else indices,
            batch_size=min(settings.evaluation_batch_size, most), seed=0, shuffle=False,
            device=settings.device, rank=settings.rank, num_workers=settings.num_workers,
        )  # fmt: skip
