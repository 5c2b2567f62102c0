"""One row per grounding method and form: a new method joins the battery by adding its rows here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from grounding_samples import GENERALISED, TASK
from torch import Tensor

from methods.base import Source
from methods.catalog import Catalog
from methods.grounding.cm_masksd import CmMaskSD
from methods.grounding.contracts import GroundingBatch, GroundingTask
from methods.grounding.grounding_students import (
    CmMaskSDStudent,
    LatentVGStudent,
    MagNetStudent,
    SharedRISStudent,
)
from methods.grounding.latent_vg import LatentVG
from methods.grounding.magnet import MagNet
from methods.grounding.method import GroundingMethod
from methods.grounding.shared_ris import SharedRIS


@dataclass(frozen=True, kw_only=True)
class Auxiliary:
    """A term that a weight of 0 turns off."""

    weight: str
    loss: str
    modules: tuple[str, ...] = ()
    """Modules of the method that only this term calls."""
    functions: tuple[str, ...] = ()
    """``module.function`` that only this term calls."""


@dataclass(frozen=True, kw_only=True)
class GroundingCase:
    """How to build a grounding method, and what is special about it."""

    method: type[GroundingMethod]
    settings: Mapping[str, Any]
    task: GroundingTask = TASK
    untrained: tuple[str, ...] = ()
    """Regular expressions of parameters that get no gradient."""
    beside: tuple[str, ...] = ("seed",)
    """Modules and buffers of the method that are no part of its artifact."""
    auxiliary: tuple[Auxiliary, ...] = ()
    golden: float | None = None
    """Total of the first step with seed 0 on the first batch."""
    smoke: bool = False
    """Whether it trains in the smoke test: one form of each method is enough."""
    teacher: str = ""
    """Case whose artifact teaches it."""


LATENT_SMALL = LatentVG.presets["latent_vg_small"]
SHARED_SMALL = SharedRIS.presets["shared_ris_small"]
DICE = Auxiliary(
    weight="mask_dice_weight", loss="mask_dice", functions=("methods.grounding.method.mask_dice",)
)
CROSS_ENTROPY = Auxiliary(weight="mask_bce_weight", loss="mask_bce", functions=("methods.grounding.method.mask_bce",))  # fmt: skip
L1 = Auxiliary(weight="box_l1_weight", loss="box_l1", functions=("methods.grounding.method.box_l1",))
GIOU = Auxiliary(weight="box_giou_weight", loss="box_giou", functions=("methods.grounding.method.box_giou",))
CONTRAST = Auxiliary(
    weight="contrast_weight", loss="contrast", functions=("methods.grounding.latent_vg.margin_contrast",)
)
CM_SMALL = CmMaskSD.presets["cm_masksd_small"]
MAGNET_SMALL = MagNet.presets["magnet_small"]
TINY: Mapping[str, Any] = {"width": 48, "num_layers": 2, "channels": 16}
"""For further forms of a method, whose size says nothing."""
CM_TINY: Mapping[str, Any] = {
    "vision_width": 48,
    "vision_layers": 2,
    "text_width": 48,
    "text_layers": 2,
    "shared_width": 32,
    "channels": 16,
    "decoder_layers": 1,
}
MAGNET_TINY: Mapping[str, Any] = {"swin_width": 8, "bert_width": 48, "channels": 16}
HEADS: Mapping[str, Any] = {"box_head": True, "empty_head": True}

VISION, LANGUAGE = (
    Auxiliary(weight=f"{branch}_weight", loss=f"{branch}_agreement") for branch in ("vision", "language")
)
ONLY_VISION = Auxiliary(
    weight="vision_weight",
    loss="vision_agreement",
    functions=tuple(
        f"methods.grounding.cm_masksd.{name}" for name in ("hide", "correlations", "mask_divergence")
    ),
)
GROUND, ALIGN_PIXEL, ALIGN_TEXT = (
    Auxiliary(weight=weight, loss=loss, functions=tuple(f"methods.grounding.magnet.{name}" for name in names))
    for weight, loss, names in (
        ("ground_weight", "ground", ("select_words", "word_loss")),
        ("align_pixel_weight", "align_pixel", ("pixel_contrast",)),
        ("align_text_weight", "align_text", ("text_contrast",)),
    )
)
CM_PARTS = {
    "untrained": (r"network\.encoder\.clip\.logit_scale",),
    "beside": ("seed", "num_rows_seen", "stand_ins"),
}
MAGNET_PARTS = {"beside": ("seed", "word_predictor")}

CASES: dict[str, GroundingCase] = {
    "latent_vg": GroundingCase(
        method=LatentVG,
        settings=LATENT_SMALL,
        auxiliary=(DICE, CROSS_ENTROPY, CONTRAST),
        golden=1.02164,
        smoke=True,
    ),
    "latent_vg-none": GroundingCase(
        method=LatentVG, settings={**LATENT_SMALL, **TINY, "attribute_lengths": ()}
    ),
    "latent_vg-generalised": GroundingCase(
        method=LatentVG, settings={**LATENT_SMALL, **TINY, **HEADS}, task=GENERALISED, auxiliary=(L1, GIOU)
    ),
    "latent_vg-after-attention": GroundingCase(
        method=LatentVG,
        settings={
            **LATENT_SMALL,
            **TINY,
            "pyramid": True,
            "inject_at": "after_attention",
            "inject": "replace",
        },
    ),
    "shared_ris": GroundingCase(
        method=SharedRIS, settings=SHARED_SMALL, auxiliary=(DICE, CROSS_ENTROPY), golden=1.00426, smoke=True
    ),
    "shared_ris-generalised": GroundingCase(
        method=SharedRIS,
        settings={
            **SHARED_SMALL,
            **TINY,
            **HEADS,
            "taps": (1, 2),
            "share_projection": False,
            "sentence": "mean_of_words",
        },
        task=GENERALISED,
        auxiliary=(L1, GIOU),
    ),
    "shared_ris-pyramid": GroundingCase(
        method=SharedRIS,
        settings={
            **SHARED_SMALL,
            **TINY,
            "num_layers": 3,
            "pyramid": True,
            "taps": (1, 2, 3),
            "decoder_stride": 32,
        },
    ),
    "shared_ris-towers": GroundingCase(
        method=SharedRIS, settings={**SHARED_SMALL, **TINY, "taps": (1, 2), "encoder": "dual"}
    ),
    "cm_masksd": GroundingCase(
        method=CmMaskSD,
        settings=CM_SMALL,
        auxiliary=(DICE, CROSS_ENTROPY, VISION, LANGUAGE),
        golden=1.36370,
        smoke=True,
        **CM_PARTS,
    ),
    "cm_masksd-vision": GroundingCase(
        method=CmMaskSD,
        settings={**CM_SMALL, **CM_TINY, "text_mask_ratio": 0.0},
        auxiliary=(ONLY_VISION,),
        **CM_PARTS,
    ),
    "cm_masksd-encoder-input": GroundingCase(
        method=CmMaskSD,
        settings={
            **CM_SMALL,
            **CM_TINY,
            "mask_at": "encoder_input",
            "mask_strategy": "sampled",
            "distill_on": "features",
            "supervise_masked": True,
        },
        **CM_PARTS,
    ),
    "cm_masksd-generalised": GroundingCase(
        method=CmMaskSD,
        settings={**CM_SMALL, **CM_TINY, **HEADS},
        task=GENERALISED,
        auxiliary=(L1, GIOU),
        **CM_PARTS,
    ),
    "magnet": GroundingCase(
        method=MagNet,
        settings=MAGNET_SMALL,
        auxiliary=(DICE, CROSS_ENTROPY, GROUND, ALIGN_PIXEL, ALIGN_TEXT),
        golden=3.67468,
        smoke=True,
        **MAGNET_PARTS,
    ),
    "magnet-deformable": GroundingCase(
        method=MagNet,
        settings={
            **MAGNET_SMALL,
            **MAGNET_TINY,
            "decoder": "deformable",
            "channels": 32,
            "decoder_heads": 4,
            "decoder_layers": 1,
            "query_layers": 3,
        },
        **MAGNET_PARTS,
    ),
    "magnet-generalised": GroundingCase(
        method=MagNet,
        settings={
            **MAGNET_SMALL,
            **MAGNET_TINY,
            **HEADS,
            "grounding_pass": "separate",
            "pool_sizes": (),
            "ground_inputs": ("mask",),
        },
        task=GENERALISED,
        auxiliary=(L1, GIOU),
        **MAGNET_PARTS,
    ),
}

ADAPTED = ("seed", "pixel_adapter", "sentence_adapter")
KD = (
    Auxiliary(weight="kd_weight", loss="kd", functions=("methods.grounding.grounding_kd.mask_divergence",)),
    Auxiliary(
        weight="pixel_weight", loss="pixels", functions=("methods.grounding.grounding_kd.pixel_distance",)
    ),
    Auxiliary(
        weight="sentence_weight",
        loss="sentence",
        functions=("methods.grounding.grounding_kd.sentence_distance",),
    ),
)
CASES |= {
    "latent_vg_kd": GroundingCase(
        method=LatentVGStudent,
        settings={**LATENT_SMALL, **TINY},
        teacher="shared_ris-pyramid",
        beside=ADAPTED,
        golden=2.02908,
    ),
    "shared_ris_kd": GroundingCase(
        method=SharedRISStudent,
        settings={**SHARED_SMALL, **TINY, "taps": (1, 2)},
        teacher="latent_vg-after-attention",
        beside=ADAPTED,
        golden=2.01679,
        auxiliary=KD,
    ),
    "cm_masksd_kd": GroundingCase(
        method=CmMaskSDStudent,
        settings={**CM_SMALL, **CM_TINY},
        teacher="shared_ris-pyramid",
        untrained=CM_PARTS["untrained"],
        golden=2.08240,
        beside=(*CM_PARTS["beside"], *ADAPTED[1:]),
    ),
    "magnet_kd": GroundingCase(
        method=MagNetStudent,
        settings={**MAGNET_SMALL, **MAGNET_TINY},
        teacher="shared_ris-pyramid",
        beside=(*MAGNET_PARTS["beside"], *ADAPTED[1:]),
        golden=4.62356,
    ),
}


def build(name: str, *, seed: int = 0, task: GroundingTask | None = None, **changes: Any) -> GroundingMethod:
    """A fresh method of the case; ``changes`` replace settings."""
    case = CASES[name]
    torch.manual_seed(seed)
    settings = case.method.Settings(**{**case.settings, **changes})
    inputs = (
        {"teacher": finished(build(case.teacher, seed=7), case.teacher).teacher()} if case.teacher else {}
    )
    return case.method(settings, task=task or case.task, model=None, inputs=inputs)


def finished(method: GroundingMethod, name: str) -> Source:
    """The artifact that ``method`` of the case leaves when it stops now."""
    return Source(
        key=f"key-of-{name}",
        method=name,
        settings=method.settings,
        model=None,
        task=method.task,
        weights={key: value.clone() for key, value in method.artifact().state_dict().items()},
        inputs={},
        catalog=Catalog(methods={name: type(method)}, models={}, datasets={}),
    )


@dataclass
class Trainer:
    """Plain AdamW steps with what a checkpoint has to hold."""

    method: GroundingMethod
    learning_rate: float = 1e-3
    optimizer: torch.optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.AdamW(self.method.parameters(), lr=self.learning_rate)
        self.method.train()

    def step(self, batch: GroundingBatch) -> Tensor:
        total = self.method(batch).total
        self.optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(self.method.parameters(), 1.0)
        self.optimizer.step()
        return total.detach()
