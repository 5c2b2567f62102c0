"""A teacher's network that answers from a recording where it can, and the stream that tells it what it is asked.

A network sees images and no more. The stream notes which batches it gave out lately; images that lie in the memory of
one of them are that batch, or a part of it, and everything else (validation, other views) is computed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from methods.base import Batch
from methods.data.randomness import derive_seed
from methods.data.stream import Stream
from orchestrator.signals_codec import SignalFormat
from orchestrator.signals_recording import Place, Recording, Tally

__all__ = ["RecordedNetwork", "WatchedStream", "Window"]

NUM_REMEMBERED = 4
"""Batches that are remembered: the one in work, and a few that somebody may have asked for in advance."""


class _Seen(NamedTuple):
    view: str
    images: Tensor
    place: Place


class Window:
    """The batches that a stream gave out last."""

    def __init__(self) -> None:
        self._seen: deque[_Seen] = deque(maxlen=2 * NUM_REMEMBERED)
        self.num_seen = 0
        """Batches so far."""

    def add(self, batch: Batch, place: Place) -> None:
        """Remember both views of a batch."""
        self.num_seen += 1
        self._seen.appendleft(_Seen("weak", batch.images, place))
        if batch.strong is not None:
            self._seen.appendleft(_Seen("strong", batch.strong, place))

    def find(self, images: Tensor) -> tuple[str, Place] | None:
        """The view and the rows that ``images`` are, or None."""
        for view, whole, place in self._seen:
            first = _first_row(images, whole)
            if first is not None:
                return view, place._replace(ids=place.ids[first : first + len(images)])
        return None


def _first_row(images: Tensor, whole: Tensor) -> int | None:
    """Number of the row of ``whole`` at which ``images`` begin in the same memory, or None where they do not."""
    if images is whole:
        return 0
    if (
        images.shape[1:] != whole.shape[1:]
        or images.stride() != whole.stride()
        or images.dtype != whole.dtype
    ):
        return None
    row_bytes = whole.stride(0) * whole.element_size()
    first, rest = divmod(images.data_ptr() - whole.data_ptr(), max(1, row_bytes))
    return first if rest == 0 and 0 <= first <= len(whole) - len(images) else None


class WatchedStream:
    """The training stream, with a note of each batch in a window before it is given out."""

    def __init__(self, stream: Stream, window: Window) -> None:
        self._stream, self._window = stream, window
        self.batch_size, self.num_batches = stream.batch_size, stream.num_batches

    @property
    def num_samples(self) -> int:
        return self._stream.num_samples

    def known_labels(self) -> np.ndarray:
        return self._stream.known_labels()

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        shares = self._stream.sample_ids(epoch)[start:]
        whole_rows = self.batch_size // self._stream.num_workers
        for number, batch in enumerate(self._stream.batches(epoch, start), start):
            ids = shares[number - start]
            self._window.add(batch, Place(epoch, number, ids, len(ids) == whole_rows))
            yield batch


@dataclass(frozen=True, kw_only=True, slots=True)
class Audit:
    """Which batches are computed although they were read, and how well they must agree."""

    num_batches: int
    """Of full size, in an epoch."""
    tolerance: float
    """Largest difference, relative to the largest value. 0: to the bit."""

    def is_due(self, recording: Recording, place: Place) -> bool:
        """One batch of each epoch, at random."""
        chosen = derive_seed(place.epoch, "audit", recording.key) % max(1, self.num_batches)
        return chosen == place.number


@dataclass
class Sources:
    """Where a network's answers may come from besides itself; empty until recordings are opened."""

    window: Window = field(default_factory=Window)
    tally: Tally = field(default_factory=Tally)
    audit: Audit | None = None


class RecordedNetwork(nn.Module):
    """Maps images to ``(logits, pooled)`` like the network inside, in the format of recordings."""

    def __init__(
        self, network: nn.Module, form: SignalFormat, num_classes: int, num_features: int, sources: Sources
    ) -> None:
        super().__init__()
        self.inside, self.form, self.sources = network, form, sources
        self.num_classes, self.num_features = num_classes, num_features
        self.recordings: dict[str, Recording] = {}
        """View -> its recording."""

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        found = self.sources.window.find(images) if self.recordings else None
        if found is None or found[0] not in self.recordings:
            return self.form.decode(self.form.encode(*self.inside(images)), self.num_classes)
        view, place = found
        return self.form.decode(self._columns(self.recordings[view], place, images), self.num_classes)

    def __getattr__(self, name: str) -> Any:
        """What else somebody may ask of a network is that of the one inside."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inside"), name)

    def _columns(self, recording: Recording, place: Place, images: Tensor) -> Mapping[str, Tensor]:
        tally, audit = self.sources.tally, self.sources.audit
        read = recording.read(place)
        if read is None:
            computed = self.form.encode(*self.inside(images))
            tally.num_computed += len(images)
            recording.keep(place, computed)
            return computed
        if images.device.type == "cuda":
            read = {
                name: column.pin_memory().to(images.device, non_blocking=True)
                for name, column in read.items()
            }
        tally.num_read += len(images)
        if audit is None or not audit.is_due(recording, place):
            return read
        computed = self.form.encode(*self.inside(images))
        worst = self._difference(read, computed)
        if worst <= audit.tolerance:
            tally.num_audited += len(images)
            return read
        recording.discard(
            f"in epoch {place.epoch + 1}, batch {place.number + 1}, it differs from what the teacher says now by "
            f"{worst:.3g} of the largest value, where {audit.tolerance:g} is allowed"
        )
        return computed

    def _difference(self, read: Mapping[str, Tensor], computed: Mapping[str, Tensor]) -> float:
        """Largest difference of logits or pooled features, relative to the largest value of either."""
        worst = 0.0
        pairs = zip(self.form.decode(read, self.num_classes), self.form.decode(computed, self.num_classes), strict=True)  # fmt: skip
        for one, other in pairs:
            if one.shape != other.shape:
                return float("inf")
            if not torch.equal(one, other):
                gap = (one.double() - other.double()).abs().max() / other.double().abs().max().clamp_min(
                    1e-30
                )
                worst = max(worst, float(gap.nan_to_num(float("inf"))))
        return worst
