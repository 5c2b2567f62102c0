"""What was injected how often, and what was lost: the table of the documentation, from the runs themselves."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from chaos import Loss, Sweep

PROMISES = {
    "worker": ("a worker process of a stage is killed", "the stage goes on from its checkpoint"),
    "trial": ("the process of a trial is killed", "the trial goes on in another process"),
    "node": ("a host loses its power, and comes back", "what it did goes on elsewhere, or when it is back"),
    "tracking": ("the tracking server's host loses its power", "training does not notice; MLflow is complete at the end"),
    "driver": ("`stillhouse run` is killed", "the same command goes on from the store"),
    "head": ("the head's host loses its power", "a fresh cluster and the same command go on from the store"),
}  # fmt: skip
HEADER = (
    "fault", "promise", "injected", "stages in work then", "finished epochs trained again",
    "longest since a checkpoint", "finished stages repeated", "weights and table",
)  # fmt: skip


def markdown(sweeps: Sequence[Sweep], verdict: str = "same bits") -> str:
    """One line per kind of fault, over all sweeps."""
    losses = [loss for sweep in sweeps for loss in sweep.losses()]
    injected = [item for sweep in sweeps for item in sweep.injected]
    repeated = sum(len(sweep.watch.broken) for sweep in sweeps)
    lines = [HEADER, ("---", "---", "---:", "---:", "---:", "---:", "---:", "---")]
    for kind, (what, promise) in PROMISES.items():
        own = [loss for loss in losses if loss.injected.fault.kind == kind]
        num = sum(item.fault.kind == kind for item in injected)
        again = sum(loss.num_epochs for loss in own)
        lines.append(
            (what, promise, str(num), str(len(own)), str(again), _seconds(own), str(repeated), verdict)
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _seconds(losses: Iterable[Loss]) -> str:
    most = max((loss.seconds for loss in losses), default=0.0)
    return f"{most:.1f} s"
