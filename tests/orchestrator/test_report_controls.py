"""What the report says of a gain that its controls explain, of one that they do not, and of one seed."""

from __future__ import annotations

from orchestrator.report import Objective, Report, TrialRow, to_markdown

CONTROLS = ("control-kd-matched", "control-kd-4", "control-label-heads")
WOBBLE = (0.0, 0.05, -0.04)


def rows(label: str, offset: float, *, num_seeds: int = 3) -> list[TrialRow]:
    return [
        TrialRow(
            point=label, label=label if label.startswith("control") else "point", settings={}, seed=seed, status="done",
            metrics={
                "student.top1": 70 + offset + seed,
                "student.test_top1": 69 + offset + seed + WOBBLE[seed] * (offset != 0),
            },
        )
        for seed in range(num_seeds)
    ]  # fmt: skip


def told(*groups: list[TrialRow]) -> str:
    report = Report(
        name="r", rows=[row for group in groups for row in group], objectives=[Objective(name="student.top1")],
        baseline=CONTROLS[0], controls=CONTROLS, baselines=CONTROLS,
    )  # fmt: skip
    return to_markdown(report).partition("## Controls")[2].partition("##")[0]


def test_a_gain_over_everything_survives() -> None:
    text = told(rows("p", 2.0), rows("control-kd-matched", 0), rows("control-label-heads", 0))
    assert "survives all 2 controls" in text
    assert "against heads grown on labels alone (`control-label-heads`): +2.00 (" in text


def test_a_gain_that_label_heads_have_as_well_does_not() -> None:
    text = told(rows("p", 2.0), rows("control-kd-matched", 0), rows("control-label-heads", 2.0))
    assert (
        "**does not survive** the controls: it is not shown to be better than heads grown on labels" in text
    )
    assert "tuned (the matched weight, `control-kd-matched`): +2.00" in text


def test_only_the_weight_that_is_best_on_validation_counts() -> None:
    text = told(
        rows("p", 2.0),
        rows("control-kd-matched", 0),
        rows("control-kd-4", 1.0),
        rows("control-label-heads", 0),
    )
    assert "4 times the matched weight" in text
    assert "control-kd-matched" not in text


def test_one_seed_says_nothing() -> None:
    text = told(rows("p", 2.0, num_seeds=1), rows("control-label-heads", 0, num_seeds=1))
    assert "cannot be said from one seed" in text


def test_without_controls_there_is_no_section() -> None:
    assert told(rows("p", 2.0)) == ""
