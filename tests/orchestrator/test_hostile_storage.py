"""Somebody else can write to the storage, or names things: no path leads out, and nothing is ever unpickled."""

from __future__ import annotations

import hashlib
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from experiment_cases import document

from methods import BUILTIN
from orchestrator.errors import ConfigurationError, DamagedArtifactError, StillhouseError
from orchestrator.portable import left_behind
from orchestrator.reader import parse_experiment
from orchestrator.spec import RunSettings
from orchestrator.stage import load_source
from orchestrator.store import Store
from orchestrator.submit_jobs import connect_jobs, job_log

KEY = "ab" * 32
NAMES = ["../x", "/x", "a/b", "..", ".hidden", "a\x00b", "z" * 101, "", "a b", "-x", "a\nb"]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_could_become_another_path(name: str, tmp_path: Path) -> None:
    for changes in (
        {"name": name},
        {"baselines": {name: {"student": {"method": "kd"}}}},
        {"stages": {name: {}}},
    ):
        with pytest.raises(ConfigurationError):
            parse_experiment(document(changes), BUILTIN)
    store = Store(str(tmp_path / "runs"))
    for use in (
        store.has,
        store.manifest,
        store.lease,
        store.checkpoints,
        lambda key: store.put(key, {}, {}),
    ):
        with pytest.raises(ValueError, match="a key is"):
            use(name)
    if name != "z" * 101:
        with pytest.raises(ValueError, match="a document lies in a folder"):
            store.write_json(f"failures/../{name}", {})
        with pytest.raises(ValueError, match="file name must be plain"):
            store.put(KEY, {name: b"x"}, {})
        with pytest.raises(ConfigurationError, match="a job is named by"):
            job_log(None, name)  # type: ignore[arg-type]
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("address", ["os://x", "file:///etc", "ray://h:1", "127.0.0.1:8265", "http://"])
def test_an_address_never_names_a_module(address: str) -> None:
    with pytest.raises(ConfigurationError, match="is not the http address of a Ray dashboard"):
        connect_jobs(address)


def forge(store: Store, **changes: Any) -> None:
    """Rewrite a manifest as somebody would who knows how its checksum is made."""
    path = Path(store.url) / "artifacts" / KEY[:2] / KEY / "manifest.json"
    manifest = {**json.loads(path.read_text()), **changes}
    del manifest["checksum"]
    text = json.dumps(manifest, indent=1).removesuffix("\n}")
    path.write_text(f'{text},\n "checksum": "{hashlib.sha256(text.encode()).hexdigest()}"\n}}')


def test_a_forged_manifest_leads_nowhere_else(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"private")
    described = {"size": 7, "sha256": hashlib.sha256(b"private").hexdigest()}
    store = Store(str(tmp_path / "runs"))
    store.put(KEY, {"a": b"1"}, {"inputs": {}})
    out = "../" * 5 + "secret"
    forge(store, files={out: described})
    for use in (lambda: store.verify(KEY), lambda: store.read(KEY, out)):
        with pytest.raises(DamagedArtifactError, match="names of files in its own folder"):
            use()
    forge(store, files={"secret": described}, attempt="../../../..")
    with pytest.raises(DamagedArtifactError, match="which leaves its folder"):
        store.read(KEY, "secret")


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._marker,)


def test_a_planted_pickle_is_never_loaded(tmp_path: Path) -> None:
    marker = tmp_path / "was-loaded"
    bomb = pickle.dumps(Bomb(marker))
    pickle.loads(bomb)
    assert marker.exists()  # it would go off
    marker.unlink()
    store = Store(str(tmp_path / "runs"))
    task = {"num_classes": 2, "in_channels": 1, "image_size": 8}
    content = {"method": "supervised"}
    manifest = {"content": content, "settings": {}, "model": {"name": "tiny_mlp"}, "task": task, "inputs": {}}
    store.put(KEY, {"weights.safetensors": bomb, "weights.pt": bomb, "history.json": bomb}, manifest)
    with pytest.raises(DamagedArtifactError, match="is no safetensors file"):
        load_source(store, KEY, BUILTIN)
    store.checkpoints(KEY).save({"step": 1})
    (newest,) = (tmp_path / "runs" / "work" / KEY).iterdir()
    for file in newest.iterdir():
        file.write_bytes(bomb)
    assert store.checkpoints(KEY).load() is None
    for path in (f"progress/{KEY}.json", f"failures/{KEY}.json", f"stopped/{KEY}.json"):
        store.write_json(path, {})
        (tmp_path / "runs" / path).write_bytes(bomb)
        with pytest.raises(StillhouseError, match="is no JSON document"):
            store.read_json(path)
    lease = store.lease(KEY)
    assert lease is not None
    lease.release()
    (tmp_path / "runs" / "leases" / KEY / "00000009.json").write_bytes(bomb)
    store.holder(KEY)
    assert not marker.exists()


def test_relative_paths_stay_behind() -> None:
    run = RunSettings(storage="runs", tracking="sqlite:///mlflow.db")
    problems = left_behind(run, ["data/cifar", "/data/ok", "s3://b/d"], ["teacher.pt", "/data/teacher.pt"])
    assert [problem.split(" is relative")[0] for problem in problems] == [
        "run.storage: 'runs'",
        "run.tracking: 'mlflow.db'",
        "data.root: 'data/cifar'",
        "model.checkpoint: 'teacher.pt'",
    ]
    fine = RunSettings(storage="s3://bucket/runs", tracking="http://mlflow:5000")
    assert left_behind(fine, ["/data"], []) == []
    assert left_behind(RunSettings(storage="file:///data/runs"), [], []) == []


def test_a_manifest_with_the_older_checksum_is_read(tmp_path: Path) -> None:
    """Of its values, whatever the text: stores of earlier versions are no ruins."""
    store = Store(str(tmp_path / "runs"))
    store.put(KEY, {"a": b"1"}, {"inputs": {}, "top1": 71.5})
    path = Path(store.url) / "artifacts" / KEY[:2] / KEY / "manifest.json"
    rest = {name: value for name, value in json.loads(path.read_text()).items() if name != "checksum"}
    checksum = hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps({**rest, "checksum": checksum}, indent=1))
    store.verify(KEY)
    path.write_text(path.read_text().replace("71.5", "99.9"))
    with pytest.raises(DamagedArtifactError, match="checksum"):
        store.manifest(KEY)
