"""The benchmark's parts work, at the smallest size. What they measure is not asserted."""

from __future__ import annotations

import copy
from dataclasses import replace

import loop_cost
import overhead
import pytest
import sweep_cost
import torch


@pytest.mark.parametrize("case", loop_cost.CASES, ids=lambda case: case.model)
def test_both_loops_end_with_the_same_weights(case: loop_cost.LoopCase) -> None:
    small = replace(case, num_training=150, num_validation=20, epochs=2)
    data, settings, network = (
        loop_cost.make_data(small),
        loop_cost.make_settings(small),
        loop_cost.make_method(small).model,
    )
    bare, ours = copy.deepcopy(network), copy.deepcopy(network)
    loop_cost.train_bare(small, data, settings, bare)
    loop_cost.train_ours(small, data, settings, ours)
    for name, weights in bare.state_dict().items():
        assert torch.equal(weights, ours.state_dict()[name]), name
    assert any(
        not torch.equal(weights, network.state_dict()[name]) for name, weights in bare.state_dict().items()
    )


def test_loop_table_has_a_line_per_network(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = tuple(replace(case, num_training=70, num_validation=10, epochs=1) for case in loop_cost.CASES)
    monkeypatch.setattr(loop_cost, "CASES", small)
    overhead.main(["--quick", "--only", "loop"])
    lines = capsys.readouterr().out.splitlines()
    assert [case.model for case in small] == [
        line.split(" | ")[0].strip("| ") for line in lines if "**" in line
    ]
    assert "cores" in lines[-2]


def test_a_failed_sweep_says_why() -> None:
    broken = sweep_cost.System(title="broken", arguments=("nonsense",))
    with pytest.raises(RuntimeError, match="invalid choice: 'nonsense'"):
        sweep_cost.run_sweep(broken, num_trials=1, trial_seconds=0.0)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("system", [sweep_cost.OURS, sweep_cost.PLAIN[2]], ids=["ours", "plain"])
def test_a_sweep_is_timed(system: sweep_cost.System) -> None:
    run = sweep_cost.run_sweep(system, num_trials=2, trial_seconds=0.2)
    assert run.body_seconds >= 0.4
    assert run.seconds > run.before_ray_seconds + run.ray_seconds
    assert run.peak_bytes >= run.resident_bytes * 0.9 > 1e8


def test_memory_is_the_difference_per_trial() -> None:
    cost = sweep_cost.MemoryCost(
        system=sweep_cost.OURS, few_bytes=1_000_000, many_bytes=1_640_000, num_more=64
    )
    assert cost.kilobytes_per_trial == 10.0
