"""What of a frozen network's answer is kept in a recording, and the answer that is made from it again. Pure.

A classifier answers with logits and pooled features; other networks with an object of named parts, of which a student
reads some (``Method.asks``). What a student gets has the same form whether it was recorded or not.

Shape legend: B = batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Protocol

from torch import Tensor

from orchestrator.signals_codec import Columns, SignalFormat

__all__ = ["ClassForm", "Form", "PartsForm"]

IMAGE_ORDER = (0, 2, 3, 1)
"""How a channels-last map lies in memory. The last bits of a sum over it depend on that, so it is kept."""
LAST = "@channels_last"


class Form(Protocol):
    """Answers to columns and back."""

    def encode(self, answer: Any) -> Mapping[str, Tensor]:
        """The columns to keep, ``[B, ...]`` each."""

    def decode(self, columns: Columns) -> Any:
        """What a student gets."""

    def compared(self, columns: Columns) -> tuple[Tensor, ...]:
        """By what two recordings of the same rows are compared."""

    def content(self) -> dict[str, Any]:
        """What sets recordings of this form apart."""

    def row_bytes(self, example: Callable[[], Columns]) -> float:
        """Bytes that one sample takes in one epoch, its index included. ``example`` gives the columns of some batch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassForm:
    """``(logits, pooled)``, possibly compressed."""

    form: SignalFormat
    num_classes: int
    num_features: int

    def encode(self, answer: Any) -> Mapping[str, Tensor]:
        return self.form.encode(*answer)

    def decode(self, columns: Columns) -> tuple[Tensor, Tensor]:
        return self.form.decode(columns, self.num_classes)

    def compared(self, columns: Columns) -> tuple[Tensor, ...]:
        return self.decode(columns)

    def content(self) -> dict[str, Any]:
        return self.form.content()

    def row_bytes(self, example: Callable[[], Columns]) -> float:
        return self.form.row_bytes(self.num_classes, self.num_features)


@dataclass(frozen=True, kw_only=True, slots=True)
class PartsForm:
    """Some named parts of an answer, possibly rounded. What a student gets has these attributes and no others."""

    form: SignalFormat
    parts: tuple[str, ...]

    def encode(self, answer: Any) -> Mapping[str, Tensor]:
        columns = {}
        for part in self.parts:
            values: Tensor = getattr(answer, part)
            is_last = values.dim() == 4 and not values.is_contiguous() and values.permute(IMAGE_ORDER).is_contiguous()  # fmt: skip
            name, values = (part + LAST, values.permute(IMAGE_ORDER)) if is_last else (part, values)
            columns[name] = self.form.rounded(values.contiguous())
        return columns

    def decode(self, columns: Columns) -> SimpleNamespace:
        answer = SimpleNamespace()
        for name, column in columns.items():
            values = self.form.restored(column)
            values = values.permute(0, 3, 1, 2) if name.endswith(LAST) else values
            setattr(answer, name.removesuffix(LAST), values)
        return answer

    def compared(self, columns: Columns) -> tuple[Tensor, ...]:
        return tuple(columns[name] for name in sorted(columns))

    def content(self) -> dict[str, Any]:
        return {"parts": sorted(self.parts), **self.form.content()}

    def row_bytes(self, example: Callable[[], Columns]) -> float:
        return 8 + sum(column.nbytes / len(column) for column in example().values())
