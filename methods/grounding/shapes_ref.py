"""``shapes_ref``: pictures of coloured shapes with sentences, made here and now, for runs that need nothing else.

What is made follows from (seed, split, index) alone. It tests plumbing and trains in minutes; what it shows about a
method is no claim about photos.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from methods.data.files import combined_digest
from methods.grounding.boxes import box_of_mask, centred
from methods.grounding.expressions import Sample
from methods.grounding.shapes_scene import LONGEST_SENTENCE, WORDS, draw_scene
from methods.grounding.source import GroundingData, GroundingSource, not_default
from methods.grounding.vocabulary import WordVocabulary

SPLITS = ("train", "validation", "test")
VERSION = 1
"""Raised whenever the same settings would give other pictures."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShapesRef(GroundingSource):
    """The settings of ``shapes_ref``. Pictures are made when they are first asked for, and then kept in memory."""

    num_train: int = 4000
    """Training pictures, each with one sentence."""
    num_validation: int = 300
    """Validation pictures."""
    num_test: int = 300
    """Test pictures."""
    generalised: bool = False
    """60 % of sentences name one object, 20 % several, 20 % nothing in the picture."""
    seed: int = 0
    """Of pictures and sentences."""

    shortest_text: ClassVar[int] = LONGEST_SENTENCE + 2

    def __post_init__(self) -> None:
        GroundingSource.__post_init__(self)
        if min(self.num_train, self.num_validation, self.num_test) < 2:
            raise ValueError(
                f"num_train, num_validation and num_test must be at least 2, got {self.num_train}, "
                f"{self.num_validation} and {self.num_test}"
            )
        if self.seed < 0:
            raise ValueError(f"seed must be a whole number from 0, got {self.seed}")
        if self.text_length < self.shortest_text:
            raise ValueError(
                f"text_length must be at least {self.shortest_text}: sentences have up to {LONGEST_SENTENCE} words; "
                f"got {self.text_length}"
            )

    @property
    def may_be_empty(self) -> bool:
        return self.generalised

    def fingerprint(self) -> str:
        return combined_digest("shapes_ref", VERSION, not_default(self))

    def load(self) -> GroundingData:
        counts = (self.num_train, self.num_validation, self.num_test)
        train, validation, test = (Scenes(self, split, num) for split, num in enumerate(counts))
        return GroundingData(
            source=self, vocabulary=WordVocabulary(WORDS), train=train, validation=validation, test=test
        )


class Scenes:
    """The pictures of one split, each made once."""

    decodes_photos = False

    def __init__(self, settings: ShapesRef, split: int, num_scenes: int) -> None:
        self._settings, self._split, self._num_scenes = settings, split, num_scenes
        self.pictures = self.objects = np.arange(num_scenes, dtype=np.int64)
        self._made: dict[int, tuple[str, Sample]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """What was made stays behind: another process makes the same again, and faster than it could be sent."""
        return self.__dict__ | {"_made": {}}

    def __len__(self) -> int:
        return self._num_scenes

    def sentences(self, indices: np.ndarray) -> Sequence[str]:
        return [self._scene(int(index))[0] for index in indices]

    def sample_id(self, index: int) -> str:
        return f"shapes_ref/{self._settings.seed}/{SPLITS[self._split]}/{index}"

    def sample(self, index: int, *, with_original: bool = False) -> Sample:
        return self._scene(index)[1]

    def _scene(self, index: int) -> tuple[str, Sample]:
        """Sentence and sample, made at the first call."""
        made = self._made.get(index)
        if made is None:
            side = self._settings.image_size
            random = np.random.default_rng([self._settings.seed, self._split, index])
            scene = draw_scene(random, side, generalised=self._settings.generalised)
            is_empty = scene.kind == "none"
            box = (0.0, 0.0, 0.0, 0.0) if is_empty else centred(box_of_mask(scene.mask), side, side)
            sample = Sample(scene.image, scene.mask, box, is_empty, (side, side), None)
            made = self._made[index] = (scene.sentence, sample)
        return made
