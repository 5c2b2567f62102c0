"""CRD as a method: its banks of what was seen, its negatives and normalisers, and the terms of several teachers."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from contract_cases import build, make_batch
from torch import Tensor

from methods.base import Batch
from methods.distil.crd import ContrastiveDistillation, contrast_loss


def crd(name: str = "crd", **changes: Any) -> ContrastiveDistillation:
    method = build(name, **changes)
    assert isinstance(method, ContrastiveDistillation)
    return method.train()


def negatives_of(method: ContrastiveDistillation, indices: Tensor, num_negatives: int) -> Tensor:
    assert method.negatives is not None
    return method.negatives(indices, seed=method.seed, epoch=0, num_negatives=num_negatives)


def plain_crd(method: ContrastiveDistillation, batch: Batch) -> Tensor:
    """The loss of a plain teacher, from the definition, with the banks as they are."""
    _, student_pooled = method.model(batch.images)
    teacher_pooled = method.teacher(batch.images).pooled
    compared = torch.cat([batch.indices[:, None], negatives_of(method, batch.indices, 64)], dim=1)
    total = torch.zeros(())
    sides = [
        (method.student_embedding(student_pooled), method.teacher_bank.rows, method.normalisers[0]),
        (method.teacher_embedding(teacher_pooled), method.student_bank.rows, method.normalisers[1]),
    ]
    for anchors, rows, normaliser in sides:
        scores = (rows[compared] * anchors[:, None]).sum(dim=-1)
        total = total + contrast_loss(scores, normaliser, num_samples=80, contrast_temperature=0.07)
    return total


def test_the_loss_is_that_of_both_sides_against_the_banks() -> None:
    method = crd().eval()
    batch = make_batch()
    loss = method(batch).losses["crd"].value
    torch.testing.assert_close(loss, plain_crd(method, batch))


def test_banks_begin_uniform_and_keep_directions_of_what_was_seen() -> None:
    method = crd()
    bound = (3 / 128) ** 0.5
    before = method.student_bank.rows.clone()
    assert float(before.abs().max()) <= bound
    assert float(before.std()) == pytest.approx(bound / 3**0.5, rel=0.02)
    batch = make_batch()
    with torch.no_grad():
        embedded = method.student_embedding(method.model(batch.images)[1])
        step = method(batch)
    after = method.student_bank.rows
    mixture = 0.5 * before[:12] + 0.5 * embedded
    torch.testing.assert_close(after[:12], mixture / mixture.norm(dim=1, keepdim=True))
    assert torch.equal(after[12:], before[12:])
    assert step.losses["crd"].value.isfinite()


def test_the_normalisers_are_fixed_by_the_first_batch() -> None:
    method = crd()
    batch = make_batch()
    with torch.no_grad():
        method(batch)
        first = method.normalisers.clone()
        method(make_batch(seed=2))
    assert torch.equal(method.normalisers, first)
    # At the start cosines are near 0, so that the mean of the exponentials is near 1.
    assert 40 < float(first[0]) < 160
    resumed = crd()
    resumed.load_state_dict(method.state_dict())
    with torch.no_grad():
        resumed(make_batch(seed=3))
    assert torch.equal(resumed.normalisers, first)


def test_evaluation_remembers_nothing() -> None:
    method = crd().eval()
    before = method.student_bank.rows.clone()
    method(make_batch())
    method.statistics(make_batch())
    assert torch.equal(method.student_bank.rows, before)


def test_both_embeddings_learn() -> None:
    method = crd()
    method(make_batch()).total.backward()
    for embedding in (method.student_embedding, method.teacher_embedding):
        assert float(embedding.linear.weight.grad.abs().sum()) > 0


def test_held_out_samples_are_no_negatives() -> None:
    method = crd()
    labels = torch.arange(80) % 5
    labels[40:] = -1
    method.prepare(labels, num_epochs=1)
    assert int(negatives_of(method, torch.arange(40), 500).max()) < 40


def test_preparation_comes_first() -> None:
    method = crd()
    method.negatives = None
    with pytest.raises(RuntimeError, match="call prepare"):
        method(make_batch())


def test_noisy_copies_add_a_term_each() -> None:
    """Without noise all copies are the teacher, so three of them make four times the loss."""
    noisy = crd("crd-of-copies")
    noise = dataclasses.replace(noisy.teacher.noise, noise_share=0.0)
    noisy.teachers = (dataclasses.replace(noisy.teacher, noise=noise),)
    noisy.eval()
    batch = make_batch()
    loss = noisy(batch).losses["crd"].value
    torch.testing.assert_close(loss, 4 * plain_crd(noisy, batch))


def test_the_combined_form_of_views_adds_distillation_and_branches_once() -> None:
    """CE + KL to the ensemble + 0.8 CRD of the mean feature + the branches' own losses."""
    method = crd("crd-of-views-combined")
    step = method(make_batch())
    assert [(name, step.losses[name].weight) for name in ("ce", "kd", "crd")] == [
        ("ce", 1.0),
        ("kd", 1.0),
        ("crd", 0.8),
    ]
    own = set(build("student")(make_batch()).losses) - {"ce", "kd"}
    assert set(step.losses) == {"ce", "kd", "crd"} | own
    assert float(step.metrics["effective_kd_weight"]) == 1.0
