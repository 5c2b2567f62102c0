"""Plain values into typed settings: what is accepted, and how each refusal reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from orchestrator.settings import Problems, Typed, as_mapping, nearest, parse, to_plain


@dataclass(frozen=True, kw_only=True)
class Inner:
    depth: int = 1

    def __post_init__(self) -> None:
        if self.depth < 1:
            raise ValueError(f"depth must be at least 1, got {self.depth}")


@dataclass(frozen=True, kw_only=True)
class Everything:
    rate: float = 0.1
    count: int = 1
    text: str = "a"
    flag: bool = False
    mode: Literal["slow", "fast"] = "slow"
    maybe: int | None = None
    several: tuple[float, ...] = ()
    inner: Inner = field(default_factory=Inner)
    table: Mapping[str, int] = field(default_factory=dict)
    anything: Any = None
    number_or_text: float | str = 0.0


@dataclass(frozen=True, kw_only=True)
class Required:
    root: str


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("rate", 1, 1.0),
        ("rate", "1e-3", 0.001),  # YAML reads this as text
        ("rate", float("inf"), float("inf")),
        ("count", 2.0, 2),
        ("count", "3", 3),
        ("count", 2**53 + 1, 2**53 + 1),
        ("flag", True, True),
        ("mode", "fast", "fast"),
        ("maybe", None, None),
        ("maybe", 3, 3),
        ("several", [1, "2e0"], (1.0, 2.0)),
        ("inner", {"depth": 4}, Inner(depth=4)),
        ("inner", Inner(depth=2), Inner(depth=2)),
        ("table", {"a": 1}, {"a": 1}),
        ("anything", [{"x": 1}], [{"x": 1}]),
        ("number_or_text", "auto", "auto"),
        ("number_or_text", 3, 3.0),
        ("rate", Typed("as it is"), "as it is"),
    ],
)
def test_values_are_converted(name: str, value: object, expected: object) -> None:
    problems = Problems()
    settings = parse(Everything, {name: value}, "stages.a", problems)
    assert not problems
    found = getattr(settings, name)
    assert (found, type(found)) == (expected, type(expected))


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("rate", "fast", "stages.a.rate: expected float, got 'fast'"),
        ("rate", True, "stages.a.rate: expected float, got True"),
        ("rate", float("nan"), "stages.a.rate: expected float, got nan"),
        ("rate", 10**400, "stages.a.rate: expected float, got 1000"),
        ("rate", [0.1], "stages.a.rate: expected float, got [0.1]"),
        ("count", 2.5, "stages.a.count: expected int, got 2.5"),
        ("count", float("inf"), "stages.a.count: expected int, got inf"),
        ("count", False, "stages.a.count: expected int, got False"),
        ("count", None, "stages.a.count: expected int, got None"),
        ("text", 3, "stages.a.text: expected str, got 3"),
        ("flag", "yes", "stages.a.flag: expected bool, got 'yes'"),
        ("flag", 1, "stages.a.flag: expected bool, got 1"),
        ("mode", "fsat", "stages.a.mode: got 'fsat', expected one of slow, fast"),
        ("maybe", "x", "stages.a.maybe: expected int, got 'x'"),
        ("several", "12", "stages.a.several: expected a list, got '12'"),
        ("several", [1, "x"], "stages.a.several[1]: expected float, got 'x'"),
        ("inner", 3, "stages.a.inner: expected settings of Inner (depth), got 3"),
        ("inner", {"depht": 1}, "stages.a.inner.depht: 'depht' is not a setting of Inner; did you mean 'depth'?"),
        ("inner", {"depth": 0}, "stages.a.inner.depth: depth must be at least 1, got 0"),
        ("table", [1], "stages.a.table: expected a mapping, got [1]"),
        ("table", {"k": "x"}, "stages.a.table.k: expected int, got 'x'"),
        ("cuont", 1, "stages.a.cuont: 'cuont' is not a setting of Everything; did you mean 'count'? Known: any"),
        (3, 1, "stages.a.3: 3 is not a setting of Everything"),
    ],
)  # fmt: skip
def test_refusals_name_path_and_value(name: Any, value: object, problem: str) -> None:
    problems = Problems()
    assert parse(Everything, {name: value}, "stages.a", problems) is None
    assert len(problems) == 1
    assert problems[0].startswith(problem)


def test_all_mistakes_are_found_at_once() -> None:
    problems = Problems()
    parse(Everything, {"rate": "x", "count": "y", "inner": {"depth": "z", "w": 1}, "v": 1}, "a", problems)
    assert [problem.partition(":")[0] for problem in problems] == [
        "a.v", "a.rate", "a.count", "a.inner.w", "a.inner.depth",
    ]  # fmt: skip


def test_a_required_setting_is_missed() -> None:
    problems = Problems()
    assert parse(Required, {}, "data", problems) is None
    assert problems == ["data.root: is required by Required and missing"]


def test_a_problem_is_told_once() -> None:
    problems = Problems()
    problems.add("a", "b")
    problems.add("a", "b")
    problems.add("", "alone")
    assert problems == ["a: b", "alone"]


def test_nearest_lists_what_is_known() -> None:
    assert nearest("margn", ["margin", "init"]) == "; did you mean 'margin'? Known: init, margin"
    assert nearest("zzz", ["margin"]) == ". Known: margin"
    assert nearest("zzz", []) == ". Known: none"


def test_to_plain_is_json() -> None:
    plain = to_plain(Everything(several=(1.0, 2.0), inner=Inner(depth=3), table={"a": 1}))
    assert plain["several"] == [1.0, 2.0]
    assert plain["inner"] == {"depth": 3}


def test_as_mapping() -> None:
    problems = Problems()
    assert as_mapping(None, "run", problems) == {}
    assert as_mapping({1: 2}, "run", problems) == {"1": 2}
    assert problems == []
    assert as_mapping([1], "run", problems) == {}
    assert problems == ["run: expected a mapping, got [1]"]
