"""The rows of all workers in one loss, with gradients.

A criterion that relates samples to each other sees only its worker's share of a batch, unless the rows are gathered. Then
every worker computes the same loss of the whole batch, and the training loop, which averages gradients over rows, gets from
each the gradient of its own rows, scaled so that the average is the gradient of that loss.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from methods.distil.memory import gathered_rows


def rows_of_all(rows: Tensor) -> Tensor:
    """The rows ``[B, ...]`` of all workers, in the order of workers; with one worker, ``rows`` itself.

    Every worker has to call this at the same point. Shares may differ in length.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return rows
    gathered: Tensor = _RowsOfAll.apply(rows)
    return gathered


class _RowsOfAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ranks = torch.full((len(rows),), dist.get_rank(), device=rows.device)
        gathered, ranks = gathered_rows(rows, ranks)
        ctx.start = int((ranks < dist.get_rank()).sum())
        ctx.num_rows = len(rows)
        return gathered

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        own = gradient[ctx.start : ctx.start + ctx.num_rows]
        # The loop weighs a worker's gradient by its share of the rows: this takes the share out again.
        scaled: Tensor = own * (len(gradient) / ctx.num_rows)
        return scaled
