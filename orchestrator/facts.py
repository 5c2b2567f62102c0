"""Look up in the world what keys depend on: bytes of data sets and checkpoints, source of the user's own code."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from methods import BUILTIN
from orchestrator.chain import StageSpec, resolve_chain, with_baseline
from orchestrator.data_section import DataSettings
from orchestrator.errors import ConfigurationError
from orchestrator.keys import Facts
from orchestrator.settings import Problems
from orchestrator.spec import ExperimentSpec

__all__ = ["checkpoint_paths", "data_roots", "data_sections", "files_on_every_node", "gather_facts"]


def gather_facts(spec: ExperimentSpec) -> Facts:
    """Raises ``ConfigurationError`` naming every file that is absent or unreadable."""
    problems = Problems()
    data: dict[str, str] = {}
    for name, section in data_sections(spec).items():
        try:
            data[name] = section.source.fingerprint()
        except (OSError, ValueError) as error:
            problems.add("data" if section == spec.data else f"data {section.dataset}", str(error))
    checkpoints = {}
    for path, setting in sorted(set(_weights(spec))):
        try:
            checkpoints[path] = _digest(Path(path).expanduser())
        except OSError as error:
            problems.add(setting, f"{path!r} cannot be read: {error.strerror}")
    if problems:
        raise ConfigurationError(*problems)
    return Facts(data=data, checkpoints=checkpoints, code=dict(_foreign_code(spec)))


def data_sections(spec: ExperimentSpec) -> dict[str, DataSettings]:
    """``source_id`` -> a section that loads it: the experiment's and those of stages, whatever their point."""
    sections = [spec.data, *(stage.data for stage in _all_stages(spec, ".data") if stage.data is not None)]
    return {section.source_id: section for section in reversed(sections)}


def data_roots(spec: ExperimentSpec) -> list[str]:
    """Folders of the data sets that lie in one, as the experiment writes them."""
    roots = (getattr(section.source, "root", None) for section in data_sections(spec).values())
    return [root for root in roots if isinstance(root, str)]


def files_on_every_node(spec: ExperimentSpec) -> list[str]:
    """Paths that each node reads for itself: checkpoints, and data sets too large to travel with their stages.

    Any other data set is read by the driver alone and reaches the stages through Ray.
    """
    lazy = [
        str(getattr(section.source, "root", ""))
        for section in data_sections(spec).values()
        if getattr(section.source, "reads_while_used", lambda: False)()
    ]
    return sorted({*lazy, *checkpoint_paths(spec)})


def checkpoint_paths(spec: ExperimentSpec) -> Iterator[str]:
    """Every file or folder of weights that a stage may start from, the choices of the search included."""
    return (path for path, _ in _weights(spec))


def _weights(spec: ExperimentSpec) -> Iterator[tuple[str, str]]:
    """Local weights, each with the setting that names it."""
    for stage in _all_stages(spec, ".model"):
        if stage.model is not None and stage.model.checkpoint is not None:
            yield stage.model.checkpoint, "model.checkpoint"
    for stage in _all_stages(spec, "checkpoint"):
        for setting, kind in spec.catalog.method(stage.method).weight_sources.items():
            path = getattr(stage.settings, setting)
            if path and not path.startswith("timm/") and (kind == "timm" or _is_local(path)):
                yield path, setting


def _is_local(name: str) -> bool:
    """Whether this is a path, rather than a name on a hub (``openai/clip-vit-base-patch16``)."""
    return name.startswith(("/", "~", ".")) or Path(name).exists()


def _digest(path: Path) -> str:
    """Hash of a file, or of the weights and settings in a folder as transformers keeps them."""
    if not path.is_dir():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    inside = sorted(file for file in path.iterdir() if file.suffix in (".safetensors", ".json"))
    return hashlib.sha256("".join(f"{file.name} {_digest(file)} " for file in inside).encode()).hexdigest()


def _all_stages(spec: ExperimentSpec, varied: str) -> Iterator[StageSpec]:
    """Stages of the experiment and its baselines, with each value of the swept settings whose path has ``varied``."""
    labels: list[str | None] = [None, *spec.baselines]
    choices: list[dict[str, Any]] = [{}] + [
        {path: value}
        for path, domain in spec.search.space.items()
        if varied in path
        for value in domain.probes()
    ]
    for label in labels:
        stages = spec.stages if label is None else with_baseline(spec.stages, spec.baselines[label])
        for values in choices:
            chain = resolve_chain(stages, values, spec.target, spec.catalog, Problems(), spec.data)
            yield from chain.values()


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
