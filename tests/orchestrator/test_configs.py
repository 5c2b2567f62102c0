"""The experiment files that come with the package: each is read, planned, and says how it is run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from experiment_cases import FACTS

from methods import BUILTIN
from orchestrator.document import apply_overrides, read_document
from orchestrator.plan import Plan, Planner, Point, make_plan
from orchestrator.reader import parse_experiment
from orchestrator.search import known_points

FOLDER = Path(__file__).parents[2] / "configs"
STAGES: dict[str, dict[str, int]] = {
    "angular_cifar100": {"teacher": 1, "student": 30, "views": 21},
    "angular_cifar100_small": {"teacher": 1, "student": 19, "views": 10},
    "angular_digits": {"teacher": 1, "student": 22, "views": 10},
    "born_again_digits": {"first": 1, "second": 1, "student": 9},
    "cm_masksd": {"grounder": 30},
    "cm_masksd_small": {"grounder": 4},
    "encoders_small": {"grounder": 14},
    "family_cifar100_small": {"teacher": 1, "student": 30, "views": 1},
    "grounding_kd_small": {"teacher": 1, "student": 8},
    "latent_margins_small": {"grounder": 30},
    "latent_vg": {"grounder": 9},
    "latent_vg_small": {"grounder": 4},
    "magnet": {"grounder": 6},
    "magnet_small": {"grounder": 4},
    "photos_small": {"grounder": 4},
    "shared_ris": {"grounder": 6},
    "shared_ris_small": {"grounder": 4},
    "takd_digits": {"teacher": 1, "student": 10, "assistant": 1, "copies": 1},
    "transfer_cifar100_small": {"teacher": 1, "student": 15, "probe": 15, "views": 1},
}
"""Stages that the whole experiment has to run, by name."""


def plan_of(name: str, *overrides: str) -> Plan:
    document = apply_overrides(read_document(FOLDER / f"{name}.yaml"), overrides)
    planner = Planner(parse_experiment(document, BUILTIN), FACTS)
    points = known_points(planner.spec.search)
    labels = [Point(label=label) for label in planner.spec.baselines]
    return make_plan(
        planner, [*labels, *map(Point, points or [])], has=lambda key: False, cost=lambda stage: None,
        num_undrawn=0 if points is not None else planner.spec.search.num_samples,
    )  # fmt: skip


def counts(plan: Plan) -> dict[str, int]:
    return {name: row["all"] for name, row in plan.counts().items()}


@pytest.mark.parametrize("name", STAGES)
def test_it_is_read_and_planned(name: str) -> None:
    assert counts(plan_of(name)) == STAGES[name]


def test_every_file_is_in_the_table() -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} == STAGES.keys()


@pytest.mark.parametrize("name", STAGES)
def test_it_begins_with_the_command_that_runs_it(name: str) -> None:
    first, second, *_ = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    assert first.startswith(f"# stillhouse run configs/{name}.yaml")
    assert second.startswith("#")


def test_grounders_of_the_published_size_have_it() -> None:
    """What the small presets leave out: the pyramid, the large tables, weights from elsewhere."""
    settings: dict[str, Any] = {name: plan_of(name).trials[-1].final.spec.settings for name in ("latent_vg", "shared_ris", "cm_masksd", "magnet")}  # fmt: skip
    for name in ("latent_vg", "shared_ris"):
        found = settings[name]
        assert (found.width, found.num_layers, found.patch_size, found.pyramid) == (768, 12, 16, True)
    assert settings["cm_masksd"].checkpoint == "openai/clip-vit-base-patch16"
    assert settings["magnet"].swin_checkpoint == "timm/swin_base_patch4_window12_384.ms_in22k"
    assert settings["magnet"].bert_checkpoint == "google-bert/bert-base-uncased"
