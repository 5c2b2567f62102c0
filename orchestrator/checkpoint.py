"""Checkpoints without pickle: a tree of plain values and tensors as one safetensors file and one JSON skeleton.

What comes back equals what went in, bit for bit: tensors of any safetensors dtype, integers of any size, floats with
NaN, infinities and negative zero, tuples as tuples, dictionary keys of any plain type in their order. Tensors come
back on the CPU, contiguous and without gradient; tensors that shared memory come back separate. ``OrderedDict`` comes
back as ``dict`` and a parameter as a tensor. Any other type is refused, by its path in the tree.
"""

from __future__ import annotations

import json
import logging
import struct
import uuid
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, cast

import safetensors.torch
import torch
from torch import Tensor

from orchestrator.clock import Clock
from orchestrator.errors import DamagedArtifactError
from orchestrator.filesystem import Files
from orchestrator.sealed import MANIFEST, load_manifest, read_sealed, seal, write_contents

__all__ = ["Checkpoints", "from_bytes", "to_bytes"]

logger = logging.getLogger(__name__)

SKELETON = "tree.json"
TENSORS = "tensors.safetensors"
NUM_KEPT = 2
LARGEST_PLAIN_INTEGER = 2**63
ALLOWED = "use dict, list, tuple, tensor, int, float, bool, str or None"
DTYPES = {
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.bool),
    *(
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.uint16,
        torch.uint32,
        torch.uint64,
    ),
    *(torch.float8_e4m3fn, torch.float8_e5m2),
}


def to_bytes(tree: Any) -> dict[str, bytes]:
    """Two files that hold the tree. ``TypeError`` names the path of a value that cannot be kept."""
    tensors: dict[str, Tensor] = {}
    skeleton = _encode(tree, "tree", tensors)
    data = cast(bytes, safetensors.torch.save(_unshared(tensors)))
    return {SKELETON: json.dumps(skeleton).encode(), TENSORS: data}


def from_bytes(files: Mapping[str, bytes]) -> Any:
    """The tree that ``to_bytes`` was given. Anything else, a pickle for example, is a ``DamagedArtifactError``."""
    for name in (SKELETON, TENSORS):
        if name not in files:
            raise DamagedArtifactError(f"checkpoint holds {sorted(files)}, expected also {name!r}")
    try:
        tensors = safetensors.torch.load(files[TENSORS])
    except Exception as error:  # the parser has its own exception type and lets some builtin ones through
        raise DamagedArtifactError(
            f"{TENSORS} is no safetensors file ({error}); it was not loaded"
        ) from error
    try:
        return _decode(json.loads(files[SKELETON]), tensors)
    except (ValueError, KeyError, TypeError, IndexError, struct.error, RecursionError) as error:
        raise DamagedArtifactError(f"{SKELETON} is no skeleton of a checkpoint ({error!r})") from error


class Checkpoints:
    """The numbered checkpoints of one unfinished stage; the last two are kept.

    Only the holder of the stage's lease saves. Should a former holder still write, both keep their own folders, and
    since a stage is a function of its inputs either checkpoint leads to the same result.
    """

    def __init__(self, files: Files, key: str, clock: Clock) -> None:
        self._files = files
        self._clock = clock
        self._key = key
        self._folder = f"work/{key}"

    lag_seconds = 0.0
    """What ``save`` returns from, is kept."""

    def save(self, tree: Any) -> None:
        """Keep the tree as the newest checkpoint, then drop all but the last two."""
        self.write(to_bytes(tree))

    def write(self, contents: Mapping[str, bytes]) -> None:
        """Keep what ``to_bytes`` made of a tree, as ``save`` does."""
        older = self._numbered()
        number = _number(older[-1]) + 1 if older else 1
        name = f"{number:08d}-{uuid.uuid4().hex[:8]}"
        folder = f"{self._folder}/{name}"
        try:
            write_contents(self._files, folder, contents)
            manifest = seal(contents, {"key": self._key, "number": number, "created": self._clock.time()})
            self._files.write(f"{folder}/{MANIFEST}", manifest)
        except BaseException:
            self._discard(folder)
            raise
        self._prune(older)

    def load(self) -> Any | None:
        """The newest intact tree, or None. Warns about each newer one that is damaged or incomplete."""
        for name in reversed(self._numbered()):
            try:
                return self._load_one(name)
            except DamagedArtifactError as error:
                logger.warning("checkpoint %s/%s is not used: %s", self._folder, name, error)
        return None

    def delete(self) -> None:
        """Remove every checkpoint of the stage."""
        self._files.delete(self._folder)

    def _load_one(self, name: str) -> Any:
        folder = f"{self._folder}/{name}"
        data = self._files.read(f"{folder}/{MANIFEST}")
        if data is None:
            raise DamagedArtifactError(f"it is incomplete: no {MANIFEST}, the writer was interrupted")
        what = f"checkpoint {folder}"
        manifest = load_manifest(data, what)
        return from_bytes(
            {file: read_sealed(self._files, folder, file, manifest, what) for file in manifest["files"]}
        )

    def _numbered(self) -> list[str]:
        return [name for name in self._files.names(self._folder) if name[:8].isdigit() and name[8:9] == "-"]

    def _prune(self, older: list[str]) -> None:
        num_complete = 1
        for name in reversed(older):
            if num_complete < NUM_KEPT and self._files.exists(f"{self._folder}/{name}/{MANIFEST}"):
                num_complete += 1
            else:
                self._files.delete(f"{self._folder}/{name}")

    def _discard(self, folder: str) -> None:
        try:
            self._files.delete(folder)
        except Exception as error:
            logger.warning("an unfinished checkpoint is left behind in %s: %s", folder, error)


def _number(name: str) -> int:
    return int(name[:8])


def _encode(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """JSON for a value. Exact types only: a subclass (numpy's float is one) would not come back as itself."""
    kind = type(value)
    if value is None or kind in (bool, str):
        return value
    if kind is int:
        return value if abs(value) < LARGEST_PLAIN_INTEGER else {"int": hex(value)}
    if kind is float:
        return value if value - value == 0.0 else {"float": struct.pack(">d", value).hex()}
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = _plain(value, path)
        return {"tensor": name}
    if kind in (list, tuple):
        items = [_encode(item, f"{path}[{index}]", tensors) for index, item in enumerate(value)]
        return items if kind is list else {"tuple": items}
    if kind in (dict, OrderedDict):
        return {"dict": [_encode_item(key, item, path, tensors) for key, item in value.items()]}
    raise TypeError(
        f"{path} is a {kind.__module__}.{kind.__qualname__}, which a checkpoint cannot keep; {ALLOWED}"
    )


def _encode_item(key: Any, item: Any, path: str, tensors: dict[str, Tensor]) -> list[Any]:
    if isinstance(key, Tensor):
        raise TypeError(f"{path} has a tensor as key, which a checkpoint cannot keep; {ALLOWED}")
    return [_encode(key, f"{path} (key {key!r})", tensors), _encode(item, f"{path}[{key!r}]", tensors)]


def _plain(tensor: Tensor, path: str) -> Tensor:
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type == "meta":
        raise TypeError(f"{path} is a sparse, quantized or meta tensor, which a checkpoint cannot keep")
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{path} is a tensor of {tensor.dtype}, which safetensors cannot keep")
    return tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()


def _unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, none of which shares memory with another: safetensors keeps each by itself."""
    seen: set[int] = set()
    separate = {}
    for name, tensor in tensors.items():
        address = tensor.untyped_storage().data_ptr()
        separate[name] = tensor.clone() if address in seen else tensor
        seen.add(address)
    return separate


def _decode(node: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(node, list):
        return [_decode(item, tensors) for item in node]
    if not isinstance(node, dict):
        return node
    ((tag, content),) = node.items()
    if tag == "dict":
        return {_decode(key, tensors): _decode(item, tensors) for key, item in content}
    if tag == "tuple":
        return tuple(_decode(item, tensors) for item in content)
    return _decode_leaf(tag, content, tensors)


def _decode_leaf(tag: str, content: str, tensors: Mapping[str, Tensor]) -> Any:
    if tag == "tensor":
        return tensors[content]
    if tag == "int":
        return int(content, 16)
    if tag == "float":
        return struct.unpack(">d", bytes.fromhex(content))[0]
    raise ValueError(f"unknown tag {tag!r}")
