"""Leaving training images out on purpose: few-shot and class-imbalanced variants of any data set."""

from __future__ import annotations

import numpy as np

from methods.data.randomness import hashes


def thin(
    labels: np.ndarray, positions: np.ndarray, *, fraction: float = 1.0, imbalance: float = 1.0, seed: int = 0
) -> np.ndarray:
    """The ``positions`` that stay when every class keeps a share of its samples.

    Class ``c`` of C keeps ``fraction * imbalance ** (-c / (C - 1))`` of them, rounded, and at least one: the
    exponential profile of long-tailed CIFAR (Cui et al. 2019, arXiv 1901.05555). Which ones stay follows from ``seed`` and
    the positions alone, and smaller shares are subsets of larger ones, so runs along a learning curve are nested.

    Args:
        labels: Class of each sample of the whole data set, ``[n]``.
        positions: Samples to choose from, ``[m]``, sorted.
        fraction: Share of every class, above 0 and at most 1.
        imbalance: Largest class over smallest, at least 1.
        seed: Which samples stay.

    Returns:
        int64, sorted, a subset of ``positions``.
    """
    if fraction == 1.0 and imbalance == 1.0:
        return positions
    num_classes = int(labels.max()) + 1
    profile = imbalance ** (-np.arange(num_classes) / max(1, num_classes - 1))
    chosen = labels[positions]
    counts = np.bincount(chosen, minlength=num_classes)
    quotas = np.minimum(np.maximum(np.rint(counts * fraction * profile), 1), counts).astype(np.int64)
    order = np.lexsort((hashes(seed, "thin", 0, positions), chosen))
    starts = np.cumsum(counts) - counts
    rank = np.empty(len(positions), dtype=np.int64)
    rank[order] = np.arange(len(positions)) - np.repeat(starts, counts)
    kept: np.ndarray = positions[rank < quotas[chosen]]
    return kept
