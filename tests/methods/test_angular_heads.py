"""The batched branch heads against separate layers, their parameter counts, dropout and initialisation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from methods.angular.heads import ViewHeads

PARAMETERS_PER_BRANCH = {128: 29_668, 256: 92_004, 512: 314_980, 2048: 4_405_348}


def make_heads(num_branches: int = 3, *, dropout: float = 0.0, init: str = "orthogonal") -> ViewHeads:
    heads = ViewHeads(6, 4, (dropout,) * num_branches)
    torch.manual_seed(0)
    heads.initialise(init, "released")
    return heads


def single_branch(heads: ViewHeads, branch: int) -> tuple[nn.Linear, nn.BatchNorm1d, nn.Linear]:
    """The branch as three ordinary layers with the same weights."""
    num_features, num_classes = heads.weight.shape[-1], heads.classifier_bias.shape[-1]
    linear = nn.Linear(num_features, num_features)
    norm, classifier = nn.BatchNorm1d(num_features), nn.Linear(num_features, num_classes)
    with torch.no_grad():
        linear.weight.copy_(heads.weight[branch])
        linear.bias.copy_(heads.bias[branch])
        norm.weight.copy_(heads.norm.weight.view_as(heads.bias)[branch])
        norm.bias.copy_(heads.norm.bias.view_as(heads.bias)[branch])
        classifier.weight.copy_(heads.classifier_weight[branch])
        classifier.bias.copy_(heads.classifier_bias[branch])
    return linear, norm, classifier


@pytest.mark.parametrize("num_features", PARAMETERS_PER_BRANCH)
def test_parameter_counts(num_features: int) -> None:
    with torch.device("meta"):
        heads = ViewHeads(num_features, 100, (0.2,) * 5)
    assert sum(p.numel() for p in heads.parameters()) == 5 * PARAMETERS_PER_BRANCH[num_features]


@pytest.mark.parametrize("num_branches", [1, 2, 5])
def test_the_batched_product_equals_separate_branches(num_branches: int) -> None:
    heads = make_heads(num_branches)
    nn.init.normal_(heads.bias)
    nn.init.normal_(heads.classifier_bias)
    branches = [single_branch(heads, branch) for branch in range(num_branches)]
    for training in (True, True, False):
        pooled = torch.randn(8, 6)
        heads.train(training)
        features, logits = heads(pooled)
        for branch, (linear, norm, classifier) in enumerate(branches):
            expected = norm.train(training)(linear(pooled))
            torch.testing.assert_close(features[:, branch], expected, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(logits[:, branch], classifier(expected), atol=1e-5, rtol=1e-5)
            running = heads.norm.running_var.view_as(heads.bias)[branch]
            torch.testing.assert_close(running, norm.running_var, atol=1e-6, rtol=1e-5)


def test_each_branch_drops_its_own_share_and_keeps_the_mean() -> None:
    rates = (0.0, 0.2, 0.5)
    heads = ViewHeads(50, 2, rates).train()
    torch.manual_seed(0)
    dropped = heads._dropped(torch.ones(2000, 50))
    assert dropped.eq(0).float().mean(dim=(1, 2)).tolist() == pytest.approx(rates, abs=0.01)
    assert dropped.mean(dim=(1, 2)).tolist() == pytest.approx([1.0] * 3, abs=0.02)
    assert not torch.equal(dropped[1, 0] == 0, dropped[1, 1] == 0)
    assert torch.equal(heads.eval()._dropped(torch.ones(4, 50)), torch.ones(3, 4, 50))


def test_a_training_batch_of_one_uses_and_keeps_the_running_statistics() -> None:
    heads = make_heads()
    heads(torch.randn(32, 6))
    before = {name: buffer.clone() for name, buffer in heads.named_buffers()}
    pooled = torch.randn(1, 6)
    in_training = heads(pooled)
    assert all(torch.equal(before[name], buffer) for name, buffer in heads.named_buffers())
    assert all(torch.equal(a, b) for a, b in zip(in_training, heads.eval()(pooled), strict=True))


def test_orthogonal_init_makes_every_branch_orthogonal() -> None:
    heads = make_heads()
    for weight in heads.weight:
        torch.testing.assert_close(weight @ weight.T, torch.eye(6), atol=1e-5, rtol=0)
    assert not torch.allclose(heads.weight[0], heads.weight[1])


def test_stacked_qr_makes_the_branches_of_a_unit_orthonormal() -> None:
    heads = make_heads(init="stacked_qr")
    rows = heads.weight.transpose(0, 1)
    torch.testing.assert_close(rows @ rows.transpose(1, 2), torch.eye(3).expand(6, 3, 3), atol=1e-5, rtol=0)
    assert not torch.allclose(heads.weight[0] @ heads.weight[0].T, torch.eye(6), atol=0.1)
    with pytest.raises(ValueError, match="num_branches=7 with 6 features"):
        ViewHeads(6, 4, (0.2,) * 7).initialise("stacked_qr", "standard")


def test_first_batch_norm_is_one_draw_per_branch() -> None:
    torch.manual_seed(0)
    draws: list[Tensor] = []
    for _ in range(500):
        heads = ViewHeads(2, 2, (0.2,) * 5)
        heads.initialise("orthogonal", "released")
        norm = heads.norm.weight.view(5, 2)
        assert torch.equal(norm[:, 0], norm[:, 1])
        assert not torch.equal(heads.norm.bias.view(5, 2), norm)
        draws.append(norm[:, 0].detach())
    weights = torch.stack(draws)
    assert weights.mean(0).tolist() == pytest.approx([1, 0.9, 0.8, 0.7, 0.6], abs=0.08)
    assert weights.std(0).tolist() == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5], rel=0.15)


def test_standard_batch_norm_is_left_alone() -> None:
    heads = ViewHeads(4, 2, (0.2,) * 3)
    heads.initialise("orthogonal", "standard")
    assert heads.norm.weight.eq(1).all()
    assert heads.norm.bias.eq(0).all()
