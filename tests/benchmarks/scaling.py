"""From one core to two: a stage with two workers instead of one, and two trials at a time instead of one.

Efficiency is what two cores gain over what they could gain: the time on one, divided by twice the time on two. It needs
two idle cores; the CPU time that two workers use over that of one, in the notes, says what is lost on a busy machine too.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import pictures
from measurement import Measurement

EFFICIENCY_TARGET = 0.85
BATCH_SIZE = 64
KINDS = ("workers", "trials")
TITLES = {"workers": "one stage, 1 -> 2 workers (DDP)", "trials": "sweep, 1 -> 2 concurrent trials"}


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much is trained."""

    model: str = "resnet20"
    num_steps: int = 20
    num_trials: int = 4
    num_rounds: int = 1


def measure(quick: bool) -> Iterator[Measurement]:
    """Both kinds, each on one core and on two in turns."""
    size = Size() if quick else Size(num_steps=100, num_rounds=3)
    for kind in KINDS:
        rounds = [(run(kind, 1, size), run(kind, 2, size)) for _ in range(size.num_rounds)]
        yield summarise(kind, size, rounds)


def summarise(kind: str, size: Size, rounds: list[tuple[dict[str, float], dict[str, float]]]) -> Measurement:
    """Efficiency of the second core."""
    single, double = (median(told["seconds"] for told in column) for column in zip(*rounds, strict=True))
    extra = median(two["cpu_seconds"] / one["cpu_seconds"] for one, two in rounds)
    load = os.getloadavg()[0]
    return Measurement(
        name=f"{TITLES[kind]}, {size.model}, batch {BATCH_SIZE}, {size.num_steps} steps",
        ours=double, theirs=single, unit="s", against="one core; ideal is 1",
        ratio=median(one["seconds"] / (2 * two["seconds"]) for one, two in rounds), at_least=EFFICIENCY_TARGET,
        peak_bytes=int(max(two["peak_bytes"] for _, two in rounds)),
        note=f"CPU time of training {extra:.2f} times as much; load average {load:.1f} on {os.cpu_count()} cores",
    )  # fmt: skip


def run(kind: str, number: int, size: Size) -> dict[str, float]:
    """One sweep in a fresh process. Raises RuntimeError with its last words when it fails."""
    command = [
        sys.executable,
        __file__,
        kind,
        str(number),
        size.model,
        str(size.num_steps),
        str(size.num_trials),
    ]
    with tempfile.TemporaryDirectory(prefix="c-") as folder:
        environment = os.environ | {"RAY_TMPDIR": folder}
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if ended.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with {ended.returncode}: {ended.stderr[-2000:]}")
    told: dict[str, float] = json.loads(ended.stdout.strip().splitlines()[-1])
    return told


def sweep(options: argparse.Namespace, storage: str) -> dict[str, float]:
    """Train, and tell how long it took from the first step of the first trial to the last step of the last."""
    from orchestrator import Experiment

    is_group = options.kind == "workers"
    data = pictures.Pictures(num_training=options.num_steps * BATCH_SIZE)
    experiment = Experiment(
        name="scaling",
        data={"dataset": "pictures", "num_training": data.num_training, "validation": data.validation},
        stages={
            "student": {
                "method": "supervised", "model": options.model,
                "train": {"epochs": 1, "batch_size": BATCH_SIZE, "schedule": "constant"},
            }
        },
        search={
            "space": {"student.label_smoothing": {"grid": smoothings(1 if is_group else options.num_trials)}},
            "objective": {"maximize": "student.top1"},
        },
        run={
            "storage": storage, "workers": options.number if is_group else 1,
            "concurrent_trials": 1 if is_group else options.number,
        },
        datasets={"pictures": pictures.Pictures},
    )  # fmt: skip
    result = experiment.run(quiet=True)
    if any(row.status != "done" for row in result.rows):
        raise RuntimeError(f"not every trial is done: {[(row.status, row.reason) for row in result.rows]}")
    return spans([result.store.manifest(row.key) for row in result.rows])


def smoothings(number: int) -> list[float]:
    """What the trials differ in."""
    return [0.1 * index for index in range(number)]


def spans(manifests: list[dict[str, Any]]) -> dict[str, float]:
    """Time over all stages, what their processes used, and the largest."""
    costs = [manifest["cost"] for manifest in manifests]
    finished = [manifest["finished"] for manifest in manifests]
    begun = [end - cost["seconds"] for end, cost in zip(finished, costs, strict=True)]
    return {
        "seconds": max(finished) - min(begun) if len(costs) > 1 else costs[0]["seconds"],
        "cpu_seconds": sum(cost["cpu_seconds"] for cost in costs),
        "peak_bytes": max(cost["peak_memory_bytes"] for cost in costs),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="one sweep of the benchmark; started by it")
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("number", type=int)
    parser.add_argument("model")
    parser.add_argument("num_steps", type=int)
    parser.add_argument("num_trials", type=int)
    with tempfile.TemporaryDirectory(prefix="scaling-") as place:
        print(json.dumps(sweep(parser.parse_args(), place)), flush=True)
