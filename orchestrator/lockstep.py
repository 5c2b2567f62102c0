"""Runs that train side by side in one process, behind one stream of batches. A single run is the case of one.

A run says which batch it needs next. Those that are furthest behind are served first, so that runs which begin at
different places meet; runs that need the same batch get the same object, and what can be computed once for all of
them (a teacher's signals) is. Each run finds torch's random generators as it left them: it never notices the others.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from methods.base import AnyBatch
from orchestrator.run_state import is_out_of_memory
from orchestrator.training import BatchStream, Training

__all__ = ["Lockstep", "Member", "Need", "OutgrownError", "Served", "Steps", "let_go"]

logger = logging.getLogger(__name__)


class OutgrownError(Exception):
    """Several runs together need more memory than there is. Those that could have kept a checkpoint."""


def let_go(error: BaseException) -> None:
    """Keep of an error where it came from as text only: its frames hold the run with all that it computed."""
    if error.__traceback__ is not None:
        error.add_note("".join(traceback.format_exception(error)).rstrip())
    chained: BaseException | None = error
    while chained is not None:
        chained.__traceback__ = None
        chained = chained.__cause__ or chained.__context__


class Need(NamedTuple):
    """A batch that a run waits for. Ordered: what is smaller comes earlier in every run."""

    epoch: int
    """Counted from 0."""
    is_validation: bool
    """Whether it is one of the validation split, which follows the epoch's training batches."""
    position: int
    """Number of the batch within its split."""


class Served:
    """A batch, the same for all who need it, and so are its micro-batches."""

    def __init__(self, batch: AnyBatch) -> None:
        self.batch = batch
        self._parts: dict[int, list[AnyBatch]] = {1: [batch]}

    def split(self, num_parts: int, num_rows: int) -> list[AnyBatch]:
        """Micro-batches of two rows or more (batch norm), as many on every worker: by ``num_rows`` of the smallest share."""
        num_parts = max(1, min(num_parts, num_rows // 2))
        if num_parts not in self._parts:
            self._parts[num_parts] = _split(self.batch, num_parts)
        return self._parts[num_parts]


def _split(batch: AnyBatch, num_parts: int) -> list[AnyBatch]:
    present = [name for name, value in zip(batch._fields, batch, strict=True) if isinstance(value, Tensor)]
    columns = (getattr(batch, name).tensor_split(num_parts) for name in present)
    return [batch._replace(**dict(zip(present, parts, strict=True))) for parts in zip(*columns, strict=True)]


Steps = Generator[Need, Served | None, Training]
"""A run: yields what it needs, is sent that batch (None where the split has no more), and returns what it leaves."""


@dataclass(eq=False)
class Member:
    """One of the runs."""

    steps: Steps
    seed: int
    """With which its random stream begins."""
    save: Callable[[], None]
    """Keeps a checkpoint. To be called while it waits for a training batch."""
    need: Need | None = None
    """What it waits for; None before it has begun."""
    result: Training | Exception | None = None
    """What it left, or why it ended."""


class Lockstep:
    """Advances runs until each has ended."""

    def __init__(
        self,
        members: Sequence[Member],
        *,
        training: BatchStream,
        validation: BatchStream | None,
        device: torch.device,
    ) -> None:
        self._members = members
        self._training, self._validation = training, validation
        self._device = device
        self._batches: Iterator[AnyBatch] = iter(())
        self._upcoming: Need | None = None
        self._random = _Randomness(device)

    def run(self) -> None:
        """Run every member to its end; what it left stands in its ``result``.

        An ``Exception`` ends the run that raised it and no other. Anything else ends them all, and is raised, after
        the others have kept a checkpoint.

        Raises:
            OutgrownError: Memory ran out while several runs were under way. A single one ends with its own error.
        """
        with torch.random.fork_rng(devices=[self._device] if self._device.type == "cuda" else []):
            for member in self._members:
                self._advance(member, None)
            while waiting := [member for member in self._members if member.result is None]:
                need = min(member.need for member in waiting if member.need is not None)
                served = self._serve(need)
                for member in waiting:
                    if member.need == need:
                        self._advance(member, served)

    def _advance(self, member: Member, served: Served | None) -> None:
        self._random.give_to(member)
        try:
            member.need = member.steps.send(served)
        except StopIteration as end:
            member.result = end.value
        except Exception as error:  # whoever started the run decides what becomes of it
            self._failed(member, error)
        except BaseException:
            self._save_all_but(member)
            raise

    def _failed(self, member: Member, error: Exception) -> None:
        num_running = len(self._others(member)) + 1
        if len(self._members) > 1:
            let_go(error)
        if num_running > 1 and is_out_of_memory(error):
            self._save_all_but(member)
            raise OutgrownError(f"{num_running} runs side by side: {error}") from None
        member.result = error

    def _others(self, member: Member) -> list[Member]:
        return [other for other in self._members if other is not member and other.result is None]

    def _save_all_but(self, member: Member) -> None:
        """Where a run cannot save, it is lost up to its last checkpoint: something graver is being told already."""
        for other in self._others(member):
            if other.need is not None and not other.need.is_validation:
                self._random.give_to(other)
                try:
                    other.save()
                except Exception as error:
                    logger.warning("a run beside one that failed kept no checkpoint: %s", error)

    def _serve(self, need: Need) -> Served | None:
        if need != self._upcoming:
            self._batches = self._open(need)
        self._upcoming = need._replace(position=need.position + 1)
        batch = next(self._batches, None)
        return None if batch is None else Served(batch)

    def _open(self, need: Need) -> Iterator[AnyBatch]:
        if not need.is_validation:
            return self._training.batches(need.epoch, need.position)
        assert self._validation is not None
        return self._validation.batches(0, need.position)


class _Randomness:
    """Torch's generators, which every member finds as it left them. Costs nothing while there is one member."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._owner: Member | None = None
        self._states: dict[int, tuple[Tensor, Tensor | None]] = {}

    def give_to(self, member: Member) -> None:
        if member is self._owner:
            return
        if self._owner is not None:
            self._states[id(self._owner)] = self._state()
        self._owner = member
        if id(member) in self._states:
            self._set(*self._states[id(member)])
        else:
            self._seed(member.seed)

    def _state(self) -> tuple[Tensor, Tensor | None]:
        is_cuda = self._device.type == "cuda"
        return torch.get_rng_state(), torch.cuda.get_rng_state(self._device) if is_cuda else None

    def _set(self, host: Tensor, device: Tensor | None) -> None:
        torch.set_rng_state(host)
        if device is not None:
            torch.cuda.set_rng_state(device, self._device)

    def _seed(self, seed: int) -> None:
        # Unlike torch.manual_seed, this leaves the generators of other devices alone.
        torch.default_generator.manual_seed(seed)
        if self._device.type == "cuda":
            with torch.cuda.device(self._device):
                torch.cuda.manual_seed(seed)
