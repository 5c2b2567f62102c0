"""Branches: small heads on the frozen teacher's pooled feature, all N computed as one batched product.

Shape legend: B = batch, N = branches, D = feature width, C = classes. For branch i, without any activation:

    x_i = dropout(F, p_i);   view feature F_i = BatchNorm(W_i x_i + b_i);   view logits z_i = V_i F_i + c_i
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methods.angular.settings import AngularViewsSettings, NormInit, WeightInit
from methods.base import Signals
from methods.losses import in_full_precision


class BranchNorm(nn.BatchNorm1d):
    """Batch norm of every branch's units, ``[B, N*D]``.

    A training batch of one sample has no variance: it is normalised with the running statistics, which it
    leaves unchanged.
    """

    def forward(self, units: Tensor) -> Tensor:
        if not self.training or len(units) > 1:
            return super().forward(units)
        return F.batch_norm(units, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


class ViewHeads(nn.Module):
    """N linear heads with their own dropout rate, batch norm and classifier; computed in float32.

    Parameters per branch: D^2 + D + 2D + DC + C. Fresh heads are empty: load weights or call ``initialise``.
    """

    dropout_rates: Tensor

    def __init__(self, num_features: int, num_classes: int, dropout_rates: tuple[float, ...]) -> None:
        super().__init__()
        num_branches = len(dropout_rates)
        # Shapes, in order: [N, D, D], [N, D], [N, C, D], [N, C].
        self.weight = nn.Parameter(torch.zeros(num_branches, num_features, num_features))
        self.bias = nn.Parameter(torch.zeros(num_branches, num_features))
        self.norm = BranchNorm(num_branches * num_features)
        self.classifier_weight = nn.Parameter(torch.zeros(num_branches, num_classes, num_features))
        self.classifier_bias = nn.Parameter(torch.zeros(num_branches, num_classes))
        self.register_buffer("dropout_rates", torch.tensor(dropout_rates), persistent=False)

    @in_full_precision
    def forward(self, pooled_BD: Tensor) -> tuple[Tensor, Tensor]:
        """Views of a pooled feature: ``(view_pooled [B, N, D], view_logits [B, N, C])``."""
        units_NBD = torch.baddbmm(self.bias[:, None], self._dropped(pooled_BD), self.weight.transpose(1, 2))
        normed_BX = self.norm(units_NBD.transpose(0, 1).flatten(1))
        features_BND = normed_BX.unflatten(1, self.bias.shape)
        logits_NBC = torch.baddbmm(
            self.classifier_bias[:, None],
            features_BND.transpose(0, 1),
            self.classifier_weight.transpose(1, 2),
        )
        return features_BND, logits_NBC.transpose(0, 1)

    def _dropped(self, pooled_BD: Tensor) -> Tensor:
        """The input of each branch, ``[N, B, D]``, with the branch's own share of entries dropped."""
        inputs_NBD = pooled_BD.expand(len(self.bias), -1, -1)
        if not self.training:
            return inputs_NBD
        kept_N11 = 1 - self.dropout_rates[:, None, None]
        mask_NBD = torch.rand_like(inputs_NBD, memory_format=torch.contiguous_format) < kept_N11
        return inputs_NBD * mask_NBD / kept_N11

    @torch.no_grad()
    def initialise(self, init: WeightInit, bn_init: NormInit) -> None:
        """Draw the first weights. Biases start at 0: batch norm removes those before it anyway."""
        if init == "stacked_qr":
            self.weight.copy_(_stacked_qr(*self.bias.shape))
        for branch in range(len(self.weight)):
            if init == "orthogonal":
                nn.init.orthogonal_(self.weight[branch])
            nn.init.xavier_uniform_(self.classifier_weight[branch])
            if bn_init == "released":
                self._draw_norm(branch)

    def _draw_norm(self, branch: int) -> None:
        """One scalar for all weights of the branch's batch norm and one for its biases, drawn independently."""
        for parameter in (self.norm.weight, self.norm.bias):
            draw = torch.normal(1 - 0.1 * branch, 0.1 + 0.1 * branch, size=())
            parameter.view_as(self.bias)[branch].fill_(draw)


def build_heads(settings: AngularViewsSettings, *, num_features: int, num_classes: int) -> ViewHeads:
    """Empty heads of the shape and dropout that the settings ask for."""
    return ViewHeads(num_features, num_classes, settings.dropout_rates)


def with_views(signals: Signals, heads: nn.Module) -> Signals:
    """The teacher's signals with the views of ``heads`` added. Gradients reach the heads."""
    view_pooled_BND, view_logits_BNC = heads(signals.pooled)
    return signals._replace(view_pooled=view_pooled_BND, view_logits=view_logits_BNC)


def _stacked_qr(num_branches: int, num_features: int) -> Tensor:
    """The release's weights ``[N, D, D]``: for each output unit, the rows of the N branches are orthonormal."""
    if num_branches > num_features:
        raise ValueError(
            f"init 'stacked_qr' needs at most as many branches as features, "
            f"got num_branches={num_branches} with {num_features} features"
        )
    orthonormal_DDN: Tensor = torch.linalg.qr(torch.randn(num_features, num_features, num_branches)).Q
    return orthonormal_DDN.permute(2, 0, 1)
