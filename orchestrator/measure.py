"""How large and how quick a trained network is: what accuracy is weighed against."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn

from methods.models.count import count
from methods.models.tapped import evaluating

__all__ = ["latency_ms", "size_and_speed"]

LATENCY_ROUNDS = 5
LATENCY_RUNS = 10
WARM_UP_RUNS = 3
MOST_MS = 3000.0
"""A large network is not measured for longer: fewer rounds have to do."""


def size_and_speed(network: nn.Module, task: Any, device: torch.device) -> dict[str, float]:
    """Metrics ``num_parameters``, ``macs`` (multiply-adds of one sample) and ``latency_ms`` of one sample on ``device``."""
    size = count(network, task)
    return {
        "num_parameters": float(size.parameters),
        "macs": float(size.macs),
        "latency_ms": latency_ms(network, task, device),
    }


@torch.no_grad()
def latency_ms(network: nn.Module, task: Any, device: torch.device) -> float:
    """Milliseconds for one image: the mean of ten runs, in the quickest of five rounds.

    The quickest, because whatever else runs on the machine only ever adds to it. It is a property of this device, with
    as many threads as the worker has, and not of the artifact: no key depends on it.
    """
    example = task.example(device)
    with evaluating(network):
        for _ in range(WARM_UP_RUNS):
            network(*example)
        rounds = [_round(network, example, device)]
        while len(rounds) < LATENCY_ROUNDS and sum(rounds) * LATENCY_RUNS < MOST_MS:
            rounds.append(_round(network, example, device))
        return min(rounds)


def _round(network: nn.Module, example: tuple[Any, ...], device: torch.device) -> float:
    _wait(device)
    started = time.perf_counter()
    for _ in range(LATENCY_RUNS):
        network(*example)
    _wait(device)
    return (time.perf_counter() - started) / LATENCY_RUNS * 1000


def _wait(device: torch.device) -> None:
    """A GPU is handed work; the clock is read when it is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
