"""One row per expression, from which every number is computed: with its protocol, its spread, and for any subset.

Rows can be merged in any order and partition without changing a digit. A row that comes twice counts once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from methods.grounding.contracts import GroundingBatch, GroundingOutput
from methods.grounding.metrics import Judged, judge, summarise_grounding, sums_of
from methods.grounding.protocols import EvaluationProtocol, protocol_named
from methods.grounding.stream import GroundingStream
from methods.measures.table import SampleTable

NUM_DRAWS = 1000
SHOWN = ("miou", "oiou", "pr50", "giou", "ciou", "n_acc", "t_acc", "rec50")


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """What is known about one prediction, in pixels at the size where it was judged."""

    sample_id: str
    picture: int
    intersection: int
    union: int
    predicted: int
    truth: int
    is_empty: bool
    flag: bool
    """The network itself says that nothing is named."""
    box_iou: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """Numbers that are never quoted without the rules by which they came about."""

    protocol: str
    data: str
    """Name of data set and split."""
    num_expressions: int
    metrics: Mapping[str, float]
    """In percent; NaN where nothing was counted."""

    def __str__(self) -> str:
        known = [f"{name} {self.metrics[name]:.2f}" for name in SHOWN if not math.isnan(self.metrics[name])]
        return (
            f"{self.data}, protocol {self.protocol}, {self.num_expressions} expressions: {', '.join(known)}"
        )


class Evaluator:
    """Collects rows of predictions that were judged by one protocol."""

    def __init__(self, protocol: str = "ours", data: str = "") -> None:
        self.protocol, self.data = protocol_named(protocol), data
        self._table: SampleTable[Row] = SampleTable("expression")

    def update(
        self,
        sample_ids: Sequence[str],
        pictures: Sequence[int],
        output: GroundingOutput,
        batch: GroundingBatch,
    ) -> None:
        """Judge a batch; its rows are named by ``sample_ids``."""
        judged = judge(output, batch, self.protocol)
        columns = zip(*(column.tolist() for column in judged), strict=True)
        for sample_id, picture, values in zip(sample_ids, pictures, columns, strict=True):
            named = dict(zip(_COLUMNS, values, strict=True))
            self._table.add(sample_id, Row(sample_id=sample_id, picture=int(picture), **named))

    def merge(self, other: Evaluator) -> None:
        """Take over the rows of another worker."""
        if other.protocol != self.protocol:
            raise ValueError(
                f"rows of protocol {other.protocol.name!r} cannot be added to rows of {self.protocol.name!r}"
            )
        self._table.merge(other._table)

    @property
    def rows(self) -> list[Row]:
        """All rows by their ids: the table that is kept beside the numbers."""
        return self._table.rows()

    def table(self) -> list[dict[str, Any]]:
        """The rows as plain values."""
        return [asdict(row) for row in self.rows]

    def compute(
        self,
        protocol: str | None = None,
        *,
        expected: Iterable[str] = (),
        where: Callable[[Row], bool] | None = None,
    ) -> Scores:
        """Numbers over all rows, or those that ``where`` picks.

        Args:
            protocol: Other rules than those that the rows were judged by, where they look at the same masks.
            expected: Ids that must have come up.
            where: Picks a subset, for instance small objects.

        Raises:
            ValueError: An expected row is missing, or the rules need masks of another size or threshold.
        """
        rules = self.protocol if protocol is None else protocol_named(protocol)
        self._refuse_other_masks(rules)
        rows = [row for row in self._table.rows(expected) if where is None or where(row)]
        metrics = summarise_grounding(sums_of(_judged(rows), rules))
        return Scores(protocol=rules.name, data=self.data, num_expressions=len(rows), metrics=metrics)

    def interval(self, metric: str, *, level: float = 0.95, seed: int = 0) -> tuple[float, float]:
        """Where ``metric`` lies when *pictures* are drawn anew, since sentences about one picture are not independent."""
        groups: dict[int, list[Row]] = {}
        for row in self.rows:
            groups.setdefault(row.picture, []).append(row)
        sums = [sums_of(_judged(rows), self.protocol) for rows in groups.values()]
        totals = np.array([[float(value) for value in one.values()] for one in sums])
        draws = np.random.default_rng(seed).multinomial(
            len(sums), np.full(len(sums), 1 / len(sums)), NUM_DRAWS
        )
        values = [
            summarise_grounding(dict(zip(sums[0], map(torch.tensor, drawn), strict=True)))[metric]
            for drawn in (draws @ totals).tolist()
        ]
        low, high = np.nanquantile(values, [(1 - level) / 2, (1 + level) / 2])
        return float(low), float(high)

    def _refuse_other_masks(self, rules: EvaluationProtocol) -> None:
        for name in ("size", "threshold", "overlap", "rasteriser", "resampling", "scaled_polygons"):
            own, wanted = getattr(self.protocol, name), getattr(rules, name)
            if own != wanted:
                raise ValueError(
                    f"protocol {rules.name!r} has {name} {wanted!r}, but the rows were judged by {self.protocol.name!r} with "
                    f"{own!r}: evaluate the data again with protocol: {rules.name}"
                )


_COLUMNS = tuple(item.name for item in fields(Row))[2:]
"""Columns of a row in the order of ``Judged``."""


def _judged(rows: Sequence[Row]) -> Judged:
    columns = [torch.tensor([getattr(row, name) for row in rows]) for name in _COLUMNS]
    kinds = (torch.int64,) * 4 + (torch.bool,) * 2 + (torch.float64,)
    return Judged._make(column.to(kind) for column, kind in zip(columns, kinds, strict=True))


@torch.no_grad()
def evaluate_network(network: nn.Module, stream: GroundingStream, *, data: str = "") -> Evaluator:
    """Judge a network on all of ``stream`` (this worker's share), by the protocol of its data set."""
    evaluator = Evaluator(stream.source.protocol, data)
    was_training = network.training
    network.eval()
    for batch in stream.batches(0):
        indices: Tensor = batch.indices.cpu()
        names = [stream.expressions.sample_id(int(index)) for index in indices]
        evaluator.update(names, stream.expressions.pictures[indices.numpy()].tolist(), network(batch), batch)
    network.train(was_training)
    return evaluator
