"""A small experiment as plain data, and the ways in which tests of the pure modules look at it."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from methods import BUILTIN, Catalog
from orchestrator.errors import ConfigurationError
from orchestrator.keys import Facts
from orchestrator.plan import Planner, Point, Trial
from orchestrator.reader import parse_experiment
from orchestrator.spec import ExperimentSpec

FACTS = Facts(data=defaultdict(lambda: "f0"))
"""Every data set has the fingerprint ``f0``."""
ABSENT = object()
"""Takes a key out of a document."""

DOCUMENT: dict[str, Any] = {
    "name": "angular-digits",
    "data": {"dataset": "digits", "validation": 0.2},
    "stages": {
        "teacher": {"method": "supervised", "model": "tiny_cnn", "train": {"epochs": 20}},
        "views": {"method": "angular_views", "teacher": "$teacher", "train": {"epochs": 6}},
        "student": {
            "method": "angular_kd", "model": "mini_cnn", "teacher": "$views", "train": {"epochs": 20},
        },
    },
    "baselines": {"kd": {"student": {"method": "kd", "teacher": "$teacher"}}},
    "search": {
        "space": {
            "views.num_branches": {"grid": [1, 3, 5]},
            "views.logit_intra_weight": {"grid": [1.0, 4.0]},
            "views.margin": {"grid": [0.1, 0.2]},
        },
        "objective": {"maximize": "student.top1"},
        "seeds": 2,
    },
    "run": {"storage": "runs/digits"},
}  # fmt: skip
"""That of ``configs/angular_digits.yaml`` in its essentials."""


def document(changes: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A copy with nested values replaced: ``{"stages/views/margin": 0.3}``; ``ABSENT`` removes one."""
    changed = copy.deepcopy(DOCUMENT)
    for path, value in (changes or {}).items():
        mapping = changed
        *above, last = path.split("/")
        for part in above:
            mapping = mapping.setdefault(part, {})
        if value is ABSENT:
            mapping.pop(last, None)
        else:
            mapping[last] = value
    return changed


def spec_of(changes: Mapping[str, Any] | None = None, catalog: Catalog = BUILTIN) -> ExperimentSpec:
    return parse_experiment(document(changes), catalog)


def planner_of(
    changes: Mapping[str, Any] | None = None, facts: Facts = FACTS, catalog: Catalog = BUILTIN
) -> Planner:
    return Planner(spec_of(changes, catalog), facts)


def problems_of(changes: Mapping[str, Any], catalog: Catalog = BUILTIN) -> list[str]:
    """What the reader finds wrong, one line per mistake; none when nothing is."""
    try:
        spec_of(changes, catalog)
    except ConfigurationError as error:
        return list(error.problems)
    return []


def trial_of(changes: Mapping[str, Any] | None = None, seed: int = 0, facts: Facts = FACTS) -> Trial:
    """The trial of the experiment as it stands, without values of the search space."""
    return planner_of(changes, facts).trial(Point(), seed)


def key_of(stage: str, changes: Mapping[str, Any] | None = None, seed: int = 0, facts: Facts = FACTS) -> str:
    trial = trial_of(changes, seed, facts)
    return {planned.name: planned.key for planned in trial.stages}[stage]
