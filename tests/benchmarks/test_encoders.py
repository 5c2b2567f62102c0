"""The comparison of encoders: what is counted is exact, and what is timed is set against each other in pairs."""

from __future__ import annotations

from collections.abc import Callable

import encoders
import pytest
import torch
from encoders import ENCODER_ONLY, MAGNET, SHARED, TOWERS, System

CPU = torch.device("cpu")
VISION, WORDS, WIDTH, LAYERS = 65, 12, 96, 4
"""Tokens of a picture (with the class token) and of a sentence, and the small encoder."""


def small(system: System) -> encoders.Size:
    task, _ = encoders.example(CPU)
    return encoders.size_of(system.build("small", task).network, task)


def test_two_towers_have_as_many_parameters_and_save_the_attention_between_them() -> None:
    single, dual = small(SHARED), small(TOWERS)
    assert single.parameters == dual.parameters
    between = (VISION + WORDS) ** 2 - VISION**2 - WORDS**2
    assert single.multiply_adds - dual.multiply_adds == LAYERS * 2 * WIDTH * between


def test_a_single_encoder_is_smaller_than_two_that_are_fused() -> None:
    """More multiply-adds all the same: the first stages of a Swin are narrow."""
    single, fused = small(SHARED), small(MAGNET)
    assert single.parameters < fused.parameters / 2
    assert single.without_tables == single.parameters - 34 * WIDTH


def test_pairs_are_set_against_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def seconds(work: Callable[[], object], repeats: int, device: torch.device) -> float:
        network = work.network if isinstance(work, encoders.Passes) else work.method.network  # type: ignore[attr-defined]
        return 0.002 if len(network.mask_decoder.layers) else 0.001

    monkeypatch.setattr(encoders, "seconds", seconds)
    monkeypatch.setattr(encoders, "NUM_WARM", 1)
    lines = list(encoders.compare(ENCODER_ONLY, TOWERS, CPU, num_rounds=2))
    assert [item.against for item in lines] == ["Shared-RIS on two towers"] * 4
    latency, step = lines[2:]
    assert "latency" in latency.name
    assert "training step" in step.name
    for item in (latency, step):
        assert (item.ours, item.theirs, item.ratio, item.note) == (1.0, 2.0, 2.0, "50 % less")
    assert lines[0].ratio > 1


@pytest.mark.parametrize(("ratio", "words"), [(1.6, "38 % less"), (1.0, "0 % less"), (0.8, "25 % more")])
def test_ratios_in_words(ratio: float, words: str) -> None:
    assert encoders.told(ratio) == words


def test_a_timed_step_trains() -> None:
    task, batch = encoders.example(CPU)
    method = ENCODER_ONLY.build("small", task)
    before = {name: value.clone() for name, value in method.named_parameters()}
    encoders.Steps(method, batch, CPU)()
    assert all(not torch.equal(value, before[name]) for name, value in method.named_parameters())
