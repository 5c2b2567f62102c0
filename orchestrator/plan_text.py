"""A plan as text: the stage graph with counts, what the store holds already, and what the rest will cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from orchestrator.budget import exceeded
from orchestrator.cost import NO_TIME, MachineTime, cost_text
from orchestrator.signals_plan import signal_lines

if TYPE_CHECKING:
    from orchestrator.plan import Plan, PlannedStage

__all__ = ["duration", "plan_text"]


def plan_text(plan: Plan) -> str:
    uses = plan.uses()
    by_name: dict[str, list[PlannedStage]] = {}
    for stage in plan.stages.values():
        by_name.setdefault(stage.name, []).append(stage)
    rows = [("stage", "method", "model", "distinct", "stored", "to run", "used by", "expected", "cost")]
    counts = plan.counts()
    missing = plan.missing
    depths = _depths(plan)
    for name in sorted(by_name, key=depths.__getitem__):
        stages, depth = by_name[name], depths[name]
        to_run = [stage for stage in stages if stage.key in missing]
        rows.append(
            (
                "  " * (depth - 1) + "└ " * (depth > 0) + name,
                _list({stage.spec.method for stage in stages}),
                _list({stage.spec.model.name for stage in stages if stage.spec.model}),
                str(counts[name]["all"]),
                str(counts[name]["stored"]),
                str(len(to_run)),
                f"{sum(uses[stage.key] for stage in stages)} trials",
                duration(plan.seconds(to_run)) if to_run else "–",
                cost_text(plan.machine_time(to_run), plan.run.prices) if to_run else "–",
            )
        )
    notes = [*_scaled_batches(plan), *signal_lines(plan)]
    return "\n".join([_headline(plan), "", *_columns(rows), "", *notes, *_closing(plan)])


def _scaled_batches(plan: Plan) -> list[str]:
    """What ``run.batch: scale`` makes of the stages: one line for each combination."""
    lines = []
    for stage in plan.stages.values():
        factor, train = stage.spec.batch_scale, stage.spec.train
        if factor > 1:
            lines.append(
                f"run.batch scale: {stage.name} trains with batch_size {train.batch_size} ({factor} workers x {train.batch_size // factor}) "
                f"and learning_rate {train.learning_rate:g} ({factor} x {train.learning_rate / factor:g})."
            )
    return list(dict.fromkeys(lines))


def _headline(plan: Plan) -> str:
    labels: dict[str, set[str]] = {}
    for trial in plan.trials:
        labels.setdefault(trial.point.label or "points", set()).add(trial.point_id)
    parts = [f"{len(ids)} {label if label == 'points' else f'x {label}'}" for label, ids in labels.items()]
    if plan.num_undrawn:
        parts.append(f"up to {plan.num_undrawn} points drawn while it runs")
    if plan.num_confirming:
        parts.append(f"up to {_plural(plan.num_confirming, 'trial')} more to confirm the best")
    return f"{plan.name}: {_plural(len(plan.trials), 'trial')} ({', '.join(parts)})"


def _closing(plan: Plan) -> list[str]:
    missing = plan.missing
    if not missing:
        done = "Everything is in the store; nothing will be trained."
        return [done] if not plan.num_undrawn else ["The points known now are in the store."]
    counts, depths = plan.counts(), _depths(plan)
    names = [name for name in sorted(counts, key=depths.__getitem__) if counts[name]["to_run"]]
    summary = ", ".join(_plural(counts[name]["to_run"], f"{name} stage") for name in names)
    lines = [f"To run: {summary}."]
    shared = plan.seconds(missing.values())
    if shared is None:
        unknown = {stage.name for key, stage in missing.items() if key not in plan.costs}
        listed = ", ".join(name for name in names if name in unknown)
        lines.append(f"Expected cost: no history yet for {listed}; known after the first one has run.")
        return lines + _budget(plan, NO_TIME, 0.0)
    todo = [trial for trial in plan.trials if trial.key not in plan.stored]
    alone = plan.seconds(stage for trial in todo for stage in trial.stages if stage.key not in plan.stored)
    lines.append(
        f"Expected cost: {duration(shared)} of training, about {duration(shared / plan.slots)} with {_plural(plan.slots, 'trial')} at a time."
    )
    held = plan.machine_time(missing.values()) or NO_TIME
    lines.append(f"It holds {cost_text(held, plan.run.prices)}.")
    if alone is not None and alone > shared:
        lines.append(f"Without sharing stages it would be {duration(alone)} ({alone / shared:.2f} x).")
    return lines + _budget(plan, held, shared / plan.slots)


def _budget(plan: Plan, expected: MachineTime, seconds: float) -> list[str]:
    """What was spent, and a warning where that and the expectation are more than the budget."""
    lines = []
    if plan.spent != NO_TIME:
        lines.append(f"Earlier runs of this sweep held {cost_text(plan.spent, plan.run.prices)}.")
    reached = exceeded(plan.run.budget, plan.run.prices, plan.spent + expected, seconds)
    if reached:
        lines.append(
            f"Warning: this needs more than the budget: {'; '.join(reached)}, by what is expected. "
            "The sweep will stop there, to be resumed with a larger budget."
        )
    return lines


def _depths(plan: Plan) -> dict[str, int]:
    """Stage name -> how many stages stand above it, by the longest way."""
    depths: dict[str, int] = {}
    by_name: dict[str, int] = {}
    for key, stage in plan.stages.items():
        depths[key] = max((depths[source] + 1 for source in stage.inputs.values()), default=0)
        by_name[stage.name] = max(depths[key], by_name.get(stage.name, 0))
    return by_name


def _list(names: set[str]) -> str:
    return ", ".join(sorted(names)) or "–"


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    return [lines[0], "  ".join("─" * width for width in widths), *lines[1:]]


def duration(seconds: float | None) -> str:
    """``75 -> '1 min 15 s'``; None is unknown."""
    if seconds is None:
        return "unknown"
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    hours, minutes = whole // 3600, whole % 3600 // 60
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {whole % 60:02d} s" if minutes else f"{whole} s"
