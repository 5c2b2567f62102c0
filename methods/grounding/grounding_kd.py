"""A smaller grounder learns from a finished one, whatever method either is of.

Any grounding method becomes a student by ``class Student(GroundingStudent, Method)``: to its own losses are added

    kd        T^2 KL(Bernoulli(teacher) || Bernoulli(student)) of each pixel's mask logit, with temperature T
    pixels    1 - cosine of pixel features, the student's after a 1x1 adapter and at the teacher's size
    sentence  1 - cosine of the vectors that pixels are compared with, the student's after a linear adapter

The pairs are those that the grounders' common module paths suggest (``mask_head``, ``pixel_decoder``); weights and
temperature are ours, no paper's. The teacher sees the student's own batch, or what it said of that batch is read from a
recording: the losses read named parts of its answer, and cannot tell.

Shape legend: B = batch, C = decoder width, S = width of the sentence vector, h, w = sides of a map.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from methods.base import Teacher
from methods.checks import check_positive, check_weights
from methods.grounding.contracts import GroundingBatch, GroundingOutput, GroundingTask
from methods.grounding.method import GroundingMethod
from methods.grounding.pixel_decoder import resized
from methods.grounding.self_distillation import feature_distance, mask_divergence
from methods.models.tapped import evaluating

WORDS = (
    "image_size",
    "text_length",
    "vocabulary_size",
    "start_id",
    "end_id",
    "pad_id",
    "mask_id",
    "tokenizer",
)
"""What teacher and student have to agree on, since they read the same batch."""
PARTS = {"kd_weight": "mask_logits", "pixel_weight": "pixel_embed", "sentence_weight": "sentence_embed"}
"""Weight of a loss -> what it reads of the teacher's ``GroundingOutput``."""
KD_RANGES: Mapping[str, Mapping[str, Any]] = {
    "kd_weight": {"loguniform": [0.1, 10]},
    "temperature": {"loguniform": [1, 4]},
    "pixel_weight": {"loguniform": [0.05, 5]},
    "sentence_weight": {"loguniform": [0.05, 5]},
}


@dataclass(frozen=True, kw_only=True)
class GroundingKdSettings:
    """What a student takes from its teacher."""

    kd_weight: float = 1.0
    """Weight of what compares mask probabilities. 0 turns it off."""
    temperature: float = 2.0
    """T: divides the mask logits of teacher and student."""
    pixel_weight: float = 0.5
    """Weight of what compares pixel features. 0 turns it off, and its adapter."""
    sentence_weight: float = 0.5
    """Weight of what compares sentence vectors. 0 turns it off, and its adapter."""

    def check_kd(self) -> None:
        """Refuse impossible values."""
        check_weights(self, "kd_weight", "pixel_weight", "sentence_weight")
        check_positive(self, "temperature")


class GroundingStudent(GroundingMethod):
    """What turns the grounding method behind it in the order of bases into a student of a frozen grounder."""

    inputs: ClassVar[Mapping[str, frozenset[str]]] = {"teacher": frozenset({"grounding"})}

    def __init__(
        self, settings: Any, *, task: Any, model: nn.Module | None, inputs: Mapping[str, Teacher]
    ) -> None:
        """Build network and adapters.

        Raises:
            ValueError: The teacher reads other pictures or sentences than the student.
        """
        super().__init__(settings, task=task, model=model, inputs=inputs)
        self.teacher = inputs["teacher"]
        if reason := self.teacher_refusal(self.teacher, task):
            raise ValueError(reason)
        own, told = _example(self.network, task), _example(self.teacher.network, task)
        self.pixel_adapter = self.sentence_adapter = None
        if settings.pixel_weight > 0:
            self.pixel_adapter = nn.Conv2d(own.pixel_embed.shape[1], told.pixel_embed.shape[1], 1)
        if settings.sentence_weight > 0:
            self.sentence_adapter = nn.Linear(own.sentence_embed.shape[1], told.sentence_embed.shape[1])

    @classmethod
    def teacher_refusal(cls, teacher: Teacher, task: Any) -> str | None:
        """Why the teacher cannot read this task's batches; None when it can."""
        learnt: Any = getattr(teacher.network, "task", None)
        if not isinstance(learnt, GroundingTask):
            return f"teacher {teacher.key[:8]} is no grounder: refer to a stage that segments by sentences"
        differences = [
            f"{name} {getattr(learnt, name)!r} instead of {getattr(task, name)!r}"
            for name in WORDS
            if getattr(learnt, name) != getattr(task, name)
        ]
        if not differences:
            return None
        return (
            f"teacher {teacher.key[:8]} was trained with {', '.join(differences)}: use the same data settings"
        )

    @classmethod
    def inactive(cls, settings: Any) -> frozenset[str]:
        return super().inactive(settings) | ({"temperature"} if settings.kd_weight == 0 else set())

    @classmethod
    def asks(cls, settings: Any) -> tuple[str, ...]:
        return tuple(part for weight, part in PARTS.items() if getattr(settings, weight) > 0)

    def loss_weights(self, batch: GroundingBatch) -> dict[str, float]:
        own = {"kd": self.settings.kd_weight, "pixels": self.settings.pixel_weight}  # type: ignore[attr-defined]
        return super().loss_weights(batch) | own | {"sentence": self.settings.sentence_weight}  # type: ignore[attr-defined]

    def compute_losses(self, output: GroundingOutput, batch: GroundingBatch) -> dict[str, Tensor]:
        losses = super().compute_losses(output, batch)
        weights = self.loss_weights(batch)
        if not any(weights[name] for name in ("kd", "pixels", "sentence")):
            return losses
        with torch.no_grad():
            told: GroundingOutput = self.teacher.network(batch)
        if weights["kd"]:
            temperature: float = self.settings.temperature  # type: ignore[attr-defined]
            losses["kd"] = mask_divergence(output.mask_logits, told.mask_logits, temperature=temperature)
        if self.pixel_adapter is not None:
            losses["pixels"] = pixel_distance(self.pixel_adapter(output.pixel_embed), told.pixel_embed)
        if self.sentence_adapter is not None:
            adapted_BS = self.sentence_adapter(output.sentence_embed)
            losses["sentence"] = sentence_distance(adapted_BS, told.sentence_embed)
        return losses


def pixel_distance(student_BChw: Tensor, teacher_BChw: Tensor) -> Tensor:
    """One minus the cosine of each pixel's features with the teacher's, at the teacher's size, scalar."""
    at_its_size = resized(student_BChw, teacher_BChw.shape[-2:])
    return feature_distance(at_its_size.flatten(2).transpose(1, 2), teacher_BChw.flatten(2).transpose(1, 2))


def sentence_distance(student_BS: Tensor, teacher_BS: Tensor) -> Tensor:
    """One minus the cosine of each sentence vector with the teacher's, scalar."""
    return feature_distance(student_BS, teacher_BS)


@torch.no_grad()
def _example(network: nn.Module, task: GroundingTask) -> GroundingOutput:
    """What ``network`` says of a blank sample: its widths."""
    device = next(network.parameters()).device
    with evaluating(network):
        output: GroundingOutput = network(*task.example(device))
    return output
