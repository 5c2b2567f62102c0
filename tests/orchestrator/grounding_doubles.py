"""A grounding method of a few parameters: a colour-like product of words and pixels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methods import BUILTIN
from methods.base import Loss, Method, Source, Step, Teacher
from methods.grounding.contracts import GroundingBatch, GroundingOutput, GroundingTask
from methods.grounding.metrics import grounding_sums, summarise_grounding


class TinyNetwork(nn.Module):
    def __init__(self, vocabulary_size: int, width: int) -> None:
        super().__init__()
        self.pixels = nn.Sequential(nn.Conv2d(3, width, 5, padding=2), nn.ReLU(), nn.Conv2d(width, width, 1))
        self.words = nn.Embedding(vocabulary_size, width)

    def forward(self, batch: GroundingBatch) -> GroundingOutput:
        pixel_embed = self.pixels(batch.images)
        real = batch.token_mask[..., None].float()
        sentence_embed = (self.words(batch.token_ids) * real).sum(dim=1)
        logits = torch.einsum("bchw,bc->bhw", pixel_embed, sentence_embed)[:, None] - 2
        return GroundingOutput(mask_logits=logits, pixel_embed=pixel_embed, sentence_embed=sentence_embed)


@dataclass(frozen=True, kw_only=True)
class TinySettings:
    width: int = 16
    """Channels."""


class TinyGrounder(Method):
    """Segments what a bag of words names."""

    Settings = TinySettings
    task_type: ClassVar[type] = GroundingTask
    needs_model: ClassVar[bool] = False
    same_classes: ClassVar[bool] = False
    evaluation_metrics: ClassVar[tuple[str, ...]] = ("miou", "oiou", "language_gap")

    def __init__(
        self, settings: Any, *, task: Any, model: nn.Module | None, inputs: Mapping[str, Teacher]
    ) -> None:
        super().__init__(settings, task=task, model=model, inputs=inputs)
        self.network = TinyNetwork(task.vocabulary_size, settings.width)

    @classmethod
    def keeps_network(cls) -> bool:
        return True

    @classmethod
    def data_refusals(cls, settings: Any, source: Any) -> tuple[str, ...]:
        return ("no head for sentences that name nothing",) if source.may_be_empty else ()

    def forward(self, batch: GroundingBatch) -> Step:
        logits = self.network(batch).mask_logits
        return Step({"mask_bce": Loss(F.binary_cross_entropy_with_logits(logits, batch.masks))})

    def statistics(self, batch: GroundingBatch) -> dict[str, Tensor]:
        control = batch.rolled()
        rolled = None if control is None else self.network(control)
        return grounding_sums(self.network(batch), batch, rolled=rolled, protocol=self.task.protocol)

    def summarise(self, totals: Mapping[str, Tensor]) -> dict[str, float]:
        return summarise_grounding(totals)

    def artifact(self) -> nn.Module:
        return self.network

    @classmethod
    def emit(cls, source: Source) -> Teacher:
        network = TinyNetwork(source.task.vocabulary_size, source.settings.width)
        network.load_state_dict(dict(source.weights))
        return Teacher(network=network, num_features=source.settings.width, num_classes=1, key=source.key)


CATALOG = BUILTIN.extended(methods={"tiny_grounder": TinyGrounder})
