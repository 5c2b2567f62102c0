"""Whether a gain survives its control runs, in words."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from orchestrator.controls import PREFIX
from orchestrator.report_cells import signed
from orchestrator.report_table import Objective, TrialRow, on_test
from orchestrator.statistics import PairedDifference, Verdict, holm, paired_difference, spread, verdict

__all__ = ["control_lines"]

TUNED = f"{PREFIX}kd-"
"""Labels of plain distillation with various weights: only the best of them, on validation, is a control."""
MEANING = {
    f"{PREFIX}label-heads": "heads grown on labels alone",
    f"{PREFIX}random-heads": "heads that were never trained",
    f"{PREFIX}tekap": "noisy copies of the teacher",
}


def control_lines(
    rows: Sequence[TrialRow], objective: Objective, controls: Sequence[str], baselines: Sequence[str]
) -> list[str]:
    """The best point of the search against each control, paired by seed, and what that leaves of its gain.

    ``controls`` are labels; ``baselines`` those of all rows that are no points of the search. The point and the tuned
    weight are chosen on validation; the comparison is on test where that was measured.
    """
    points: dict[str, list[TrialRow]] = defaultdict(list)
    for row in rows:
        points[row.label if row.label in baselines else row.point].append(row)
    searched = {name: point for name, point in points.items() if name not in baselines}
    best = _best(searched, objective)
    tuned = _best(
        {name: points[name] for name in controls if name.startswith(TUNED) and name in points}, objective
    )
    chosen = [name for name in controls if name in points and (name == tuned or not name.startswith(TUNED))]
    if best is None or not chosen:
        return []
    found = {name: _difference(points[best], points[name], objective) for name in chosen}
    adjusted = holm([difference.p_value for difference in found.values()])
    words = {
        name: verdict(difference, maximize=objective.maximize, adjusted_p=p)
        for (name, difference), p in zip(found.items(), adjusted, strict=True)
    }
    lines = [_line(name, found[name], words[name], objective) for name in chosen]
    return [f"Best point on validation: `{best}`. {_conclusion(words)}", *lines]


def _best(points: dict[str, list[TrialRow]], objective: Objective) -> str | None:
    sign = 1.0 if objective.maximize else -1.0
    means = {
        name: spread(_by_seed(point, objective.name).values()).mean
        for name, point in points.items()
        if _by_seed(point, objective.name)
    }
    return max(means, key=lambda name: sign * means[name], default=None)


def _difference(
    point: Sequence[TrialRow], control: Sequence[TrialRow], objective: Objective
) -> PairedDifference:
    ours, theirs = (_by_seed(rows, on_test(objective.name)) for rows in (point, control))
    if not ours.keys() & theirs.keys():
        ours, theirs = (_by_seed(rows, objective.name) for rows in (point, control))
    return paired_difference(ours, theirs)


def _by_seed(rows: Sequence[TrialRow], name: str) -> dict[int, float]:
    return {row.seed: row.metrics[name] for row in rows if row.status == "done" and name in row.metrics}


def _line(name: str, difference: PairedDifference, word: Verdict, objective: Objective) -> str:
    interval = (
        f" ({signed(difference.low, objective.name)} to {signed(difference.high, objective.name)})"
        if difference.num_pairs > 1
        else ""
    )
    return f"against {_meaning(name)}: {signed(difference.mean, objective.name)}{interval}, **{word}**"


def _meaning(name: str) -> str:
    if name.startswith(TUNED):
        weight = name.removeprefix(TUNED)
        told = "the matched weight" if weight == "matched" else f"{weight} times the matched weight"
        return f"plain distillation, tuned ({told}, `{name}`)"
    return f"{MEANING.get(name, name)} (`{name}`)"


def _conclusion(words: dict[str, Verdict]) -> str:
    left = [_meaning(name) for name, word in words.items() if word != "better"]
    if not left:
        return f"Its gain survives all {len(words)} controls (verdicts corrected for their number)."
    if "needs more seeds" in words.values():
        return "Whether its gain survives the controls cannot be said from one seed: set `search.seeds` to 3 or more."
    return f"Its gain **does not survive** the controls: it is not shown to be better than {', nor than '.join(left)}."
