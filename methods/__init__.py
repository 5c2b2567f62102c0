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
from methods.distil.attention import AttentionTransfer
from methods.distil.crd import ContrastiveDistillation
from methods.distil.dist import CorrelationDistillation
from methods.distil.dkd import DecoupledDistillation
from methods.distil.fitnet import FitNet
from methods.distil.lskd import LogitStandardisation
from methods.distil.mlkd import MultiLevelDistillation
from methods.distil.pskd import ProgressiveSelfDistillation
from methods.distil.review import Review
from methods.distil.rkd import RelationalDistillation
from methods.distil.similarity import SimilarityPreserving
from methods.distil.tekap import Tekap
from methods.grounding.cm_masksd import CmMaskSD
from methods.grounding.grounding_students import (
    CmMaskSDStudent,
    LatentVGStudent,
    MagNetStudent,
    SharedRISStudent,
)
from methods.grounding.latent_vg import LatentVG
from methods.grounding.magnet import MagNet
from methods.grounding.shared_ris import SharedRIS
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
    "attention": AttentionTransfer,
    "crd": ContrastiveDistillation,
    "fitnet": FitNet,
    "review": Review,
    "rkd": RelationalDistillation,
    "similarity": SimilarityPreserving,
    "dkd": DecoupledDistillation,
    "mlkd": MultiLevelDistillation,
    "dist": CorrelationDistillation,
    "lskd": LogitStandardisation,
    "pskd": ProgressiveSelfDistillation,
    "linear_probe": LinearProbe,
    "latent_vg": LatentVG,
    "shared_ris": SharedRIS,
    "cm_masksd": CmMaskSD,
    "magnet": MagNet,
    "latent_vg_kd": LatentVGStudent,
    "shared_ris_kd": SharedRISStudent,
    "cm_masksd_kd": CmMaskSDStudent,
    "magnet_kd": MagNetStudent,
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
