"""A distillation step with a live teacher: our whole loop against a textbook loop, and where the difference lies."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from itertools import islice
from statistics import median
from typing import Any, NamedTuple

import pictures
import product
import textbook
import torch
import turns
from measurement import Measurement, peak_bytes

from orchestrator.allocator import ENVIRONMENT

TARGET = 1.5
NUM_WARM = 4
"""Batches that a loader makes ahead: the textbook's first ones are taken before the clock starts."""
PAIRS = (("resnet20", "resnet8"), ("resnet32x4", "resnet8x4"))
Rounds = list[dict[str, Any]]


class Case(NamedTuple):
    """What is distilled, and how much of it is timed per round."""

    teacher: str
    student: str
    num_steps: int
    device: str = "cpu"


def measure(quick: bool) -> Iterator[Measurement]:
    """One pair of networks when quick, two in full; on the GPU too where there is one."""
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    for device in devices:
        for teacher, student in PAIRS[: 1 if quick and device == "cpu" else 2]:
            num_steps = 200 if device == "cuda" else 8 if quick else 40
            yield from compare(Case(teacher, student, num_steps, device), num_rounds=3 if quick else 7)


def compare(case: Case, num_rounds: int) -> Iterator[Measurement]:
    """Both sides in turns. Ours runs as in a sweep, in a process with our allocator settings."""
    arguments = [case.teacher, case.student, str(case.num_steps), case.device]
    with (
        turns.Runner([__file__, "ours", *arguments], ENVIRONMENT) as our_side,
        turns.Runner([__file__, "textbook", *arguments], {}) as their_side,
    ):
        rounds = [(our_side.round(), their_side.round()) for _ in range(num_rounds + 1)][1:]
    yield from summarise(case, [ours for ours, _ in rounds], [theirs for _, theirs in rounds])


def summarise(case: Case, ours: Rounds, theirs: Rounds) -> Iterator[Measurement]:
    """Whole loop by CPU time (which other work on the machine disturbs least) and by the clock, and its two parts."""
    name = f"KD step, {case.teacher} -> {case.student}, batch {textbook.BATCH_SIZE}, {pictures.origin()}"
    device = "CPU" if case.device == "cpu" else torch.cuda.get_device_name()
    common: dict[str, Any] = {"unit": "ms/step", "device": device, "peak_bytes": ours[-1]["peak_bytes"]}
    against = f"textbook loop, {textbook.NUM_LOADER_WORKERS} loader workers"
    kind = "cpu" if case.device == "cpu" else "clock"

    def line(part: str, title: str, other: str = against, **more: Any) -> Measurement:
        pairs = [(mine[part], its[part]) for mine, its in zip(ours, theirs, strict=True)]
        mine, its = (1000 * median(column) / case.num_steps for column in zip(*pairs, strict=True))
        ratio = median(second / first for first, second in pairs)
        return Measurement(name=f"{name}: {title}", ours=mine, theirs=its, against=other, ratio=ratio, **common | more)  # fmt: skip

    data, step = line(f"data {kind}", "data alone"), line(f"step {kind}", "step alone")
    saved = {part: item.theirs - item.ours for part, item in {"data": data, "step": step}.items()}
    share = f"of what is saved, {saved['data']:.0f} ms is data, {saved['step']:.0f} ms the step"
    peak = f"their peak {theirs[-1]['peak_bytes'] / 1e6:.0f} MB without loader workers"
    titles = {"cpu": "CPU time of all processes", "clock": "by the clock"}
    for each, title in titles.items():
        limits = {"at_least": TARGET, "note": f"{share}; {peak}"} if each == kind else {}
        yield line(f"whole {each}", title, **limits)
    yield data
    yield step
    yield bf16(name, case, ours, kind, common)


def bf16(name: str, case: Case, ours: Rounds, kind: str, common: dict[str, Any]) -> Measurement:
    """The step with ``precision: bf16`` against ours in float32."""
    pairs = [(told[f"bf16 {kind}"], told[f"step {kind}"]) for told in ours]
    mine, full = (1000 * median(column) / case.num_steps for column in zip(*pairs, strict=True))
    ratio = median(second / first for first, second in pairs)
    return Measurement(
        name=f"{name}: step in bf16", ours=mine, theirs=full, against="our step in float32", ratio=ratio, **common
    )  # fmt: skip


class Ours:
    """Our side: networks that stay warm over the rounds."""

    def __init__(self, case: Case) -> None:
        self.device = torch.device(case.device)
        self.images = pictures.images(case.num_steps * textbook.BATCH_SIZE)
        teacher, student = (product.network(name, self.device) for name in (case.teacher, case.student))
        self.method = product.method(student, teacher)

    def measure(self) -> dict[str, float]:
        stream = product.stream(self.images, textbook.BATCH_SIZE, self.device)
        same = product.Repeated(stream)
        return told(
            {
                "whole": lambda: product.run(self.method, stream, self.device),
                "step": lambda: product.run(self.method, same, self.device),
                "data": lambda: [None for _ in stream.batches(0)],
                "bf16": lambda: product.run(self.method, same, self.device, "bf16"),
            },
            self.device,
        )


class Theirs:
    """The textbook side."""

    def __init__(self, case: Case) -> None:
        self.device, self.num_steps = torch.device(case.device), case.num_steps
        self.images = pictures.images((case.num_steps + 3 * NUM_WARM) * textbook.BATCH_SIZE)
        self.teacher, self.student = (
            product.network(name, self.device, channels_last=False).get_submodule("network")
            for name in (case.teacher, case.student)
        )

    def measure(self) -> dict[str, float]:
        whole, data = (self.loader() for _ in range(2))
        same = next(self.loader())
        measured = told({"whole": lambda: self.train(islice(whole, self.num_steps))}, self.device)
        whole.close()
        next(data)
        return measured | told(
            {
                "data": lambda: list(islice(data, self.num_steps)),
                "step": lambda: self.train([same] * self.num_steps),
            },
            self.device,
        )

    def train(self, batches: Any) -> None:
        textbook.train(self.student, self.teacher, batches)

    def loader(self) -> Any:
        """An epoch under way, with its workers started and ahead."""
        epoch = textbook.batches(self.images, self.device)
        for _ in range(NUM_WARM):
            next(epoch)
        return epoch


def told(parts: dict[str, Any], device: torch.device) -> dict[str, float]:
    """``PART clock`` and ``PART cpu`` in seconds, and the peak memory so far."""
    measured: dict[str, float] = {}
    for name, work in parts.items():

        def run(work: Any = work) -> None:
            work()
            if device.type == "cuda":
                torch.cuda.synchronize()

        measured[f"{name} clock"], measured[f"{name} cpu"] = turns.timed(run)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else peak_bytes()
    return measured | {"peak_bytes": float(peak)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="one side of the benchmark; started by it")
    parser.add_argument("side", choices=["ours", "textbook"])
    parser.add_argument("teacher")
    parser.add_argument("student")
    parser.add_argument("num_steps", type=int)
    parser.add_argument("device")
    options = parser.parse_args()
    torch.set_num_threads(1)
    chosen = Case(options.teacher, options.student, options.num_steps, options.device)
    side: Ours | Theirs = Ours(chosen) if options.side == "ours" else Theirs(chosen)
    turns.answer(side.measure)
