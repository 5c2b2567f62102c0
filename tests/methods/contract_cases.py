"""One row per way to build a method: a new method joins the contract tests by adding its rows here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from methods import BUILTIN, METHODS, Batch, Method, ModelSettings, Source, Task

TASK = Task(num_classes=5, in_channels=1, image_size=8)
MODEL = ModelSettings(name="mini_cnn")
NUM_SAMPLES = 80
"""Of the training split that methods are told of."""


@dataclass(frozen=True, kw_only=True)
class MethodCase:
    """How to build a method, and which of its settings are weights of losses."""

    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, str] = field(default_factory=dict)
    """Role -> name of the case whose artifact fills it."""
    weights: tuple[str, ...] = ()
    """Settings that may be 0, one at a time."""
    beside: tuple[str, ...] = ()
    """Modules and buffers of its own that train or remember beside network and branches: part of a checkpoint."""


VIEW_WEIGHTS = ("feature_inter_weight", "feature_intra_weight", "logit_inter_weight", "logit_intra_weight")
STUDENT_WEIGHTS = ("kd_weight", "ce_weight", "view_weight")
CRD_MODULES = (
    "student_embedding",
    "teacher_embedding",
    "student_bank",
    "teacher_bank",
    "seed",
    "normalisers",
)
SMALL: dict[str, Any] = {"num_branches": 3}

CASES: dict[str, MethodCase] = {
    "supervised": MethodCase(method="supervised", settings={"label_smoothing": 0.1}),
    "kd": MethodCase(method="kd", inputs={"teacher": "supervised"}, weights=("kd_weight", "ce_weight")),
    "kd-of-views": MethodCase(method="kd", inputs={"teacher": "views"}, weights=("kd_weight", "ce_weight")),
    "tekap": MethodCase(method="tekap", inputs={"teacher": "supervised"}),
    "kd-of-copies": MethodCase(method="kd", inputs={"teacher": "tekap"}, weights=("kd_weight", "ce_weight")),
    "kd-of-several": MethodCase(
        method="kd",
        inputs={"teacher.0": "supervised", "teacher.1": "kd"},
        weights=("kd_weight", "ce_weight"),
    ),
    "attention": MethodCase(
        method="attention", inputs={"teacher": "supervised"}, weights=("attention_weight", "ce_weight")
    ),
    "fitnet": MethodCase(
        method="fitnet",
        inputs={"teacher": "supervised"},
        weights=("hint_weight", "ce_weight"),
        beside=("regressor",),
    ),
    "review": MethodCase(
        method="review",
        inputs={"teacher": "supervised"},
        weights=("review_weight", "ce_weight"),
        beside=("fusions",),
    ),
    "review-of-views": MethodCase(
        method="review",
        settings={"kd_weight": 1.0},
        inputs={"teacher": "views"},
        weights=("review_weight", "kd_weight", "view_weight"),
        beside=("fusions",),
    ),
    "rkd": MethodCase(
        method="rkd",
        inputs={"teacher": "supervised"},
        weights=("distance_weight", "angle_weight", "ce_weight"),
    ),
    "similarity": MethodCase(
        method="similarity", inputs={"teacher": "supervised"}, weights=("similarity_weight", "ce_weight")
    ),
    "crd": MethodCase(
        method="crd",
        settings={"num_negatives": 64},
        inputs={"teacher": "supervised"},
        weights=("crd_weight", "ce_weight", "bank_momentum"),
        beside=CRD_MODULES,
    ),
    "crd-of-copies": MethodCase(
        method="crd",
        settings={"num_negatives": 64},
        inputs={"teacher": "tekap"},
        weights=("crd_weight", "ce_weight"),
        beside=CRD_MODULES,
    ),
    "crd-of-views-combined": MethodCase(
        method="crd",
        settings={"num_negatives": 64, "kd_weight": 1.0},
        inputs={"teacher": "views"},
        weights=("crd_weight", "kd_weight", "ce_weight", "view_weight"),
        beside=CRD_MODULES,
    ),
    "dkd": MethodCase(
        method="dkd",
        inputs={"teacher": "supervised"},
        weights=("kd_weight", "ce_weight", "label_class_weight", "other_classes_weight"),
    ),
    "dkd-standardised": MethodCase(
        method="dkd", settings={"standardise": True}, inputs={"teacher": "supervised"}, weights=("kd_weight",)
    ),
    "dkd-of-views": MethodCase(
        method="dkd", inputs={"teacher": "views"}, weights=("kd_weight", "ce_weight", "view_weight")
    ),
    "mlkd": MethodCase(method="mlkd", inputs={"teacher": "supervised"}, weights=("kd_weight", "ce_weight")),
    "mlkd-clean": MethodCase(
        method="mlkd",
        settings={"variant": "clean", "standardise": True},
        inputs={"teacher": "supervised"},
        weights=("kd_weight", "ce_weight"),
    ),
    "dist": MethodCase(
        method="dist",
        inputs={"teacher": "supervised"},
        weights=("kd_weight", "ce_weight", "inter_weight", "intra_weight"),
    ),
    "lskd": MethodCase(method="lskd", inputs={"teacher": "supervised"}, weights=("kd_weight", "ce_weight")),
    "pskd": MethodCase(method="pskd", weights=("kd_weight",), beside=("predictions",)),
    "views": MethodCase(
        method="angular_views", settings=SMALL, inputs={"teacher": "supervised"}, weights=VIEW_WEIGHTS
    ),
    "views-single": MethodCase(
        method="angular_views",
        settings={"num_branches": 1, "bn_init": "standard"},
        inputs={"teacher": "supervised"},
        weights=VIEW_WEIGHTS,
    ),
    "views-hinge": MethodCase(
        method="angular_views",
        settings={**SMALL, "constraint": "hinge", "intra_reduction": "per_sample", "offset_space": "unit"},
        inputs={"teacher": "supervised"},
        weights=VIEW_WEIGHTS,
    ),
    "views-released": MethodCase(
        method="angular_views",
        settings={**SMALL, "preset": "released"},
        inputs={"teacher": "supervised"},
        weights=VIEW_WEIGHTS,
    ),
    "student": MethodCase(method="angular_kd", inputs={"teacher": "views"}, weights=STUDENT_WEIGHTS),
    "student-frozen": MethodCase(
        method="angular_kd",
        settings={"heads": "frozen"},
        inputs={"teacher": "views"},
        weights=STUDENT_WEIGHTS,
    ),
    "student-attached": MethodCase(
        method="angular_kd",
        settings={"detach_target": False},
        inputs={"teacher": "views"},
        weights=STUDENT_WEIGHTS,
    ),
    "probe": MethodCase(method="linear_probe", inputs={"teacher": "supervised"}),
    "student-released": MethodCase(
        method="angular_kd", inputs={"teacher": "views-released"}, weights=("kd_weight", "ce_weight")
    ),
}
TRAINED = [name for name, case in CASES.items() if METHODS[case.method].trains]
"""Cases that have training steps."""


def build(name: str, *, seed: int = 0, **changes: Any) -> Method:
    """A fresh method of the case, its inputs untrained; ``changes`` replace settings."""
    case = CASES[name]
    method = METHODS[case.method]
    teachers = {role: finished(build(other, seed=7), other).teacher() for role, other in case.inputs.items()}
    torch.manual_seed(seed)
    model = BUILTIN.build_model(MODEL, TASK) if method.needs_model else None
    settings = method.Settings(**{**case.settings, **changes})
    built = method(settings, task=TASK, model=model, inputs=teachers)
    built.prepare(torch.arange(NUM_SAMPLES) % TASK.num_classes, num_epochs=3)
    return built


def finished(method: Method, name: str) -> Source:
    """The artifact that ``method`` of the case leaves when it stops now."""
    case = CASES[name]
    return Source(
        key=f"key-of-{name}",
        method=case.method,
        settings=method.settings,
        model=MODEL if type(method).needs_model else None,
        task=TASK,
        weights={key: value.clone() for key, value in method.artifact().state_dict().items()},
        inputs={role: finished(build(other, seed=7), other) for role, other in case.inputs.items()},
        catalog=BUILTIN,
    )


def make_batch(size: int = 12, *, seed: int = 1, scale: float = 1.0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    images = scale * torch.randn(size, 1, 8, 8, generator=generator)
    labels = torch.randint(TASK.num_classes, (size,), generator=generator)
    strong = images.flip(-1) * 0.5
    return Batch(images=images, labels=labels, indices=torch.arange(size), strong=strong)


def trained_steps(
    method: Method, num_steps: int, *, learning_rate: float = 0.01, first: int = 0
) -> list[Tensor]:
    """Totals of plain SGD steps on changing batches, from number ``first`` on."""
    optimizer = torch.optim.SGD(method.parameters(), lr=learning_rate)
    method.train()
    totals = []
    for step in range(first, first + num_steps):
        total = method(make_batch(seed=step)).total
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(total.detach())
    return totals
