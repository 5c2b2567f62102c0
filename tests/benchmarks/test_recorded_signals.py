"""The benchmark of recorded signals works, at the smallest size. What it measures is not asserted."""

from __future__ import annotations

import pytest
import recorded_signals
from recorded_signals import Case, Runs


def test_the_three_kinds_of_runs_do_what_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    small = Case(teacher="resnet8", student="resnet8", batch_size=4, num_batches=1)
    asked: list[int] = []

    def seconds(self: Runs, name: str) -> float:
        before = len(asked)
        found = original(self, name)
        passes.append((name, len(asked) - before))
        return found

    class Counted(Runs):
        def __init__(self, case: Case, folder: str) -> None:
            super().__init__(case, folder)
            self.teacher.register_forward_hook(lambda *_: asked.append(1) and None)

    original, passes = Runs.seconds, list[tuple[str, int]]()
    monkeypatch.setattr(Counted, "seconds", seconds, raising=False)
    monkeypatch.setattr(recorded_signals, "Runs", Counted)
    found = recorded_signals.compare(small, num_rounds=1)
    assert passes == [
        ("student", 0),
        ("recorded", 1),
        ("live", 1),
        ("student", 0),
        ("recorded", 0),
        ("live", 1),
    ]
    assert min(found.student, found.recorded, found.live, found.recorded_over_student) > 0
