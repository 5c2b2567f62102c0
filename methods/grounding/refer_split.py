"""One split of a referring data set: photos and masks, decoded when they are asked for.

Shape legend: n = expressions, S = side of the square input, H, W = sides of the stored picture.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from methods.data.base import DataError
from methods.data.decode import decode
from methods.grounding.annotation_masks import decode_mask, union
from methods.grounding.boxes import box_of_mask, centred
from methods.grounding.expressions import Sample
from methods.grounding.fit import Fit, fitted_box, fitted_mask, fitted_photo, fitted_polygons, frame_of
from methods.grounding.protocols import EvaluationProtocol
from methods.grounding.refer_index import Index, Reference

CACHE_BYTES = 1 << 30
"""Resized photos and masks are kept up to this much; what comes later is decoded anew each time."""


class Kept:
    """Arrays by name, up to a limit. What is kept does not travel to another process."""

    def __init__(self, limit_bytes: int = CACHE_BYTES) -> None:
        self._limit_bytes, self._num_bytes = limit_bytes, 0
        self._values: dict[Any, Any] = {}

    def __reduce__(self) -> tuple[type[Kept], tuple[int]]:
        return type(self), (self._limit_bytes,)

    def get(self, name: Any, make: Callable[[], tuple[Any, int]]) -> Any:
        """The value of that name; ``make`` gives a missing one with its size in bytes."""
        if name in self._values:
            return self._values[name]
        value, num_bytes = make()
        if self._num_bytes + num_bytes <= self._limit_bytes:
            self._values[name] = value
            self._num_bytes += num_bytes
        return value


@dataclass(frozen=True)
class Target:
    """What one reference names, at the size of the input."""

    mask: np.ndarray
    box: tuple[float, float, float, float]


class JoinedSplits:
    """Several splits one after the other, for training on all of them."""

    decodes_photos = True

    def __init__(self, splits: Sequence[ReferSplit]) -> None:
        self._splits = tuple(splits)
        self._starts = np.cumsum([0, *map(len, splits)])
        objects = np.cumsum([0, *(split.num_references for split in splits)])
        self.pictures = np.concatenate([split.pictures for split in splits])
        self.objects = np.concatenate(
            [split.objects + start for split, start in zip(splits, objects[:-1], strict=True)]
        )

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def num_references(self) -> int:
        return sum(split.num_references for split in self._splits)

    @property
    def texts(self) -> Sequence[str]:
        return [text for split in self._splits for text in split.texts]

    def sentences(self, indices: np.ndarray) -> Sequence[str]:
        places = (self._place(int(index)) for index in indices)
        return [split.texts[position] for split, position in places]

    def sample_id(self, index: int) -> str:
        split, position = self._place(index)
        return split.sample_id(position)

    def sample(self, index: int, *, with_original: bool = False) -> Sample:
        split, position = self._place(index)
        return split.sample(position, with_original=with_original)

    def _place(self, index: int) -> tuple[ReferSplit, int]:
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._splits[number], index - int(self._starts[number])


class ReferSplit:
    """The expressions of one split, in the order of their ids."""

    decodes_photos = True

    def __init__(
        self,
        index: Index,
        references: Sequence[Reference],
        photos: Mapping[int, Any],
        *,
        name: str,
        image_size: int,
        rules: EvaluationProtocol,
        kept: Kept,
        fit: Fit = "stretch",
        margin: tuple[float, float, float] = (0.5, 0.5, 0.5),
    ) -> None:
        """Lay out the expressions.

        Args:
            index: Pictures and annotations.
            references: Those of this split.
            photos: Picture id -> encoded bytes, or the path of the file.
            name: Beginning of every sample id.
            image_size: Side of the square input.
            rules: How masks are rasterised and overlaps counted.
            kept: Where decoded pictures are kept, shared by the splits.
            fit: How pictures come into the square.
            margin: Colour around letterboxed pictures, 0..1 per channel.
        """
        self.index, self._photos, self._image_size = index, photos, image_size
        self._rules, self._kept, self._name = rules, kept, name
        self._fit, self._margin = fit, margin
        self._references = sorted(references, key=lambda reference: reference.ref_id)
        counts = [len(reference.sentences) for reference in self._references]
        self.objects = np.repeat(np.arange(len(counts), dtype=np.int64), counts)
        self.pictures = np.array([self._references[row].image_id for row in self.objects], dtype=np.int64)
        self._texts = [text for reference in self._references for text in reference.sentences]
        self._text_ids = [number for reference in self._references for number in reference.sentence_ids]

    def __len__(self) -> int:
        return len(self._texts)

    @property
    def num_references(self) -> int:
        return len(self._references)

    @property
    def texts(self) -> Sequence[str]:
        """Every sentence, by position."""
        return self._texts

    def sentences(self, indices: np.ndarray) -> Sequence[str]:
        return [self._texts[index] for index in indices]

    def sample_id(self, index: int) -> str:
        """``collection/by/split/ref12/sent34``: the same in every run."""
        reference = self.reference(index)
        return f"{self._name}/ref{reference.ref_id}/sent{self._text_ids[index]}"

    def reference(self, index: int) -> Reference:
        """Whom the expression at this position names."""
        return self._references[int(self.objects[index])]

    def sample(self, index: int, *, with_original: bool = False) -> Sample:
        reference = self.reference(index)
        picture = self.index.pictures[reference.image_id]
        size = (int(picture["height"]), int(picture["width"]))
        target = self._kept.get(("mask", reference.ref_id, self._name), lambda: self._target(reference, size))
        image = self._kept.get(("photo", reference.image_id), lambda: self._photo(reference.image_id, size))
        same = size == (self._image_size, self._image_size)
        original = self._mask(reference, size).astype(np.uint8) if with_original and not same else None
        frame = None if self._fit == "stretch" else frame_of(*size, self._image_size, self._fit)
        return Sample(image, target.mask, target.box, not reference.annotation_ids, size, original, frame)

    def _photo(self, image_id: int, size: tuple[int, int]) -> tuple[np.ndarray, int]:
        if image_id not in self._photos:
            raise DataError(f"picture {image_id} has sentences but no photo: add it, or drop its references")
        where = f"photo of picture {image_id}"
        pixels = decode(self._photos[image_id], channels=3, image_size=None, where=where)
        if pixels.shape[1:] != size:
            raise DataError(
                f"{where} is {pixels.shape[1]} x {pixels.shape[2]} (height x width), but the annotations are for "
                f"{size[0]} x {size[1]}: masks would lie beside their objects"
            )
        small = fitted_photo(pixels.transpose(1, 2, 0), self._image_size, self._fit, self._margin)
        return small, small.nbytes

    def _target(self, reference: Reference, size: tuple[int, int]) -> tuple[Target, int]:
        mask = self._mask(reference, size)
        small = (
            self._scaled_polygons(reference, size)
            if self._rules.scaled_polygons
            else fitted_mask(mask, self._image_size, self._fit)
        )
        box = centred(box_of_mask(mask), *size)
        if reference.annotation_ids:
            box = fitted_box(box, *size, self._image_size, self._fit)
        return Target(small, box), small.nbytes

    def _mask(self, reference: Reference, size: tuple[int, int]) -> np.ndarray:
        """The union of what is named, at the size of the stored picture."""
        rules = self._rules
        masks = (
            decode_mask(item, *size, overlap=rules.overlap, rasteriser=rules.rasteriser)
            for item in self._segmentations(reference)
        )
        return union(masks, *size)

    def _scaled_polygons(self, reference: Reference, size: tuple[int, int]) -> np.ndarray:
        """The same in the square, with polygons that were scaled before they became pixels."""
        side = self._image_size
        masks = (
            fitted_polygons(item, *size, side, self._fit, self._rules) for item in self._segmentations(reference)
        )  # fmt: skip
        return union(masks, side, side)

    def _segmentations(self, reference: Reference) -> list[Any]:
        """Of several annotations, crowds are left out."""
        annotations = [self.index.annotations[number] for number in reference.annotation_ids]
        if len(annotations) > 1:
            annotations = [item for item in annotations if not item.get("iscrowd")] or annotations
        return [item["segmentation"] for item in annotations]
