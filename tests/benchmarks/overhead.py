"""What orchestration costs: our loop, our sweep and our driver's memory, each against doing without them.

    python tests/benchmarks/overhead.py [--quick] [--only loop|sweep|memory]

Prints Markdown. Compare ratios, which come from runs that took turns in one sitting, and not seconds, which are those
of the machine named at the foot. Nothing is asserted here. In full it takes about fifteen minutes, with ``--quick``
about four.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version

import loop_cost
import sweep_cost
from measurement import Measurement, memory_gigabytes, peak_bytes, processor

NUM_SLOTS = 2
LOOP_TARGET = 1.05
SWEEP_TARGET = 1.1


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_options(arguments)
    sections = {"loop": loop_section, "sweep": sweep_section, "memory": memory_section}
    started = time.monotonic()
    for name, section in sections.items():
        if options.only in (None, name):
            print("\n".join(section(options)), end="\n\n", flush=True)
    print("\n".join(machine_section(time.monotonic() - started)), flush=True)


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="one round instead of three (loop: three of nine)"
    )
    parser.add_argument("--only", choices=["loop", "sweep", "memory"], help="one part instead of all")
    parser.add_argument("--trials", type=int, default=24, help="trials of the timed sweep")
    parser.add_argument("--trial-seconds", type=float, default=1.0, help="how long each of them sleeps")
    parser.add_argument("--memory-trials", type=int, nargs=2, default=[8, 72], help="sizes of the two sweeps")
    return parser.parse_args(arguments)


def loop_section(options: argparse.Namespace) -> Iterator[str]:
    """Our loop against a bare one."""
    num_pairs = 3 if options.quick else 9
    yield f"### Training loop against a bare PyTorch loop (target: at most {LOOP_TARGET:g})\n"
    yield f"Same weights at the end, to the bit. One thread; medians of {num_pairs} pairs of runs in turns.\n"
    yield from row(
        "network", "image", "batch", "bare, ms/step", "ours/bare", "lowest to highest", "CPU time", head=True
    )
    for case in loop_cost.CASES:
        cost = loop_cost.measure(case, num_pairs)
        yield from row(
            case.model,
            f"{case.channels}x{case.image_size}x{case.image_size}",
            str(case.batch_size),
            f"{1000 * cost.bare_seconds_per_step:.2f}",
            f"**{cost.ratio:.3f}**",
            f"{min(cost.ratios):.3f} to {max(cost.ratios):.3f}",
            f"{cost.cpu_ratio:.3f}",
        )


def sweep_section(options: argparse.Namespace) -> Iterator[str]:
    """Our sweep against plain Ray Tune."""
    num_rounds = 1 if options.quick else 3
    costs = sweep_cost.measure_time(options.trials, options.trial_seconds, num_rounds)
    ours = costs[0]
    ideal = options.trials * options.trial_seconds / NUM_SLOTS
    yield f"### Sweep of {options.trials} trials of {options.trial_seconds:g} s, {NUM_SLOTS} at a time (target: at most {SWEEP_TARGET:g} x plain Ray Tune)\n"
    yield f"Trial bodies / slots: {ideal:.1f} s. Fresh process and own Ray each; medians of {num_rounds} round(s) in turns.\n"
    yield from row(
        "system", "seconds", "before Ray", "Ray start", "rest over bodies", "ours/this",
        "ours/this without Ray start", "driver CPU s", "driver peak MB", head=True,
    )  # fmt: skip
    for cost in costs:
        others = cost is not ours
        yield from row(
            cost.system.title,
            f"{cost.median('seconds'):.1f}",
            f"{cost.median('before_ray_seconds'):.1f}",
            f"{cost.median('ray_seconds'):.1f}",
            f"{(cost.median('seconds_without_ray') - cost.median('before_ray_seconds')) / ideal:.2f}"
            if ideal
            else "-",
            f"**{sweep_cost.ratio(ours, cost, 'seconds'):.2f}**" if others else "",
            f"{sweep_cost.ratio(ours, cost, 'seconds_without_ray'):.2f}" if others else "",
            f"{cost.median('cpu_seconds'):.1f}",
            f"{cost.median('peak_bytes') / 1e6:.0f}",
        )
    yield f"\nOur trials' own clocks say {ours.median('body_seconds'):.1f} s for the bodies together."


def memory_section(options: argparse.Namespace) -> Iterator[str]:
    """Memory that a driver keeps per finished trial."""
    few, many = options.memory_trials
    num_rounds = 1 if options.quick else 3
    yield f"### Driver memory per finished trial, from sweeps of {few} and {many} trials\n"
    yield from row("system", f"after {few}, MB", f"after {many}, MB", "kB per trial", head=True)
    for cost in sweep_cost.measure_memory(few, many, num_rounds):
        yield from row(
            cost.system.title,
            f"{cost.few_bytes / 1e6:.1f}",
            f"{cost.many_bytes / 1e6:.1f}",
            f"**{cost.kilobytes_per_trial:.0f}**",
        )


def measure(quick: bool) -> Iterator[Measurement]:
    """The loop and the sweep, as ``bench`` wants them. Quick is fewer networks, pairs and trials."""
    for case in loop_cost.CASES[:1] if quick else loop_cost.CASES:
        cost = loop_cost.measure(case, num_pairs=3 if quick else 9)
        bare = 1000 * cost.bare_seconds_per_step
        yield Measurement(
            name=f"training loop, {case.model}, batch {case.batch_size}", unit="ms/step",
            ours=bare * cost.ratio, theirs=bare, against="bare PyTorch loop, same bits",
            ratio=cost.ratio, at_most=LOOP_TARGET, peak_bytes=peak_bytes(),
            note=f"{min(cost.ratios):.3f} to {max(cost.ratios):.3f}; CPU time {cost.cpu_ratio:.3f}",
        )  # fmt: skip
    num_trials = 12 if quick else 24
    for ours, plain in [sweep_cost.measure_time(num_trials, 1.0, 1 if quick else 3)[:2]]:
        yield Measurement(
            name=f"sweep of {num_trials} trials of 1 s, {NUM_SLOTS} at a time", unit="s",
            ours=ours.median("seconds"), theirs=plain.median("seconds"), against=plain.system.title,
            ratio=sweep_cost.ratio(ours, plain, "seconds"), at_most=SWEEP_TARGET,
            peak_bytes=int(ours.median("peak_bytes")),
            note=f"without Ray's start {sweep_cost.ratio(ours, plain, 'seconds_without_ray'):.2f}",
        )  # fmt: skip


def machine_section(seconds: float) -> Iterator[str]:
    """Where and with what this was measured."""
    own = peak_bytes() / 1e6
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "ray", "mlflow"))
    yield f"{processor()}, {os.cpu_count()} cores, {memory_gigabytes():.0f} GB; Python {platform.python_version()}, {versions}."
    yield f"Measured in {seconds:.0f} s; load average at the end {load}; peak memory of this process {own:.0f} MB."


def row(*cells: str, head: bool = False) -> Iterator[str]:
    """A line of a Markdown table; two for its head."""
    yield f"| {' | '.join(cells)} |"
    if head:
        yield "|---" + "|---:" * (len(cells) - 1) + "|"


if __name__ == "__main__":
    main()
