"""One recording: rows of a teacher's signals by epoch and sample, read where they are and kept where they are not."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from orchestrator.errors import DamagedArtifactError, StorageError
from orchestrator.signals_behind import Behind
from orchestrator.signals_chunk import Table, map_chunk, to_chunk
from orchestrator.signals_shelf import Shelf

__all__ = ["Place", "Recording", "Tally"]

logger = logging.getLogger(__name__)

CHUNK_BYTES = 2**23


class Place(NamedTuple):
    """Which rows a teacher is asked for."""

    epoch: int
    number: int
    """Of the batch within the epoch."""
    ids: np.ndarray
    """Samples, ``[B]``, in the order of the batch."""
    is_whole: bool = True
    """Whether the batch has its full size: the last one of an epoch may not."""


@dataclass
class Tally:
    """What became of a stage's signals, in rows."""

    num_read: int = 0
    """Rows that came from a recording."""
    num_computed: int = 0
    """Rows for which the teacher ran."""
    num_audited: int = 0
    """Rows that were read and computed, and were the same."""
    notes: list[str] = field(default_factory=list)
    """What did not go as wished."""
    _subjects: set[str] = field(default_factory=set)

    def note(self, text: str, subject: str = "") -> None:
        """Warn, once for each subject: by default, that is the text."""
        if (subject or text) not in self._subjects:
            self._subjects.add(subject or text)
            self.notes.append(text)
            logger.warning("%s", text)


@dataclass(frozen=True)
class _Rows:
    """Rows on their way to a chunk."""

    place: Place
    columns: Mapping[str, Tensor]
    event: torch.cuda.Event | None
    """After which they have arrived from the GPU."""

    @classmethod
    def of(cls, place: Place, columns: Mapping[str, Tensor], chosen: np.ndarray) -> _Rows:
        """The ``chosen`` rows, ``[B]`` bool, copied to the CPU; from a GPU without waiting for it."""
        if next(iter(columns.values())).device.type != "cuda":
            rows = torch.from_numpy(np.flatnonzero(chosen))
            own = {name: column.index_select(0, rows) for name, column in columns.items()}
            return cls(place._replace(ids=place.ids[chosen]), own, None)
        # All of them, since choosing would wait for the device.
        own = {name: _on_host(column) for name, column in columns.items()}
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return cls(place, own, event)

    @property
    def num_bytes(self) -> int:
        return sum(column.nbytes for column in self.columns.values())

    def is_of(self, place: Place, chosen: np.ndarray) -> bool:
        """Whether these are the same rows: a method may ask twice in one step."""
        return place.number == self.place.number and np.array_equal(place.ids[chosen], self.place.ids)

    def wait(self) -> None:
        if self.event is not None:
            self.event.synchronize()


def _on_host(tensor: Tensor) -> Tensor:
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


class Recording:
    """Reads and keeps the rows of one recording. Not for several threads; ``behind`` does the writing.

    Of several processes that record the same rows at the same time, the first to finish a chunk wins.
    """

    def __init__(
        self,
        key: str,
        shelves: Sequence[Shelf],
        behind: Behind,
        tally: Tally,
        *,
        num_ids: int,
        rank: int,
        batches_per_chunk: int,
        is_fixed: bool,
        is_writable: bool,
    ) -> None:
        """``is_fixed``: a sample looks the same in all epochs, so that a row of any of them serves for all."""
        self.key, self.shelves, self.behind, self.tally = key, shelves, behind, tally
        self.num_ids, self.rank, self.batches_per_chunk = num_ids, rank, batches_per_chunk
        self.is_fixed, self.is_writable = is_fixed, is_writable
        self.is_discarded = False
        self._table = Table(num_ids)
        self._known: set[str] = set()
        self._epoch: int | None = None
        self._looked_at = -1
        self._rows: list[_Rows] = []

    def read(self, place: Place) -> dict[str, Tensor] | None:
        """The rows, on the CPU; None unless all of them are there."""
        if self.is_discarded or not self._is_kept(place):
            return None
        self._turn_to(place)
        if self._table.is_missing(place.ids).any() and self._part(place) != self._looked_at:
            self._looked_at = self._part(place)
            self._look()  # somebody else may be a little ahead
        return None if self._table.is_missing(place.ids).any() else self._table.rows(place.ids)

    def keep(self, place: Place, columns: Mapping[str, Tensor]) -> None:
        """Have those rows written that are not there yet."""
        if not self.is_writable or self.is_discarded or not self._is_kept(place):
            return
        self._turn_to(place)
        if self._rows and self._part(self._rows[0].place) != self._part(place):
            self.flush()
        missing = self._table.is_missing(place.ids)
        if missing.any() and not (self._rows and self._rows[-1].is_of(place, missing)):
            self._rows.append(_Rows.of(place, columns, missing))

    def flush(self) -> None:
        """Have what was gathered written as a chunk."""
        rows, self._rows = self._rows, []
        if rows and not self.behind.submit(lambda: self._write(rows), sum(item.num_bytes for item in rows)):
            self.tally.note(
                f"recording {self.key[:8]}: the disk is slower than the training, so some rows are not kept"
            )

    def discard(self, reason: str) -> None:
        """Remove it everywhere, and go on without."""
        self.is_discarded, self._rows = True, []
        self.tally.note(
            f"recording {self.key[:8]} of teacher signals is discarded: {reason}; they are computed live"
        )
        self.behind.submit(self._drop)

    def use(self) -> None:
        """Say to all shelves that it is in use."""
        for shelf in self.shelves:
            self._attempt("marked as used", lambda shelf=shelf: shelf.use(self.key))  # type: ignore[misc]

    def describe(self, identity: Mapping[str, Any]) -> None:
        """Say for people what it is a recording of."""
        for shelf in self.shelves:
            self._attempt("described", lambda shelf=shelf: shelf.describe(self.key, identity))  # type: ignore[misc]

    def _is_kept(self, place: Place) -> bool:
        # A row may depend on the size of the batch in its last bits; epochs that share rows share whole batches only.
        return place.is_whole or not self.is_fixed

    def _part(self, place: Place) -> int:
        return place.number // self.batches_per_chunk

    def _folder(self, epoch: int) -> str:
        return "all" if self.is_fixed else f"{epoch:05d}"

    def _turn_to(self, place: Place) -> None:
        if place.epoch == self._epoch:
            return
        self.flush()
        self.behind.check()
        self._epoch, self._looked_at = place.epoch, self._part(place)
        if self.is_fixed:
            self.behind.wait()  # what this epoch needs may have been recorded by the one before
        else:
            self._table, self._known = Table(self.num_ids), set()
        self._look()
        if not self.is_fixed and len(self.shelves) > 1:
            following = self._folder(place.epoch + 1)
            self.behind.submit(lambda: self._attempt("fetched", lambda: self._fetch(following)))

    def _look(self) -> None:
        """Map the chunks that came in addition."""
        assert self._epoch is not None
        folder, names = self._folder(self._epoch), list[str]()
        self._attempt("fetched", lambda: self._fetch(folder))
        self._attempt("read", lambda: names.extend(self.shelves[0].names(self.key, folder)))
        for name in names:
            if name not in self._known:
                self._known.add(name)
                self._map(folder, name)

    def _map(self, folder: str, name: str) -> None:
        """Take in a chunk. One that is damaged is fetched again where there is another copy, and dropped otherwise."""
        near = self.shelves[0]
        for shelf in reversed(self.shelves):
            try:
                self._table.add(map_chunk(near.path(self.key, folder, name), self.key))
                return
            except FileNotFoundError:  # evicted since it was listed
                return
            except (DamagedArtifactError, OSError, ValueError) as error:
                self.tally.note(
                    f"a chunk of recorded teacher signals is dropped, to be computed again: {error}"
                )
                self._attempt("removed", lambda: near.drop(self.key, folder, name))
            if shelf is not near:
                self._attempt("fetched", lambda: self._fetch(folder))
        self._attempt("removed", lambda: self.shelves[-1].drop(self.key, folder, name))

    def _fetch(self, folder: str) -> None:
        """Bring to this node what only the storage has."""
        if len(self.shelves) == 1:
            return
        near, far = self.shelves
        for name in sorted(set(far.names(self.key, folder)) - set(near.names(self.key, folder))):
            data = far.read(self.key, folder, name)
            if data is not None:
                near.add(self.key, folder, name, data)

    def _write(self, rows: Sequence[_Rows]) -> None:
        if not self.is_writable or self.is_discarded:
            return
        for item in rows:
            item.wait()
        first, last = rows[0].place, rows[-1].place
        ids = np.concatenate([item.place.ids for item in rows])
        columns = {name: torch.cat([item.columns[name] for item in rows]) for name in rows[0].columns}
        data = to_chunk(self.key, ids, columns)
        mark = hashlib.blake2b(ids.tobytes(), digest_size=4).hexdigest()
        name = f"{self.rank:04d}-{first.number:07d}-{last.number:07d}-{mark}.chunk"
        for shelf in self.shelves:
            try:
                shelf.add(self.key, self._folder(first.epoch), name, data)
            except StorageError as error:
                self.is_writable = False
                self.tally.note(f"teacher signals are recorded no further, training goes on live: {error}")
                return

    def _drop(self) -> None:
        for shelf in self.shelves:
            self._attempt("removed", lambda shelf=shelf: shelf.drop(self.key))  # type: ignore[misc]

    def _attempt(self, doing: str, action: Callable[[], None]) -> None:
        """A storage that fails costs no training: what it does not give is computed."""
        try:
            action()
        except StorageError as error:
            self.tally.note(f"recorded teacher signals could not be {doing}: {error}", subject=doing)
