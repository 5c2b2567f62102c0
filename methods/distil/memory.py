"""Something remembered for each training sample, the same on every worker.

Shape legend: n = samples of the training split, B = batch, K = numbers remembered per sample.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn


class SampleMemory(nn.Module):
    """Rows ``[n, K]`` by sample index. Part of the checkpoint, but no buffer: it is not broadcast at every step.

    Reading and writing leave no gradient. ``write`` has to be called by every worker, once per forward pass: each
    then writes the rows of all, so that the memories stay equal and any worker's checkpoint is that of all.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rows = torch.zeros(0, 0)

    @property
    def is_filled(self) -> bool:
        return len(self.rows) > 0

    def fill(self, rows_nK: Tensor) -> None:
        """Begin with these rows."""
        self.rows = rows_nK.detach().clone()

    @torch.no_grad()
    def read(self, indices_B: Tensor) -> Tensor:
        """A copy of the rows of these samples, ``[B, K]``."""
        return self.rows.index_select(0, indices_B)

    @torch.no_grad()
    def write(self, indices_B: Tensor, rows_BK: Tensor) -> None:
        """Replace the rows of these samples, and of those that the other workers bring."""
        indices, rows = gathered_rows(indices_B, rows_BK.detach().to(self.rows.dtype))
        self.rows.index_copy_(0, indices, rows)

    def get_extra_state(self) -> Tensor:
        return self.rows

    def set_extra_state(self, state: Tensor) -> None:
        self.rows = state.to(self.rows.device).clone()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SampleMemory:
        """Follow ``.to(device)``, as a buffer would."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.rows = fn(self.rows)
        return self


def gathered_rows(*columns: Tensor) -> tuple[Tensor, ...]:
    """Each column with the rows of all workers, in the order of workers; without workers, as they are. No gradient.

    Every worker has to call this at the same point with columns of the same widths; lengths may differ by worker.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return columns
    length = torch.tensor([len(columns[0])], device=columns[0].device)
    lengths = [torch.empty_like(length) for _ in range(dist.get_world_size())]
    dist.all_gather(lengths, length)
    sizes = [int(size) for size in lengths]
    return tuple(_gathered(column.detach(), sizes) for column in columns)


def _gathered(column: Tensor, sizes: list[int]) -> Tensor:
    """Collectives want equal shapes, so shorter shares are padded and cut again."""
    padded = column.new_zeros(max(sizes), *column.shape[1:])
    padded[: len(column)] = column
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
