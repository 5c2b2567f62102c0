"""Content keys: the hash of everything that changes an artifact's bytes, and of nothing that does not. Pure."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from methods.catalog import Catalog
from orchestrator.chain import StageSpec
from orchestrator.optimisation import TrainSettings
from orchestrator.settings import to_plain

__all__ = [
    "Facts",
    "active_settings",
    "active_train",
    "content_key",
    "cost_signature",
    "inactive_settings",
    "stage_content",
]


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What has to be looked up in the world before a key can be made."""

    data: Mapping[str, str]
    """``source_id`` of a data section -> fingerprint of what is loaded."""
    checkpoints: Mapping[str, str] = field(default_factory=dict)
    """Path of a checkpoint file or folder -> hash of its bytes."""
    code: Mapping[str, str] = field(default_factory=dict)
    """``method:NAME`` or ``model:NAME`` -> version of code that is not ours."""


def content_key(content: Any) -> str:
    """32 hex digits that depend on every value of ``content`` and not on the order of its keys."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def active_settings(stage: StageSpec, catalog: Catalog) -> dict[str, Any]:
    """The method's settings that have an effect at this point, as plain values."""
    inactive = inactive_settings(stage, catalog)
    return {name: value for name, value in to_plain(stage.settings).items() if name not in inactive}


def inactive_settings(stage: StageSpec, catalog: Catalog) -> frozenset[str]:
    """Names of the method's settings that have no effect at this point."""
    return stage.inactive | catalog.method(stage.method).inactive(stage.settings)


def active_train(train: TrainSettings) -> dict[str, Any]:
    """The training settings that have an effect, as plain values."""
    return dict(_active_train(train))


@lru_cache(1024)
def _active_train(train: TrainSettings) -> dict[str, Any]:
    """Most points of a sweep train alike, and are asked several times each."""
    inactive = TrainSettings.inactive(train)
    return {name: value for name, value in to_plain(train).items() if name not in inactive}


def stage_content(
    stage: StageSpec,
    *,
    data: Mapping[str, Any],
    seed: int,
    inputs: Mapping[str, str],
    facts: Facts,
    catalog: Catalog,
    signals: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Everything that determines the bytes of this stage's artifact.

    ``data`` is the content of its data section, ``signals`` how a teacher's signals are compressed.
    """
    method = catalog.method(stage.method)
    return {
        "method": stage.method,
        "method_version": facts.code.get(f"method:{stage.method}", method.version),
        "settings": _settings_content(stage, facts, catalog),
        "model": _model_content(stage, facts),
        "train": active_train(stage.train),
        "data": dict(data),
        "seed": seed,
        "inputs": dict(inputs),
        **({"signals": dict(signals)} if signals else {}),
    }


def _settings_content(stage: StageSpec, facts: Facts, catalog: Catalog) -> dict[str, Any]:
    """Active settings; in place of a path of first weights stands the hash of their bytes."""
    settings = active_settings(stage, catalog)
    named = catalog.method(stage.method).weight_sources.keys() & settings.keys()
    return settings | {name: facts.checkpoints.get(settings[name], settings[name]) for name in named}


def _model_content(stage: StageSpec, facts: Facts) -> dict[str, Any] | None:
    if stage.model is None:
        return None
    content: dict[str, Any] = {"name": stage.model.name, "pretrained": stage.model.pretrained}
    if stage.model.checkpoint is not None:
        content["checkpoint"] = facts.checkpoints[stage.model.checkpoint]
    if f"model:{stage.model.name}" in facts.code:
        content["version"] = facts.code[f"model:{stage.model.name}"]
    return content


def cost_signature(stage: StageSpec, data: Mapping[str, Any], input_signatures: Mapping[str, str]) -> str:
    """Name of the history to which this stage's cost per epoch belongs: kind of work, not its settings."""
    return content_key({
        "method": stage.method,
        "model": stage.model.name if stage.model else None,
        "batch_size": stage.train.batch_size,
        "precision": stage.train.precision,
        **({"compile": True} if stage.train.compile else {}),
        "data": dict(data),
        "inputs": dict(input_signatures),
    })  # fmt: skip
