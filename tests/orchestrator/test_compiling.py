"""``train.compile``: compiled networks train, resume and are kept like others; where they cannot be, that is said at once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from experiment_cases import planner_of, problems_of
from safetensors.torch import load

from methods import BUILTIN
from methods.models.tapped import Tapped
from orchestrator import compiling
from orchestrator.errors import ConfigurationError
from orchestrator.packing import pack_signature
from orchestrator.plan import PlannedStage, Point, Trial
from orchestrator.spec import RunSettings
from orchestrator.stage import StageRunner
from orchestrator.store import Store
from orchestrator.training import Row, StopTraining
from orchestrator.workers import SOLO, TorchWorkers, Workers

TRAIN = {"epochs": 2, "batch_size": 256}
"""One batch an epoch: each size of batch is compiled by itself."""
STAGES: dict[str, Any] = {
    "teacher": {"method": "supervised", "model": "tiny_mlp", "train": {"epochs": 0}},
    "student": {"method": "kd", "model": "tiny_mlp", "teacher": "$teacher", "train": TRAIN},
}
COMPILED = {**STAGES["student"], "train": {**TRAIN, "compile": True}}


def trial_with(student: dict[str, Any], **changes: Any) -> Trial:
    stages = {**STAGES, "student": student}
    planner = planner_of(
        {"stages": stages, "baselines": {}, "search/space": {}, "data/fraction": 0.1, **changes}
    )
    return planner.trial(Point(), 0)


def runner_in(folder: Path, workers: Workers = SOLO) -> StageRunner:
    run = RunSettings(checkpoint_seconds=0, signals="live")
    return StageRunner(Store(str(folder)), BUILTIN, run, lambda data: data.source.load(), workers)


def made(runner: StageRunner, trial: Trial) -> tuple[bytes, list[Row]]:
    """Weights and epochs of the last stage, trained from where a checkpoint may be."""
    for stage in trial.stages:
        runner.execute(stage, lambda row: None)
    rows = json.loads(runner.store.read(trial.key, "history.json"))
    return runner.store.read(trial.key, "weights.safetensors"), rows


@pytest.fixture
def group(tmp_path: Path) -> Iterator[TorchWorkers]:
    """A group of one worker, which wraps what it trains like one of many."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    yield TorchWorkers.current(torch.device("cpu"))
    dist.destroy_process_group()


@pytest.mark.slow
def test_compiled_students_train_resume_and_are_kept_like_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group: TorchWorkers
) -> None:
    monkeypatch.setenv(compiling.CACHE_VARIABLE, str(tmp_path / "cache"))
    plain, trial = trial_with(STAGES["student"]), trial_with(COMPILED)
    expected, rows = made(runner_in(tmp_path / "plain"), plain)
    weights, compiled_rows = made(runner_in(tmp_path / "whole"), trial)
    for name, tensor in load(expected).items():
        torch.testing.assert_close(load(weights)[name], tensor, rtol=1e-3, atol=1e-4)
    assert compiled_rows[0]["train_kd"] == pytest.approx(rows[0]["train_kd"], rel=1e-4)
    code = set((tmp_path / "cache").rglob("*.so"))
    assert code

    interrupted = runner_in(tmp_path / "interrupted")
    interrupted.execute(trial.stages[0], lambda row: None)
    with pytest.raises(StopTraining):
        interrupted.execute(trial.final, lambda row: row["epoch"] == 1)
    kept = interrupted.store.checkpoints(trial.key).load()
    assert kept is not None
    assert [name for name in kept["method"] if "orig_mod" in name] == []
    assert made(interrupted, trial)[0] == weights
    assert made(runner_in(tmp_path / "group", group), trial)[0] == weights
    assert set((tmp_path / "cache").rglob("*.so")) == code  # warmed once for all of them


def test_compiled_stages_have_keys_of_their_own() -> None:
    assert trial_with(STAGES["student"]).key != trial_with(COMPILED).key
    spelt_out = {**STAGES["student"], "train": {**TRAIN, "compile": False}}
    assert trial_with(STAGES["student"]).key == trial_with(spelt_out).key
    recordings = [trial_with(student).final.signals for student in (STAGES["student"], COMPILED)]
    assert recordings[0] != recordings[1]  # a compiled teacher says something else in the last bit


def test_compiled_stages_are_not_packed() -> None:
    trial = trial_with(COMPILED)
    assert pack_signature(trial, lambda key: False) is None
    assert pack_signature(trial, lambda key: True) is not None  # nothing is left to compile
    with pytest.raises(ConfigurationError, match=r"stages.student.train.compile is true and run.pack is 4"):
        trial_with(COMPILED, **{"run/pack": 4})


def compile_stage(stage: PlannedStage) -> None:
    task = stage.data.source.load().task()
    model = BUILTIN.build_model(stage.spec.model, task)  # type: ignore[arg-type]
    method = BUILTIN.method("supervised")
    compiling.compile_networks(
        "student", method(method.Settings(), task=task, model=model, inputs={}), [], num_threads=1
    )


def test_a_node_without_a_compiler_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import torch._inductor.config as inductor

    monkeypatch.setenv(compiling.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(inductor.cpp, "cxx", ("no-such-compiler",))
    compiling._why_not.cache_clear()
    expected = r"stages.student.train.compile is true, but torch cannot compile for cpu on .*install a C\+\+ compiler"
    try:
        with pytest.raises(ConfigurationError, match=expected):
            compile_stage(trial_with(COMPILED).final)
    finally:
        compiling._why_not.cache_clear()


def test_a_cache_folder_that_cannot_be_made_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(compiling.CACHE_VARIABLE, str(tmp_path / "file" / "cache"))
    with pytest.raises(ConfigurationError, match="set TORCHINDUCTOR_CACHE_DIR"):
        compile_stage(trial_with(COMPILED).final)


def test_the_cache_is_the_users_and_not_in_the_storage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(compiling.CACHE_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert compiling.cache_folder() == Path("/somewhere/stillhouse/compiled")


def test_networks_that_cannot_be_compiled_are_refused_in_the_plan() -> None:
    stages = {"student": {"method": "latent_vg", "train": {"compile": True}}}
    changes = {"data": {"dataset": "shapes_ref"}, "stages": stages, "baselines": {}, "search/space": {}}
    problems = problems_of({**changes, "search/objective": {"maximize": "student.miou"}})
    assert any("stages.student.train.compile: the networks of LatentVG" in problem for problem in problems)


def test_passes_in_another_mode_stay_as_they_are() -> None:
    torch.manual_seed(0)
    network = Tapped(torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)), "1")
    images = torch.rand(5, 3)
    expected = network.eval()(images)
    network.compile_passes(in_training=True)
    assert all(map(torch.equal, network(images), expected))
    assert list(network.state_dict()) == [
        "network.0.weight",
        "network.0.bias",
        "network.1.weight",
        "network.1.bias",
    ]
