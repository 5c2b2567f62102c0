"""The base of grounding methods: a network that finds what a sentence names, and the losses by which it learns.

A method says how its network is built (``build_network``), which losses it adds (``compute_losses``) and with which
weights (``loss_weights``). Modules that only training needs are attributes of the method beside ``network``: they are
checkpointed, but are no part of the artifact.

Every network exposes the module paths ``encoder``, ``encoder.layers.<i>`` (or ``encoder.stages.<i>``),
``pixel_decoder`` and ``mask_head``, so that any of them can teach any other.

Shape legend: B = batch, H, W = image sides, L = text length.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from methods.base import Loss, Method, Source, Step, Teacher, UpdateRule
from methods.grounding.contracts import GroundingBatch, GroundingOutput, GroundingTask
from methods.grounding.draws import Draws
from methods.grounding.mask_losses import box_giou, box_l1, empty_bce, mask_bce, mask_dice
from methods.grounding.metrics import GROUNDING_METRICS, grounding_sums, summarise_grounding
from methods.grounding.panel import grounding_panel
from methods.grounding.settings import RANGES, GroundingSettings, without_effect
from methods.teachers import freeze

UNDECAYED = ("positions", "token", "bank")
"""Parts of names whose parameters are not decayed, beside vectors and scalars."""


class GroundingNetwork(nn.Module):
    """What a grounding method trains: pictures and sentences in, ``GroundingOutput`` out."""

    task: GroundingTask | None = None
    """What it was built for, set by its method."""

    @abstractmethod
    def forward(self, batch: GroundingBatch, draws: Draws | None = None) -> GroundingOutput:
        """Masks for ``batch``. Reads images and sentences only, so that masks and boxes may be absent.

        Args:
            batch: Pictures with their sentences.
            draws: Where random numbers come from in training; without them, or in evaluation mode, nothing is drawn.
        """


class GroundingMethod(Method):
    """Base of methods that segment what a sentence names. Losses ``mask_bce``, ``mask_dice`` and those of the heads."""

    task_type: ClassVar[type] = GroundingTask
    needs_model: ClassVar[bool] = False
    same_classes: ClassVar[bool] = False
    can_be_compiled: ClassVar[bool] = False
    emits: ClassVar[frozenset[str]] = frozenset({"grounding"})
    ranges: ClassVar[Mapping[str, Mapping[str, Any]]] = RANGES
    evaluation_metrics: ClassVar[tuple[str, ...]] = GROUNDING_METRICS
    settings: GroundingSettings
    task: GroundingTask
    network: GroundingNetwork
    seed: Tensor

    def __init__(
        self, settings: Any, *, task: Any, model: nn.Module | None, inputs: Mapping[str, Teacher]
    ) -> None:
        """Build the network.

        Raises:
            ValueError: The data has sentences that name nothing, and the method no head that can say so.
        """
        super().__init__(settings, task=task, model=model, inputs=inputs)
        if task.may_be_empty and not settings.empty_head:
            raise ValueError(no_head(type(self).__name__))
        self.network = self.build_network(settings, task)
        self.network.task = task
        self.register_buffer("seed", torch.randint(1 << 31, ()))

    @classmethod
    @abstractmethod
    def build_network(cls, settings: Any, task: GroundingTask) -> GroundingNetwork:
        """The network for ``task``, with its first weights."""

    @classmethod
    def without_sources(cls, settings: Any) -> Any:
        """The same settings without first weights from elsewhere: an artifact holds every weight itself."""
        return settings

    @classmethod
    def inactive(cls, settings: Any) -> frozenset[str]:
        return without_effect(settings)

    @classmethod
    def data_refusals(cls, settings: Any, source: Any) -> Iterable[str]:
        if getattr(source, "may_be_empty", False) and not settings.empty_head:
            yield no_head(cls.__name__)

    @classmethod
    def keeps_network(cls) -> bool:
        return True

    def forward(self, batch: GroundingBatch) -> Step:
        output = self.network(batch, Draws(seed=self.seed, indices=batch.indices, epoch=batch.epoch))
        weights = self.loss_weights(batch)
        losses = self.compute_losses(output, batch)
        return Step(
            {name: Loss(value, weights[name]) for name, value in losses.items()}, self.step_metrics(output)
        )

    def loss_weights(self, batch: GroundingBatch) -> dict[str, float]:
        """Weight of every loss that ``compute_losses`` may give. A loss of weight 0 is not computed."""
        settings = self.settings
        weights = {"mask_bce": settings.mask_bce_weight, "mask_dice": settings.mask_dice_weight}
        if settings.box_head:
            weights |= {"box_l1": settings.box_l1_weight, "box_giou": settings.box_giou_weight}
        if settings.empty_head:
            weights["empty"] = settings.empty_weight
        return weights

    def compute_losses(self, output: GroundingOutput, batch: GroundingBatch) -> dict[str, Tensor]:
        """Unweighted losses by name, without those of weight 0. Methods add theirs to what this gives."""
        return shared_losses(output, batch, self.loss_weights(batch))

    def step_metrics(self, output: GroundingOutput) -> dict[str, Tensor]:
        """Detached numbers worth watching in training."""
        return {}

    def update_rule(self, name: str, parameter: nn.Parameter) -> UpdateRule:
        """The encoder may learn more slowly; norms, biases, positions, single tokens and banks are not decayed."""
        factor = self.settings.encoder_lr_factor if name.startswith("network.encoder.") else 1.0
        return UpdateRule(factor, parameter.dim() > 1 and not any(part in name for part in UNDECAYED))

    @torch.no_grad()
    def statistics(self, batch: GroundingBatch) -> dict[str, Tensor]:
        """Sums over the batch, and over its control: the same pictures with sentences about others."""
        control = batch.rolled()
        rolled = None if control is None else self.network(control)
        return grounding_sums(self.network(batch), batch, rolled=rolled, protocol=self.task.protocol)

    def summarise(self, totals: Mapping[str, Tensor]) -> dict[str, float]:
        return summarise_grounding(totals)

    @classmethod
    def panel(cls, network: nn.Module, validation: Any) -> bytes | None:
        return grounding_panel(network, validation)

    def artifact(self) -> nn.Module:
        return self.network

    @classmethod
    def emit(cls, source: Source) -> Teacher:
        """The finished network as a teacher: ``teacher.network(batch)`` gives its ``GroundingOutput``."""
        with torch.random.fork_rng(devices=[]):
            network = cls.build_network(cls.without_sources(source.settings), source.task)
        network.load_state_dict(dict(source.weights), strict=True)
        network.task = source.task
        return Teacher(
            network=freeze(network), num_features=source.settings.channels, num_classes=1, key=source.key,
            reads=("images", "token_ids", "token_mask"),
        )  # fmt: skip


def no_head(name: str) -> str:
    """Why a method without a no-target head cannot learn from sentences that name nothing."""
    return (
        f"the data has sentences that name nothing in their picture, but {name} cannot say so: set empty_head: true, "
        "or choose data without such sentences"
    )


def shared_losses(
    output: GroundingOutput, batch: GroundingBatch, weights: Mapping[str, float]
) -> dict[str, Tensor]:
    """The losses of mask, box and "no such object" that have a weight above 0."""
    losses: dict[str, Tensor] = {}
    if weights.get("mask_bce"):
        losses["mask_bce"] = mask_bce(output.mask_logits, batch.masks)
    if weights.get("mask_dice"):
        losses["mask_dice"] = mask_dice(output.mask_logits, batch.masks)
    if weights.get("box_l1") and output.boxes is not None:
        losses["box_l1"] = box_l1(output.boxes, batch.boxes, batch.is_empty)
    if weights.get("box_giou") and output.boxes is not None:
        losses["box_giou"] = box_giou(output.boxes, batch.boxes, batch.is_empty)
    if weights.get("empty") and output.empty_logit is not None:
        losses["empty"] = empty_bce(output.empty_logit, batch.is_empty)
    return losses
