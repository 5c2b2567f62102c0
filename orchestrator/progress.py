"""Live view of a sweep: what is done, running, shared and waiting, the best so far, and the time left."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from orchestrator.plan_text import duration
from orchestrator.secrecy import hide

__all__ = ["Display", "RunningStage", "StageCount", "Status", "make_display"]

PLAIN_LINE_SECONDS = 10.0


@dataclass(frozen=True, kw_only=True)
class StageCount:
    """Distinct stages of one name."""

    done: int = 0
    running: int = 0
    shared: int = 0
    """Uses of these stages, by trials, beyond the first: runs that sharing saves."""
    waiting: int = 0


@dataclass(frozen=True, kw_only=True)
class RunningStage:
    name: str
    key: str
    epoch: float
    epochs: int
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Status:
    """One look at the sweep."""

    name: str
    trials_ended: int
    trials_failed: int
    trials: int
    counts: Mapping[str, StageCount] = field(default_factory=dict)
    running: tuple[RunningStage, ...] = ()
    best: str = ""
    seconds_left: float | None = None
    elapsed_seconds: float = 0.0
    spent: str = ""
    """Machine time and money so far and in the end, as text."""
    cost: Mapping[str, float] = field(default_factory=dict)
    """The same as numbers, for tracking."""


class Display:
    """Shows plain lines: one per event, and a summary now and then. For logs and pipes."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._clock = clock
        self._last_summary = float("-inf")

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def event(self, text: str) -> None:
        """Something worth a line of its own."""
        self._console.print(Text(hide(text)), soft_wrap=True)

    def show(self, status: Status) -> None:
        pause = max(PLAIN_LINE_SECONDS, status.elapsed_seconds / 20)  # a long run needs fewer lines
        if self._clock() - self._last_summary >= pause:
            self._last_summary = self._clock()
            self.event(summary_line(status))


class LiveDisplay(Display):
    """Keeps a small table at the foot of the terminal up to date; events scroll above it."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._live = Live(console=console, auto_refresh=False, transient=True)

    def __enter__(self) -> LiveDisplay:
        self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._live.stop()

    def show(self, status: Status) -> None:
        self._live.update(render(status), refresh=True)


def make_display(quiet: bool = False) -> Display:
    """A live table on a terminal, plain lines elsewhere, on standard error so that results can be piped."""
    console = Console(stderr=True, quiet=quiet, highlight=False)
    return LiveDisplay(console) if console.is_terminal and sys.stderr.isatty() else Display(console)


def summary_line(status: Status) -> str:
    stages = "; ".join(
        f"{name} {count.done} done, {count.running} running, {count.shared} shared, {count.waiting} waiting"
        for name, count in status.counts.items()
    )
    parts = [f"[{duration(status.elapsed_seconds)}] {status.trials_ended}/{status.trials} trials", stages]
    if status.trials_failed:
        parts.append(f"{status.trials_failed} failed")
    if status.best:
        parts.append(f"best {status.best}")
    if status.seconds_left is not None:
        parts.append(f"about {duration(status.seconds_left)} left")
    if status.spent:
        parts.append(f"spent {status.spent}")
    return " | ".join(parts)


def render(status: Status) -> Group:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("stage", "done", "running", "shared", "waiting"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for name, count in status.counts.items():
        table.add_row(
            name, *(str(value) for value in (count.done, count.running, count.shared, count.waiting))
        )
    running = Table(box=None, pad_edge=False, show_header=False)
    for stage in status.running:
        running.add_row(
            f"  {stage.name}", stage.key[:8], _bar(stage), f"{stage.epoch:g}/{stage.epochs}", stage.note
        )
    head = Text(
        f"{status.name}  {status.trials_ended}/{status.trials} trials  {duration(status.elapsed_seconds)}",
        style="bold",
    )
    if status.trials_failed:
        head.append(f"  {status.trials_failed} failed", style="red")
    if status.seconds_left is not None:
        head.append(f"  about {duration(status.seconds_left)} left", style="dim")
    parts: list[Text | Table] = [head, table, running]
    if status.spent:
        parts.append(Text(f"spent: {status.spent}", style="dim"))
    if status.best:
        parts.append(Text(f"best so far: {status.best}"))
    return Group(*parts)


def _bar(stage: RunningStage, width: int = 20) -> str:
    filled = round(width * stage.epoch / max(stage.epochs, 1))
    return "━" * filled + "┄" * (width - filled)
