"""What a trial costs the driver, and whether the ten thousandth costs more than the hundredth.

The driver is the product's own; stages are stubs, see ``driver_simulation``. Each size runs in a process of its own, on
a store in memory where the machine has such a disk, and only CPU time is compared: waiting for a disk is the trials'.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from driver_simulation import Simulated
from measurement import Measurement

SIZES = (100, 1_000, 10_000)
FLAT = 1.25
"""What counts as flat: the noise of two runs on a busy machine."""
INTERACTIVE_SECONDS = 3.0
MEMORY_DISK = Path("/dev/shm")


def measure(quick: bool) -> Iterator[Measurement]:
    """Time and memory per trial, plan and results. The sizes are the same when it has to be quick."""
    few, some, many = in_turns()
    yield drive_measurement(few, some, many)
    yield memory_measurement(few, some, many)
    for name, seconds in (("plan", many.plan_seconds), ("results", many.results_seconds)):
        yield Measurement(
            name=f"`stillhouse {name}` of {many.num_trials:,} finished trials, local store"
            if name == "results" else f"`stillhouse plan` of {many.num_trials:,} trials",
            ours=seconds, theirs=INTERACTIVE_SECONDS, unit="CPU s", against="what is felt as interactive",
            ratio=seconds / INTERACTIVE_SECONDS, at_most=1.0, peak_bytes=many.peak_bytes,
            note=f"{some.num_trials:,} trials: {getattr(some, f'{name}_seconds'):.2g} CPU s",
        )  # fmt: skip


def drive_measurement(few: Simulated, some: Simulated, many: Simulated) -> Measurement:
    """Driver's CPU time per trial."""
    each = [1000 * run.drive_seconds / run.num_trials for run in (few, some, many)]
    return Measurement(
        name=f"driver's time per trial, {many.num_trials:,} trials on {many.num_executed - many.num_trials} teachers",
        ours=each[2], theirs=each[0], unit="CPU ms/trial", against=f"the same of {few.num_trials} trials",
        ratio=each[2] / each[0], at_most=FLAT, peak_bytes=many.peak_bytes,
        note=f"{some.num_trials:,} trials: {each[1]:.3g}; {many.num_records / many.num_trials / 2:.0f} journal records a trial; "
        f"beside it {1000 * many.trial_seconds / many.num_trials:.3g} ms in the trial's own process for lease, artifact and costs",
    )  # fmt: skip


def memory_measurement(few: Simulated, some: Simulated, many: Simulated) -> Measurement:
    """Driver's memory per further trial."""
    early, late = kilobytes_per_trial(few, some), kilobytes_per_trial(some, many)
    return Measurement(
        name=f"driver's memory per further trial, {some.num_trials:,} to {many.num_trials:,}",
        ours=late, theirs=early, unit="kB", against=f"the same from {few.num_trials} to {some.num_trials:,}",
        ratio=late / early, at_most=FLAT, peak_bytes=many.peak_bytes,
        note="report and pictures included, Ray's own records of its trials not",
    )  # fmt: skip


def in_turns() -> tuple[Simulated, Simulated, Simulated]:
    """One run of each size. The smaller ones are runs of medium speed, of some before and after the largest."""
    few, some, many = SIZES
    runs = [run(size) for size in (few, some, few, many, few, some, few, some, few)]
    ordered = sorted(runs, key=lambda run: run.drive_seconds)
    by_size = {size: [run for run in ordered if run.num_trials == size] for size in SIZES}
    first, second, third = (found[len(found) // 2] for found in by_size.values())
    return first, second, third


def kilobytes_per_trial(fewer: Simulated, more: Simulated) -> float:
    return (more.resident_bytes - fewer.resident_bytes) / (more.num_trials - fewer.num_trials) / 1000


def run(num_trials: int) -> Simulated:
    """Simulate in a fresh process. Raises RuntimeError with its last words when it fails."""
    command = [sys.executable, str(Path(__file__).with_name("driver_simulation.py")), str(num_trials)]
    if MEMORY_DISK.is_dir() and os.access(MEMORY_DISK, os.W_OK):
        command += ["--folder", str(MEMORY_DISK)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with {ended.returncode}: {ended.stderr[-2000:]}")
    return Simulated(**json.loads(ended.stdout.strip().splitlines()[-1]))
