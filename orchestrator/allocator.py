"""What the C library's allocator is told in processes that train: keep freed memory instead of giving it back. Pure.

A training step frees and asks again for the same few hundred megabytes. By default glibc gives much of that back to the
system in between, and each page that comes back costs a fault: thousands per step, some per cent of a step on a CPU.
The variables are read when a process starts, so they are set for whatever Ray starts. Results stay the same to the bit.
"""

from __future__ import annotations

__all__ = ["ENVIRONMENT"]

ENVIRONMENT = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(512 << 20),
}
"""One heap for all threads, since the heaps of threads (a trial is one) cannot be kept; of blocks up to 32 MiB, the most
that every glibc takes; up to 512 MiB of freed memory at its end. Other C libraries ignore all three."""
