"""Texts about what exists: methods and models with their settings, artifacts with their lineage."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields
from typing import Any

from methods import BUILTIN
from methods.base import Method, ModelSettings, Task
from methods.catalog import UnknownNameError
from orchestrator.errors import ConfigurationError, DamagedArtifactError
from orchestrator.optimisation import TrainSettings
from orchestrator.plan_text import duration
from orchestrator.store import Store

__all__ = ["artifact_text", "methods_text", "models_text"]


def methods_text(name: str | None = None) -> str:
    """All methods with a line each, or one with its paper, inputs, settings and defaults."""
    if name is None:
        rows = [f"{name:16} {_first_line(method)}" for name, method in BUILTIN.methods.items()]
        return "\n".join([*rows, "", "stillhouse methods NAME shows the settings of one."])
    try:
        method = BUILTIN.method(name)
    except UnknownNameError as error:
        raise ConfigurationError(str(error)) from None
    inputs = [
        f"  {role}: $STAGE that emits {', '.join(sorted(needs))}" for role, needs in method.inputs.items()
    ]
    lines = [
        name,
        "",
        (inspect.getdoc(inspect.getmodule(method)) or "").strip(),
        "",
        "inputs:",
        *(inputs or ["  none"]),
    ]
    lines += [
        f"emits: {', '.join(sorted(method.emits)) or 'nothing'}",
        f"metrics: {', '.join(method.evaluation_metrics)}",
    ]
    lines += ["", "settings:", *_setting_lines(method.Settings, {})]
    if method.presets:
        lines += ["", "presets:", *(f"  {name}: {dict(values)}" for name, values in method.presets.items())]
    known = {field.name for field in fields(method.Settings)}
    worth = [f"  STAGE.{setting}: {domain}" for setting, domain in _domains(method) if setting in known]
    if worth:
        lines += ["", "worth sweeping (search.space):", *worth]
    lines += ["", "train:", *_setting_lines(TrainSettings, dict(method.train_defaults))]
    return "\n".join(lines)


def _domains(method: type[Method]) -> Iterator[tuple[str, str]]:
    """Settings with their ranges, as YAML has them."""
    for setting, domain in method.ranges.items():
        ((kind, values),) = domain.items()
        yield setting, f"{{{kind}: [{', '.join(map(str, values))}]}}"


def _first_line(method: type[Method]) -> str:
    return (inspect.getdoc(method) or "").partition("\n")[0]


def _setting_lines(settings: type, defaults: dict[str, Any]) -> Iterator[str]:
    notes = _field_notes(settings)
    for field in fields(settings):
        default = defaults.get(field.name, _default(field))
        yield f"  {field.name} = {default}"
        if note := notes.get(field.name):
            yield f"      {note}"


def _default(field: Field[Any]) -> Any:
    if field.default is not MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not MISSING else "(required)"


def _field_notes(settings: type) -> dict[str, str]:
    """The line of explanation below each field, as the source has it; inherited fields bring theirs."""
    notes: dict[str, str] = {}
    for cls in reversed(settings.__mro__[:-1]):
        notes |= _own_field_notes(cls)
    return notes


def _own_field_notes(settings: type) -> dict[str, str]:
    import ast
    import textwrap

    tree = ast.parse(textwrap.dedent(inspect.getsource(settings))).body[0]
    assert isinstance(tree, ast.ClassDef)
    notes = {}
    for statement, following in zip(tree.body, tree.body[1:], strict=False):
        if (
            isinstance(statement, ast.AnnAssign)
            and isinstance(statement.target, ast.Name)
            and isinstance(following, ast.Expr)
        ):
            value = following.value
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                notes[statement.target.id] = " ".join(value.value.split())
    return notes


def models_text(name: str | None = None, num_classes: int = 100) -> str:
    """The networks of the table with their parameter counts at 100 classes; any timm model besides."""
    names = [name] if name else list(BUILTIN.models)
    rows = []
    for each in names:
        try:
            network = BUILTIN.build_model(ModelSettings(name=each), Task(num_classes=num_classes))
        except ValueError as error:
            raise ConfigurationError(str(error)) from None
        count = sum(parameter.numel() for parameter in network.parameters())
        rows.append(f"{each:16} {count:>12,} parameters   pooled width {network.num_features}")
    if name is None:
        rows += [
            "",
            f"Counted with {num_classes} classes and RGB images. Any timm model: timm/NAME, for instance timm/resnet18.",
        ]
    return "\n".join(rows)


def artifact_text(store: Store, prefix: str) -> str:
    """Manifest and lineage of one artifact; says so when its bytes are damaged."""
    key = store.find(prefix)
    manifest = store.manifest(key)
    try:
        store.verify(key)
        state = "complete, checksums right"
    except DamagedArtifactError as damage:
        state = f"DAMAGED: {damage}"
    content = manifest["content"]
    lines = [
        f"{manifest['name']}  {key}",
        f"state: {state}",
        f"method: {content['method']} (version {content['method_version']})",
    ]
    if manifest["model"]:
        lines.append(
            f"model: {manifest['model']['name']}, {manifest['metrics']['num_parameters']:,.0f} parameters"
        )
    lines += [f"seed: {manifest['seed']}", f"data: {manifest['dataset']} {content['data']}"]
    lines += ["settings:", *(f"  {name} = {value}" for name, value in content["settings"].items())]
    lines += ["train:", *(f"  {name} = {value}" for name, value in content["train"].items())]
    lines += ["metrics:", *(f"  {name} = {value:.4g}" for name, value in manifest["metrics"].items())]
    cost, placement = manifest["cost"], manifest["placement"]
    lines.append(
        f"cost: {duration(cost['seconds'])} ({duration(cost['cpu_seconds'])} CPU) on {placement['device']}, host {placement['host']}, {placement['workers']} worker(s)"
    )
    lines.append(
        "versions: " + ", ".join(f"{name} {version}" for name, version in manifest["versions"].items())
    )
    lines += [
        "files:",
        *(
            f"  {name}  {item['size']:,} bytes  sha256 {item['sha256'][:16]}"
            for name, item in manifest["files"].items()
        ),
    ]
    return "\n".join([*lines, "lineage:", *_lineage(store, key, 1)])


def _lineage(store: Store, key: str, depth: int, role: str = "") -> Iterator[str]:
    indent = "  " * depth + (f"{role}: " if role else "")
    if not store.has(key):
        yield f"{indent}{key} (not in this store)"
        return
    manifest = store.manifest(key)
    model = f" {manifest['model']['name']}" if manifest["model"] else ""
    yield f"{indent}{manifest['name']} {key[:8]}  {manifest['content']['method']}{model}"
    for input_role, source in manifest["inputs"].items():
        yield from _lineage(store, source, depth + 1, input_role)
