"""What a sweep cost, in words and as one line per trial: its own part, the part it shared, and the sum."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from orchestrator.cost import NO_TIME, PriceSettings, Spent, cost_text
from orchestrator.report_cells import duration
from orchestrator.report_table import TrialRow, cost

__all__ = ["cost_lines", "cost_table"]


def cost_table(rows: Sequence[TrialRow], prices: PriceSettings | None) -> pd.DataFrame:
    """One row per trial. ``own_`` was paid for this trial first, ``shared_`` was there already; their sum is the chain."""
    return pd.DataFrame(
        {
            "point": row.point,
            "label": row.label,
            "seed": row.seed,
            "status": row.status,
            "own_seconds": row.seconds - row.shared_seconds,
            "shared_seconds": row.shared_seconds,
            **(row.held - row.shared_held).numbers(prices, "own_"),
            **row.shared_held.numbers(prices, "shared_"),
        }
        for row in rows
    )


def cost_lines(rows: Sequence[TrialRow], prices: PriceSettings | None, spent: Spent) -> list[str]:
    """Sentences for the report; none where nothing was trained."""
    total = cost(rows)
    lines = []
    if total.alone_seconds > 0:
        share = total.shared_seconds / total.alone_seconds
        lines.append(
            f"Training every trial on its own would have taken {duration(total.alone_seconds)}; "
            f"with shared stages it took {duration(total.paid_seconds)}: {duration(total.shared_seconds)} ({100 * share:.0f} %) saved. "
            "These are training times summed over all trials, not the time on the clock."
        )
    if total.alone != NO_TIME:
        lines.append(
            f"Held by that training: {cost_text(total.alone - total.shared, prices)}; "
            f"saved by sharing: {cost_text(total.shared, prices)}."
        )
    if spent.total != NO_TIME:
        lost = spent.unfinished
        lines.append(
            f"All runs of this sweep held {cost_text(spent.total, prices)}, starting, evaluating and repeated work included"
            + (
                f"; {cost_text(lost, prices)} of it on stages that failed, were stopped early or are not finished."
                if lost != NO_TIME
                else "."
            )
        )
    return lines
