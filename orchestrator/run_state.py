"""Everything that changes while a method trains, and how it goes into a checkpoint and comes back."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from methods.base import Method
from orchestrator.errors import DivergedError, StillhouseError
from orchestrator.optimisation import TrainSettings, Updater, WeightAverage
from orchestrator.training import Clock, Row
from orchestrator.workers import Workers

__all__ = ["Held", "RunState", "is_out_of_memory", "peak_memory_bytes"]

SAVED_AS_THEY_ARE = ("epoch", "position", "names", "history", "best", "learning_rate")


@dataclass(frozen=True, slots=True)
class Held:
    """Time that a training took, over all of its attempts up to their last checkpoint."""

    seconds: float = 0.0
    """By the clock."""
    worker_seconds: float = 0.0
    """By the clock, times the workers that each attempt had."""
    cpu_seconds: float = 0.0
    """CPU time used by all workers' processes."""

    @classmethod
    def from_tuple(cls, values: Sequence[float]) -> Held:
        """From a checkpoint; those of older versions hold no worker time, and their CPU time comes second."""
        if len(values) == len(fields(cls)):
            return cls(*values)
        seconds, cpu_seconds = values
        return cls(seconds, seconds, cpu_seconds)


class RunState:
    """A training under way: networks, optimizer, average, place in the data, sums of the epoch, history, time."""

    def __init__(
        self,
        method: Method,
        settings: TrainSettings,
        *,
        device: torch.device,
        workers: Workers,
        clock: Clock,
        worker_clock: Clock | None = None,
        cpu_clock: Clock = time.process_time,
    ) -> None:
        """``worker_clock`` and ``cpu_clock`` tell this run's part of them, where several share the process."""
        self.method, self.device, self.workers, self.clock = method.to(device), device, workers, clock
        trained = [item for item in method.named_parameters() if item[1].requires_grad]
        parameters = [parameter for _, parameter in trained]
        rules = [method.update_rule(name, parameter) for name, parameter in trained]
        self.updater = Updater(settings, parameters, rules=rules, device=device, workers=workers)
        self.average = WeightAverage(method, settings.ema_decay) if settings.ema_decay > 0 else None
        self.epoch = self.position = self.resumed_epochs = self.num_rows = 0
        self.sums: Tensor | None = None
        self.names: list[str] = []
        self.history: list[Row] = []
        self.best: dict[str, Any] | None = None
        self.learning_rate = settings.learning_rate
        self._worker_clock, self._cpu_clock = worker_clock or clock, cpu_clock
        self._started = self._now()
        self._earlier = Held()

    def held(self) -> Held:
        """Time up to now, that of earlier attempts included. Every worker takes part: CPU times are added up."""
        seconds, worker_seconds, cpu_seconds = (
            now - started for now, started in zip(self._now(), self._started, strict=True)
        )
        used = torch.tensor(cpu_seconds, dtype=torch.float64)
        return Held(
            seconds=self._earlier.seconds + seconds,
            worker_seconds=self._earlier.worker_seconds + worker_seconds * self.workers.size,
            cpu_seconds=self._earlier.cpu_seconds
            + float(self.workers.all_reduce_sum({"used": used})["used"]),
        )

    def _now(self) -> tuple[float, float, float]:
        now = self.clock()
        return now, now if self._worker_clock is self.clock else self._worker_clock(), self._cpu_clock()

    @property
    def peak_memory_bytes(self) -> int:
        return peak_memory_bytes(self.device)

    def add(self, names: list[str], values: Tensor, num_rows: int) -> None:
        """Add means over ``num_rows`` rows to the sums of this epoch, on the device."""
        if self.sums is None:
            self.names, self.sums = names, torch.zeros_like(values, dtype=torch.float64)
        elif names != self.names:
            raise ValueError(
                f"{type(self.method).__name__} must give the same losses and metrics in each step of an epoch: "
                f"got {names} after {self.names}"
            )
        self.sums.add_(values, alpha=num_rows)
        self.num_rows += num_rows

    def finish_epoch(self) -> Row:
        """Means over the rows of all workers since the epoch began; the next epoch begins."""
        assert self.sums is not None
        rows = torch.tensor(self.num_rows, dtype=torch.float64)
        totals = self.workers.all_reduce_sum({"sums": self.sums, "rows": rows})
        means = (totals["sums"].cpu() / totals["rows"].cpu()).tolist()
        self.epoch, self.position, self.sums, self.num_rows = self.epoch + 1, 0, None, 0
        return dict(zip(self.names, means, strict=True))

    def refuse_divergence(self, values: Tensor) -> None:
        """Raise DivergedError where the updater met too many broken steps. ``values`` are those of the last one."""
        if not self.updater.has_diverged():
            return
        sums = [] if self.sums is None else self.sums.tolist()
        broken = [name for name, total in zip(self.names, sums, strict=True) if not math.isfinite(total)]
        shown = ", ".join(
            f"{name} {value:g}" for name, value in zip(self.names, values.tolist(), strict=True)
        )
        raise DivergedError(
            f"training diverged in epoch {self.epoch + 1}, at step {self.position}: not finite: "
            f"{', '.join(broken) or 'the gradient'}; last values: {shown}; learning rate {self.learning_rate:g}. "
            "No broken step reached the weights. Lower learning_rate, or set clip_norm."
        )

    def tree(self) -> dict[str, Any]:
        """The state as a checkpoint keeps it. Every worker takes part; the tensors are live."""
        gather = self.workers.gather
        is_cuda = self.device.type == "cuda"
        return {
            "method": self.method.state_dict(),
            **self.updater.state(),
            "average": None if self.average is None else self.average.average,
            "random": gather(torch.get_rng_state()),
            "random_cuda": gather(torch.cuda.get_rng_state(self.device)) if is_cuda else None,
            "sums": None if self.sums is None else gather(self.sums),
            "num_rows": gather(torch.tensor(self.num_rows)),
            "seconds": astuple(self.held()),
            **{name: getattr(self, name) for name in SAVED_AS_THEY_ARE},
        }

    def restore(self, tree: Mapping[str, Any] | None) -> None:
        """Continue where ``tree`` was taken; None begins anew. Random streams follow only if no worker was added."""
        self._refuse_discord(tree)
        if tree is None:
            return
        self.method.load_state_dict(tree["method"])
        self.updater.load_state(tree)
        if self.average is not None:
            self.average.load_state(tree["average"])
        for name in SAVED_AS_THEY_ARE:
            setattr(self, name, tree[name])
        self.history = list(self.history)
        self.resumed_epochs, self._earlier = self.epoch, Held.from_tuple(tree["seconds"])
        self.sums = None if tree["sums"] is None else self._own_share(tree["sums"]).to(self.device)
        self.num_rows = int(self._own_share(tree["num_rows"]))
        if len(tree["random"]) == self.workers.size:
            # Cloned, because torch crashes on a state that does not begin on an aligned address.
            torch.set_rng_state(tree["random"][self.workers.rank].clone())
            if tree["random_cuda"] is not None and self.device.type == "cuda":
                torch.cuda.set_rng_state(tree["random_cuda"][self.workers.rank].clone(), self.device)

    def _own_share(self, gathered: Tensor) -> Tensor:
        """This worker's part of saved sums; with another number of workers than then, worker 0 takes them all."""
        if len(gathered) == self.workers.size:
            return gathered[self.workers.rank].clone()
        return gathered.sum(0) * int(self.workers.rank == 0)

    def _refuse_discord(self, tree: Mapping[str, Any] | None) -> None:
        place = [-1, -1] if tree is None else [tree["epoch"], tree["position"]]
        places = self.workers.gather(torch.tensor(place)).tolist()
        if any(other != place for other in places):
            raise StillhouseError(
                f"workers found checkpoints at different places (epoch, batch): {places}. All of them must read the "
                "same storage: is it shared between their machines?"
            )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this is one of the ways in which torch and Python say that memory ran out."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "allocate memory" in str(error)
    )


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory allocated on the GPU; on the CPU, the peak resident size of the process so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
