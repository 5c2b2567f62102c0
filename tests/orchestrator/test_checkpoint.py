"""Checkpoint trees come back bit for bit, and nothing is ever unpickled."""

from __future__ import annotations

import json
import logging
import math
import pickle
import struct
from collections import OrderedDict, defaultdict, namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.checkpoint import SKELETON, TENSORS, from_bytes, to_bytes
from orchestrator.clock import SYSTEM_CLOCK
from orchestrator.errors import DamagedArtifactError
from orchestrator.sealed import seal
from orchestrator.store import Store

KEY = "ab12cd34"
DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.bool, torch.uint8,
    torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64,
    torch.float8_e4m3fn, torch.float8_e5m2,
]  # fmt: skip


def same(left: Any, right: Any) -> bool:
    """Equal in type and in every bit."""
    if isinstance(left, torch.Tensor):
        return (
            isinstance(right, torch.Tensor)
            and (left.dtype, left.shape) == (right.dtype, right.shape)
            and raw(left) == raw(right)
        )
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return len(left) == len(right) and all(
            same(a, b) and same(left[a], right[b]) for a, b in zip(left, right, strict=True)
        )
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, float):
        return struct.pack(">d", left) == struct.pack(">d", right)
    return bool(left == right)


def raw(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def restored(tree: Any) -> Any:
    return from_bytes(to_bytes(tree))


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    num_elements = math.prod(shape)
    if dtype == torch.bool:
        bits = draw(st.lists(st.booleans(), min_size=num_elements, max_size=num_elements))
        return torch.tensor(bits, dtype=torch.bool).reshape(shape)
    num_bytes = num_elements * dtype.itemsize
    content = bytearray(draw(st.binary(min_size=num_bytes, max_size=num_bytes)))
    return (
        torch.frombuffer(content, dtype=dtype).reshape(shape) if content else torch.empty(shape, dtype=dtype)
    )


numbers = st.integers() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=True)
keys = st.text(max_size=5) | st.integers() | st.floats(allow_nan=False) | st.booleans() | st.none()
trees = st.recursive(
    st.none() | st.booleans() | numbers | st.text(max_size=8) | tensors(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(keys | st.tuples(keys), inner, max_size=3)
    ),
    max_leaves=12,
)


@given(trees)
@settings(max_examples=150, deadline=None)
def test_any_tree_comes_back_bit_for_bit(tree: Any) -> None:
    assert same(tree, restored(tree))


@pytest.mark.parametrize(
    "value",
    [
        2**20_000, -(2**63), 2**63, 2**63 - 1, -0.0, float("inf"), float("-inf"), 5e-324, 1.7976931348623157e308,
        struct.unpack(">d", bytes.fromhex("7ff8dead00000001"))[0], "\ud800 lone", "", [], (), {}, ((),), [[]],
        {1: "a", "1": "b", None: "c", (1, (2,)): "d", 0.5: "e"}, {"int": "0x1"}, {"tensor": "0"}, {"dict": []},
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_corner_values_come_back(value: Any) -> None:
    assert same(value, restored(value))


def test_views_come_back_as_separate_contiguous_tensors() -> None:
    base = torch.arange(12.0).reshape(3, 4)
    tree = {"base": base, "same": base, "row": base[1:2], "transposed": base.T, "strided": base[:, ::2],
            "spread": torch.ones(1).expand(5), "zero_dim": torch.tensor(3), "gradient": base.clone().requires_grad_()}  # fmt: skip
    back = restored(tree)
    for name, tensor in tree.items():
        assert same(tensor.detach(), back[name]), name
        assert back[name].is_contiguous()
        assert not back[name].requires_grad
    back["base"].add_(1)
    assert torch.equal(back["same"], base)


def test_conjugated_and_negated_views_come_back_with_their_values() -> None:
    value = torch.tensor([1 + 2j, 3 - 4j])
    back = restored([value.conj(), value.conj().imag])
    assert torch.equal(back[0], value.conj())
    assert torch.equal(back[1], value.conj().imag)


def test_training_goes_on_with_the_same_bits() -> None:
    def build() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 2))
        return model, torch.optim.AdamW(model.parameters(), lr=1e-2)

    def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, generator: torch.Generator) -> None:
        optimizer.zero_grad()
        model(torch.randn(6, 4, generator=generator)).square().sum().backward()
        optimizer.step()

    model, optimizer = build()
    generator = torch.Generator().manual_seed(3)
    for _ in range(3):
        step(model, optimizer, generator)
    saved = to_bytes(
        {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "random": generator.get_state()}
    )
    for _ in range(3):
        step(model, optimizer, generator)

    again, optimizer_again = build()
    generator_again = torch.Generator()
    tree = from_bytes(saved)
    again.load_state_dict(tree["model"])
    optimizer_again.load_state_dict(tree["optimizer"])
    generator_again.set_state(tree["random"])
    for _ in range(3):
        step(again, optimizer_again, generator_again)
    assert same(dict(model.state_dict()), dict(again.state_dict()))


def test_ordered_dictionaries_and_parameters_become_plain() -> None:
    back = restored(OrderedDict(weight=torch.nn.Parameter(torch.ones(2))))
    assert type(back) is dict
    assert type(back["weight"]) is torch.Tensor


Pair = namedtuple("Pair", "left right")


@pytest.mark.parametrize(
    "value",
    [
        np.float64(1.0), np.int64(1), np.zeros(2), b"bytes", {1, 2}, 1j, object(), Path("x"), Pair(1, 2),
        torch.Size([1]), defaultdict(list), print, torch.float32, torch.device("cpu"),
        torch.eye(2).to_sparse(), torch.empty(1, device="meta"), torch.zeros(1, dtype=torch.complex128),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_other_types_are_refused_by_path(value: Any) -> None:
    with pytest.raises(TypeError, match=r"tree\['model'\]\[1\] .*cannot keep"):
        to_bytes({"model": [0, value]})


def test_other_key_types_are_refused() -> None:
    with pytest.raises(TypeError, match="cannot keep"):
        to_bytes({b"bytes": 1})
    with pytest.raises(TypeError, match="tensor as key"):
        to_bytes({"state": {torch.ones(1): 1}})


class Bomb:
    """Unpickling this leaves a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.trace.write_text, ("it was unpickled",)


@pytest.mark.parametrize(
    "replaced",
    [
        lambda bomb: {TENSORS: bomb},
        lambda bomb: {SKELETON: bomb},
        lambda bomb: {SKELETON: bomb, TENSORS: bomb},
        lambda bomb: {TENSORS: b""},
        lambda bomb: {TENSORS: b"\xff" * 64},
        lambda bomb: {SKELETON: b'{"pickle": "x"}'},
        lambda bomb: {SKELETON: b'{"tensor": "17"}'},
        lambda bomb: {SKELETON: b'{"tensor": "0", "int": "0x1"}'},
        lambda bomb: {SKELETON: b'{"float": "00"}'},
        lambda bomb: {SKELETON: b'{"dict": [[[1], 2]]}'},
        lambda bomb: {SKELETON: b"[" * 100_000},
        lambda bomb: {SKELETON: b"\x80\x81"},
    ],
)
def test_planted_content_is_refused_and_never_unpickled(tmp_path: Path, replaced: Any) -> None:
    trace = tmp_path / "trace"
    bomb = pickle.dumps(Bomb(trace))
    with pytest.raises(DamagedArtifactError):
        from_bytes({**to_bytes({"weights": torch.ones(2)}), **replaced(bomb)})
    with pytest.raises(DamagedArtifactError, match="expected also"):
        from_bytes({"checkpoint.pkl": bomb})
    assert not trace.exists()


def test_a_pickle_with_matching_checksums_is_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever can write to the storage can also write a manifest; what they plant is still only parsed."""
    store, trace = Store(str(tmp_path / "store")), tmp_path / "trace"
    slot = store.checkpoints(KEY)
    slot.save({"epoch": 1})
    slot.save({"epoch": 2})
    newest = store._files.names(f"work/{KEY}")[-1]
    contents = {TENSORS: pickle.dumps(Bomb(trace)), SKELETON: b"{}", "model.pkl": pickle.dumps(Bomb(trace))}
    for name, data in contents.items():
        store._files.write(f"work/{KEY}/{newest}/{name}", data)
    marker = seal(contents, {"key": KEY, "number": 2, "created": SYSTEM_CLOCK.time()})
    store._files.write(f"work/{KEY}/{newest}/manifest.json", marker)
    with caplog.at_level(logging.WARNING):
        assert slot.load() == {"epoch": 1}
    assert newest in caplog.text
    assert "no safetensors file" in caplog.text
    assert not trace.exists()


def test_a_refused_tree_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    slot = Store(str(tmp_path)).checkpoints(KEY)
    slot.save({"epoch": 1})
    with pytest.raises(TypeError, match=r"tree\['epoch'\]"):
        slot.save({"epoch": np.int64(2)})
    assert slot.load() == {"epoch": 1}


def test_the_files_are_plain_json_and_safetensors() -> None:
    files = to_bytes({"a": torch.ones(1), "b": (1, float("nan"))})
    assert set(files) == {SKELETON, TENSORS}
    assert json.loads(files[SKELETON])["dict"][0] == ["a", {"tensor": "0"}]
