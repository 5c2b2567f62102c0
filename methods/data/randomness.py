"""Random numbers as functions of what they are for: no generator, no state, no order of calls.

A number follows from (seed, stream name, epoch, sample id). Whoever asks, in whatever batch and on whatever worker,
gets the same one. Integers are mixed by the finaliser of SplitMix64 (Steele, Lea, Flood 2014).
"""

from __future__ import annotations

import hashlib

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_MIX_SECOND = np.uint64(0x94D049BB133111EB)


def derive_seed(seed: int, *purpose: str) -> int:
    """A seed of 63 bits for a named purpose, the same on every machine: ``derive_seed(0, "views", "init")``."""
    return _digest(repr(int(seed)), *purpose) >> 1


def hashes(seed: int, stream: str, epoch: int, ids: np.ndarray) -> np.ndarray:
    """One number of 64 uniform bits per id, ``[n]``, uint64."""
    base = np.uint64(_digest(repr(int(seed)), stream, repr(int(epoch))))
    mixed = base + (ids.astype(np.uint64) + np.uint64(1)) * _GOLDEN  # wraps around, as it should
    return _mix(_mix(mixed) ^ base)


def uniform(seed: int, stream: str, epoch: int, ids: np.ndarray) -> np.ndarray:
    """One number from [0, 1) per id, ``[n]``, float64."""
    return (hashes(seed, stream, epoch, ids) >> np.uint64(11)) * 2.0**-53


def integers(seed: int, stream: str, epoch: int, ids: np.ndarray, *, high: int) -> np.ndarray:
    """One integer from 0 to ``high - 1`` per id, ``[n]``, int64."""
    drawn: np.ndarray = (uniform(seed, stream, epoch, ids) * high).astype(np.int64)
    return drawn


def _mix(values: np.ndarray) -> np.ndarray:
    values = (values ^ (values >> np.uint64(30))) * _MIX_FIRST
    values = (values ^ (values >> np.uint64(27))) * _MIX_SECOND
    mixed: np.ndarray = values ^ (values >> np.uint64(31))
    return mixed


def _digest(*parts: str) -> int:
    # The separator keeps ("ab", "c") and ("a", "bc") apart.
    return int.from_bytes(hashlib.sha256("\x1f".join(parts).encode()).digest()[:8], "little")
