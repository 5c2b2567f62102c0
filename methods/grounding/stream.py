"""The batches of one split of a grounding data set, epoch after epoch: one worker's share.

As for classification, order and augmentation are functions of (seed, epoch, expression), batches are shared row by row,
and an epoch can be entered at any batch. Evaluation batches bring a sentence about another picture for the control, and
truth at the size of stored pictures where the protocol judges there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from methods.data.augment import Normalise
from methods.data.decode import decode_threads
from methods.data.randomness import hashes, uniform
from methods.grounding.contracts import GroundingBatch
from methods.grounding.expressions import Expressions, Sample, controls
from methods.grounding.protocols import protocol_named
from methods.grounding.vocabulary import Vocabulary, encode, mirrored

if TYPE_CHECKING:
    from methods.grounding.source import GroundingSource

Statistics = tuple[tuple[float, float, float], tuple[float, float, float]]
T = TypeVar("T")
R = TypeVar("R")
MIN_SAMPLES_PER_WORKER = 2
"""What batch normalisation needs in training."""


class GroundingStream:
    """Batches of some expressions of a split."""

    def __init__(
        self,
        expressions: Expressions,
        vocabulary: Vocabulary,
        source: GroundingSource,
        normalisation: Statistics,
        *,
        indices: np.ndarray,
        batch_size: int,
        seed: int,
        shuffle: bool,
        device: torch.device,
        flip: bool = False,
        one_sentence: bool = False,
        rank: int = 0,
        num_workers: int = 1,
    ) -> None:
        """Prepare the batches.

        Args:
            expressions: The split.
            vocabulary: Turns sentences into ids.
            source: Settings of the data set.
            normalisation: Mean and deviation per channel.
            indices: Which of its expressions, ``[n]``.
            batch_size: Expressions of a batch over all workers together.
            seed: Of the order and the augmentation.
            shuffle: Whether this is for training; else batches bring control and original masks.
            device: Where batches are made.
            flip: Mirror half of the pictures; left and right change places in their sentences.
            one_sentence: An epoch shows each object once, with a sentence that is drawn anew.
            rank: This worker, from 0.
            num_workers: Workers that share each batch.
        """
        self.expressions, self.vocabulary, self.source = expressions, vocabulary, source
        self.batch_size, self.seed, self.shuffle, self.flip = batch_size, seed, shuffle, flip
        self.device, self.rank, self.num_workers = device, rank, num_workers
        self.indices = np.asarray(indices, dtype=np.int64)
        self._choices = self._sentences_of_objects() if one_sentence else None
        self._refuse_impossible()
        self._normalise = Normalise(*normalisation, device)
        self._controls = None if shuffle else controls(expressions.pictures[self.indices])
        self._with_original = not shuffle and protocol_named(source.protocol).size == "original"
        whole, rest = divmod(self.num_samples, batch_size)
        self.num_batches = whole + (rest >= (num_workers * MIN_SAMPLES_PER_WORKER if shuffle else 1))

    @property
    def num_samples(self) -> int:
        """Expressions (or objects) over all workers, including those of a batch that is dropped."""
        return len(self.indices) if self._choices is None else len(self._choices)

    def known_labels(self) -> np.ndarray:
        """0 for each expression that comes up here and -1 for the others: sentences have no classes."""
        labels = np.full(len(self.expressions), -1, dtype=np.int64)
        labels[self.indices] = 0
        return labels

    def sample_ids(self, epoch: int) -> list[np.ndarray]:
        """Which expressions this worker's share of each batch of ``epoch`` holds, ``[B]`` each, in their order."""
        order = self._order(epoch)
        shares = (self._share(order, number) for number in range(self.num_batches))
        return [self.indices[share] for share in shares if len(share)]

    def batches(self, epoch: int, start: int = 0) -> Iterator[GroundingBatch]:
        """This worker's share of the batches of ``epoch`` (from 0), from batch number ``start`` on."""
        order = self._order(epoch)
        shares = [self._share(order, number) for number in range(start, self.num_batches)]
        parts = [(epoch, positions) for positions in shares if len(positions)]
        for made in _ahead(self._make, parts):
            yield self._on_device(epoch, made)

    def batch_of(self, positions: np.ndarray) -> GroundingBatch:
        """All expressions at these positions of ``indices``, whichever worker would see them, as in epoch 0."""
        return self._on_device(0, self._make((0, positions)))

    def _order(self, epoch: int) -> np.ndarray:
        """Positions in ``self.indices``, in the order of this epoch; of each object one, where that is wanted."""
        if not self.shuffle:
            return np.arange(len(self.indices))
        if self._choices is None:
            return np.lexsort((self.indices, hashes(self.seed, "order", epoch, self.indices)))
        numbers = np.arange(len(self._choices))
        drawn = uniform(self.seed, "sentence", epoch, numbers)
        chosen = np.array([those[int(len(those) * u)] for those, u in zip(self._choices, drawn, strict=True)])
        return chosen[np.lexsort((numbers, hashes(self.seed, "order", epoch, numbers)))]

    def _sentences_of_objects(self) -> list[np.ndarray]:
        """Positions in ``self.indices`` of each object's sentences."""
        objects = self.expressions.objects[self.indices]
        order = np.argsort(objects, kind="stable")
        return np.split(order, np.flatnonzero(np.diff(objects[order])) + 1) if len(order) else []

    def _share(self, order: np.ndarray, number: int) -> np.ndarray:
        batch = order[number * self.batch_size : (number + 1) * self.batch_size]
        return batch[self.rank :: self.num_workers]

    def _make(self, part: tuple[int, np.ndarray]) -> dict[str, Any]:
        """Everything of a batch as arrays; runs ahead, on another thread."""
        epoch, positions = part
        ids = self.indices[positions]
        samples = self._samples(ids)
        sentences = list(self.expressions.sentences(ids))
        if self.flip:
            for row in np.flatnonzero(uniform(self.seed, "flip", epoch, ids) < 0.5):
                samples[row], sentences[row] = _flipped(samples[row]), mirrored(sentences[row])
        tokens = encode(self.vocabulary, sentences, self.source.text_length)
        made = {
            "images": np.stack([sample.image for sample in samples]),
            "token_ids": tokens.ids,
            "token_mask": tokens.mask,
            "masks": np.stack([sample.mask for sample in samples])[:, None],
            "boxes": np.array([sample.box for sample in samples], dtype=np.float32),
            "is_empty": np.array([sample.is_empty for sample in samples]),
            "indices": ids,
            "original_sizes": np.array([sample.size for sample in samples], dtype=np.int64),
        }
        if self._controls is not None:
            others = self.expressions.sentences(self.indices[self._controls[positions]])
            control = encode(self.vocabulary, list(others), self.source.text_length)
            made |= {"control_ids": control.ids, "control_mask": control.mask}
        side = self.source.image_size
        if self._with_original and any(sample.size != (side, side) for sample in samples):
            made["original_masks"] = [_original(sample) for sample in samples]
        if not self.shuffle and all(sample.frame is not None for sample in samples):
            made["frames"] = np.array([sample.frame for sample in samples], dtype=np.int64)
        return made

    def _samples(self, ids: np.ndarray) -> list[Sample]:
        read = partial(self.expressions.sample, with_original=self._with_original)
        positions = ids.tolist()
        return list(
            decode_threads().map(read, positions) if self.expressions.decodes_photos else map(read, positions)
        )

    def _on_device(self, epoch: int, made: dict[str, Any]) -> GroundingBatch:
        originals = tuple(self._to_device(mask) for mask in made.pop("original_masks", ()))
        tensors = {name: self._to_device(values) for name, values in made.items()}
        tensors["images"] = self._normalise(tensors["images"])
        tensors["masks"] = tensors["masks"].float()
        return GroundingBatch(**tensors, epoch=epoch, original_masks=originals)

    def _to_device(self, values: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(values))
        if self.device.type != "cuda":
            return tensor.to(self.device)
        return tensor.pin_memory().to(self.device, non_blocking=True)

    def _refuse_impossible(self) -> None:
        if not 0 <= self.rank < self.num_workers:
            raise ValueError(f"rank must lie in 0..{self.num_workers - 1}, got {self.rank}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")
        needed = self.num_workers * MIN_SAMPLES_PER_WORKER
        if self.shuffle and min(self.batch_size, self.num_samples) < needed:
            raise ValueError(
                f"batch_size {self.batch_size} and {self.num_samples} training samples are too few for "
                f"{self.num_workers} worker(s): each needs {MIN_SAMPLES_PER_WORKER} of a batch, so at least {needed}"
            )


def _original(sample: Sample) -> np.ndarray:
    """Truth at the size of the stored picture: the mask itself where that is the input's size."""
    return sample.mask.astype(np.uint8) if sample.original_mask is None else sample.original_mask


def _flipped(sample: Sample) -> Sample:
    x, y, width, height = sample.box
    box = sample.box if sample.is_empty else (1 - x, y, width, height)
    return sample._replace(image=sample.image[..., ::-1], mask=sample.mask[..., ::-1], box=box)


def _ahead(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """``function(item)`` for every item, in order; the next is worked on while the current one is used."""
    with ThreadPoolExecutor(1) as background:
        pending: deque[Future[R]] = deque()
        for item in items:
            pending.append(background.submit(function, item))
            if len(pending) > 1:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
