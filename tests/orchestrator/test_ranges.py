"""What methods call worth sweeping is a search space that the reader takes."""

from __future__ import annotations

from dataclasses import fields

import pytest

from methods import BUILTIN
from orchestrator.describe import methods_text
from orchestrator.settings import Problems
from orchestrator.space import parse_domain

RANGED = [name for name, method in BUILTIN.methods.items() if method.ranges]


@pytest.mark.parametrize("name", RANGED)
def test_every_range_is_a_domain_of_values_that_the_method_accepts(name: str) -> None:
    method = BUILTIN.method(name)
    known = {field.name for field in fields(method.Settings)}
    problems = Problems()
    for setting in method.ranges.keys() & known:
        domain = parse_domain(method.ranges[setting], setting, problems)
        assert domain is not None, problems
        for value in domain.probes():
            method.Settings(**{setting: value})
    assert problems == []


def test_they_are_shown_as_yaml() -> None:
    text = methods_text("angular_views")
    assert "  STAGE.margin: {uniform: [0.05, 0.5]}" in text
    assert "  STAGE.constraint: {choice: [contrastive, hinge]}" in text
    assert "STAGE.temperature" not in methods_text("angular_kd")  # one value is shared, that of the views


def test_a_ranged_setting_exists_in_its_own_method() -> None:
    for name in RANGED:
        own = vars(BUILTIN.method(name)).get("ranges", {})
        assert own.keys() & {field.name for field in fields(BUILTIN.method(name).Settings)} or not own
