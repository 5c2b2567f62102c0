"""One row per sample, merged in any order and partition without changing a digit; a row that comes twice counts once."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Generic, Self, TypeVar

Row = TypeVar("Row")
NUM_NAMED = 3
"""Missing samples that an error names."""


class SampleTable(Generic[Row]):
    """Rows by sample id. Rows are compared with ``==``, so they hold whole numbers, texts and bytes, not arrays."""

    def __init__(self, what: str = "sample") -> None:
        """``what`` is the word for a sample in errors."""
        self._what = what
        self._rows: dict[str, Row] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, sample_id: str, row: Row) -> None:
        """Keep a row. A repeat, as a sampler makes that pads the share of a worker, changes nothing.

        Raises:
            ValueError: The sample is there with another row.
        """
        known = self._rows.setdefault(sample_id, row)
        if known != row:
            raise ValueError(
                f"{self._what} {sample_id!r} came twice with other counts: {known} and {row}; ids must be unique, and a "
                "repeated sample must be judged alike"
            )

    def merge(self, other: SampleTable[Row]) -> None:
        """Take over the rows of another worker."""
        for sample_id, row in other._rows.items():
            self.add(sample_id, row)

    def rows(self, expected: Iterable[str] = ()) -> list[Row]:
        """All rows in the order of their ids. Raises ValueError when one of ``expected`` is missing."""
        missing = sorted(set(expected) - self._rows.keys())
        if missing:
            raise ValueError(
                f"{len(missing)} {self._what}s were not judged, for instance {', '.join(missing[:NUM_NAMED])}"
            )
        return [self._rows[sample_id] for sample_id in sorted(self._rows)]


class Measure(ABC, Generic[Row]):
    """A table of samples that were judged by the same rules, and the numbers that follow from it."""

    def __init__(self, rules: object) -> None:
        self._rules = rules
        self.table: SampleTable[Row] = SampleTable()

    def merge(self, other: Self) -> None:
        """Take over the rows of another worker. Raises ValueError when they were judged by other rules."""
        if type(other) is not type(self) or other._rules != self._rules:
            raise ValueError(
                f"samples judged by {other._rules} cannot be added to samples judged by {self._rules}: judge all of "
                "them by the same rules"
            )
        self.table.merge(other.table)

    @abstractmethod
    def compute(self, *, expected: Iterable[str] = ()) -> dict[str, float]:
        """Metrics in percent over all samples, NaN where nothing was counted; ``expected`` ids must have come up."""


def percent(part: float, whole: float) -> float:
    """NaN where nothing was counted."""
    return 100 * part / whole if whole else math.nan
