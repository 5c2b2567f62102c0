"""One encoder for pixels and words against two: size, multiply-adds, latency and training step of grounders.

Published for a single encoder (Shared-RIS, by one secondary source): about 40 % quicker and 35 % smaller than grounders with
two. Networks are compared in pairs, at 48 px with every encoder four layers deep and 96 wide (MagNet's Swin has its own
widths, 16 to 128), and with their first weights, since weights change no time. The fairest pair has the same decoder and
two towers of the same depth and width. At the published size, 480 px, only parameters and multiply-adds are counted. How
well each segments is told by ``configs/encoders_small.yaml``.

On a CPU times are CPU times of one thread, which other work on the machine disturbs least; on a GPU those of the clock.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from statistics import median
from typing import Any, NamedTuple

import torch
from measurement import Measurement
from torch import nn

from methods import BUILTIN
from methods.data.base import Augment, StreamSettings
from methods.grounding.contracts import GroundingBatch, GroundingTask
from methods.grounding.method import GroundingMethod, GroundingNetwork
from methods.grounding.shapes_ref import ShapesRef
from methods.models.count import count
from orchestrator.optimisation import TrainSettings, Updater

BATCH_SIZE = 16
NUM_WARM = 10
PASSES_PER_ROUND, STEPS_PER_ROUND = 10, 2
VOCABULARIES = {"cm_masksd": 49_408, "magnet": 30_522}
"""Words of CLIP and BERT; BEiT-3 has a table of its own."""


@dataclass(frozen=True, kw_only=True)
class System:
    """A grounder, by its method and what differs from its preset."""

    name: str
    method: str
    changes: tuple[tuple[str, Any], ...] = ()

    def build(self, size: str, task: GroundingTask) -> GroundingMethod:
        """It with its first weights, at preset ``METHOD_small`` or ``METHOD_base``."""
        method = BUILTIN.method(self.method)
        preset = {**method.presets.get(f"{self.method}_{size}", {}), **dict(self.changes)}
        settings = method.without_sources(method.Settings(**preset))
        torch.manual_seed(0)
        built: GroundingMethod = method(settings, task=task, model=None, inputs={})
        return built


SHARED = System(name="Shared-RIS", method="shared_ris")
ENCODER_ONLY = System(
    name="Shared-RIS without mask decoder", method="shared_ris", changes=(("decoder_layers", 0),)
)
TOWERS = System(name="Shared-RIS on two towers", method="shared_ris", changes=(("encoder", "dual"),))
LATENT = System(name="Latent-VG", method="latent_vg")
NO_LATENT = System(name="Latent-VG, N = 0", method="latent_vg", changes=(("attribute_lengths", ()),))
CM_MASKSD = System(name="CM-MaskSD (CLIP's two)", method="cm_masksd")
MAGNET = System(name="MagNet (Swin and BERT, fused)", method="magnet")
PAIRS = (
    (SHARED, TOWERS), (ENCODER_ONLY, TOWERS), (SHARED, CM_MASKSD), (SHARED, MAGNET), (NO_LATENT, MAGNET), (LATENT, MAGNET),
)  # fmt: skip


def measure(quick: bool) -> Iterator[Measurement]:
    """All pairs, at the small size and at the published one. In full with more rounds."""
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for ours, theirs in PAIRS:
        yield from compare(ours, theirs, device, num_rounds=5 if quick else 15)
    for ours, theirs in PAIRS:
        yield from sizes(ours, theirs, "480 px, published size", *map(large, (ours, theirs)))


def compare(ours: System, theirs: System, device: torch.device, num_rounds: int) -> Iterator[Measurement]:
    """One pair at the small size."""
    task, batch = example(device)
    methods = [each.build("small", task).to(device) for each in (ours, theirs)]
    yield from sizes(ours, theirs, "48 px", *(size_of(method.network, task) for method in methods))
    picture = task.example(device)
    passes = [Passes(method.network, picture) for method in methods]
    yield timed_pair("latency of one picture", ours, theirs, passes, PASSES_PER_ROUND, device, num_rounds)
    steps = [Steps(method, batch, device) for method in methods]
    yield timed_pair(
        f"training step, batch {BATCH_SIZE}", ours, theirs, steps, STEPS_PER_ROUND, device, num_rounds
    )


def sizes(ours: System, theirs: System, where: str, own: Size, their: Size) -> Iterator[Measurement]:
    """Parameters of the finished network, and multiply-adds of one picture, in millions."""
    bare = told(their.without_tables / own.without_tables)
    yield line(
        f"parameters, {where}", ours, theirs, own.parameters / 1e6, their.parameters / 1e6, unit="M",
        more=f"; {bare} without tables of words and positions",
    )  # fmt: skip
    yield line(
        f"multiply-adds, {where}", ours, theirs, own.multiply_adds / 1e6, their.multiply_adds / 1e6, unit="M"
    )


def timed_pair(
    what: str,
    ours: System,
    theirs: System,
    work: list[Callable[[], object]],
    repeats: int,
    device: torch.device,
    num_rounds: int,
) -> Measurement:
    """Rounds in which both take turns; the ratio is the median over rounds."""
    for each in work:
        for _ in range(NUM_WARM if repeats == PASSES_PER_ROUND else 1):
            each()
    rounds = [[seconds(each, repeats, device) for each in work] for _ in range(num_rounds)]
    mine, its = (1000 * median(column) for column in zip(*rounds, strict=True))
    ratio = median(second / first for first, second in rounds)
    where = "48 px, CPU time of one thread" if device.type == "cpu" else "48 px"
    return line(f"{what}, {where}", ours, theirs, mine, its, unit="ms", ratio=ratio, device=device)


def line(
    what: str,
    ours: System,
    theirs: System,
    mine: float,
    its: float,
    *,
    unit: str,
    ratio: float | None = None,
    device: torch.device | None = None,
    more: str = "",
) -> Measurement:
    """One row; the ratio says how many times less ours is."""
    ratio = its / mine if ratio is None else ratio
    is_gpu = device is not None and device.type == "cuda"
    return Measurement(
        name=f"{ours.name}: {what}", ours=mine, theirs=its, unit=unit, against=theirs.name, ratio=ratio,
        device=torch.cuda.get_device_name() if is_gpu else "CPU", note=told(ratio) + more,
    )  # fmt: skip


def told(ratio: float) -> str:
    """A ratio of theirs to ours in words."""
    share = 100 * (1 - 1 / ratio)
    return f"{share:.0f} % less" if share >= 0 else f"{-share:.0f} % more"


class Size(NamedTuple):
    """How large a network is."""

    parameters: int
    without_tables: int
    """Parameters but for tables of words and positions, which cost no time, and are as long as a tokenizer wants."""
    multiply_adds: int


def size_of(network: GroundingNetwork, task: GroundingTask) -> Size:
    counted = count(network, task)
    tables = sum(module.weight.numel() for module in network.modules() if isinstance(module, nn.Embedding))
    return Size(counted.parameters, counted.parameters - tables, counted.macs)


class Passes:
    """One picture with its sentence through a finished network."""

    def __init__(self, network: GroundingNetwork, picture: tuple[GroundingBatch, ...]) -> None:
        self.network, self.picture = network, picture

    @torch.no_grad()
    def __call__(self) -> None:
        self.network.eval()(*self.picture)


class Steps:
    """A training step with everything that the loop does on a batch: losses, gradients, clipped update."""

    def __init__(self, method: GroundingMethod, batch: GroundingBatch, device: torch.device) -> None:
        self.method, self.batch = method, batch
        named = [item for item in method.named_parameters() if item[1].requires_grad]
        settings = TrainSettings(optimizer="adamw", weight_decay=0.05, clip_norm=1.0)
        rules = [method.update_rule(*item) for item in named]
        self.updater = Updater(settings, [parameter for _, parameter in named], device=device, rules=rules)

    def __call__(self) -> None:
        total = self.method.train()(self.batch).total
        self.updater.backward(total)
        self.updater.step(total.detach(), 1e-4)


def seconds(work: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Of one call, by CPU time; by the clock where a GPU does the work."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    wait = (lambda: None) if device.type == "cpu" else torch.cuda.synchronize
    wait()
    started = clock()
    for _ in range(repeats):
        work()
    wait()
    return (clock() - started) / repeats


def example(device: torch.device) -> tuple[GroundingTask, GroundingBatch]:
    """The task of the small configurations and a training batch of it."""
    data = ShapesRef(num_train=BATCH_SIZE, num_validation=2, num_test=2).load()
    settings = StreamSettings(
        batch_size=BATCH_SIZE, evaluation_batch_size=BATCH_SIZE, seed=0, augment=Augment(), validation=0.1, device=device,
    )  # fmt: skip
    batch: Any = next(iter(data.streams(settings)["training"].batches(0)))
    return data.task(), batch


@cache
def large(system: System) -> Size:
    """Its size as published; built and run once, however many pairs it is in."""
    task = GroundingTask(
        image_size=480, text_length=20, vocabulary_size=VOCABULARIES.get(system.method, 1000),
        start_id=0, end_id=3, pad_id=1, mask_id=2,
    )  # fmt: skip
    return size_of(system.build("base", task).network, task)
