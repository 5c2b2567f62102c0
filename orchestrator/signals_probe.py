"""What has to be found out, on a stage's first batch, before its teacher's signals can be recorded or read."""

from __future__ import annotations

import hashlib
import platform
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from methods.base import AnyBatch
from methods.data.base import ListedStream
from orchestrator.optimisation import PRECISIONS
from orchestrator.signals_codec import Columns
from orchestrator.signals_network import RecordedNetwork

__all__ = ["Probe", "machine", "network_digest", "unlike_again"]

NUM_PASSES = 3
LONG_PASS_SECONDS = 0.05
WORDS = {"indices": "order", "strong": "images", "token_ids": "sentences", "token_mask": "sentences"}


def unlike_again(stream: ListedStream) -> str:
    """Why the batches of ``stream`` cannot be replayed; empty if its first one comes out the same twice."""
    one, other = (next(iter(stream.batches(0)), None) for _ in range(2))
    if one is None or other is None:
        return "it has no batch"
    for name in sorted(one._fields, key=lambda field: field != "indices"):
        first, second = getattr(one, name), getattr(other, name)
        if isinstance(first, Tensor) and not torch.equal(first, second):
            what = WORDS.get(name, name.replace("_", " "))
            return (
                f"the first batch has other {what} each time it is asked for, so the data set or its images draw "
                "random numbers of their own: what a teacher said once would not fit. Let data.augment vary the images"
            )
    return ""


def machine(device: torch.device) -> str:
    """What decides about the last bits of a sum: the processor, its instructions and threads, and the libraries."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}, torch {torch.__version__}"
    instructions = torch.backends.cpu.get_cpu_capability()
    return f"{_processor()}, {instructions}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def network_digest(network: nn.Module) -> str:
    """Hash of a network's structure and of every weight: two networks of one digest say the same."""
    found = hashlib.blake2b(repr(network).encode(), digest_size=16)
    for name, tensor in sorted(network.state_dict().items()):
        data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        found.update(data)
    return found.hexdigest()


class Probe:
    """Asks a network about a first batch, in the precision of training."""

    def __init__(self, batch: AnyBatch, device: torch.device, precision: str) -> None:
        self.batch, self.device, self._kind = batch, device, PRECISIONS[precision]

    def columns(self, network: RecordedNetwork) -> Columns:
        """What would be recorded of the batch."""
        return self._run(lambda: network.columns_of(self.batch))

    def has_independent_rows(self, network: RecordedNetwork) -> bool:
        """Whether what is said of an image is the same to the bit wherever in a batch it stands."""
        fields = self.batch._asdict().items()
        turned = {name: value.flip(0) for name, value in fields if isinstance(value, Tensor)}
        straight = self.columns(network)
        reversed_ = self._run(lambda: network.columns_of(self.batch._replace(**turned)))
        return all(torch.equal(column, reversed_[name].flip(0)) for name, column in straight.items())

    def pass_seconds(self, network: RecordedNetwork) -> float:
        """How long the network takes for the batch."""
        shortest = float("inf")
        for _ in range(NUM_PASSES):
            started = time.perf_counter()
            self.columns(network)
            shortest = min(shortest, time.perf_counter() - started)
            if shortest > LONG_PASS_SECONDS:
                break
        return shortest

    @torch.no_grad()
    def _run(self, ask: Callable[[], Columns]) -> Columns:
        cast = nullcontext() if self._kind is torch.float32 else torch.autocast(self.device.type, self._kind)
        with cast:
            columns = ask()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return columns
