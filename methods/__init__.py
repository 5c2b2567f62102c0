"""Methods, networks and data sets: plain PyTorch that knows nothing of sweeps.

``BUILTIN`` is the one table of what an experiment may name. Extend it by value: ``BUILTIN.extended(methods={...})``.
"""

from __future__ import annotations

from collections.abc import Mapping

from methods.angular.student import AngularDistillation
from methods.angular.views import AngularViews
from methods.base import Batch, Loss, Method, ModelSettings, Signals, Source, Step, Task, Teacher
from methods.catalog import Catalog, UnknownNameError
from methods.data import DATASETS
from methods.distil.tekap import Tekap
from methods.kd import KnowledgeDistillation
from methods.linear_probe import LinearProbe
from methods.models import MODELS
from methods.supervised import Supervised

METHODS: Mapping[str, type[Method]] = {
    "supervised": Supervised,
    "kd": KnowledgeDistillation,
    "angular_views": AngularViews,
    "angular_kd": AngularDistillation,
    "tekap": Tekap,
    "linear_probe": LinearProbe,
}

BUILTIN = Catalog(methods=METHODS, models=MODELS, datasets=DATASETS)

__all__ = [
    "BUILTIN",
    "METHODS",
    "Batch",
    "Catalog",
    "Loss",
    "Method",
    "ModelSettings",
    "Signals",
    "Source",
    "Step",
    "Task",
    "Teacher",
    "UnknownNameError",
]
