"""What the training loop needs from its fellow workers: sums, one decision for all, and gathered states.

``SOLO`` is one process and does nothing. ``TorchWorkers`` speaks through the ``torch.distributed`` group that the
caller has initialised (gloo on CPU, nccl on GPU). Every worker must make the same calls in the same order.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

__all__ = ["SOLO", "TorchWorkers", "Workers"]


@dataclass(frozen=True)
class Workers:
    """One process that works alone; the base of every other arrangement."""

    rank: int = 0
    """Number of this worker, from 0. Worker 0 decides, observes and saves."""
    size: int = 1
    """How many workers share each batch."""

    def parallel(self, module: nn.Module) -> nn.Module:
        """The module to call in training, so that gradients are the mean over workers after ``backward``."""
        return module

    def no_sync(self, module: nn.Module) -> AbstractContextManager[None]:
        """Scope in which ``backward`` on a module from ``parallel`` adds to the local gradient only."""
        return nullcontext()

    def all_reduce_sum(self, totals: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Sums over all workers, float64. A worker that saw no data may bring an empty mapping."""
        return {name: total.double() for name, total in totals.items()}

    def all_true(self, flag: Tensor) -> Tensor:
        """Whether the boolean scalar ``flag`` is true on every worker, without waiting for the device."""
        return flag

    def broadcast_flag(self, flag: bool) -> bool:
        """Worker 0's ``flag``, on every worker."""
        return flag

    def broadcast_tensors(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite ``tensors`` in place by those of worker 0."""

    def gather(self, tensor: Tensor) -> Tensor:
        """Equally shaped tensors of all workers, stacked by rank on the CPU, ``[size, ...]``."""
        return tensor.cpu().unsqueeze(0)

    def barrier(self) -> None:
        """Wait until every worker is here."""


SOLO = Workers()
"""The only worker of a single-process run."""


@dataclass(frozen=True)
class TorchWorkers(Workers):
    """Workers of an initialised ``torch.distributed`` process group."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """Where collectives run: the CPU for gloo, this worker's GPU for nccl."""

    @classmethod
    def current(cls, device: torch.device) -> TorchWorkers:
        """This process's place in the default group; raises RuntimeError where none was initialised."""
        if not dist.is_initialized():
            raise RuntimeError("no torch.distributed group: call torch.distributed.init_process_group first")
        collective_device = device if dist.get_backend() == "nccl" else torch.device("cpu")
        return cls(rank=dist.get_rank(), size=dist.get_world_size(), device=collective_device)

    def parallel(self, module: nn.Module) -> nn.Module:
        # A method may leave parameters out of a step (a loss of weight zero), hence the search for unused ones.
        return DistributedDataParallel(module, find_unused_parameters=True)

    def no_sync(self, module: nn.Module) -> AbstractContextManager[None]:
        assert isinstance(module, DistributedDataParallel)
        return module.no_sync()

    def all_reduce_sum(self, totals: Mapping[str, Tensor]) -> dict[str, Tensor]:
        layout = self._layout_of_first({name: list(total.shape) for name, total in totals.items()})
        if totals and {name: tuple(total.shape) for name, total in totals.items()} != layout:
            raise ValueError(
                f"worker {self.rank} brings sums {sorted(totals)}, worker 0 {sorted(layout)}: "
                "names and shapes must be equal on all workers"
            )
        parts = [
            totals[name].to(self.device, torch.float64).reshape(-1)
            if totals
            else torch.zeros(math.prod(shape), dtype=torch.float64, device=self.device)
            for name, shape in layout.items()
        ]
        if not parts:
            return {}
        flat = torch.cat(parts)
        dist.all_reduce(flat)
        pieces = torch.split(flat, [part.numel() for part in parts])
        return {name: piece.view(shape) for (name, shape), piece in zip(layout.items(), pieces, strict=True)}

    def all_true(self, flag: Tensor) -> Tensor:
        shared = flag.to(self.device, torch.uint8)
        dist.all_reduce(shared, dist.ReduceOp.MIN)
        return shared.to(flag.device, torch.bool)

    def broadcast_flag(self, flag: bool) -> bool:
        shared = torch.tensor(int(flag), dtype=torch.uint8, device=self.device)
        dist.broadcast(shared, src=0)
        return bool(shared.item())

    def broadcast_tensors(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            shared = tensor.detach().to(self.device)
            dist.broadcast(shared, src=0)
            tensor.detach().copy_(shared)

    def gather(self, tensor: Tensor) -> Tensor:
        local = tensor.to(self.device).contiguous()
        gathered = [torch.empty_like(local) for _ in range(self.size)]
        dist.all_gather(gathered, local)
        return torch.stack(gathered).cpu()

    def barrier(self) -> None:
        dist.barrier()

    def _layout_of_first(self, layout: dict[str, list[int]]) -> dict[str, tuple[int, ...]]:
        """Names and shapes of worker 0, which always has data. JSON, so that no worker unpickles another's bytes."""
        text = torch.tensor(list(json.dumps(layout).encode()), dtype=torch.uint8, device=self.device)
        length = torch.tensor(text.numel(), device=self.device)
        dist.broadcast(length, src=0)
        if self.rank != 0:
            text = torch.empty(int(length.item()), dtype=torch.uint8, device=self.device)
        dist.broadcast(text, src=0)
        shapes = json.loads(bytes(text.cpu().tolist()))
        return {name: tuple(shape) for name, shape in shapes.items()}
