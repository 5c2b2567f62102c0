"""Preflight's judgement, on facts as nodes would tell them. On real nodes: ``tests/sweeps/test_cluster.py``."""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from orchestrator.preflight_judge import Clock, Expected, NodeReport, judge_cluster, judge_node
from orchestrator.preflight_probe import erase_marker, look, read_markers
from orchestrator.ray_preflight import Answer

OWN: dict[str, Any] = {
    "host": "head",
    "python": "3.11.4",
    "versions": {"stillhouse": "0.1.0", "ray": "2.60.0", "torch": "2.15.0+cpu"},
    "source": "aaaa",
    "memory_gb": 24.0,
    "gpus": [],
    "free_gb": {"storage": 100.0, "temporary": 50.0},
    "missing": [],
    "storage": "",
    "time": 1000.0,
}
GPU = {"name": "H200", "memory_gb": 140.0}
EXPECTED = Expected(
    facts=OWN, lease_seconds=30.0, needs_gpu=True, hosts={"driver": "the driver", "id-b": "other"}
)


def report(
    changes: Mapping[str, Any] | None = None, *, missing: tuple[str, ...] = (), num_gpus: float = 0.0
) -> NodeReport:
    facts = {**OWN, **(changes or {})}
    first = Answer(facts=facts, sent=999.0, received=1001.0)
    second = Answer(facts={"missing": list(missing), "time": facts["time"] + 2}, sent=1001.9, received=1002.1)
    return NodeReport(name="node", address="10.0.0.2", num_gpus=num_gpus, answers=(first, second))


CASES: list[tuple[NodeReport, str, str]] = [
    (report(), "good", "same code and clock"),
    (report({"versions": {**OWN["versions"], "ray": "2.59.0"}}), "wrong", "ray 2.59.0, but the driver has 2.60.0"),
    (report({"versions": {**OWN["versions"], "torch": "2.14.0"}}), "wrong", "torch 2.14.0"),
    (report({"versions": {**OWN["versions"], "torch": "2.15.0+cu126"}}), "note", "torch 2.15.0+cu126"),
    (report({"versions": {**OWN["versions"], "stillhouse": "not installed"}}), "wrong", "stillhouse not installed"),
    (report({"source": "bbbb"}), "wrong", "source bbbb of stillhouse, but the driver has aaaa"),
    (report({"python": "3.11.9"}), "note", "Python 3.11.9"),
    (report({"python": "3.12.4"}), "wrong", "Python 3.12.4"),
    (report({"storage": "StorageError: read-only"}), "wrong", "cannot be used here: StorageError: read-only"),
    (report(missing=("driver", "id-b")), "wrong", "not shared: what the driver, other wrote"),
    (report({"time": 1016.0}), "wrong", "its clock is +16.0 s against the driver's, leases allow for 15 s"),
    (report({"time": 980.0}), "wrong", "its clock is -20.0 s"),
    (report({"time": 1006.0}), "note", "its clock is +6.0 s"),
    (report({"time": 1000.9}), "good", "same code"),
    (report({"free_gb": {"storage": 0.5, "temporary": 9.0}}), "wrong", "0.5 GB free in the storage folder"),
    (report({"free_gb": {"temporary": 0.5}}), "note", "0.5 GB free in the temporary folder"),
    (report(num_gpus=1.0), "wrong", "Ray gives away 1 GPUs there, but nvidia-smi shows 0"),
    (report({"gpus": [GPU, GPU]}, num_gpus=1.0), "note", "nvidia-smi shows 2 GPUs, of which Ray gives away 1"),
    (report({"missing": ["/data/teacher.pt"]}), "wrong", "/data/teacher.pt is not there"),
]  # fmt: skip


@pytest.mark.parametrize(("node", "level", "text"), CASES, ids=[text for _, _, text in CASES])
def test_a_node_is_judged(node: NodeReport, level: str, text: str) -> None:
    (finding,) = judge_node(node, EXPECTED)
    assert (finding.level, finding.host) == (level, "node")
    assert text in finding.text


def test_a_node_that_does_not_answer() -> None:
    silent = NodeReport(
        name="10.0.0.3",
        address="10.0.0.3",
        num_gpus=0,
        answers=(Answer(facts=None, error="no answer within 60 s"),),
    )
    (finding,) = judge_node(silent, EXPECTED)
    assert finding.level == "wrong"
    assert "the node at 10.0.0.3 could not be asked: no answer within 60 s" in finding.text


def test_a_slow_way_to_a_node_is_no_wrong_clock() -> None:
    slow = NodeReport(
        name="n", address="a", num_gpus=0,
        answers=(Answer(facts={**OWN, "time": 1040.0}, sent=1000.0, received=1060.0), Answer(facts={"missing": [], "time": 1061.0}, sent=1060.0, received=1062.0)),
    )  # fmt: skip
    assert slow.clock.proven_seconds == 0
    assert Clock(low=-9.0, high=-7.0).proven_seconds == 7
    assert next(judge_node(slow, EXPECTED)).level == "good"


def test_gpus_of_several_kinds_are_named() -> None:
    assert list(judge_cluster([report({"gpus": [GPU]}), report({"gpus": [GPU]})])) == []
    (finding,) = judge_cluster(
        [report({"gpus": [GPU]}), report({"gpus": [{"name": "A10", "memory_gb": 24.0}]})]
    )
    assert (finding.level, "1 x A10 24 GB, 1 x H200 140 GB" in finding.text) == ("note", True)


def test_markers_prove_that_a_storage_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.preflight_probe.SEEN_SECONDS", 0.3)
    shared, own = str(tmp_path / "shared"), str(tmp_path / "own")
    facts = look(shared, "run", "a", [str(tmp_path), str(tmp_path / "absent")])
    assert (facts["host"], facts["storage"], facts["missing"]) == (
        socket.gethostname(),
        "",
        [str(tmp_path / "absent")],
    )
    assert facts["free_gb"]["storage"] > 0
    assert abs(facts["time"] - time.time()) < 5
    assert look(own, "run", "b", [])["storage"] == ""
    assert read_markers(shared, "run", ["a"])["missing"] == []
    assert read_markers(shared, "run", ["a", "b"])["missing"] == ["b"]
    assert read_markers(shared, "an earlier run", ["a"])["missing"] == ["a"]
    erase_marker(shared, "a")
    assert list((tmp_path / "shared").iterdir()) == []
    (tmp_path / "file").write_text("")
    assert "a part of the path is a file" in look(str(tmp_path / "file" / "x"), "run", "a", [])["storage"]
