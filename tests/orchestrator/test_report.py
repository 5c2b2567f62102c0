"""The table, its text forms and the report, from rows written by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from orchestrator.cost import MachineTime, PriceSettings, Spent
from orchestrator.report import (
    Objective,
    Report,
    TrialRow,
    best,
    cost,
    cost_lines,
    cost_table,
    table,
    to_markdown,
    to_text,
)
from orchestrator.report_cells import MISSING, duration, setting, short_names, signed

TOP1 = [Objective(name="student.top1")]


def row(
    point: str, seed: int, top1: float | None = None, test: float | None = None, **fields: Any
) -> TrialRow:
    metrics = {} if top1 is None else {"student.top1": top1}
    metrics |= {} if test is None else {"student.test_top1": test}
    settings = {"views.margin": 0.2, "views.num_branches": 5} if point != "kd" else {}
    defaults = {
        "label": "kd" if point == "kd" else "angular",
        "settings": settings,
        "status": "done",
        "num_parameters": 1_230_000,
        "seconds": 100.0,
    }
    return TrialRow(**{"point": point, "seed": seed, "metrics": metrics, **defaults, **fields})


def kd() -> list[TrialRow]:
    return [row("kd", seed, 70.0 + seed, 69.0 + seed) for seed in range(3)]


def test_means_spreads_and_paired_differences() -> None:
    rows = [*kd(), *(row("p", seed, 71.0 + seed, 70.5 + seed + 0.1 * seed) for seed in range(3))]
    frame = table(rows, TOP1, baseline="kd")
    first, second = frame.to_dict("records")
    assert (first["point"], first["label"], first["seeds"]) == ("p", "angular", 3)
    assert (first["student.top1"], first["student.top1 std"]) == pytest.approx((72.0, 1.0))
    assert first["student.test_top1"] == pytest.approx(71.6)
    assert first["difference (test)"] == pytest.approx(1.6)
    assert first["low"] < 1.6 < first["high"]
    assert first["pairs"] == 3
    assert (first["views.margin"], first["parameters"]) == (0.2, 1_230_000)
    assert math.isnan(second["difference (test)"])
    assert math.isnan(second["views.margin"])
    assert frame["student.top1"].dtype == float
    chosen = best(frame)
    assert chosen is not None
    assert chosen["point"] == "p"


def test_without_test_numbers_the_difference_is_on_validation_and_says_so() -> None:
    rows = [row("kd", 0, 70.0), row("kd", 1, 71.0), row("p", 0, 71.0), row("p", 1, 72.5)]
    frame = table(rows, TOP1, baseline="kd")
    assert "student.test_top1" not in frame
    assert frame["difference (validation)"].iloc[0] == pytest.approx(1.25)
    assert "Δ validation" in to_text(frame, 200)


def test_of_several_baseline_points_the_best_on_validation_counts() -> None:
    rows = [row("p", 0, 75.0, 80.0), *(row(f"kd{n}", 0, 70.0 + n, 90.0 - n, label="kd") for n in range(3))]
    frame = table(rows, TOP1, baseline="kd")
    assert frame.set_index("point")["difference (test)"]["p"] == pytest.approx(80.0 - 88.0)


def test_sorted_by_validation_with_failed_last_and_stopped_without_test() -> None:
    rows = [
        row("low", 0, 60.0, 99.0),
        row("high", 0, 70.0, 1.0),
        row("stopped", 0, 90.0, 90.0, status="stopped", reason="ASHA"),
        row("failed", 0, status="failed", reason="loss is NaN"),
        row("waiting", 0, status="waiting"),
        row("mixed", 0, 65.0, 50.0),
        row("mixed", 1, status="failed", reason="out of memory"),
        row("mixed", 2, status="failed", reason="out of memory"),
    ]
    frame = table(rows, TOP1, baseline=None)
    assert list(frame["point"]) == ["high", "mixed", "low", "stopped", "waiting", "failed"]
    assert list(frame["status"]) == ["done", "partial", "done", "stopped", "waiting", "failed"]
    by_point = frame.set_index("point")
    assert math.isnan(by_point["student.test_top1"]["stopped"])
    assert by_point["student.top1"]["stopped"] == 90.0
    assert by_point["seeds"]["mixed"] == 1
    assert by_point["reason"]["mixed"] == "out of memory (2 seeds)"


def test_metrics_that_nothing_is_chosen_by_stand_beside_the_objective() -> None:
    rows = [row("p", seed, 71.0, 70.0) for seed in range(2)]
    for seed, item in enumerate(rows):
        item.metrics.update({"student.language_gap": 5.0, "student.test_language_gap": 20.0 + 2 * seed})
        item.metrics.update({"student.t_acc": 99.0})
    names = ["student.language_gap", "student.t_acc", "student.absent"]
    frame = table(rows, TOP1, shown=names)
    assert frame["student.test_language_gap"].tolist() == [21.0]
    assert frame["student.t_acc"].tolist() == [99.0]
    text = to_text(frame, 200)
    assert "21.00 ± 1.41" in text
    assert "99.00 ± 0.00" in text
    assert text.count("language_gap %") == text.count("t_acc %") == text.count("absent") == 1


def test_a_swept_list_is_a_value_like_others() -> None:
    rows = [row(str(lengths), 0, 71.0, settings={"grounder.attribute_lengths": lengths}) for lengths in ([8], [4, 10])]  # fmt: skip
    text = to_text(table(rows, TOP1), 200)
    assert "[4, 10]" in text
    assert "[8]" in text
    assert "[4, 10]" in to_markdown(Report(name="lists", rows=rows, objectives=TOP1))


def test_minimizing_puts_the_smallest_first() -> None:
    rows = [
        TrialRow(point=p, label=p, settings={}, seed=0, status="done", metrics={"s.loss": v})
        for p, v in (("a", 2.0), ("b", 1.0))
    ]
    frame = table(rows, [Objective(name="s.loss", maximize=False)], baseline="a")
    assert list(frame["point"]) == ["b", "a"]
    assert f"1 ± {MISSING} (1)" in to_text(frame, 120)


def test_no_rows_and_nothing_finished() -> None:
    empty = table([], TOP1, baseline="kd")
    assert best(empty) is None
    assert to_text(empty, 80) == "no trials yet\n"
    assert "No trials yet." in to_markdown(Report(name="x", rows=[], objectives=TOP1))
    failed = [row("p", 0, status="failed", reason="bad | luck")]
    frame = table(failed, TOP1, baseline="kd")
    assert best(frame) is None
    assert "failed: angular p: bad | luck" in to_text(frame, 80)


def test_text_fits_its_width_and_drops_what_matters_least() -> None:
    rows = [*kd(), *(row("p", seed, 76.0 + 0.1 * seed, 75.0 + 0.2 * seed) for seed in range(3))]
    frame = table(rows, TOP1, baseline="kd")
    wide = to_text(frame, 200)
    assert "76.10 ± 0.10 (3)" in wide
    assert "1.23 M" in wide
    assert "100 s" not in wide
    assert "1.7 min" in wide
    for width in (60, 80, 100, 120):
        text = to_text(frame, width)
        assert max(map(len, text.splitlines())) <= width
    narrow = to_text(frame, 80)
    assert "1.23 M" not in narrow
    assert "76.10 ± 0.10" in narrow
    assert "3 seeds" in narrow


def test_of_many_points_the_best_and_the_baselines_are_shown() -> None:
    rows = [
        row(f"p{index}", 0, 50.0 + index / 10, label="point", settings={"views.margin": index})
        for index in range(95)
    ]
    lost = [
        row(f"f{index}", 0, label="point", status="failed", reason=f"broken {index}") for index in range(35)
    ]
    report = Report(name="many", rows=[*rows, *lost, *kd()], objectives=TOP1, baseline="kd")
    frame = table(report.rows, TOP1, baseline="kd")
    assert len(frame) == 131
    for text in (to_text(frame, 160), to_markdown(report)):
        assert "59.40" in text  # the best, and the twentieth
        assert "57.50" in text
        assert "57.40" not in text
        assert "71.00" in text  # the baseline
        assert "also has the other 110 (75 done, 35 failed)" in text
    assert "broken 29" in to_text(frame, 160)
    assert "and 5 more" in to_text(frame, 160)
    assert "other" not in to_text(table([*rows[:37], *kd()], TOP1, baseline="kd"), 160)


def test_markdown_tells_splits_verdicts_cost_failures_and_commands(tmp_path: Path) -> None:
    rows = [
        *kd(),
        *(row("p", seed, 76.0, 75.0 + seed, seconds=300.0, shared_seconds=200.0) for seed in range(3)),
        row("q", 0, status="failed", reason="loss is NaN | epoch 3", epochs=3),
    ]
    report = Report(
        name="digits",
        rows=rows,
        objectives=TOP1,
        baseline="kd",
        command="stillhouse run x.yaml",
        tracking_command="mlflow ui --backend-store-uri sqlite:////x.db",
        plots=[tmp_path / "plots" / "cost.png"],
        folder=tmp_path,
    )
    text = to_markdown(report)
    for expected in (
        "# digits",
        "3 points, 3 seeds, 7 trials (6 done, 1 failed)",
        "chosen by **validation**",
        "read once per finished student",
        "angular (margin 0.2, num_branches 5) against kd, test: +6.00 (95 % interval +6.00 to +6.00), 3 paired seeds: **better**",
        "would have taken 22 min; with shared stages it took 12 min: 10 min (46 %) saved",
        "failed: angular `q` seed 0, after 3 epochs: loss is NaN | epoch 3",
        "`stillhouse run x.yaml`",
        "`mlflow ui --backend-store-uri sqlite:////x.db`",
        "![cost](plots/cost.png)",
    ):
        assert expected in text, expected
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1
    assert text.encode("utf-8")


def test_cost_counts_every_trial() -> None:
    total = cost([row("p", 0, seconds=10.0, shared_seconds=4.0), row("p", 1, seconds=5.0, status="failed")])
    assert (total.alone_seconds, total.shared_seconds, total.paid_seconds) == (15.0, 4.0, 11.0)


HELD = MachineTime(cpu_seconds=7200.0, gpu_seconds=3600.0)
SHARED = MachineTime(cpu_seconds=3600.0, gpu_seconds=1800.0)


def test_machine_time_and_money_of_a_point_and_of_each_trial() -> None:
    rows = [*kd(), row("p", 0, 71.0, seconds=3600.0, held=HELD, shared_held=SHARED), row("p", 1, status="waiting", seconds=0.0)]  # fmt: skip
    prices = PriceSettings(gpu_hour=2.0, cpu_hour=0.5, currency="CHF")
    point = table(rows, TOP1, baseline="kd", prices=prices).set_index("point").loc["p"]
    assert (point["cpu_hours"], point["gpu_hours"], point["money"]) == (2.0, 1.0, 3.0)
    assert (point["shared_cpu_hours"], point["shared_gpu_hours"], point["shared_money"]) == (1.0, 0.5, 1.5)
    assert "CHF/" in to_text(table(rows, TOP1, baseline="kd", prices=prices), 200)
    trials = cost_table(rows, prices)
    assert len(trials) == len(rows)
    assert trials.iloc[3][["own_cpu_hours", "own_gpu_hours", "own_money", "shared_money"]].tolist() == [1.0, 0.5, 1.5, 1.5]  # fmt: skip


def test_cost_columns_that_say_nothing_are_left_out() -> None:
    rows = [row("p", 0, 71.0, held=MachineTime(cpu_seconds=100.0))]
    assert not {"cpu_hours", "gpu_hours", "money"} & set(table(rows, TOP1))
    wide = [row("p", 0, 71.0, held=MachineTime(cpu_seconds=200.0))]
    assert set(table(wide, TOP1)) - set(table(rows, TOP1)) == {"cpu_hours", "shared_cpu_hours"}


def test_the_report_tells_lost_work() -> None:
    rows = [row("p", 0, 71.0, held=HELD, shared_held=SHARED)]
    spent = Spent(finished=HELD, unfinished=SHARED)
    lines = cost_lines(rows, None, spent)
    assert "Held by that training: 0.50 GPU-h, 1.00 CPU-h; saved by sharing: 0.50 GPU-h, 1.00 CPU-h." in lines
    assert "All runs of this sweep held 1.50 GPU-h, 3.00 CPU-h" in lines[-1]
    assert "0.50 GPU-h, 1.00 CPU-h of it on stages that failed" in lines[-1]


def test_a_table_written_to_csv_reads_back(tmp_path: Path) -> None:
    frame = table(kd(), TOP1, baseline="kd")
    frame.to_csv(tmp_path / "t.csv", index=False)
    assert list(pd.read_csv(tmp_path / "t.csv")["student.top1"]) == list(frame["student.top1"])


@pytest.mark.parametrize(("seconds", "text"), [
    (0.0, "0 s"), (0.42, "0.4 s"), (48.4, "48 s"), (372.0, "6.2 min"), (3000.0, "50 min"), (12240.0, "3.4 h"), (math.nan, MISSING),
])  # fmt: skip
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(("value", "text"), [
    (None, MISSING), (math.nan, MISSING), (True, "yes"), (False, "no"), (5, "5"), (5.0, "5"), (0.05, "0.05"), (1e-5, "1e-05"),
    (1 / 3, "0.333"), ("joint", "joint"), (1200.0, "1200"), (1e9, "1e+09"), (50000, "50000"),
])  # fmt: skip
def test_setting(value: Any, text: str) -> None:
    assert setting(value) == text


def test_names_are_shortened_only_where_unique() -> None:
    names = ["views.margin", "views.lr", "student.lr"]
    assert short_names(names) == {
        "views.margin": "margin",
        "views.lr": "views.lr",
        "student.lr": "student.lr",
    }


def test_differences_carry_a_sign() -> None:
    assert signed(0.5, "student.top1") == "+0.50"
    assert signed(-0.01234, "student.loss") == "-0.0123"


def compared(name: str, gains: tuple[float, ...]) -> list[TrialRow]:
    return [row(name, seed, 71.0, 69.0 + seed + gain) for seed, gain in enumerate(gains)]


def verdict_lines(rows: list[TrialRow]) -> str:
    return to_markdown(Report(name="sweep", rows=rows, objectives=TOP1, baseline="kd"))


def test_verdicts_are_corrected_for_the_number_of_points_compared() -> None:
    close = compared("close", (1.0, 1.3, 0.6))  # p = 0.042 alone
    others = [point for number in range(3) for point in compared(f"other{number}", (0.5, -0.5, 0.1))]
    assert "**better**" in verdict_lines([*kd(), *close])
    many = verdict_lines([*kd(), *close, *others])
    assert "**better**" not in many
    assert "among so many comparisons (p 0.17 after correction)" in many
    frame = table([*kd(), *close, *others], TOP1, baseline="kd").set_index("point")
    assert frame["adjusted p"]["close"] == pytest.approx(4 * frame["p"]["close"])


def test_an_open_verdict_says_how_many_more_seeds_would_tell() -> None:
    assert "about 1 more seed would tell" in verdict_lines([*kd(), *compared("p", (1.0, 1.6, 0.4))])
    assert "hardly tell them apart" in verdict_lines([*kd(), *compared("p", (0.5, -0.5, 0.01))])


def test_the_best_epoch_is_told_beside_the_last() -> None:
    rows = [row("p", seed, 70.0, 69.0) for seed in range(2)]
    for one, best_top1 in zip(rows, (70.2, 70.6), strict=True):
        one.metrics["student.best_top1"] = best_top1
    text = to_markdown(Report(name="sweep", rows=rows, objectives=TOP1))
    assert "best epoch reads +0.40 on validation" in text
