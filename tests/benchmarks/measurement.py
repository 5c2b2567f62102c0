"""What a benchmark measured, and the table that is made of it."""

from __future__ import annotations

import os
import platform
import resource
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

HEAD = ("measurement", "device", "ours", "theirs", "against", "ratio", "target", "peak MB", "notes")


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One line of the table: two numbers from the same run, and their ratio."""

    name: str
    """What was measured, with networks and batch."""
    ours: float
    """Median of ours."""
    theirs: float
    """Median of what ours is compared with."""
    unit: str
    """Of both: ``ms/step``, ``CPU s``."""
    against: str
    """What ours is compared with."""
    ratio: float
    """Median over pairs that took turns. Which of the two is divided by which, follows from the target."""
    at_least: float | None = None
    """The target where a higher ratio is better (theirs / ours: how many times less)."""
    at_most: float | None = None
    """The target where a lower ratio is better (ours / theirs: what is added)."""
    peak_bytes: int = 0
    """Peak memory of the process that did our part; 0 is not known."""
    device: str = "CPU"
    note: str = ""
    """Spread, how it splits up, what was extrapolated."""

    @property
    def target(self) -> str:
        """The target and whether it was reached."""
        if self.at_least is not None:
            return f">= {self.at_least:.3g}: {_verdict(self.ratio >= self.at_least)}"
        if self.at_most is not None:
            return f"<= {self.at_most:.3g}: {_verdict(self.ratio <= self.at_most)}"
        return ""


def _verdict(is_met: bool) -> str:
    return "met" if is_met else "**missed**"


def markdown(measured: Sequence[Measurement], failed: Mapping[str, str], machine_lines: Sequence[str]) -> str:
    """The table, what failed, and where all of it was measured."""
    lines = ["# What Stillhouse costs and saves", "", *machine_lines, "", *_row(HEAD, head=True)]
    for item in measured:
        lines += _row((
            item.name, item.device, f"{item.ours:.4g} {item.unit}", f"{item.theirs:.4g} {item.unit}", item.against,
            f"**{item.ratio:.3g}**", item.target, f"{item.peak_bytes / 1e6:.0f}" if item.peak_bytes else "", item.note,
        ))  # fmt: skip
    for name, reason in failed.items():
        last = reason.strip().splitlines()[-1]
        lines += ["", f"Failed: {name}: {last}"]
    return "\n".join(lines) + "\n"


def _row(cells: Sequence[str], *, head: bool = False) -> Iterator[str]:
    yield f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"
    if head:
        yield "|---|---|---:|---:|---|---:|---|---:|---|"


def machine(seconds: float) -> list[str]:
    """When, where and with what it was measured. No host name."""
    import torch

    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "ray", "mlflow"))
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    return [
        f"Measured on {datetime.now(UTC):%Y-%m-%d %H:%M} UTC in {seconds:.0f} s with `make bench`. {processor()}, "
        f"{os.cpu_count()} cores, {memory_gigabytes():.0f} GB; {', '.join(gpus) or 'no GPU'}; "
        f"Python {platform.python_version()}, {versions}. Load average at the end {load}.",
        "Ratios are medians of pairs that took turns on the same machine; a target above 1 with >= is how many times less, one with <= what is added.",
    ]


def processor() -> str:
    """Name of the processor, where the system tells it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def memory_gigabytes() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9


def peak_bytes() -> int:
    """Peak memory of this process and, if larger, of the largest that it started."""
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return max(resource.getrusage(kind).ru_maxrss for kind in kinds) * 1024
