"""The files of the published size, made small: from made checkpoints and annotation files through a whole stage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from grounding_samples import TASK
from refer_files import write_original
from safetensors.torch import save_file
from torch import Tensor, nn

from methods import BUILTIN
from methods.grounding.clip_encoder import clip_config
from methods.grounding.multiway import MultiwayEncoder
from methods.grounding.swin_bert import build_bert, build_swin
from orchestrator.document import apply_overrides, read_document
from orchestrator.facts import gather_facts
from orchestrator.plan import PlannedStage, Planner, Point
from orchestrator.reader import parse_experiment
from orchestrator.spec import RunSettings
from orchestrator.stage import StageRunner, load_source
from orchestrator.store import Store

FOLDER = Path(__file__).parents[3] / "configs"
NUM_WORDS = 10
"""Five special ones, and those of the made sentences."""
ROWS = 24
"""Words of the made checkpoints. More than the made sentences have."""
SIZES: dict[str, dict[str, Any]] = {
    "latent_vg": {"patch_size": 6, "width": 24, "num_layers": 2, "num_heads": 2, "channels": 8, "num_concepts": 8, "vocabulary_rows": ROWS},
    "shared_ris": {"patch_size": 6, "width": 24, "num_layers": 3, "num_heads": 2, "channels": 8, "taps": "[1, 2, 3]", "vocabulary_rows": ROWS},
    "cm_masksd": {"patch_size": 8, "vision_width": 16, "vision_layers": 1, "vision_heads": 2, "text_width": 16, "text_layers": 1, "text_heads": 2,
                  "shared_width": 16, "table_image_size": 16, "table_text_length": 17, "channels": 8, "decoder_layers": 1, "decoder_heads": 2},
    "magnet": {"patch_size": 2, "swin_width": 8, "swin_depths": "[1, 1, 1, 1]", "swin_heads": "[1, 1, 1, 1]", "window_size": 3, "bert_width": 16,
               "bert_layers": 4, "bert_heads": 2, "table_text_length": 20, "channels": 32, "decoder_heads": 2, "decoder_layers": 1, "query_layers": 3,
               "predictor_layers": 1, "predictor_heads": 2},
}  # fmt: skip
COMMON = {
    "data.tokenizer": "words", "data.test_split": "test", "data.image_size": 48, "run.workers": 1, "run.gpus_per_worker": 0, "stages.grounder.train.epochs": 1,
    "stages.grounder.train.batch_size": 2, "stages.grounder.train.learning_rate": 1e-30,
}  # fmt: skip
"""Nothing is learnt, so that the artifact still holds the weights of the checkpoint."""


def beit3(settings: Any, folder: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """timm's file of the vision part, of pictures half as large."""
    encoder = MultiwayEncoder(settings, image_size=24, text_length=20, vocabulary_size=ROWS)
    weights = {name.replace("layers.", "blocks.").replace(".vision.", "."): value for name, value in encoder.state_dict().items() if ".vision." in name}  # fmt: skip
    others = {"pos_embed": encoder.vision_positions, "cls_token": encoder.cls_token}
    others |= {f"patch_embed.proj.{kind}": getattr(encoder.patch_embed, kind) for kind in ("weight", "bias")}
    weights |= {name: value.detach() for name, value in others.items() if value is not None}
    save_file(weights, folder / "beit3.safetensors")
    expected = {f"encoder.layers.{number}.{expert}.attn.qkv.weight": weights[f"blocks.{number}.attn.qkv.weight"] for number in (0, 1) for expert in ("vision", "language")}  # fmt: skip
    return {"checkpoint": str(folder / "beit3.safetensors")}, expected


def clip(settings: Any, folder: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    from transformers import CLIPModel

    model = CLIPModel(clip_config(settings, task_of(settings)))
    model.save_pretrained(folder / "clip")
    return {"checkpoint": str(folder / "clip")}, under("encoder.clip.", model)


def swin_and_bert(settings: Any, folder: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    image, text = build_swin(settings, task_of(settings)), build_bert(settings, task_of(settings))
    save_file(image.state_dict(), folder / "swin.safetensors")
    text.save_pretrained(folder / "bert")
    expected = under("encoder.stages.0.image.", image.layers[0]) | under("encoder.stages.3.text.0.", text.encoder.layer[3])  # fmt: skip
    return {"swin_checkpoint": str(folder / "swin.safetensors"), "bert_checkpoint": str(folder / "bert")}, expected  # fmt: skip


def under(prefix: str, module: nn.Module) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in module.state_dict().items()}


def task_of(settings: Any) -> Any:
    """The smallest task in which the made sentences fit; tables of published encoders have their own sizes."""
    return replace(TASK, vocabulary_size=NUM_WORDS, text_length=settings.table_text_length)


MAKERS: dict[str, Callable[[Any, Path], tuple[dict[str, str], dict[str, Tensor]]]] = {
    "latent_vg": beit3, "shared_ris": beit3, "cm_masksd": clip, "magnet": swin_and_bert,
}  # fmt: skip


@pytest.fixture(params=MAKERS)
def name(request: pytest.FixtureRequest) -> str:
    chosen: str = request.param
    return chosen


@pytest.fixture
def prepared(name: str, tmp_path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Overrides that make the file small and name its data and checkpoints; and weights that have to arrive."""
    collection = read_document(FOLDER / f"{name}.yaml")["data"]["collection"]
    sizes = {f"stages.grounder.{setting}": value for setting, value in SIZES[name].items()}
    sources = BUILTIN.method(name).weight_sources
    root = write_original(tmp_path / "data", collection)
    small = {
        **COMMON,
        **sizes,
        "data.root": root,
        **{f"stages.grounder.{setting}": '""' for setting in sources},
    }
    torch.manual_seed(5)
    settings = final_stage(name, small).spec.settings
    files, expected = MAKERS[name](settings, tmp_path)
    return {**small, **{f"stages.grounder.{setting}": path for setting, path in files.items()}}, expected


def test_it_trains_from_local_checkpoints(
    name: str,
    prepared: tuple[dict[str, Any], dict[str, Tensor]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("orchestrator.stage.size_and_speed", lambda *arguments: {})
    overrides, expected = prepared
    stage, store = final_stage(name, overrides), Store(str(tmp_path / "runs"))
    rows: list[dict[str, float]] = []
    runner = StageRunner(store, BUILTIN, RunSettings(), lambda section: section.source.load())
    runner.execute(stage, rows.append)
    assert [row["epoch"] for row in rows] == [1]
    source = load_source(store, stage.key, BUILTIN)
    assert len(expected) > 3
    for path, tensor in expected.items():
        assert torch.allclose(source.weights[path], tensor, rtol=0, atol=1e-20), path
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    assert source.teacher().network is not None  # an artifact needs no checkpoint any more


def test_baselines_start_from_the_same_weights(name: str, prepared: tuple[dict[str, Any], Any]) -> None:
    own = final_stage(name, prepared[0]).spec.settings
    for label in read_document(FOLDER / f"{name}.yaml")["baselines"]:
        settings = final_stage(name, prepared[0], label).spec.settings
        for setting in (*BUILTIN.method(name).weight_sources, "encoder_lr_factor", *SIZES[name]):
            assert getattr(settings, setting) == getattr(own, setting), (label, setting)


def final_stage(name: str, overrides: dict[str, Any], label: str | None = None) -> PlannedStage:
    document = apply_overrides(read_document(FOLDER / f"{name}.yaml"), [f"{path}={value}" for path, value in overrides.items()])  # fmt: skip
    spec = parse_experiment(document, BUILTIN)
    return Planner(spec, gather_facts(spec)).trial(Point(label=label), 0).final
