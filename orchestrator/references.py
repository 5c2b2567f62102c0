"""References between stages: lists of them, and what a method is told of the stages it refers to. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from methods.base import InputStage, Method
from methods.catalog import Catalog
from orchestrator.settings import Problems

if TYPE_CHECKING:
    from orchestrator.chain import StageSpec

__all__ = ["each_reference", "input_stage"]


def each_reference(
    references: Mapping[str, Any], method: type[Method], path: str, problems: Problems
) -> Iterator[tuple[str, Any]]:
    """Role and reference, lists taken apart. A list of one is the same as what it holds."""
    for role, value in references.items():
        if not isinstance(value, list | tuple):
            yield role, value
        elif role not in method.allows_many and len(value) != 1:
            problems.add(
                f"{path}.{role}", f"{method.__name__} takes one stage here, got a list of {len(value)}"
            )
        elif not value or len(set(map(repr, value))) < len(value):
            problems.add(f"{path}.{role}", f"expected different earlier stages, got {list(value)!r}")
        elif len(value) == 1:
            yield role, value[0]
        else:
            yield from ((f"{role}.{number}", item) for number, item in enumerate(value))


def input_stage(stage: StageSpec, earlier: Mapping[str, StageSpec], catalog: Catalog) -> InputStage:
    """What methods are told of a stage that has not run yet."""
    return InputStage(
        name=stage.name,
        method=catalog.method(stage.method),
        settings=stage.settings,
        model=stage.model,
        inputs={role: input_stage(earlier[name], earlier, catalog) for role, name in stage.inputs.items()},
        catalog=catalog,
    )
