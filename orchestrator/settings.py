"""Turn plain mappings into frozen dataclasses, strictly, and say everything that is wrong at once.

A key that is not a field, a value of another type or an impossible value becomes a problem: one line with the full
path, the value and, for a misspelt name, the nearest valid one. Nothing is imported or called on behalf of the data.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

__all__ = ["Problems", "Typed", "as_mapping", "nearest", "parse", "to_plain"]

T = TypeVar("T")
_MISSING = object()
_PLAIN = frozenset({bool, int, float, str, type(None)})


class Problems(list[str]):
    """The mistakes found so far, in reading order."""

    def add(self, path: str, message: str) -> None:
        line = f"{path}: {message}" if path else message
        if line not in self:
            self.append(line)


def nearest(name: str, known: Iterable[str]) -> str:
    """``; did you mean 'x'?`` followed by the known names, or only the names when none is near."""
    known = sorted(known)
    match = difflib.get_close_matches(str(name), known, n=1)
    hint = f"; did you mean {match[0]!r}?" if match else "."
    return f"{hint} Known: {', '.join(known) or 'none'}"


@dataclasses.dataclass(frozen=True, slots=True)
class Typed:
    """Marks a value inside a mapping as already typed: ``parse`` takes it as it is."""

    value: Any


def parse(cls: type[T], values: Any, path: str, problems: Problems) -> T | None:
    """Build ``cls`` from ``values``; on any problem, add it to ``problems`` and return None.

    Nested dataclasses, ``Literal``, ``X | None``, ``tuple[X, ...]`` and mappings are followed. Whole numbers are
    accepted for floats, and so is exponent notation, which YAML reads as text (``1e-3``).
    """
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
    if not isinstance(values, Mapping):
        problems.add(path, f"expected settings of {cls.__name__} ({', '.join(fields)}), got {values!r}")
        return None
    num_problems = len(problems)
    for name in values:
        if name not in fields:
            problems.add(
                f"{path}.{name}", f"{name!r} is not a setting of {cls.__name__}{nearest(name, fields)}"
            )
    hints = _type_hints(cls)  # type: ignore[arg-type]
    arguments: dict[str, Any] = {}
    for name, field in fields.items():
        if name in values:
            arguments[name] = _convert(hints[name], values[name], f"{path}.{name}", problems)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            problems.add(f"{path}.{name}", f"is required by {cls.__name__} and missing")
    if len(problems) > num_problems:
        return None
    try:
        return cls(**arguments)
    except ValueError as error:
        subject = str(error).partition(" ")[0]
        problems.add(f"{path}.{subject}" if subject in fields else path, str(error))
        return None


@functools.cache
def _field_names(cls: type) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(cls))


@functools.cache
def _type_hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _convert(kind: Any, value: Any, path: str, problems: Problems) -> Any:
    if isinstance(value, Typed):
        return value.value
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        if value in arguments:
            return value
        problems.add(path, f"got {value!r}, expected one of {', '.join(map(str, arguments))}")
        return None
    if origin in (Union, types.UnionType):
        return _convert_union(arguments, value, path, problems)
    if origin in (tuple, list):
        return _convert_sequence(arguments[0], value, path, problems)
    if origin is not None and issubclass(origin, Mapping):
        if isinstance(value, Mapping):
            return {
                str(name): _convert(arguments[1], item, f"{path}.{name}", problems)
                for name, item in value.items()
            }
        problems.add(path, f"expected a mapping, got {value!r}")
        return None
    if dataclasses.is_dataclass(kind):
        return value if isinstance(value, kind) else parse(kind, value, path, problems)  # type: ignore[arg-type]
    return _convert_scalar(kind, value, path, problems)


def _convert_union(kinds: Sequence[Any], value: Any, path: str, problems: Problems) -> Any:
    if value is None and type(None) in kinds:
        return None
    kinds = [kind for kind in kinds if kind is not type(None)]
    for kind in kinds[:-1]:
        attempt = Problems()
        converted = _convert(kind, value, path, attempt)
        if not attempt:
            return converted
    return _convert(kinds[-1], value, path, problems)


def _convert_sequence(kind: Any, value: Any, path: str, problems: Problems) -> Any:
    if isinstance(value, str) or not isinstance(value, Sequence):
        problems.add(path, f"expected a list, got {value!r}")
        return None
    return tuple(_convert(kind, item, f"{path}[{index}]", problems) for index, item in enumerate(value))


def _convert_scalar(kind: Any, value: Any, path: str, problems: Problems) -> Any:
    converted: Any = _MISSING
    if kind is Any or kind is object:
        converted = value
    elif kind is float or kind is int:
        converted = _number(kind, value)
    elif isinstance(kind, type) and isinstance(value, kind):
        converted = value
    if converted is _MISSING:
        problems.add(path, f"expected {getattr(kind, '__name__', kind)}, got {value!r}")
        return None
    return converted


def _number(kind: type, value: Any) -> Any:
    """``value`` as a whole number or a float. Neither a truth value nor NaN is one."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return _MISSING
    if kind is int and isinstance(value, int):
        return value
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return _MISSING
    if kind is int:
        return int(number) if number.is_integer() else _MISSING
    return _MISSING if math.isnan(number) else number


def to_plain(value: Any) -> Any:
    """Settings as plain JSON types: dataclasses become mappings, tuples lists."""
    if type(value) in _PLAIN:  # most values are, and a sweep of thousands asks for hundreds of thousands
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {name: to_plain(getattr(value, name)) for name in _field_names(type(value))}
    if isinstance(value, Mapping):
        return {str(name): to_plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [to_plain(item) for item in value]
    return value


def as_mapping(value: Any, path: str, problems: Problems) -> dict[str, Any]:
    """``value`` as a mapping with text keys; anything else is a problem and gives an empty one."""
    if value is None:
        return {}
    if isinstance(value, Mapping):
        return {str(name): item for name, item in value.items()}
    problems.add(path, f"expected a mapping, got {value!r}")
    return {}
