"""A pack: students that train side by side in one process, behind one data stream and one pass of their teacher.

The mechanism is a loop over the students, each with its own optimizer, random stream, history and checkpoint, so that
every student gets the bits that it would get alone. What trains side by side need agree in nothing but its batches.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch

from methods.base import Method
from orchestrator.lockstep import Lockstep, Member, OutgrownError, Steps, let_go
from orchestrator.loop import begin
from orchestrator.optimisation import TrainSettings
from orchestrator.run_state import is_out_of_memory
from orchestrator.training import BatchStream, CheckpointSlot, Clock, Observer, Training

__all__ = ["Finish", "PackMember", "train_pack"]

logger = logging.getLogger(__name__)

Finish = Callable[[Method, Training], None]
"""Takes a trained method and what training left. What it raises is that member's failure."""


def keep_nothing(method: Method, training: Training) -> None:
    """Finish with nothing."""


@dataclass(frozen=True, kw_only=True)
class PackMember:
    """One student of a pack. Fields as the arguments of ``loop.train``."""

    build: Callable[[], Method]
    """Makes the method with its first weights: again, where a pack that outgrew the memory is split."""
    settings: TrainSettings
    seed: int
    checkpoints: CheckpointSlot | None
    observe: Observer
    writing: AbstractContextManager[object, None] = field(default_factory=nullcontext)
    """Entered when its training begins, and left when that has ended, before ``finish``: waits for checkpoints that are
    on their way. Entered again where a pack is split."""
    finish: Finish = keep_nothing
    """Called as soon as this member is trained, while the others go on."""


def train_pack(
    members: Sequence[PackMember],
    *,
    training: BatchStream,
    validation: BatchStream | None,
    device: torch.device,
    checkpoint_seconds: float = 30.0,
    clock: Clock = time.monotonic,
) -> list[Training | Exception]:
    """Train all ``members``; gives for each what training left, or why it ended, in their order.

    A member whose observer says stop, or that diverges, leaves the others undisturbed. Members may begin at different
    checkpoints: those behind catch up first. A pack that needs more memory than there is splits in halves, which go
    on one after the other from checkpoints; rows since the last one are shown again.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    pack = _Pack(training, validation, device, checkpoint_seconds, clock)
    results: dict[int, Training | Exception] = {}
    parts = [dict(enumerate(members))]
    while parts:
        part = parts.pop(0)
        results |= pack.train(part)
        gc.collect()  # what a part held hangs together in cycles
        rest = [number for number in part if number not in results]
        half = (len(rest) + 1) // 2
        halves = ({number: part[number] for number in some} for some in (rest[:half], rest[half:]))
        parts = [half for half in halves if half] + parts
    return [results[number] for number in range(len(members))]


@dataclass(frozen=True)
class _Pack:
    """What the parts of a pack have in common."""

    training: BatchStream
    validation: BatchStream | None
    device: torch.device
    checkpoint_seconds: float
    clock: Clock

    def train(self, part: Mapping[int, PackMember]) -> dict[int, Training | Exception]:
        """Results by number; those are missing that outgrew the memory together."""
        results: dict[int, Training | Exception] = {}
        runs: dict[int, Member] = {}
        shares = (_Share(self.clock, len(part)), _Share(time.process_time, len(part)))
        try:
            for number, member in part.items():
                try:
                    runs[number] = self._begin(member, *shares)
                except Exception as error:  # the others have nothing to do with it
                    if is_out_of_memory(error) and len(part) > 1:
                        raise OutgrownError(f"{len(part)} runs side by side: {error}") from None
                    results[number] = error
                    for share in shares:
                        share.leave()
            Lockstep(
                list(runs.values()), training=self.training, validation=self.validation, device=self.device
            ).run()
        except OutgrownError as error:
            logger.warning("%s; the pack splits in halves", str(error))
        finally:
            for run in runs.values():
                run.steps.close()  # those that are not at their end leave ``writing`` here, with their checkpoints
        for number, run in runs.items():
            if run.result is not None:
                results[number] = run.result
        for result in results.values():
            if isinstance(result, Exception):
                let_go(result)
        return results

    def _begin(self, member: PackMember, worker_clock: _Share, cpu_clock: _Share) -> Member:
        method = member.build()
        run = begin(
            method,
            settings=member.settings,
            training=self.training,
            validation=self.validation,
            seed=member.seed,
            device=self.device,
            checkpoints=member.checkpoints,
            observe=member.observe,
            checkpoint_seconds=self.checkpoint_seconds,
            clock=self.clock,
            worker_clock=worker_clock,
            cpu_clock=cpu_clock,
        )
        run.steps = _to_the_end(run.steps, method, member, (worker_clock, cpu_clock))
        return run


def _to_the_end(steps: Steps, method: Method, member: PackMember, shares: Iterable[_Share]) -> Steps:
    """``steps``, then ``finish``; from then on the others share the process without this member."""
    try:
        with member.writing:
            training = yield from steps
        member.finish(method, training)
        return training
    finally:
        for share in shares:
            share.leave()


class _Share:
    """A clock of what each of several runs uses: with n of them it goes n times slower than the one it reads."""

    def __init__(self, clock: Clock, num_sharing: int) -> None:
        self._clock, self._num_sharing = clock, num_sharing
        self._read, self._told = clock(), 0.0

    def __call__(self) -> float:
        now = self._clock()
        self._told += (now - self._read) / max(1, self._num_sharing)
        self._read = now
        return self._told

    def leave(self) -> None:
        """One run less."""
        self()
        self._num_sharing -= 1
