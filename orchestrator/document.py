"""Experiment files as plain data: read YAML strictly, and lay command-line overrides over it."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from orchestrator.errors import ConfigurationError

__all__ = ["SECTIONS", "apply_overrides", "dump_document", "read_document"]

SECTIONS = ("name", "data", "stages", "baselines", "controls", "search", "run")
MERGE_TAG = "tag:yaml.org,2002:merge"
NOT_YAML = (yaml.YAMLError, ValueError, RecursionError)
"""What the YAML reader raises: ValueError for a date such as 2024-13-01, RecursionError for absurd nesting."""


class _StrictLoader(yaml.SafeLoader):
    """Plain YAML in which a key may stand only once."""


def _unique_mapping(loader: _StrictLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        if key_node.tag == MERGE_TAG:  # `<<: *base` may be overlaid on purpose: it is no key of its own
            continue
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str | int | float):
            raise yaml.constructor.ConstructorError(
                None, None, f"{key!r} cannot be a key", key_node.start_mark
            )
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"{key!r} stands twice", key_node.start_mark)
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)
"""``1e-3`` is a number to everybody but YAML 1.1."""
_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_mapping)


def read_document(path: Path) -> dict[str, Any]:
    """The experiment file at ``path``; a ``ConfigurationError`` that names file and line when it is not one.

    ``configs/NAME.yaml`` also means the one that comes with the package, where there is no such file: on a cluster,
    for instance, where only the package is installed.
    """
    try:
        text = (path if path.exists() else shipped_experiment(path)).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigurationError(f"{path}: no such experiment file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path}: cannot be read: {error}") from None
    try:
        document = yaml.load(text, Loader=_StrictLoader)
    except NOT_YAML as error:
        raise ConfigurationError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(document, dict):
        raise ConfigurationError(f"{path}: expected a mapping with {', '.join(SECTIONS)}, got {document!r}")
    return document


def shipped_experiment(path: Path) -> Path:
    """The package's own file for ``configs/NAME.yaml``, else ``path`` itself."""
    own = Path(__file__).parents[1] / "configs" / path.name
    return own if path.parent == Path("configs") and own.exists() else path


def dump_document(document: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(document), sort_keys=False, allow_unicode=True)


def apply_overrides(document: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of ``document`` with each ``path=value`` laid over it.

    A path starts with a section (``search.seeds=3``) or with the name of a stage (``views.margin=0.3``, short for
    ``stages.views.margin``). Fixing a setting that the search varies takes it out of the search space.
    """
    changed = copy.deepcopy(dict(document))
    problems = []
    for override in overrides:
        path, equals, text = override.partition("=")
        if not equals or not path.strip():
            problems.append(f"override {override!r}: expected path=value, for instance search.seeds=3")
            continue
        try:
            value = yaml.load(text, Loader=_StrictLoader)
        except NOT_YAML as error:
            problems.append(f"override {override!r}: the value is not valid YAML: {error}")
            continue
        problem = _override(changed, path.strip(), value)
        if problem:
            problems.append(f"override {override!r}: {problem}")
    if problems:
        raise ConfigurationError(*problems)
    return changed


def _override(document: dict[str, Any], path: str, value: Any) -> str | None:
    stages = document.get("stages")
    parts = path.split(".")
    if parts[0] not in SECTIONS:
        if not isinstance(stages, dict) or parts[0] not in stages:
            return f"{parts[0]!r} is neither a section ({', '.join(SECTIONS)}) nor a stage"
        parts = ["stages", *parts]
    if parts[0] == "stages":
        _leave_space(document, ".".join(parts[1:]))
    elif path.startswith("search.space."):
        parts = ["search", "space", path.removeprefix("search.space.")]
    return _set(document, parts, value)


def _leave_space(document: dict[str, Any], path: str) -> None:
    """Take what ``path`` fixes out of the search space: itself, all below it, and the short form of ``model.name``."""
    search = document.get("search")
    if isinstance(search, dict) and isinstance(search.get("space"), dict):
        search["space"] = {
            name: domain for name, domain in search["space"].items()
            if name != path and not str(name).startswith(f"{path}.") and f"{name}.name" != path
        }  # fmt: skip


def _set(mapping: dict[str, Any], parts: Sequence[str], value: Any) -> str | None:
    """Set a nested value, turning the short form ``model: NAME`` into ``model: {name: NAME}`` on the way."""
    for depth, part in enumerate(parts[:-1]):
        below = mapping.get(part)
        if below is None:
            below = mapping[part] = {}
        elif isinstance(below, str) and part in ("model", "scheduler"):
            below = mapping[part] = {"name": below}
        if not isinstance(below, dict):
            return f"{'.'.join(parts[: depth + 1])} is {below!r}, which has no settings"
        mapping = below
    mapping[parts[-1]] = value
    return None
