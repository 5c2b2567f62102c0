"""From journal records to what MLflow's names, limits and units allow."""

from __future__ import annotations

import getpass
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from orchestrator.journal import Record

__all__ = [
    "ID_TAG",
    "MAX_METRICS",
    "MAX_OTHERS",
    "PARENT_TAG",
    "Values",
    "merged",
    "milliseconds",
    "run_tags",
    "tag_texts",
    "tracking_name",
]

ID_TAG = "stillhouse.id"
"""Our own stable id of a run: by it a run is found again."""
PARENT_TAG = "mlflow.parentRunId"
MAX_METRICS = 1000
"""Metrics that one call may carry."""
MAX_OTHERS = 100
"""Params, or tags, that one call may carry."""
MAX_PARAM_CHARACTERS = 6000
MAX_TAG_CHARACTERS = 8000
MAX_NAME_CHARACTERS = 250


@dataclass(frozen=True, kw_only=True, slots=True)
class Values:
    """All that several records of one run say."""

    params: list[tuple[str, str]]
    """Name and value, without exact repetitions."""
    tags: dict[str, str]
    metrics: list[tuple[str, float, int, int]]
    """Name, value, timestamp in ms, step."""


def merged(group: Sequence[Record]) -> Values:
    """Values of ``params``, ``metrics`` and ``tags`` records of one run; of equal tags the last one holds."""
    params: dict[tuple[str, str], None] = {}
    tags: dict[str, str] = {}
    metrics: list[tuple[str, float, int, int]] = []
    for record in group:
        if record["op"] == "params":
            pairs = record["values"].items()
            params |= {
                (tracking_name(name), _cut(value, MAX_PARAM_CHARACTERS)): None for name, value in pairs
            }
        elif record["op"] == "tags":
            tags |= tag_texts(record["values"])
        else:
            for row in record["rows"]:
                metrics += _points(row)
    return Values(params=list(params), tags=tags, metrics=metrics)


def tag_texts(values: Mapping[str, str]) -> dict[str, str]:
    """Tags with names and lengths that MLflow takes."""
    return {tracking_name(name): _cut(value, MAX_TAG_CHARACTERS) for name, value in values.items()}


def run_tags(record: Record, parent: str | None) -> dict[str, str]:
    """All tags of a new run: MLflow's own, ours, and those of its declaration. ``parent`` is an MLflow run id."""
    tags = {
        "mlflow.source.name": "stillhouse",
        "mlflow.source.type": "LOCAL",
        "mlflow.user": _user(),
        **record["tags"],
        "mlflow.runName": record["name"],
        ID_TAG: record["id"],
        "stillhouse.kind": record["kind"],
    }
    return tag_texts(tags if parent is None else tags | {PARENT_TAG: parent})


def tracking_name(text: str) -> str:
    """A name in MLflow's alphabet and length."""
    return re.sub(r"[^\w\-. :/]", "_", text)[:MAX_NAME_CHARACTERS]


def milliseconds(seconds: float) -> int:
    """MLflow's unit of time."""
    return round(seconds * 1000)


def _points(row: Mapping[str, float | str]) -> list[tuple[str, float, int, int]]:
    """``epoch`` is the step and ``time`` the timestamp of everything else in the row."""
    step, timestamp = int(float(row.get("epoch", 0))), milliseconds(float(row["time"]))
    values = {name: value for name, value in row.items() if name not in ("epoch", "time")}
    return [(tracking_name(name), float(value), timestamp, step) for name, value in values.items()]


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container without a name for its user id
        return "unknown"
