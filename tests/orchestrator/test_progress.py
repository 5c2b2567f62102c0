"""What a sweep looks like while it runs: one line for logs, a small table for terminals."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from orchestrator.progress import (
    Display,
    LiveDisplay,
    RunningStage,
    StageCount,
    Status,
    make_display,
    render,
    summary_line,
)

STATUS = Status(
    name="angular-digits",
    trials=22,
    trials_ended=5,
    trials_failed=1,
    counts={
        "teacher": StageCount(done=1, shared=21),
        "student": StageCount(done=4, running=2, waiting=15),
    },
    running=(
        RunningStage(name="student", key="0123456789abcdef", epoch=5, epochs=20, note="top1 91.20"),
        RunningStage(name="views", key="fedcba9876543210", epoch=0, epochs=0),
    ),
    best="student.top1 93.10 at views.margin=0.2",
    seconds_left=75.0,
    elapsed_seconds=8.04,
)
EMPTY = Status(name="empty", trials=0, trials_ended=0, trials_failed=0)


def console() -> Console:
    return Console(file=io.StringIO(), width=80, force_terminal=False, color_system=None)


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_summary_line() -> None:
    assert summary_line(STATUS) == (
        "[8.0 s] 5/22 trials | teacher 1 done, 0 running, 21 shared, 0 waiting; "
        "student 4 done, 2 running, 0 shared, 15 waiting | 1 failed | "
        "best student.top1 93.10 at views.margin=0.2 | about 1 min 15 s left"
    )


def test_the_summary_line_leaves_out_what_is_unknown() -> None:
    assert summary_line(EMPTY) == "[0.0 s] 0/0 trials | "


RENDERED = """\
angular-digits  5/22 trials  8.0 s  1 failed  about 1 min 15 s left
stage    done  running  shared  waiting
teacher     1        0      21        0
student     4        2       0       15
  student  01234567  ━━━━━┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄  5/20  top1 91.20
  views    fedcba98  ┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄  0/0
best so far: student.top1 93.10 at views.margin=0.2
"""


def test_the_table() -> None:
    screen = console()
    screen.print(render(STATUS))
    assert "\n".join(line.rstrip() for line in written(screen).splitlines()) + "\n" == RENDERED


def test_the_table_of_nothing() -> None:
    screen = console()
    screen.print(render(EMPTY))
    assert "empty  0/0 trials" in written(screen)


@pytest.mark.parametrize(("epoch", "filled"), [(0, 0), (10, 10), (20, 20)])
def test_the_bar(epoch: int, filled: int) -> None:
    running = (RunningStage(name="a", key="0" * 16, epoch=epoch, epochs=20),)
    screen = console()
    screen.print(render(Status(name="x", trials=1, trials_ended=0, trials_failed=0, running=running)))
    assert written(screen).count("━") == filled


def test_plain_lines_come_now_and_then() -> None:
    now = 0.0
    screen = console()
    with Display(screen, clock=lambda: now) as display:
        display.show(EMPTY)
        now = 9.0
        display.show(STATUS)  # too soon
        now = 10.0
        display.show(STATUS)
        display.event("failed   abc: [bold]markup stays as it is[/bold]")
    lines = written(screen).splitlines()
    assert lines == [
        summary_line(EMPTY),
        summary_line(STATUS),
        "failed   abc: [bold]markup stays as it is[/bold]",
    ]


def test_a_long_run_writes_fewer_lines() -> None:
    now = 0.0
    screen = console()
    long = Status(name="x", trials=1, trials_ended=0, trials_failed=0, elapsed_seconds=3600.0)
    display = Display(screen, clock=lambda: now)
    for minute in range(7):
        now = 60.0 * minute
        display.show(long)
    assert len(written(screen).splitlines()) == 3


def test_a_live_display_redraws_and_lets_events_scroll() -> None:
    screen = Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None)
    with LiveDisplay(screen) as display:
        display.show(EMPTY)
        display.event("done     abc seed 0")
        display.show(STATUS)
    text = written(screen)
    assert "done     abc seed 0" in text
    assert "5/22 trials" in text


def test_no_terminal_gets_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    display = make_display()
    assert type(display) is Display
    with display:
        display.event("hello")
    assert capsys.readouterr() == ("", "hello\n")
    with make_display(quiet=True) as silent:
        silent.event("hello")
    assert capsys.readouterr() == ("", "")
