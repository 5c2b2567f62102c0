"""Rows of all workers in one tensor, with gradient: so that a contrast does not depend on the number of workers.

Shape legend: B = rows of this worker, G = rows of all workers.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def gathered_with_gradient(rows: Tensor) -> tuple[Tensor, int]:
    """All workers' rows ``[G, ...]`` in the order of workers, and where the own ones begin; alone, the own ones and 0.

    Every worker has to call this at the same point, forward and backward; numbers of rows may differ by worker.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return rows, 0
    length = torch.tensor([len(rows)], device=rows.device)
    lengths = [torch.empty_like(length) for _ in range(dist.get_world_size())]
    dist.all_gather(lengths, length)
    sizes = [int(size) for size in lengths]
    gathered: Tensor = _Gather.apply(rows, sizes)
    return gathered, sum(sizes[: dist.get_rank()])


class _Gather(torch.autograd.Function):
    """Backward sums what all workers say about a row: each has used it in its own loss."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: list[int]) -> Tensor:
        ctx.sizes = sizes
        padded = rows.new_zeros(max(sizes), *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].contiguous()
        dist.all_reduce(total)
        return torch.split(total, ctx.sizes)[dist.get_rank()], None
