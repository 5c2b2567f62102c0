"""A teacher's network that answers from a recording where it can, and the stream that tells it what it is asked.

A network sees images, or images with sentences, and no more. The stream notes which batches it gave out lately; what
lies in the memory of one of them is that batch, or a part of it, and everything else (validation, other views) is
computed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from methods.base import AnyBatch
from methods.data.base import ListedStream
from methods.data.randomness import derive_seed
from orchestrator.signals_codec import Columns
from orchestrator.signals_form import Form
from orchestrator.signals_recording import Place, Recording, Tally

__all__ = ["IMAGES", "RecordedNetwork", "WatchedStream", "Window"]

NUM_REMEMBERED = 4
"""Batches that are remembered: the one in work, and a few that somebody may have asked for in advance."""


IMAGES = ("images",)
"""What a network reads that is called with nothing else."""


class _Seen(NamedTuple):
    view: str
    images: Tensor
    batch: AnyBatch
    place: Place


class Window:
    """The batches that a stream gave out last."""

    def __init__(self) -> None:
        self._seen: deque[_Seen] = deque(maxlen=2 * NUM_REMEMBERED)
        self.num_seen = 0
        """Batches so far."""

    def add(self, batch: AnyBatch, place: Place) -> None:
        """Remember both views of a batch."""
        self.num_seen += 1
        self._seen.appendleft(_Seen("weak", batch.images, batch, place))
        strong = getattr(batch, "strong", None)
        if strong is not None:
            self._seen.appendleft(_Seen("strong", strong, batch, place))

    def find(self, asked: Tensor | AnyBatch, reads: tuple[str, ...] = IMAGES) -> tuple[str, Place] | None:
        """The view and the rows that ``asked`` is, images or a batch of which the fields ``reads`` count; or None."""
        for view, images, batch, place in self._seen:
            if isinstance(asked, Tensor):
                first, num_rows = _first_row(asked, images), len(asked)
            else:
                rows = {_first_row(getattr(asked, name), getattr(batch, name)) for name in reads}
                first, num_rows = rows.pop() if len(rows) == 1 else None, len(asked.images)
            if first is not None:
                return view, place._replace(ids=place.ids[first : first + num_rows])
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

    def __init__(self, stream: ListedStream, window: Window) -> None:
        self._stream, self._window = stream, window
        self.batch_size, self.num_batches = stream.batch_size, stream.num_batches

    @property
    def num_samples(self) -> int:
        return self._stream.num_samples

    def known_labels(self) -> np.ndarray:
        return self._stream.known_labels()

    def batches(self, epoch: int, start: int = 0) -> Iterator[AnyBatch]:
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
    """Answers like the network inside, in the form of recordings."""

    def __init__(
        self, network: nn.Module, form: Form, sources: Sources, reads: tuple[str, ...] = IMAGES
    ) -> None:
        """``reads``: see ``Teacher``."""
        super().__init__()
        self.inside, self.form, self.sources, self.reads = network, form, sources, reads
        self.recordings: dict[str, Recording] = {}
        """View -> its recording."""

    def forward(self, asked: Tensor | AnyBatch) -> Any:
        found = self.sources.window.find(asked, self.reads) if self.recordings else None
        if found is None or found[0] not in self.recordings:
            return self.form.decode(self.form.encode(self.inside(asked)))
        view, place = found
        return self.form.decode(self._columns(self.recordings[view], place, asked))

    def columns_of(self, batch: AnyBatch) -> Columns:
        """What is said of a batch now, whatever is recorded."""
        return self.form.encode(self.inside(batch.images if self.reads == IMAGES else batch))

    def __getattr__(self, name: str) -> Any:
        """What else somebody may ask of a network is that of the one inside."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inside"), name)

    def _columns(self, recording: Recording, place: Place, asked: Tensor | AnyBatch) -> Mapping[str, Tensor]:
        tally, audit, num_rows = self.sources.tally, self.sources.audit, len(place.ids)
        read = recording.read(place)
        if read is None:
            computed = self.form.encode(self.inside(asked))
            tally.num_computed += num_rows
            recording.keep(place, computed)
            return computed
        device = asked.device if isinstance(asked, Tensor) else asked.images.device
        if device.type == "cuda":
            read = {name: column.pin_memory().to(device, non_blocking=True) for name, column in read.items()}
        tally.num_read += num_rows
        if audit is None or not audit.is_due(recording, place):
            return read
        computed = self.form.encode(self.inside(asked))
        worst = self._difference(read, computed)
        if worst <= audit.tolerance:
            tally.num_audited += num_rows
            return read
        recording.discard(
            f"in epoch {place.epoch + 1}, batch {place.number + 1}, it differs from what the teacher says now by "
            f"{worst:.3g} of the largest value, where {audit.tolerance:g} is allowed"
        )
        return computed

    def _difference(self, read: Mapping[str, Tensor], computed: Mapping[str, Tensor]) -> float:
        """Largest difference of logits, pooled features or other parts, relative to the largest value of each."""
        worst = 0.0
        for one, other in zip(self.form.compared(read), self.form.compared(computed), strict=True):
            if one.shape != other.shape:
                return float("inf")
            if not torch.equal(one, other):
                gap = (one.double() - other.double()).abs().max() / other.double().abs().max().clamp_min(
                    1e-30
                )
                worst = max(worst, float(gap.nan_to_num(float("inf"))))
        return worst
