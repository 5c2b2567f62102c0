"""Equal work has equal keys, different work different ones, and a golden key makes an accidental change loud."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from experiment_cases import ABSENT, FACTS, document, key_of, planner_of, spec_of, trial_of

from methods import BUILTIN
from methods.supervised import Supervised
from orchestrator.errors import ConfigurationError
from orchestrator.facts import gather_facts
from orchestrator.keys import content_key
from orchestrator.plan import Point

GOLDEN = {
    "teacher": "da751cd5a3a5461e28da021715017fab",
    "views": "e4289615fd2387f946a3c064a8869fbe",
    "student": "a8f823d7090d6f746250c4206d7a5f20",
}
"""Keys of the stages of ``DOCUMENT`` with ``FACTS``. If they change, every stored artifact is trained again: raise a
method's ``version`` on purpose, or restore what went into the content."""

STAGE = {"method": "angular_kd", "model": "mini_cnn", "teacher": "$views", "train": {"epochs": 20}}


def test_golden_keys() -> None:
    assert {stage.name: stage.key for stage in trial_of().stages} == GOLDEN


EQUAL: list[tuple[str, dict[str, Any]]] = [
    ("defaults spelt out", {"stages/student/kd_weight": 1.0, "stages/student/heads": "joint", "stages/student/seed": "trial"}),
    ("whole number for a float", {"stages/student/kd_weight": 1, "stages/student/train": {"epochs": 20.0, "learning_rate": "5e-2"}}),
    ("long form of the model", {"stages/student/model": {"name": "mini_cnn", "pretrained": False}}),
    ("order of keys", {"stages/student": dict(reversed(STAGE.items()))}),
    ("run section", {"run": {"storage": "elsewhere", "workers": 4, "lease_seconds": 5}}),
    ("search", {"search/seeds": 5, "search/space": {}, "search/algorithm": "random"}),
    ("baselines", {"baselines": {}}),
    ("name", {"name": "other"}),
    ("power of another schedule", {"stages/student/train": {"epochs": 20, "power": 2.0}}),
    ("objective without best", {"stages/student/train": {"epochs": 20, "objective": "loss"}}),
    ("another stage beside it", {"stages": {"spare": {"method": "supervised", "model": "resnet8"}, **document()["stages"]},
                                 "baselines/spare": {"student": {"method": "kd", "teacher": "$spare"}}}),
]  # fmt: skip


@pytest.mark.parametrize("changes", [case[1] for case in EQUAL], ids=[case[0] for case in EQUAL])
def test_equal_work_has_equal_keys(changes: dict[str, Any]) -> None:
    assert {stage.name: stage.key for stage in trial_of(changes).stages} == GOLDEN


@pytest.mark.parametrize(
    ("stage", "inactive", "changes"),
    [
        (
            "views",
            {"feature_inter_weight": 0, "logit_inter_weight": 0},
            {"margin": 0.4, "contrast_temperature": 1},
        ),
        ("views", {"constraint": "hinge"}, {"contrast_temperature": 1, "extra_branch_division": False}),
        ("views", {"num_branches": 1}, {"logit_intra_weight": 4.0, "dropout_high": 0.9}),
        ("views", {"preset": "released"}, {"dropout_low": 0.0, "init": "stacked_qr"}),
        ("student", {"kd_weight": 0}, {"view_weight": 0.3}),
        ("student", {"heads": "frozen"}, {"detach_target": False}),
        (
            "student",
            {"train": {"schedule": "cosine"}},
            {"train": {"schedule": "cosine", "milestones": [0.1], "decay": 0.5}},
        ),
        ("student", {"train": {"optimizer": "adamw"}}, {"train": {"optimizer": "adamw", "momentum": 0.1}}),
        (
            "student",
            {"train": {"epochs": 0}},
            {"train": {"epochs": 0, "learning_rate": 1.0, "batch_size": 8}},
        ),
    ],
)
def test_a_setting_without_effect_is_not_in_the_key(
    stage: str, inactive: Mapping[str, Any], changes: Mapping[str, Any]
) -> None:
    before = {f"stages/{stage}/{name}": value for name, value in inactive.items()}
    after = before | {f"stages/{stage}/{name}": value for name, value in changes.items()}
    assert key_of("student", before) == key_of("student", after)
    assert key_of("student", before) != GOLDEN["student"]


DIFFERENT: list[tuple[str, str, Any]] = [
    ("teacher", "label_smoothing", 0.1), ("teacher", "model", "tiny_mlp"), ("teacher", "seed", 1),
    ("teacher", "seed", "trial"), ("teacher", "train", {"epochs": 21}),
    ("views", "num_branches", 3), ("views", "margin", 0.1), ("views", "temperature", 2), ("views", "preset", "released"),
    ("views", "constraint", "hinge"), ("views", "bn_init", "standard"), ("views", "dropout_high", 0.5),
    ("student", "kd_weight", 0.5), ("student", "view_weight", 0.5), ("student", "heads", "frozen"), ("student", "model", "resnet8"),
    *(("student", "train", {"epochs": 20, name: value}) for name, value in {
        "batch_size": 32, "optimizer": "adamw", "learning_rate": 0.01, "momentum": 0.8, "nesterov": True, "weight_decay": 0,
        "schedule": "cosine", "milestones": [0.5], "decay": 0.2, "warmup": 0.1, "precision": "bf16", "accumulate": 2,
        "clip_norm": 1, "ema_decay": 0.9, "keep": "best", "evaluate_every": 2}.items()),
]  # fmt: skip


@pytest.mark.parametrize(("stage", "setting", "value"), DIFFERENT)
def test_different_work_has_different_keys(stage: str, setting: str, value: object) -> None:
    changes = {f"stages/{stage}/{setting}": value}
    keys = {planned.name: planned.key for planned in trial_of(changes, seed=1).stages}
    before = {planned.name: planned.key for planned in trial_of(seed=1).stages}
    names = list(before)
    first = names.index(stage)
    assert [keys[name] == before[name] for name in names] == [index < first for index in range(len(names))]


def test_the_seed_of_a_trial_reaches_only_the_last_stage() -> None:
    zero, one = trial_of(seed=0), trial_of(seed=1)
    assert [a.key == b.key for a, b in zip(zero.stages, one.stages, strict=True)] == [True, True, False]
    assert zero.point_id == one.point_id


@pytest.mark.parametrize(
    "change",
    [
        {"data/validation": 0.1}, {"data/split_seed": 1}, {"data/augment": {"pad": 0, "flip": True}},
        {"data/fraction": 0.5}, {"data/imbalance": 10},
    ],
)  # fmt: skip
def test_data_is_in_every_key(change: dict[str, Any]) -> None:
    assert all(key_of(stage, change) != key for stage, key in GOLDEN.items())


def test_the_fingerprint_of_the_data_is_in_every_key() -> None:
    facts = replace(FACTS, data=defaultdict(lambda: "f1"))
    assert all(key_of(stage, facts=facts) != key for stage, key in GOLDEN.items())


def test_a_stage_with_data_of_its_own_changes_alone() -> None:
    changes = {"stages/student/data": {"fraction": 0.25}}
    assert key_of("views", changes) == GOLDEN["views"]
    assert key_of("student", changes) != GOLDEN["student"]
    assert key_of("student", {"stages/student/data": {"fraction": 1.0}}) == GOLDEN["student"]


def test_all_keys_of_different_work_differ() -> None:
    keys = [
        key_of("student", {f"stages/{stage}/{setting}": value}, seed=1) for stage, setting, value in DIFFERENT
    ]
    keys.remove(key_of("student", {"stages/teacher/seed": "trial"}, seed=1))  # seed 1, as with teacher.seed 1
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("equal", [({"a": 1, "b": [1.5]}, {"b": [1.5], "a": 1})])
def test_content_keys_ignore_order(equal: tuple[Any, Any]) -> None:
    assert content_key(equal[0]) == content_key(equal[1])
    assert len(content_key(equal[0])) == 32


@pytest.mark.parametrize(
    ("one", "other"), [({"a": 1}, {"a": 1.0}), ({"a": None}, {}), ({"a": True}, {"a": 1}), ([1, 2], [2, 1])]
)
def test_content_keys_tell_values_apart(one: Any, other: Any) -> None:
    assert content_key(one) != content_key(other)


def test_an_endless_setting_has_a_key() -> None:
    assert content_key({"a": float("inf")}) != content_key({"a": float("-inf")})


def test_the_place_of_the_data_is_not_in_the_key_but_its_content_is(tmp_path: Path) -> None:
    from PIL import Image

    def folder(name: str, color: int) -> Path:
        for split in ("train", "test"):
            place = tmp_path / name / split / "cat"
            place.mkdir(parents=True)
            Image.new("L", (8, 8), color).save(place / "1.png")
        return tmp_path / name

    def fingerprint(root: Path) -> str:
        data = {"dataset": "imagefolder", "root": str(root), "image_size": 8, "validation": 0.2}
        return next(iter(gather_facts(spec_of({"data": data})).data.values()))

    first = fingerprint(folder("a", 10))
    assert fingerprint(folder("b", 10)) == first
    assert fingerprint(folder("c", 11)) != first


def test_data_settings_reach_the_facts() -> None:
    before = gather_facts(spec_of()).data
    assert gather_facts(spec_of({"data/augment": {"pad": 1}})).data == before  # the data set's own, spelt out
    assert gather_facts(spec_of({"data/test_fraction": 0.3})).data != before


def test_data_of_a_stage_and_of_the_space_is_looked_up() -> None:
    changes = {
        "stages/student/data": {"dataset": "digits", "test_fraction": 0.3, "validation": 0.2},
        "search/space": {"student.data.test_fraction": {"grid": [0.4, 0.5]}},
    }
    found = gather_facts(spec_of(changes)).data
    assert len(set(found.values())) == len(found) == 4


def test_a_checkpoint_counts_by_its_bytes(tmp_path: Path) -> None:
    def key(name: str, content: bytes) -> str:
        (tmp_path / name).write_bytes(content)
        changes = {"stages/teacher/model": {"name": "tiny_cnn", "checkpoint": str(tmp_path / name)}}
        checkpoints = gather_facts(spec_of(changes)).checkpoints
        return key_of("teacher", changes, facts=replace(FACTS, checkpoints=checkpoints))

    assert key("a.pt", b"one") == key("b.pt", b"one")
    assert key("c.pt", b"two") != key("a.pt", b"one") != GOLDEN["teacher"]


SHAPES: dict[str, Any] = {"data": {"dataset": "shapes_ref"}, "baselines": {}, "search/space": {}, "search/objective": {"maximize": "grounder.miou"}}  # fmt: skip


@pytest.mark.parametrize(
    ("method", "setting"),
    [("latent_vg", "checkpoint"), ("shared_ris_kd", "checkpoint"), ("cm_masksd", "checkpoint"),
     ("magnet", "swin_checkpoint"), ("magnet", "bert_checkpoint")],
)  # fmt: skip
def test_first_weights_of_an_encoder_count_by_their_bytes(tmp_path: Path, method: str, setting: str) -> None:
    """A file, or a folder as transformers keeps it; a name on a hub stands for itself."""

    def key(path: str, content: bytes = b"") -> str:
        if path.startswith("/"):
            Path(path).mkdir(exist_ok=True)
            (Path(path) / "model.safetensors").write_bytes(content)
            (Path(path) / "notes.txt").write_text(path)
        teacher = {"teacher": {"method": "shared_ris"}} if method.endswith("_kd") else {}
        learns = {"teacher": "$teacher"} if teacher else {}
        changes = {**SHAPES, "stages": {**teacher, "grounder": {"method": method, setting: path, **learns}}}
        facts = gather_facts(spec_of(changes))
        return key_of("grounder", changes, facts=replace(FACTS, checkpoints=facts.checkpoints))

    first = key(str(tmp_path / "a"), b"one")
    assert key(str(tmp_path / "b"), b"one") == first
    assert len({first, key(str(tmp_path / "c"), b"two"), key("timm/some"), key("timm/other"), key("")}) == 5


@pytest.mark.parametrize(("method", "setting", "name"), [("latent_vg", "checkpoint", "beit3.pth"), ("magnet", "bert_checkpoint", "/no/bert")])  # fmt: skip
def test_absent_first_weights_are_a_mistake(method: str, setting: str, name: str) -> None:
    changes = {**SHAPES, "stages": {"grounder": {"method": method, setting: name}}}
    with pytest.raises(ConfigurationError, match=f"{setting}: '{name}' cannot be read: No such file"):
        gather_facts(spec_of(changes))


@pytest.mark.parametrize("swept", [False, True])
def test_an_absent_checkpoint_is_a_mistake(tmp_path: Path, swept: bool) -> None:
    path = str(tmp_path / "absent.pt")
    changes: dict[str, Any] = {"stages/teacher/model": {"name": "tiny_cnn", "checkpoint": path}}
    if swept:
        changes = {"search/space": {"teacher.model.checkpoint": {"grid": [path]}}}
    with pytest.raises(ConfigurationError, match=r"absent\.pt' cannot be read: No such file"):
        gather_facts(spec_of(changes))


class Renamed(Supervised):
    """A user's own method."""


class NewVersion(Supervised):
    version = 2


def own_model(*, num_classes: int, in_channels: int) -> Any:
    raise NotImplementedError


def test_a_new_version_of_a_method_gives_new_keys() -> None:
    catalog = BUILTIN.extended(methods={"supervised": NewVersion})
    trial = planner_of(catalog=catalog).trial(Point(), 0)
    assert all(stage.key != GOLDEN[stage.name] for stage in trial.stages)


def test_code_of_the_user_is_in_the_key() -> None:
    catalog = BUILTIN.extended(methods={"own": Renamed}, models={"own_net": own_model})
    changes = {"stages/teacher/method": "own", "stages/student/model": "own_net"}
    code = gather_facts(spec_of(changes, catalog)).code
    assert set(code) == {"method:own", "model:own_net"}

    def keys(facts: Mapping[str, str]) -> dict[str, str]:
        planner = planner_of(changes, replace(FACTS, code=facts), catalog)
        return {stage.name: stage.key for stage in planner.trial(Point(), 0).stages}

    before = keys(code)
    assert keys(dict(code)) == before
    changed_method = keys({**code, "method:own": "1:other source"})
    assert all(changed_method[name] != before[name] for name in before)
    changed_model = keys({**code, "model:own_net": "other source"})
    assert [changed_model[name] == before[name] for name in before] == [True, True, False]


def test_source_of_the_user_is_what_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    monkeypatch.syspath_prepend(tmp_path)
    text = "from methods.supervised import Supervised\nclass Own(Supervised):\n    x = {}\n"

    def code(value: int) -> Mapping[str, str]:
        path = tmp_path / "own_method_for_keys.py"
        path.write_text(text.format(value))
        os.utime(path, (value, value))
        importlib.invalidate_caches()
        import linecache

        linecache.clearcache()
        module = importlib.reload(importlib.import_module("own_method_for_keys"))
        return gather_facts(spec_of(catalog=BUILTIN.extended(methods={"own": module.Own}))).code

    assert code(1) == code(1)
    assert code(1) != code(2)


@dataclass(frozen=True)
class Kind:
    changes: dict[str, Any]
    is_same: bool


@pytest.mark.parametrize(
    "kind",
    [
        Kind({"stages/student/kd_weight": 0.5}, True),
        Kind({"stages/student/train": {"epochs": 3}}, True),
        Kind({"stages/student/seed": 3}, True),
        Kind({"stages/student/model": "resnet8"}, False),
        Kind({"stages/teacher/model": "resnet8"}, False),
        Kind({"stages/student/train": {"epochs": 20, "batch_size": 32}}, False),
        Kind({"stages/student/train": {"epochs": 20, "precision": "bf16"}}, False),
        Kind({"stages/views/num_branches": 8}, True),
    ],
)
def test_cost_history_belongs_to_the_kind_of_work(kind: Kind) -> None:
    assert (trial_of(kind.changes).final.signature == trial_of().final.signature) == kind.is_same


def test_settings_of_views_are_in_the_key_only_where_there_are_views() -> None:
    kd = {"stages/student/method": "kd", "search/space": {}}
    plain = {**kd, "stages/student/teacher": "$teacher", "stages/views": ABSENT}
    assert key_of("student", plain) == key_of("student", {**plain, "stages/student/view_weight": 0.5})
    assert key_of("student", kd) != key_of("student", {**kd, "stages/student/view_weight": 0.5})


def test_a_preset_and_what_it_stands_for_have_one_key() -> None:
    dkd = {"stages/student/method": "dkd", "search/space": {}}
    by_name = {**dkd, "stages/student/preset": "resnet56-resnet20"}
    by_value = {**dkd, "stages/student/other_classes_weight": 2.0}
    assert key_of("student", by_name) == key_of("student", by_value) != key_of("student", dkd)
