"""Chunks: immutable files of recorded rows, checked as a whole and then mapped into memory.

Layout: 8 bytes that name the format, the BLAKE2b digest of all that follows it (32 bytes), the length of the header
(8 bytes, little-endian), the header (JSON), then each column's raw little-endian values, aligned to 64 bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from orchestrator.errors import DamagedArtifactError
from orchestrator.signals_codec import Columns

__all__ = ["Chunk", "Table", "map_chunk", "to_chunk"]

MAGIC = b"SHsignl1"
DIGEST_BYTES = 32
START = len(MAGIC) + DIGEST_BYTES + 8
ALIGNMENT = 64
KINDS = {
    name: getattr(torch, name)
    for name in ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16")
}
IDS = "ids"


@dataclass(frozen=True)
class Chunk:
    """Rows of some samples, mapped from a file that may be deleted meanwhile."""

    ids: np.ndarray
    """Which samples, ``[n]``, int64."""
    columns: Columns
    """``[n, ...]`` each."""


def to_chunk(recording: str, ids: np.ndarray, columns: Columns) -> bytes:
    """The file that holds ``columns`` of the samples ``ids`` ``[n]`` of a recording."""
    tensors = {IDS: torch.from_numpy(np.ascontiguousarray(ids, dtype=np.int64)), **columns}
    described, parts, end = {}, [], 0
    for name, tensor in tensors.items():
        data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        padding = -end % ALIGNMENT
        kind = str(tensor.dtype).removeprefix("torch.")
        described[name] = {"offset": end + padding, "kind": kind, "shape": list(tensor.shape)}
        parts += [bytes(padding), data]
        end += padding + len(data)
    header = json.dumps({"recording": recording, "columns": described}).encode()
    header += b" " * (-(START + len(header)) % ALIGNMENT)
    rest = b"".join([len(header).to_bytes(8, "little"), header, *parts])
    return MAGIC + hashlib.blake2b(rest, digest_size=DIGEST_BYTES).digest() + rest


def map_chunk(path: str, recording: str) -> Chunk:
    """Map the file at ``path``. ``DamagedArtifactError`` where it is not what was written, or of another recording."""
    raw = np.memmap(path, dtype=np.uint8, mode="c")  # copy on write: torch takes no read-only memory
    if len(raw) < START or raw[: len(MAGIC)].tobytes() != MAGIC:
        raise DamagedArtifactError(f"{path}: {len(raw)} bytes that are no chunk of signals")
    digest_end = len(MAGIC) + DIGEST_BYTES
    expected = raw[len(MAGIC) : digest_end].tobytes().hex()
    found = hashlib.blake2b(raw[digest_end:].data, digest_size=DIGEST_BYTES).hexdigest()
    if found != expected:
        raise DamagedArtifactError(f"{path}: expected digest {expected[:16]}, found {found[:16]}")
    try:
        return _read(raw, recording)
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, RecursionError) as error:
        raise DamagedArtifactError(f"{path}: {error}") from error


def _read(raw: np.ndarray, recording: str) -> Chunk:
    body = START + int.from_bytes(raw[START - 8 : START].tobytes(), "little")
    header = json.loads(raw[START:body].tobytes())
    if header["recording"] != recording:
        raise ValueError(f"it holds signals of recording {header['recording']}, not of {recording}")
    memory = torch.from_numpy(raw)[body:]
    columns = {name: _column(memory, described) for name, described in header["columns"].items()}
    ids = columns.pop(IDS).numpy()
    if ids.ndim != 1 or any(len(column) != len(ids) for column in columns.values()):
        raise ValueError("its columns differ in length")
    return Chunk(ids, columns)


def _column(memory: Tensor, described: Mapping[str, Any]) -> Tensor:
    kind, shape = KINDS[described["kind"]], [int(size) for size in described["shape"]]
    start = int(described["offset"])
    num_bytes = math.prod(shape) * kind.itemsize
    if min([start, *shape]) < 0 or start + num_bytes > len(memory):
        raise ValueError("a column reaches beyond its end")
    return memory[start : start + num_bytes].view(kind).view(shape)


class Table:
    """Where in some chunks the row of each sample lies."""

    def __init__(self, num_ids: int) -> None:
        """For samples ``0..num_ids - 1``."""
        self._chunks: list[Chunk] = []
        self._chunk_of = np.full(num_ids, -1, dtype=np.int64)
        self._row_of = np.zeros(num_ids, dtype=np.int64)

    def add(self, chunk: Chunk) -> None:
        """Take in the rows of a chunk. Of two rows of one sample the later stays; they are equal."""
        if len(chunk.ids) and not 0 <= chunk.ids.min() <= chunk.ids.max() < len(self._chunk_of):
            raise DamagedArtifactError(
                f"a chunk names sample {chunk.ids.max()}; there are {len(self._chunk_of)}"
            )
        self._chunk_of[chunk.ids] = len(self._chunks)
        self._row_of[chunk.ids] = np.arange(len(chunk.ids))
        self._chunks.append(chunk)

    def is_missing(self, ids: np.ndarray) -> np.ndarray:
        """Whether there is no row of each of the samples ``ids`` ``[B]``."""
        missing: np.ndarray = self._chunk_of[ids] < 0
        return missing

    def rows(self, ids: np.ndarray) -> dict[str, Tensor]:
        """Columns of the samples ``ids`` ``[B]``, none of which may be missing: new tensors in that order."""
        chunk_of, row_of = self._chunk_of[ids], self._row_of[ids]
        numbers = np.unique(chunk_of)
        if len(numbers) == 1:
            # Into memory of torch's own: how it is aligned may change the last bits of what is computed from it.
            rows = torch.from_numpy(row_of)
            columns = self._chunks[int(numbers[0])].columns
            return {name: column.index_select(0, rows) for name, column in columns.items()}
        return self._rows_of_many(numbers, chunk_of, row_of)

    def _rows_of_many(
        self, numbers: np.ndarray, chunk_of: np.ndarray, row_of: np.ndarray
    ) -> dict[str, Tensor]:
        first = self._chunks[int(numbers[0])].columns
        found = {
            name: torch.empty((len(chunk_of), *column.shape[1:]), dtype=column.dtype)
            for name, column in first.items()
        }
        for number in numbers:
            where = np.flatnonzero(chunk_of == number)
            rows = torch.from_numpy(row_of[where])
            for name, column in self._chunks[int(number)].columns.items():
                found[name][torch.from_numpy(where)] = column.index_select(0, rows)
        return found
