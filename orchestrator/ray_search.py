"""Tune's view of the dispatcher: what to start next, and what becomes of a trial that ended or died.

Tune itself tries nothing again. A trial whose process died comes back here; by the kind of its death it is handed to
the dispatcher once more after a pause, or has failed. While it pauses it counts as running, but holds nothing.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ray import tune
from ray.tune.search import Searcher

from orchestrator.capacity import WaitState
from orchestrator.dispatch import Dispatcher, Outcome
from orchestrator.loop import Row
from orchestrator.placement import TOKEN, held_by_trial
from orchestrator.plan import Trial
from orchestrator.retry import Attempts, death_text, kind_of_death
from orchestrator.secrecy import hide
from orchestrator.spec import ExperimentSpec

__all__ = [
    "HOLDS",
    "LEADS",
    "OBJECTIVE",
    "OUTCOME",
    "PACK",
    "ROW",
    "DispatchSearcher",
    "GaveUp",
    "Recovery",
    "SweepListener",
    "Watch",
]

HOLDS = "holds"
"""What a trial holds while it runs, in Ray's names."""
PACK = "pack"
"""Name of the pack that a trial belongs to."""
LEADS = "leads"
"""The points of the others, for the trial that leads the pack."""
OBJECTIVE = "objective"
"""What the scheduler compares: the first objective's metric."""
ROW = "row"
"""An epoch's row as JSON, apart from the numbers that Tune adds."""
OUTCOME = "outcome"
"""The last thing that a trial reports, as JSON: Tune flattens anything else."""

UNPLACED_SECONDS = 15.0
"""A started trial that has no process after this long is said to wait."""


class SweepListener(Protocol):
    """Hears what happens in the driver. Called in the driver's main thread; must return quickly."""

    def trial_started(self, trial: Trial) -> None: ...

    def trial_placed(self, trial: Trial) -> None:
        """The trial holds its resources from now on; again after its process died."""

    def trial_row(self, trial: Trial, row: Row) -> None: ...

    def trial_ended(self, trial: Trial, outcome: Outcome) -> None: ...

    def trial_returned(self, trial: Trial, text: str) -> None:
        """The trial's process died and it is tried again: ``text`` says why and when."""

    def waiting(self, text: str) -> None:
        """What the sweep waits for: asked, available. Empty when it waits for nothing. Called again and again."""

    def tick(self) -> None:
        """Called several times a second."""


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """What the searcher asks when things go wrong."""

    attempts: Attempts
    room: Callable[[bool], WaitState]
    """What there is room for, given whether a trial is at work."""
    lighten: Callable[[Trial, str, int], bool]
    """Take in that a trial was killed for its memory (reason, peak in bytes); whether it may use less next time."""
    stop_follower: Callable[[str, Trial], None]
    """Let the pack's leader know that the scheduler has stopped a trial, whose own process may be gone already."""
    clock: Callable[[], float] = field(default=time.monotonic)


@dataclass(eq=False)
class PackUnderWay:
    """A pack whose leader was given to Tune. Its followers are given out when the leader has its place."""

    name: str
    trials: Sequence[Trial]
    is_placed: bool = False
    waiting: list[Trial] = field(init=False)

    def __post_init__(self) -> None:
        self.waiting = list(self.trials[1:])


def choice_of(trial: Trial) -> dict[str, Any]:
    """What a trial's process needs to plan it again."""
    return {"values": dict(trial.point.values), "label": trial.point.label, "seed": trial.seed}


class DispatchSearcher(Searcher):
    """Gives Tune the dispatcher's trials, as many at a time as there is room for."""

    def __init__(
        self, spec: ExperimentSpec, dispatcher: Dispatcher, listener: SweepListener, recovery: Recovery
    ) -> None:
        super().__init__()
        self._spec = spec
        self._dispatcher = dispatcher
        self._listener = listener
        self._recovery = recovery
        self._trials: dict[str, Trial] = {}
        self._asked: dict[str, float] = {}
        """Trials without a process yet -> when they were given to Tune."""
        self._paused: list[tuple[float, Trial]] = []
        self._last_rows: dict[str, Row] = {}
        self._packs: dict[str, PackUnderWay] = {}
        """By the trial that leads each."""
        self._following: dict[str, str] = {}
        """Trial that follows -> the name of its pack."""
        self.gave_up = False

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        self._listener.tick()
        room = self.look_around()
        if not self._trials and self._dispatcher.finished:  # also where there is no room for any more
            finished: str = Searcher.FINISHED
            return finished
        if (follower := self._next_follower()) is not None:
            pack, trial = follower
            self._following[trial_id] = pack.name
            return {**self._begin(trial_id, trial), HOLDS: dict(TOKEN), PACK: pack.name}
        num_free = room.slots - (len(self._trials) - len(self._following))
        trials = self._dispatcher.next_pack(num_free) if num_free > 0 else ()
        if not trials:
            return None
        # Of the whole experiment, not of what this trial lacks: Tune keeps an idle trial's process, with all that it
        # holds, and where trials hold different things a group of workers would wait for that for ever.
        stages = self._spec.workers(self._spec.stage_names)
        config = {**self._begin(trial_id, trials[0]), HOLDS: held_by_trial(stages)}
        if len(trials) == 1:
            return config
        pack = self._packs[trial_id] = PackUnderWay(uuid.uuid4().hex, trials)
        return {**config, PACK: pack.name, LEADS: [choice_of(trial) for trial in trials[1:]]}

    def _begin(self, trial_id: str, trial: Trial) -> dict[str, Any]:
        self._trials[trial_id] = trial
        self._asked[trial_id] = self._recovery.clock()
        self._listener.trial_started(trial)
        return choice_of(trial)

    def _next_follower(self) -> tuple[PackUnderWay, Trial] | None:
        """One whose leader has its place; none are started any more once the run is to stop."""
        for pack in self._packs.values():
            if self._dispatcher.cancelled:
                self._give_back(pack)
            elif pack.is_placed and pack.waiting:
                return pack, pack.waiting.pop(0)
        return None

    def _give_back(self, pack: PackUnderWay) -> None:
        """Followers that were never started wait again."""
        while pack.waiting:
            self._dispatcher.ended(pack.waiting.pop(0), Outcome(status="deferred"))

    def look_around(self) -> WaitState:
        """Hand back what has paused long enough, and see what there is room for. Gives up when that is hopeless."""
        now = self._recovery.clock()
        due = [trial for at, trial in self._paused if at <= now or self._dispatcher.cancelled]
        self._paused = [(at, trial) for at, trial in self._paused if trial not in due]
        for trial in due:
            self._dispatcher.ended(trial, Outcome(status="deferred"))
        room = self._recovery.room(len(self._asked) < len(self._trials))
        late = [name for name, since in self._asked.items() if now - since > UNPLACED_SECONDS]
        text = room.text
        if late and not text:
            text = f"{len(late)} of {len(self._trials)} trials wait for resources that are in use, or for a process to start"
        needs_room = bool(self._trials or self._paused or self._dispatcher.num_waiting)
        self._listener.waiting(text if needs_room else "")
        if room.is_hopeless and needs_room and not self.gave_up:
            self._give_up(room.text)
        return room

    def _give_up(self, reason: str) -> None:
        """Nothing runs, and nothing that waits can ever be placed."""
        self.gave_up = True
        failed = Outcome(status="failed", reason=f"it could not be placed: {reason}")
        for trial_id in list(self._trials):
            self.ended(trial_id, failed)
        for _, trial in self._paused:
            self._take_in(trial, failed)
        self._paused.clear()
        for trial, outcome in self._dispatcher.give_up(failed.reason):
            self._listener.trial_ended(trial, outcome)

    def placed(self, trial_id: str) -> None:
        """The trial has a process."""
        self._asked.pop(trial_id, None)
        if trial_id in self._packs:
            self._packs[trial_id].is_placed = True
        if trial_id in self._trials and trial_id not in self._following:  # a follower holds nothing
            self._listener.trial_placed(self._trials[trial_id])

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        if OBJECTIVE in result and trial_id in self._trials:
            row: Row = json.loads(result[ROW])
            self._last_rows[trial_id] = row
            self._recovery.attempts.progressed(self._trials[trial_id].key)
            self._listener.trial_row(self._trials[trial_id], row)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        if error:  # a trial that died is taken in by ``died``, which Tune lets know why
            return
        result = result or {}
        if OUTCOME not in result:  # the row at which the scheduler stopped it, which Tune shows only here
            self.on_trial_result(trial_id, result)
        outcome = _outcome(result, self._last_rows.get(trial_id))
        if outcome.status == "stopped" and trial_id in self._following:
            self._recovery.stop_follower(self._following[trial_id], self._trials[trial_id])
        self.ended(trial_id, outcome)

    def died(self, trial_id: str, text: str) -> None:
        """A trial's process ended without an outcome; ``text`` is Ray's word on it."""
        is_packed = trial_id in self._packs or trial_id in self._following
        if trial_id in self._packs:
            self._dispatcher.broke(self._packs[trial_id].trials)
        trial = self._forget(trial_id)
        if trial is None:
            return
        kind, (reason, peak) = kind_of_death(text), death_text(hide(text))
        # A pack comes back in halves, and a follower trains nothing: neither says anything about the trial's stage.
        is_lighter = kind == "memory" and (is_packed or self._recovery.lighten(trial, reason, peak))
        now = self._recovery.clock()
        decision = self._recovery.attempts.decide(trial.key, kind, now, is_lighter=is_lighter)
        if decision.again:
            self._paused.append((now + decision.pause_seconds, trial))
            text = "tried again in a smaller pack" if is_lighter and is_packed else decision.text
            self._listener.trial_returned(trial, f"{reason}; {text}")
        else:
            tail = f" ({decision.text})" if decision.text else ""
            self._take_in(trial, Outcome(status="failed", reason=f"{reason}{tail}"))

    def ended(self, trial_id: str, outcome: Outcome) -> None:
        trial = self._forget(trial_id)
        if trial is not None:
            self._take_in(trial, outcome)

    def _forget(self, trial_id: str) -> Trial | None:
        self._last_rows.pop(trial_id, None)
        self._asked.pop(trial_id, None)
        self._following.pop(trial_id, None)
        if trial_id in self._packs:
            self._give_back(self._packs.pop(trial_id))
        return self._trials.pop(trial_id, None)

    def _take_in(self, trial: Trial, outcome: Outcome) -> None:
        self._dispatcher.ended(trial, outcome)
        if outcome.status != "deferred":
            self._listener.trial_ended(trial, outcome)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the store knows what is finished."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: the store knows what is finished."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


def _outcome(result: Mapping[str, Any], row: Row | None) -> Outcome:
    if OUTCOME in result:
        return Outcome.from_plain(json.loads(result[OUTCOME]))
    if row is None:
        return Outcome(status="failed", reason="the trial ended without a result")
    return Outcome(
        status="stopped",
        values=(float(result[OBJECTIVE]),),
        reason=f"stopped early after epoch {row['epoch']:g}",
    )


class Watch(tune.Callback):
    """Lets searcher and listener look around while no trial reports, and learns why a trial died."""

    def __init__(self, listener: SweepListener, searcher: DispatchSearcher) -> None:
        self._listener = listener
        self._searcher = searcher

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        self._listener.tick()
        self._searcher.look_around()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._searcher.placed(trial.trial_id)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        # Not ``trial.get_error()``: that reads Tune's storage, to which nothing is copied here.
        path = trial.error_file
        self._searcher.died(trial.trial_id, Path(path).read_text(errors="replace") if path else "")

    def __getstate__(self) -> dict[str, Any]:
        return {}


class GaveUp(tune.Stopper):
    """Ends Tune's loop when the searcher has given up on trials that nothing can place."""

    def __init__(self, searcher: DispatchSearcher) -> None:
        self._searcher = searcher

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._searcher.gave_up

    def __getstate__(self) -> dict[str, Any]:
        return {}
