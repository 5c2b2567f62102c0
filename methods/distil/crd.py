"""CRD: a sample's student feature should recognise its own teacher feature among thousands of others, and the reverse.

Tian, Krishnan, Isola: "Contrastive Representation Distillation", arXiv 1910.10699. Both features are embedded linearly, with
length 1, and remembered in a bank for each network. An anchor of one side is compared with its own entry and with K entries
of other classes in the other side's bank:

    x_k = exp(e . m_k / contrast_temperature) / Z,   noise = K / n
    anchor loss = -mean over the batch of [ log(x_0 / (x_0 + noise)) + sum over k of log(noise / (x_k + noise)) ]
    L = ce_weight CE + crd_weight (student anchor + teacher anchor) + kd_weight T^2 KL

Z is n times the mean of the exponentials of the very first batch, then constant. After each step m <- unit(0.5 m + 0.5 e).
Defaults as in the paper. Expected top-1 on CIFAR-100, 240 epochs, resnet32x4 -> resnet8x4: 75.51 (with ``kd_weight`` 1: 75.46);
on ``angular_views`` 75.82 (76.46 together with ``kd_weight`` 1); on ``tekap`` 75.65 (75.98).

Differences from the release on purpose: negatives are drawn with repetition, as a function of (seed, epoch, sample). With
noisy copies of a teacher the loss is the sum over the copies; they share the banks, which remember the teacher's own feature.

Cost for n = 50 000, K = 16384, batch 64: a bank holds 26 MB, in memory and in checkpoints. Scores come from one product with the
whole bank, [64, 50 000] numbers; gathering the entries would take [64, 16385, 128] (0.54 GB) and, on one CPU core, 2.6 s instead of
0.05 s. Rows are taken in parts where that product would be larger than ``MAX_NUMBERS``.

Several workers: banks and Z are those of the whole batch, so the result does not depend on how many share it.

Shape legend: n = training samples, B = batch, D = pooled feature width, E = embedding width, K = negatives, J = 1 + K.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from methods.angular.losses import unit
from methods.base import Batch, Loss, Task, Teacher
from methods.checks import check_positive, check_weights
from methods.distil.adapters import Embedding
from methods.distil.memory import SampleMemory, gathered_rows
from methods.distil.negatives import Negatives
from methods.distil.settings import TemperedSettings
from methods.distil.student import FeatureStudent
from methods.distil.teaching import Outputs, Teaching
from methods.losses import in_full_precision

SMALLEST_SUM = 1e-7
"""Added to both denominators, as in the release."""
MAX_NUMBERS = 1 << 25
"""How many numbers an intermediate result may have: 128 MiB of float32."""
GATHERING_COST = 50
"""How many times longer an entry takes that is looked up than one that a whole product passes (measured on a CPU)."""


@dataclass(frozen=True, kw_only=True)
class ContrastiveSettings(TemperedSettings):
    """Settings of ``crd``."""

    kd_weight: float = 0.0
    """Weight of the divergence from the teacher's probabilities; the combined form has 1."""
    crd_weight: float = 0.8
    """Weight of the contrastive loss. 0 turns it off."""
    num_negatives: int = 16384
    """Samples of other classes that each sample is contrasted with (K)."""
    num_dimensions: int = 128
    """Width of the embeddings."""
    contrast_temperature: float = 0.07
    """Divides the cosines of embeddings."""
    bank_momentum: float = 0.5
    """Share of the old entry in an updated one, below 1."""

    def __post_init__(self) -> None:
        TemperedSettings.__post_init__(self)
        check_weights(self, "crd_weight", "bank_momentum")
        check_positive(self, "num_negatives", "num_dimensions", "contrast_temperature")
        if self.bank_momentum >= 1:
            raise ValueError(
                f"bank_momentum must be below 1, got {self.bank_momentum!r}: entries would never change"
            )


class ContrastiveDistillation(FeatureStudent):
    """Contrasts each sample with thousands of others across the two networks. Losses ``ce``, ``kd``, ``crd``."""

    Settings = ContrastiveSettings
    ranges: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        **FeatureStudent.ranges,
        "crd_weight": {"loguniform": [0.1, 2]},
        "num_negatives": {"grid": [1024, 4096, 16384]},
        "contrast_temperature": {"loguniform": [0.03, 0.5]},
    }
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"combined": {"kd_weight": 1.0}}
    settings: ContrastiveSettings
    seed: Tensor
    normalisers: Tensor

    def __init__(
        self, settings: Any, *, task: Task, model: nn.Module | None, inputs: Mapping[str, Teacher]
    ) -> None:
        super().__init__(settings, task=task, model=model, inputs=inputs)
        num_features: int = self.model.num_features  # type: ignore[assignment]
        self.student_embedding = Embedding(num_features, settings.num_dimensions)
        self.teacher_embedding = Embedding(self.teacher.num_features, settings.num_dimensions)
        self.student_bank, self.teacher_bank = SampleMemory(), SampleMemory()
        self.negatives: Negatives | None = None
        self.register_buffer("seed", torch.randint(1 << 31, ()))
        # Z of the student's and of the teacher's anchors; 0 until the first batch has been seen.
        self.register_buffer("normalisers", torch.zeros(2))
        self._is_normalised = False

    @classmethod
    def inactive(cls, settings: Any) -> frozenset[str]:
        own = {"num_negatives", "num_dimensions", "contrast_temperature", "bank_momentum"}
        return super().inactive(settings) | (frozenset(own) if settings.crd_weight == 0 else frozenset())

    def prepare(self, labels_n: Tensor, *, num_epochs: int) -> None:
        self.negatives = Negatives(labels_n)
        generator = torch.Generator().manual_seed(int(self.seed))
        bound = (3 / self.settings.num_dimensions) ** 0.5
        for bank in (self.student_bank, self.teacher_bank):
            uniform = torch.rand(len(labels_n), self.settings.num_dimensions, generator=generator)
            bank.fill((2 * uniform - 1) * bound)

    def feature_losses(self, student: Outputs, teaching: Teaching, batch: Batch) -> dict[str, Loss]:
        if self.negatives is None:
            raise RuntimeError(
                "crd contrasts with the training samples: call prepare(labels) before training"
            )
        negatives_BK = self.negatives(
            batch.indices, seed=self.seed, epoch=batch.epoch, num_negatives=self.settings.num_negatives
        )
        compared_BJ = torch.cat([batch.indices[:, None], negatives_BK], dim=1)
        student_BE = self.student_embedding(student.pooled)
        terms = [(weight, self.teacher_embedding(pooled_BD)) for weight, pooled_BD in teaching.pooled_terms]
        scores_BJ = bank_scores(student_BE, self.teacher_bank.rows.clone(), compared_BJ)
        # Cloned: this step's gradient still needs the entries that are about to be overwritten.
        student_rows = self.student_bank.rows.clone()
        term_scores = [bank_scores(teacher_BE, student_rows, compared_BJ) for _, teacher_BE in terms]
        self._normalise(scores_BJ, term_scores[0])
        total = sum(weight for weight, _ in terms) * self._contrast(scores_BJ, self.normalisers[0])
        for (weight, _), term_BJ in zip(terms, term_scores, strict=True):
            total = total + weight * self._contrast(term_BJ, self.normalisers[1])
        if self.training:
            self._remember(batch.indices, student_BE, terms[0][1])
        return {"crd": Loss(total, self.settings.crd_weight)}

    def _contrast(self, scores_BJ: Tensor, normaliser: Tensor) -> Tensor:
        assert self.negatives is not None
        return contrast_loss(
            scores_BJ,
            normaliser,
            num_samples=len(self.negatives.samples),
            contrast_temperature=self.settings.contrast_temperature,
        )

    @torch.no_grad()
    def _normalise(self, student_BJ: Tensor, teacher_BJ: Tensor) -> None:
        """Fix Z by the first batch of all workers."""
        if not self._is_normalised and not bool((self.normalisers > 0).all()):
            assert self.negatives is not None
            both_B2J = torch.stack([student_BJ, teacher_BJ], dim=1)
            means_B2 = (both_B2J / self.settings.contrast_temperature).exp().mean(dim=-1)
            (of_all_B2,) = gathered_rows(means_B2)
            self.normalisers.copy_(len(self.negatives.samples) * of_all_B2.mean(dim=0))
        self._is_normalised = True

    @torch.no_grad()
    def _remember(self, indices_B: Tensor, student_BE: Tensor, teacher_BE: Tensor) -> None:
        momentum = self.settings.bank_momentum
        for bank, embeddings_BE in ((self.student_bank, student_BE), (self.teacher_bank, teacher_BE)):
            mixture_BE = momentum * bank.read(indices_B) + (1 - momentum) * embeddings_BE
            bank.write(indices_B, unit(mixture_BE))


@in_full_precision
def contrast_loss(
    scores_BJ: Tensor, normaliser: Tensor, *, num_samples: int, contrast_temperature: float
) -> Tensor:
    """Noise-contrastive loss of one side's anchors, scalar.

    Args:
        scores_BJ: Cosines with the own entry (first) and the K negatives.
        normaliser: Z, scalar.
        num_samples: n: negatives are drawn from a noise of density 1 / n.
        contrast_temperature: Divides the cosines.
    """
    noise = (scores_BJ.shape[1] - 1) / num_samples
    likeness_BJ = (scores_BJ / contrast_temperature).exp() / normaliser
    own_B, others_BK = likeness_BJ[:, 0], likeness_BJ[:, 1:]
    recognised_B = (own_B / (own_B + noise + SMALLEST_SUM)).log()
    rejected_BK = (noise / (others_BK + noise + SMALLEST_SUM)).log()
    return -(recognised_B + rejected_BK.sum(dim=1)).mean()


@in_full_precision
def bank_scores(anchors_BE: Tensor, bank_nE: Tensor, indices_BJ: Tensor) -> Tensor:
    """Inner products of each anchor with some entries of a bank, ``[B, J]``. Gradients reach the anchors only."""
    num_rows, num_compared = len(bank_nE), indices_BJ.shape[1]
    if num_compared * GATHERING_COST < num_rows:
        return _in_parts(_by_gathering, anchors_BE, bank_nE, indices_BJ, num_compared * bank_nE.shape[1])
    return _in_parts(_by_product, anchors_BE, bank_nE, indices_BJ, num_rows)


def _by_product(anchors_BE: Tensor, bank_nE: Tensor, indices_BJ: Tensor) -> Tensor:
    return (anchors_BE @ bank_nE.T).gather(1, indices_BJ)


def _by_gathering(anchors_BE: Tensor, bank_nE: Tensor, indices_BJ: Tensor) -> Tensor:
    return (bank_nE[indices_BJ] @ anchors_BE[:, :, None]).squeeze(2)


def _in_parts(
    score: Callable[[Tensor, Tensor, Tensor], Tensor],
    anchors_BE: Tensor,
    bank_nE: Tensor,
    indices_BJ: Tensor,
    numbers_per_row: int,
) -> Tensor:
    """``score`` on as many rows at a time as memory allows; the backward pass computes each part again."""
    num_rows = max(1, MAX_NUMBERS // numbers_per_row)
    if num_rows >= len(anchors_BE):
        return score(anchors_BE, bank_nE, indices_BJ)
    parts = zip(torch.split(anchors_BE, num_rows), torch.split(indices_BJ, num_rows), strict=True)
    return torch.cat(
        [checkpoint(score, anchors, bank_nE, indices, use_reentrant=False) for anchors, indices in parts]
    )
