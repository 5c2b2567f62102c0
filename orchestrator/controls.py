"""Control runs for an Angular experiment: what else could explain its gain. Pure.

A gain of angular views over plain distillation may come from a larger weight of the distillation loss, from any kind of
extra heads, or from noise. ``controls: true`` adds, on the same data, recipe and seeds as the experiment:

- ``control-kd-matched``: the same criterion on the plain teacher, with the effective weight of the experiment;
- ``control-kd-2``, ``-4``, ``-8``: the same with other weights, the best of which on validation is tuned distillation;
- ``control-label-heads``: heads grown on labels alone, without any angular loss;
- ``control-random-heads``: heads that were never trained, frozen;
- ``control-tekap``: noisy copies of the teacher in the place of views.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from methods.catalog import Catalog
from orchestrator.chain import Chain, StageSpec
from orchestrator.settings import Problems, to_plain

__all__ = ["PREFIX", "control_baselines"]

PREFIX = "control-"
TUNED_WEIGHTS = (2.0, 4.0, 8.0)
"""Times the matched weight: multiplying it by 4 to 8 is known to help plain distillation a good deal."""
ANGULAR_WEIGHTS = (
    "feature_inter_weight", "feature_intra_weight", "logit_inter_weight", "logit_intra_weight",
)  # fmt: skip
INHERITED = ("model", "train", "seed", "data")
OF_VIEWS = ("view_weight", "heads", "detach_target")
COPIES = "control_copies"
"""Name of the stage that blurs the teacher."""

Stages = Mapping[str, Mapping[str, Any]]


def control_baselines(
    stages: Stages, chain: Chain, target: str, catalog: Catalog, problems: Problems
) -> dict[str, dict[str, dict[str, Any]]]:
    """Label -> stages that replace those of the experiment, as in its ``baselines`` section.

    ``chain`` is the experiment's own, typed; ``stages`` as they were written.
    """
    student = chain[target]
    name = student.inputs.get("teacher", "")
    if name not in chain or chain[name].method != "angular_views":
        problems.add(
            "controls",
            f"they belong to an experiment whose stage {target!r} has an angular_views stage as its teacher",
        )
        return {}
    views, teacher = stages[name], f"${chain[name].inputs['teacher']}"
    own = {key: value for key, value in stages[target].items() if key not in INHERITED}
    plain = {**_plain_student(student, chain[name].settings, catalog), "teacher": teacher}
    weight = plain.get("kd_weight", 0.0)
    factors = (
        TUNED_WEIGHTS if weight else ()
    )  # a criterion that compares no probabilities has no weight to tune
    controls = {
        "kd-matched": {target: plain},
        **{f"kd-{factor:g}": {target: {**plain, "kd_weight": factor * weight}} for factor in factors},
        "label-heads": {name: {**views, **dict.fromkeys(ANGULAR_WEIGHTS, 0.0)}, target: own},
        "random-heads": {name: {**views, "train": {"epochs": 0}}, target: {**own, "heads": "frozen"}},
        "tekap": {
            COPIES: {"method": "tekap", "teacher": teacher},
            target: {**plain, "teacher": f"${COPIES}"},
        },
    }
    return {f"{PREFIX}{label}": replaced for label, replaced in controls.items()}


def _plain_student(student: StageSpec, views: Any, catalog: Catalog) -> dict[str, Any]:
    """The student's criterion for the teacher itself, with the weight that its views had in effect."""
    method = "kd" if student.method == "angular_kd" else student.method
    known = {item.name for item in fields(catalog.method(method).Settings)}
    settings = to_plain(student.settings)
    if student.method == "angular_kd":
        settings |= {"kd_weight": student.settings.kd_weight * _mass(views), "temperature": views.temperature}
    kept = {key: value for key, value in settings.items() if key in known and key not in OF_VIEWS}
    return {**kept, "method": method}


def _mass(views: Any) -> float:
    """How much stronger than a distribution the views' target is: 1, but for the release's weighting."""
    if views.preset != "released":
        return 1.0
    return float((0.8 * views.num_branches + 1) / math.sqrt(0.64 * views.num_branches + 1))
