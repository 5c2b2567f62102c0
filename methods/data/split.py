"""Holding out validation samples so that every class keeps its share."""

from __future__ import annotations

import numpy as np

from methods.data.randomness import hashes


def stratified_split(labels: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split sample positions into training and validation ones, class by class.

    About ``fraction`` of the samples, and of each class, are held out; what rounding leaves over goes to the
    classes that lost most by it. Every class keeps at least one training sample, so a class of one has no validation
    sample. Whether a sample is held out follows from the labels, ``fraction`` and ``seed`` alone.

    Args:
        labels: Class of each sample, ``[n]``.
        fraction: Share to hold out, from 0 (nothing) to below 1.
        seed: Which samples are drawn.

    Returns:
        Positions for training and for validation: int64, sorted, disjoint, together ``0..n-1``.

    Raises:
        ValueError: ``fraction`` is outside [0, 1), or so small or large that one side would stay empty.
    """
    if not 0.0 <= fraction < 1.0:
        raise ValueError(f"the validation fraction must be at least 0 and below 1, got {fraction}")
    positions = np.arange(len(labels), dtype=np.int64)
    if fraction == 0.0:
        return positions, positions[:0]
    counts = np.bincount(labels)
    quotas = _quotas(counts, fraction)
    if quotas.sum() == 0:
        raise ValueError(
            f"a validation fraction of {fraction} holds out none of {len(labels)} samples in "
            f"{np.count_nonzero(counts)} classes: raise it, or set it to 0"
        )
    # Sorted by class, and at random within each: the first ``quota`` of each class are held out.
    order = np.lexsort((hashes(seed, "split", 0, positions), labels))
    starts = np.cumsum(counts) - counts
    rank = np.arange(len(labels)) - np.repeat(starts, counts)
    held_out = np.zeros(len(labels), dtype=bool)
    held_out[order] = rank < np.repeat(quotas, counts)
    return positions[~held_out], positions[held_out]


def _quotas(counts: np.ndarray, fraction: float) -> np.ndarray:
    """How many of each class are held out: largest remainders, and never a whole class."""
    exact = counts * fraction
    limits = np.maximum(counts - 1, 0)
    quotas: np.ndarray = np.minimum(np.floor(exact).astype(np.int64), limits)
    left_over = round(float(exact.sum())) - int(quotas.sum())
    neediest = np.argsort(quotas - exact, kind="stable")
    neediest = neediest[quotas[neediest] < limits[neediest]]
    quotas[neediest[: max(left_over, 0)]] += 1
    return quotas
