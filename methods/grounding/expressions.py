"""One split of a grounding data set: expressions, each with its picture, and what a batch of them is made of.

Shape legend: n = expressions, S = side of the square input, H, W = sides of the stored picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from methods.data.base import DataError
from methods.data.randomness import hashes
from methods.grounding.fit import Frame


class Sample(NamedTuple):
    """What is known about one expression."""

    image: np.ndarray
    """uint8 ``[3, S, S]``"""
    mask: np.ndarray
    """The union of what is named, bool ``[S, S]``."""
    box: tuple[float, float, float, float]
    """Of that union: centre x, centre y, width, height in [0, 1]; zeros when nothing is named."""
    is_empty: bool
    """Nothing is named. Never told from an empty mask: a thin object can vanish when it is resized."""
    size: tuple[int, int]
    """Height and width of the stored picture."""
    original_mask: np.ndarray | None
    """uint8 ``[H, W]``: only when it was asked for, and when its size is another than the input's."""
    frame: Frame | None = None
    """Where in the square the picture lies; None where it fills it."""


class Expressions(Protocol):
    """A split. Position is identity: an expression keeps its number in every epoch and process."""

    pictures: np.ndarray
    """Which picture each expression is about, ``[n]`` int64."""
    objects: np.ndarray
    """Which object (or set of objects) of the data set each expression names, ``[n]`` int64."""
    decodes_photos: bool
    """Whether samples come from files that are worth decoding on several threads."""

    def __len__(self) -> int: ...

    def sentences(self, indices: np.ndarray) -> Sequence[str]:
        """What is said at these positions."""

    def sample_id(self, index: int) -> str:
        """A name of the expression that is the same in every run."""

    def sample(self, index: int, *, with_original: bool = False) -> Sample:
        """Picture and truth of one expression."""


def controls(pictures: np.ndarray) -> np.ndarray | None:
    """For each position, the nearest later one (from the start again at the end) that is about another picture.

    None when all are about one picture: there is no sentence about another.
    """
    num = len(pictures)
    if num == 0 or bool((pictures == pictures[0]).all()):
        return None
    following = np.empty(num, dtype=np.int64)
    twice = np.concatenate([pictures, pictures])
    ahead = 2 * num - 1
    for position in range(2 * num - 2, -1, -1):
        if twice[position] != twice[position + 1]:
            ahead = position + 1
        following[position % num] = ahead % num
    return following


def split_by_picture(pictures: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions for training and for validation, so that no picture is on both sides.

    About ``fraction`` of the pictures is held out, at least one. Which ones follows from ``seed`` alone.
    """
    positions = np.arange(len(pictures), dtype=np.int64)
    if fraction == 0.0:
        return positions, positions[:0]
    known = np.unique(pictures)
    if len(known) < 2:
        raise DataError("all expressions are about one picture: it cannot be split; set data.validation to 0")
    num_held_out = min(len(known) - 1, max(1, round(fraction * len(known))))
    order = np.lexsort((known, hashes(seed, "split", 0, known)))
    held_out = np.isin(pictures, known[order[:num_held_out]])
    return positions[~held_out], positions[held_out]


def refuse_shared_pictures(**splits: Expressions | None) -> None:
    """Raise DataError when a picture is in two splits: what is learnt would be asked again."""
    seen: dict[int, str] = {}
    for name, split in splits.items():
        if split is None:
            continue
        own = np.unique(split.pictures).tolist()
        shared = [(picture, seen[picture]) for picture in own if picture in seen]
        if shared:
            picture, other = shared[0]
            raise DataError(
                f"{len(shared)} pictures are in split {name!r} and in another, for instance {picture} (in {other!r}): a "
                "network would be asked about pictures that it has learnt from. Split by picture"
            )
        seen |= dict.fromkeys(own, name)
