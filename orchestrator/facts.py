"""Look up in the world what keys depend on: bytes of data sets and checkpoints, source of the user's own code."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from methods import BUILTIN
from orchestrator.chain import resolve_chain, with_baseline
from orchestrator.errors import ConfigurationError
from orchestrator.keys import Facts
from orchestrator.settings import Problems, to_plain
from orchestrator.spec import ExperimentSpec

__all__ = ["checkpoint_paths", "gather_facts"]


def gather_facts(spec: ExperimentSpec) -> Facts:
    """Raises ``ConfigurationError`` naming every file that is absent or unreadable."""
    problems = Problems()
    data: dict[str, Any] = {}
    try:
        data["fingerprint"] = spec.data.source.fingerprint()
    except (OSError, ValueError) as error:
        problems.add("data", str(error))
    data |= {
        "validation": spec.data.validation,
        "split_seed": spec.data.split_seed,
        "augment": to_plain(spec.data.active_augment),
    }
    checkpoints = {}
    for path in sorted(set(checkpoint_paths(spec))):
        try:
            checkpoints[path] = hashlib.sha256(Path(path).expanduser().read_bytes()).hexdigest()
        except OSError as error:
            problems.add("model.checkpoint", f"{path!r} cannot be read: {error.strerror}")
    if problems:
        raise ConfigurationError(*problems)
    return Facts(data=data, checkpoints=checkpoints, code=dict(_foreign_code(spec)))


def checkpoint_paths(spec: ExperimentSpec) -> Iterator[str]:
    """Every file of weights that a stage may start from, the choices of the search included."""
    labels: list[str | None] = [None, *spec.baselines]
    choices: list[dict[str, Any]] = [{}] + [
        {path: value}
        for path, domain in spec.search.space.items()
        if ".model" in path
        for value in domain.probes()
    ]
    for label in labels:
        stages = spec.stages if label is None else with_baseline(spec.stages, spec.baselines[label])
        for values in choices:
            for stage in resolve_chain(stages, values, spec.target, spec.catalog, Problems()).values():
                if stage.model is not None and stage.model.checkpoint is not None:
                    yield stage.model.checkpoint


def _foreign_code(spec: ExperimentSpec) -> Iterator[tuple[str, str]]:
    """Versions of methods and models that the user brought: a change of their source gives new keys."""
    for name, method in spec.catalog.methods.items():
        if BUILTIN.methods.get(name) is not method:
            yield f"method:{name}", f"{method.version}:{_source_hash(method)}"
    for name, factory in spec.catalog.models.items():
        if BUILTIN.models.get(name) is not factory:
            yield f"model:{name}", _source_hash(factory)


def _source_hash(code: Any) -> str:
    try:
        return hashlib.sha256(inspect.getsource(code).encode()).hexdigest()[:16]
    except (OSError, TypeError):  # typed into a prompt: there is no source to read, so its name has to do
        return f"{code.__module__}.{getattr(code, '__qualname__', type(code).__qualname__)}"
