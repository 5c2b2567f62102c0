"""The teacher signals of one stage: read from recordings where they are there, recorded where that is worth it.

A recording belongs to a frozen network, to a stream of batches (data, order, augmentation, batch size), to a precision
and to the kind of machine that computed it. What changes none of these shares it: all criteria, temperatures, weights,
views and noisy copies on one teacher. On a CPU in float32 a student that reads follows the live one to the bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from methods.base import Source, Teacher
from methods.data.base import ListedStream, SampleStream
from orchestrator.errors import ConfigurationError
from orchestrator.keys import content_key
from orchestrator.plan import PlannedStage
from orchestrator.signals_behind import Behind
from orchestrator.signals_form import ClassForm, Form, PartsForm
from orchestrator.signals_network import IMAGES, Audit, RecordedNetwork, Sources, WatchedStream
from orchestrator.signals_plan import PASSED_ON, is_fixed, recording_content
from orchestrator.signals_probe import Probe, machine, network_digest, unlike_again
from orchestrator.signals_recording import CHUNK_BYTES, Recording
from orchestrator.signals_shelf import Shelf, open_shelves
from orchestrator.spec import RunSettings
from orchestrator.workers import Workers

__all__ = ["StageSignals"]

LAYOUT = 1
"""Raised whenever chunks or their columns are laid out in another way."""
SHORTEST_PASS_SECONDS = 0.003
"""A teacher that is quicker than this is not recorded by ``auto``: reading takes up to a millisecond as well."""
READ_BYTES_PER_SECOND = 1e9
"""At which large signals are taken to be read: a teacher that says them more quickly is not recorded by ``auto``."""
NOT_SHARED = "no other stage of the sweep wants the same signals"
TOLERANCES = {"fp32": 1e-3, "bf16": 5e-2, "fp16": 1e-2}
"""How far a GPU may be from what it said before, relative to the largest value: it is free in its order of summing."""


@dataclass(frozen=True, kw_only=True)
class _Wish:
    """What a teacher could have recorded, or read: one view of its images."""

    role: str
    network: RecordedNetwork
    view: str
    key: str
    identity: dict[str, Any]
    num_bytes: float
    """How large it gets when it is complete."""
    row_bytes: float
    """What one sample takes in one epoch."""

    @property
    def is_fixed(self) -> bool:
        return self.identity["seed"] is None


@dataclass
class StageSignals:
    """Wraps the teachers and the training stream of one stage."""

    stage: PlannedStage
    run: RunSettings
    storage_url: str
    shared: frozenset[str]
    """Recordings that more than one stage of the sweep wants."""
    workers: Workers
    device: torch.device
    is_audited: bool = True
    """Whether a batch of each epoch that is read is computed too."""
    sources: Sources = field(default_factory=Sources)
    reasons: list[str] = field(default_factory=list)
    """Why signals are computed live."""
    _probe: Probe | None = None
    _networks: dict[str, tuple[str, RecordedNetwork]] = field(default_factory=dict)
    _opened: list[Recording] = field(default_factory=list)

    def teacher(self, role: str, source: Source, teacher: Teacher) -> Teacher:
        """The same teacher, whose network may answer from a recording."""
        if self.run.signals == "live" or role not in self.stage.signals:
            return teacher
        form = self._form(source, teacher)
        if isinstance(form, PartsForm) and teacher.reads == IMAGES:
            self._refuse(
                f"{role} does not tell which fields of a batch it reads (Teacher.reads): let it tell"
            )
            return teacher
        network = RecordedNetwork(teacher.network, form, self.sources, teacher.reads)
        self._networks[role] = _network_key(source), network.eval()
        return replace(teacher, network=network)

    def _form(self, source: Source, teacher: Teacher) -> Form:
        """Of a teacher's answer, what this stage's method asks for."""
        parts = source.catalog.method(self.stage.spec.method).asks(self.stage.spec.settings)
        form = self.run.signal_format
        if parts is not None:
            return PartsForm(form=form, parts=parts)
        return ClassForm(form=form, num_classes=teacher.num_classes, num_features=teacher.num_features)

    @contextmanager
    def watching(self, stream: SampleStream) -> Iterator[SampleStream]:
        """Scope in which the training stream is recorded or read; what is recorded is written by its end."""
        if not isinstance(stream, ListedStream):
            if self._networks:
                self._refuse(
                    "streams of its data set do not tell which samples come up: give them sample_ids"
                )
            yield stream
            return
        shelves = open_shelves(self.storage_url, self.run.signals_dir, self.run.signals_gigabytes)
        is_hopeful = self._networks and self._is_hopeful(shelves) and self._can_be_replayed(stream)
        wishes = list(self._wishes(stream)) if is_hopeful else []
        choices = [(wish, self._choice(wish, shelves)) for wish in wishes]
        chosen = [(wish, is_writable) for wish, is_writable in choices if is_writable is not None]
        if not chosen:
            yield stream
            return
        behind = Behind(self._say_used)
        try:
            for wish, is_writable in chosen:
                self._open(wish, stream, shelves, behind, is_writable)
            behind.submit(self._say_used)
            yield WatchedStream(stream, self.sources.window)
            self._note_if_unasked()
        finally:
            for recording in self._opened:
                recording.flush()
            behind.close()

    def summary(self) -> dict[str, Any]:
        """What became of the signals, for the manifest; empty for a stage without recordable teacher."""
        if not self._networks:
            return {}
        tally = self.sources.tally
        return {
            "recordings": [recording.key for recording in self._opened],
            "read_rows": tally.num_read,
            "computed_rows": tally.num_computed,
            "audited_rows": tally.num_audited,
            "live_because": list(dict.fromkeys(self.reasons)),
            "notes": list(tally.notes),
        }

    def _is_hopeful(self, shelves: Sequence[Shelf]) -> bool:
        """Whether a look at network and stream may lead to anything: most sweeps of small stages have nothing to share."""
        if self.run.signals == "record" or self.shared & {
            self.stage.signals[role] for role in self._networks
        }:
            return True
        self.reasons.append(NOT_SHARED)
        return any(shelf.has_any() for shelf in shelves)

    def _can_be_replayed(self, stream: ListedStream) -> bool:
        reason = unlike_again(stream)
        if reason:
            self._refuse(reason)
        return not reason

    def _refuse(self, reason: str) -> None:
        """Note why teachers are asked live, or raise where that was not to be."""
        if self.run.signals == "record":
            raise ConfigurationError(
                f"stages.{self.stage.name}: its teacher's signals cannot be recorded: {reason}, or set run.signals to live"
            )
        self.reasons.append(reason)

    def _wishes(self, stream: ListedStream) -> Iterator[_Wish]:
        train = self.stage.spec.train
        probe = self._probe = Probe(next(iter(stream.batches(0))), self.device, train.precision)
        for role, (key, network) in self._networks.items():
            digest = network_digest(network.inside)
            has_strong = getattr(probe.batch, "strong", None) is not None
            row_bytes = network.form.row_bytes(partial(probe.columns, network))
            for view in ("weak", "strong")[: 1 + has_strong]:
                seed = None if view == "weak" and self._is_fixed(network, probe) else stream.seed
                content = recording_content(
                    teacher=key, data=self.stage.content["data"], seed=seed, train=train, num_workers=self.workers.size
                )  # fmt: skip
                own = {"layout": LAYOUT, "weights": digest, "view": view, "machine": machine(self.device)}
                identity = {**content, **own, **network.form.content()}
                num_rows = stream.num_samples * (1 if seed is None else train.epochs)
                yield _Wish(
                    role=role, network=network, view=view, key=content_key(identity), identity=identity,
                    num_bytes=row_bytes * num_rows, row_bytes=row_bytes,
                )  # fmt: skip

    def _is_fixed(self, network: RecordedNetwork, probe: Probe) -> bool:
        """Whether epochs may share rows: images stay as they are, and no bit depends on a row's place in its batch."""
        train, size = self.stage.spec.train, self.workers.size
        is_even = train.batch_size % (size * train.accumulate) == 0
        if not is_fixed(self.stage.data) or not is_even or train.compile:  # compiled for each size by itself
            return False
        return probe.has_independent_rows(network)

    def _choice(self, wish: _Wish, shelves: Sequence[Shelf]) -> bool | None:
        """Whether a recording is written to (True) or only read (False); None where neither is of use."""
        if self.run.signals == "record":
            return True
        is_there = any(shelf.has(wish.key) for shelf in shelves)
        reason = self._against(wish, is_there)
        if reason:
            self.reasons.append(reason)
        return False if reason and is_there else None if reason else True

    def _against(self, wish: _Wish, is_there: bool) -> str:
        """Why ``auto`` does not record this; empty if it does."""
        if self.stage.signals[wish.role] not in self.shared:
            return NOT_SHARED
        budget = self.run.signals_gigabytes * 1e9
        if wish.num_bytes > budget:
            return f"{wish.num_bytes / 1e9:.3g} GB are more than run.signals_gigabytes ({self.run.signals_gigabytes:g})"
        if is_there or self._probe is None:
            return ""
        seconds = self._probe.pass_seconds(wish.network)
        batch_bytes = wish.row_bytes * len(self._probe.batch.images)
        if seconds < max(SHORTEST_PASS_SECONDS, batch_bytes / READ_BYTES_PER_SECOND):
            return f"the teacher takes only {1000 * seconds:.2g} ms for a batch of {batch_bytes / 1e6:.2g} MB"
        return ""

    def _open(
        self, wish: _Wish, stream: ListedStream, shelves: Sequence[Shelf], behind: Behind, is_writable: bool
    ) -> None:
        batch_bytes = wish.row_bytes * stream.batch_size / self.workers.size
        recording = Recording(
            wish.key, shelves, behind, self.sources.tally,
            num_ids=len(stream.known_labels()), rank=self.workers.rank,
            batches_per_chunk=max(1, int(CHUNK_BYTES // max(1.0, batch_bytes))),
            is_fixed=wish.is_fixed, is_writable=is_writable,
        )  # fmt: skip
        wish.network.recordings[wish.view] = recording
        self._opened.append(recording)
        if is_writable:
            behind.submit(lambda: recording.describe(wish.identity))
        if self.is_audited:
            precision = self.stage.spec.train.precision
            self.sources.audit = Audit(
                num_batches=stream.num_samples // stream.batch_size,
                tolerance=TOLERANCES[precision] if self.device.type == "cuda" else 0.0,
            )

    def _say_used(self) -> None:
        for recording in self._opened:
            recording.use()

    def _note_if_unasked(self) -> None:
        tally = self.sources.tally
        if self.sources.window.num_seen and not tally.num_read + tally.num_computed:
            tally.note(
                f"stages.{self.stage.name}: its method never asked its teacher about the images of a batch as they came "
                "from the stream, so nothing was recorded or read"
            )


def _network_key(source: Source) -> str:
    """The artifact whose network is asked: that of the source, or the one whose signals it passes on."""
    emits = source.catalog.method(source.method).emits
    if source.model is None and "teacher" in source.inputs and emits & PASSED_ON:
        return _network_key(source.inputs["teacher"])
    return source.key
