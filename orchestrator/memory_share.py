"""How much memory a stage may use: the share of its device that goes with the cores or the GPU that it holds."""

from __future__ import annotations

import os
from pathlib import Path

import torch

__all__ = ["host_memory_bytes", "memory_share_bytes"]

CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def memory_share_bytes(device: torch.device, *, cpus: float, gpus: float) -> float:
    """Of a GPU, the fraction that is held; of the host's memory, as much as ``cpus`` are of its cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory * min(1.0, gpus)
    return host_memory_bytes() * min(1.0, cpus / (os.cpu_count() or 1))


def host_memory_bytes(limit: Path = CGROUP_LIMIT) -> float:
    """Memory of this machine, or of the container that this process is in where that is less."""
    there = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    text = limit.read_text().strip() if limit.exists() else "max"
    return min(there, float(text)) if text.isdigit() else there
