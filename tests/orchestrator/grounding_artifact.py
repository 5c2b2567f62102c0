"""A real grounder after a few steps on scenes of shapes, stored as a sweep stores it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from experiment_cases import planner_of, spec_of

from methods import BUILTIN
from methods.catalog import Catalog
from orchestrator.plan import Point, Trial
from orchestrator.spec import ExperimentSpec, RunSettings
from orchestrator.stage import StageRunner
from orchestrator.store import Store

SHAPES: Mapping[str, Any] = {
    "dataset": "shapes_ref", "num_train": 48, "num_validation": 9, "num_test": 4, "image_size": 24,
}  # fmt: skip
LATENT: Mapping[str, Any] = {
    "method": "latent_vg", "preset": "latent_vg_small", "width": 48, "num_layers": 2, "channels": 16,
    "num_concepts": 8, "mask_bce_weight": 0.0, "attribute_lengths": [2, 3, 2],
    "train": {"epochs": 2, "batch_size": 8, "learning_rate": 3e-3, "optimizer": "adamw"},
}  # fmt: skip


def changes(stage: Mapping[str, Any] = LATENT, data: Mapping[str, Any] = SHAPES) -> dict[str, Any]:
    """The experiment with the one stage ``grounder``, as changes of the usual small document."""
    return {
        "data": dict(data), "stages": {"grounder": dict(stage)}, "baselines": {}, "search/space": {},
        "search/objective": {"maximize": "grounder.miou"},
    }  # fmt: skip


class StoredTrial(NamedTuple):
    """A finished trial."""

    store: Store
    trial: Trial
    spec: ExperimentSpec


def stored(
    folder: Path, document: Mapping[str, Any] | None = None, catalog: Catalog = BUILTIN
) -> StoredTrial:
    """Run the experiment's one trial in this process."""
    document = changes() if document is None else document
    store = Store(str(folder))
    trial = planner_of(document, catalog=catalog).trial(Point(), 0)
    runner = StageRunner(store, catalog, RunSettings(), lambda data: data.source.load())
    for stage in trial.stages:
        runner.execute(stage, lambda row: None)
    return StoredTrial(store, trial, spec_of(document, catalog))
