"""Parts of Latent-VG: where latent expressions begin, what they share, and what they take from the picture.

Published in secondary sources: the initialiser, the subject distributor, the injector with a bank of concepts, and the
positive-margin contrast (margin 0.2). Reconstructed: temperatures of the injector, its residual form, the temperature
and weight of the contrast, and what its denominator holds.

Shape legend: B = batch, L = text length, D = encoder width, N = latent expressions, K = attribute tokens of one of them,
A = attribute slots of all of them, P = patches, Q = concepts, G = samples of all workers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methods.grounding.draws import Draws
from methods.losses import in_full_precision

Denominator = Literal["with_margin", "raw", "negatives_only"]
DropUnit = Literal["word", "element"]

FIRST_TEMPERATURE = 0.07
LEAST_TEMPERATURE = 1e-3
NUM_FIXED_TOKENS = 2
"""A latent expression begins with the sentence's first token and the subject; its attributes follow."""


class SubjectSelector(nn.Module):
    """The subject of a sentence: a mean of its words, sharply weighted by a learned score."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.score = nn.Linear(width, 1, bias=False)
        self.temperature = nn.Parameter(torch.tensor(FIRST_TEMPERATURE))

    def forward(self, words_BLD: Tensor, token_mask_BL: Tensor, draws: Draws | None) -> Tensor:
        """The subject token, ``[B, 1, D]``. With ``draws``, Gumbel noise is added to the scores."""
        scores_BL = self.score(words_BLD)[..., 0]
        if draws is not None:
            scores_BL = scores_BL + draws.gumbel("subject", scores_BL.shape[1])
        weights_BL = subject_weights(scores_BL, token_mask_BL, self.temperature)
        return (weights_BL[..., None] * words_BLD).sum(dim=1, keepdim=True)


@in_full_precision
def subject_weights(scores_BL: Tensor, token_mask_BL: Tensor, temperature: Tensor) -> Tensor:
    """Softmax of the scores over real tokens except the first, ``[B, L]``; exactly 0 on all others."""
    is_candidate_BL = token_mask_BL.clone()
    is_candidate_BL[:, 0] = False
    scaled_BL = scores_BL / temperature.abs().clamp_min(LEAST_TEMPERATURE)
    return scaled_BL.masked_fill(~is_candidate_BL, torch.finfo(scaled_BL.dtype).min).softmax(dim=1)


class ExpressionInitialiser(nn.Module):
    """Latent expressions before the first layer: first token, subject, and attributes mixed from the sentence's words."""

    def __init__(
        self,
        width: int,
        *,
        text_length: int,
        attribute_lengths: Sequence[int],
        word_drop: Sequence[float],
        drop_unit: DropUnit,
    ) -> None:
        super().__init__()
        self.num_words, self.word_drop, self.drop_unit = text_length - 1, tuple(word_drop), drop_unit
        self.mixers = nn.ParameterList(torch.empty(length, self.num_words) for length in attribute_lengths)
        for mixer in self.mixers:
            nn.init.normal_(mixer, std=self.num_words**-0.5)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in attribute_lengths)

    def forward(
        self, words_BLD: Tensor, token_mask_BL: Tensor, subject_B1D: Tensor, draws: Draws | None
    ) -> list[Tensor]:
        """Each latent expression ``[B, 2 + K, D]``. With ``draws``, each hears only some of the words."""
        real_BmD = words_BLD[:, 1:] * token_mask_BL[:, 1:, None]
        real_BmD = F.pad(real_BmD, (0, 0, 0, self.num_words - real_BmD.shape[1]))
        expressions = []
        for number, (mixer_Km, norm) in enumerate(zip(self.mixers, self.norms, strict=True)):
            heard_BmD = self._heard(real_BmD, number, draws)
            attributes_BKD = torch.einsum("km,bmd->bkd", mixer_Km, heard_BmD)
            expressions.append(norm(torch.cat([words_BLD[:, :1], subject_B1D, attributes_BKD], dim=1)))
        return expressions

    def _heard(self, words_BmD: Tensor, number: int, draws: Draws | None) -> Tensor:
        rate = self.word_drop[number]
        if draws is None or rate == 0:
            return words_BmD
        shape = words_BmD.shape[1:] if self.drop_unit == "element" else (words_BmD.shape[1], 1)
        is_kept = draws.uniform(f"words of expression {number}", *shape) >= rate
        return words_BmD * is_kept / (1 - rate)


class ConceptInjector(nn.Module):
    """Gives attributes what the picture shows: concepts gather patches that fit the sentence, slots compete for them.

    One bank for all layers, its rows orthonormal at the start. All arithmetic is float32.
    """

    def __init__(
        self,
        width: int,
        num_concepts: int,
        *,
        concept_temperature: float,
        slot_temperature: float,
        is_residual: bool,
    ) -> None:
        super().__init__()
        rows_DQ, _ = torch.linalg.qr(torch.randn(width, num_concepts))
        self.bank = nn.Parameter(rows_DQ.T.contiguous())
        self.concept_temperature, self.slot_temperature = concept_temperature, slot_temperature
        self.is_residual = is_residual

    def forward(self, slots_BAD: Tensor, patches_BPD: Tensor, sentence_BD: Tensor) -> Tensor:
        """The slots after injection, ``[B, A, D]``."""
        injected_BAD = injected_concepts(
            slots_BAD,
            retrieved_concepts(self.bank, patches_BPD, sentence_BD, self.concept_temperature),
            self.slot_temperature,
        ).to(slots_BAD.dtype)
        return slots_BAD + injected_BAD if self.is_residual else injected_BAD


@in_full_precision
def retrieved_concepts(
    bank_QD: Tensor, patches_BPD: Tensor, sentence_BD: Tensor, temperature: float
) -> Tensor:
    """Each concept as a mean of the patches that fit the sentence at least averagely, ``[B, Q, D]``."""
    return torch.einsum(
        "bqp,bpd->bqd", concept_weights(bank_QD, patches_BPD, sentence_BD, temperature), patches_BPD
    )


@in_full_precision
def concept_weights(bank_QD: Tensor, patches_BPD: Tensor, sentence_BD: Tensor, temperature: float) -> Tensor:
    """How much each patch adds to each concept, ``[B, Q, P]``: rows sum to 1, and are 0 on patches that fit less."""
    units_BPD = F.normalize(patches_BPD, dim=-1)
    fit_BP = torch.einsum("bpd,bd->bp", units_BPD, F.normalize(sentence_BD, dim=-1))
    # Rounding can lift the mean of equal values above them all, so that the best patch is named a target by itself.
    is_target_BP = (fit_BP >= fit_BP.mean(dim=1, keepdim=True)) | (fit_BP == fit_BP.amax(dim=1, keepdim=True))
    likeness_BQP = torch.einsum("qd,bpd->bqp", F.normalize(bank_QD, dim=-1), units_BPD) / temperature
    return likeness_BQP.masked_fill(~is_target_BP[:, None], -torch.inf).softmax(dim=-1)


@in_full_precision
def injected_concepts(slots_BAD: Tensor, concepts_BQD: Tensor, temperature: float) -> Tensor:
    """What each slot takes from the concepts, ``[B, A, D]``. Each concept is shared out over all slots of a sample."""
    likeness_BAQ = F.normalize(slots_BAD, dim=-1) @ F.normalize(concepts_BQD, dim=-1).transpose(1, 2)
    return (likeness_BAQ / temperature).softmax(dim=1) @ concepts_BQD


@in_full_precision
def margin_contrast(
    sentence_BD: Tensor,
    expressions_BND: Tensor,
    *,
    margin: float,
    temperature: float,
    denominator: Denominator,
    all_expressions_GND: Tensor | None = None,
    first: int = 0,
) -> Tensor:
    """Pulls a sentence to its own latent expressions, up to a margin, and away from those of other samples.

    ``-mean log( exp(min(1, margin + cos(t, z_i)) / T) / sum exp(cos(t, z_k) / T) )``, compared with the same i only.
    The sum holds the other samples and, by ``denominator``, the own one with its margin (never negative; free inside
    the margin), the own one without it (pushes to a cosine of ``1 - margin``), or not the own one at all.

    Args:
        sentence_BD: Final first token of each sentence (t).
        expressions_BND: Final first token of each latent expression (z).
        margin: How far below 1 a cosine may stay for free.
        temperature: T, above 0.
        denominator: What the sum holds.
        all_expressions_GND: Expressions of all workers, where there are several.
        first: Where the own samples begin in it.

    Returns:
        Scalar; 0 where there is no other sample.
    """
    others_GND = expressions_BND if all_expressions_GND is None else all_expressions_GND
    if len(others_GND) < 2:
        return (sentence_BD.sum() + expressions_BND.sum()) * 0
    cosine_BNG = torch.einsum(
        "bd,gnd->bng", F.normalize(sentence_BD, dim=-1), F.normalize(others_GND, dim=-1)
    )
    rows_B = torch.arange(len(sentence_BD), device=cosine_BNG.device)
    own_BNG = F.one_hot(rows_B + first, len(others_GND)).bool()[:, None].expand_as(cosine_BNG)
    positive_BN1 = (cosine_BNG[own_BNG].view(*cosine_BNG.shape[:2], 1) + margin).clamp_max(1) / temperature
    scaled_BNG = cosine_BNG / temperature
    if denominator == "with_margin":
        scaled_BNG = torch.where(own_BNG, positive_BN1, scaled_BNG)
    elif denominator == "negatives_only":
        scaled_BNG = scaled_BNG.masked_fill(own_BNG, -torch.inf)
    return (scaled_BNG.logsumexp(dim=-1) - positive_BN1[..., 0]).mean()


@in_full_precision
def mean_pairwise_cosine(slots_BAD: Tensor) -> Tensor:
    """How alike the slots of a sample are, averaged over pairs and samples, scalar; 1 when all are the same."""
    units_BAD = F.normalize(slots_BAD, dim=-1)
    num_slots = slots_BAD.shape[1]
    total_B = units_BAD.sum(dim=1).square().sum(dim=-1) - num_slots
    return (total_B / max(num_slots * (num_slots - 1), 1)).mean()


@in_full_precision
def mean_map_difference(expression_logits_BNhw: Tensor) -> Tensor:
    """Mean absolute difference of the probability maps of each pair of expressions, scalar."""
    probabilities_BNP = expression_logits_BNhw.sigmoid().flatten(2)
    num_maps = probabilities_BNP.shape[1]
    pairs = torch.combinations(torch.arange(num_maps, device=probabilities_BNP.device))
    return (probabilities_BNP[:, pairs[:, 0]] - probabilities_BNP[:, pairs[:, 1]]).abs().mean()
