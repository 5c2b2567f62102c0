"""First weights of our own networks, drawn from torch's global generator (seeded by the caller)."""

from __future__ import annotations

from torch import nn


def initialise(network: nn.Module) -> None:
    """Kaiming normal (fan-out) for convolutions, 1 and 0 for batch norm; linear layers keep torch's default."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
