"""Which trial may start next. Pure: the world is asked through the functions that are handed in.

The dispatcher knows the whole sweep: points from the sampler, their seeds, the baselines. It holds a trial back
while a stage that the trial needs is being made by another one, so that a trial which waits occupies nothing; it
answers a trial that is stored already from the store; it begins with the stages that most trials wait for; and it runs the
best points on more seeds in the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

from orchestrator.errors import ConfigurationError
from orchestrator.packing import PackPolicy, pack_signature
from orchestrator.plan import PlannedStage, Planner, Point, Trial
from orchestrator.search import Sampler
from orchestrator.tally import StageTally
from orchestrator.trial_queue import TrialQueue

__all__ = ["ALONE", "Dispatcher", "Outcome", "Status"]

ALONE = PackPolicy(size=1)
PACK_LOOK_AHEAD = 64
"""Among how many waiting trials companions are looked for: the driver's work stays the same for any queue."""

Status = Literal["done", "stopped", "failed", "deferred"]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a trial ended. ``deferred``: it met a stage that somebody else is making, and is to be tried again."""

    status: Status
    values: tuple[float, ...] = ()
    """One per objective, when done or stopped."""
    reason: str = ""
    alone: bool = False
    """Whether a deferred trial must not share a process when it is tried again."""

    @classmethod
    def from_plain(cls, told: Mapping[str, Any]) -> Outcome:
        """The outcome that ``dataclasses.asdict`` made plain."""
        return cls(**{**told, "values": tuple(told["values"])})


@dataclass(eq=False)
class _PointState:
    point: Point
    trials: dict[int, Trial] = field(default_factory=dict)
    """Seed -> trial."""
    questions: list[int] = field(default_factory=list)
    """Numbers of the sampler's points that train this; empty for a baseline."""


class Dispatcher:
    """Decides what runs next.

    Args:
        planner: Turns a point and a seed into a trial.
        sampler: Gives the points of the search.
        stored: Whether the store holds a key.
        busy: Whether somebody outside of this sweep is making a key right now.
        recall: The outcome of a trial that has ended in this or an earlier run, else None.
        seconds: What a stage is expected to take, or None: long stages that many wait for are begun first.
        packing: How many trials may share a process.
    """

    def __init__(
        self,
        planner: Planner,
        sampler: Sampler,
        *,
        stored: Callable[[str], bool],
        busy: Callable[[str], bool],
        recall: Callable[[Trial], Outcome | None],
        seconds: Callable[[PlannedStage], float | None] = lambda stage: None,
        packing: PackPolicy = ALONE,
    ) -> None:
        self._planner = planner
        self._search = planner.spec.search
        self._sampler = sampler
        self._stored = stored
        self._busy = busy
        self._recall = recall
        self._packing = packing
        self._largest: dict[str, int] = {}
        """Key of a trial -> how large a pack with it may be, after one that failed."""
        self._known_stored: set[str] = set()
        self._points: dict[str, _PointState] = {}
        self._users: dict[str, list[_PointState]] = {}
        """Key of a trial -> the points that it is a seed of."""
        self._num_asked = 0
        self._cancelled = False
        self.tally = StageTally()
        """All stages of the sweep, counted."""
        self._queue = TrialQueue(self.tally.uses, self._known_stored.__contains__, seconds)
        self._running: dict[str, Trial] = {}
        self.trials: dict[str, Trial] = {}
        self.outcomes: dict[str, Outcome] = {}
        self.num_failed = 0
        """Trials among the outcomes."""
        self.broken: list[tuple[Point, str]] = []
        """Points that turned out to be impossible, with the reason."""
        self._confirming = False
        for label in planner.spec.baselines:
            self._admit(Point(label=label), None)

    def next(self) -> Trial | None:
        """The next trial that can start now; None when none can (see ``finished``)."""
        self.draw()
        holds = self._holds(self._running.values())
        trial = self._queue.take(
            held_by=lambda trial: next((stage.key for stage in trial.stages if holds(stage.key)), None),
            is_free=lambda key: not holds(key),
        )
        if trial is not None:
            self._running[trial.key] = trial
        return trial

    def next_pack(self, num_free_slots: int = 1) -> tuple[Trial, ...]:
        """The next trials that one process is to train side by side: often one alone; none when none can start."""
        first = self.next()
        if first is None:
            return ()
        followers = self._followers(first, num_free_slots)
        for trial in followers:
            self._queue.remove(trial)
            self._running[trial.key] = trial
        return (first, *followers)

    def _followers(self, first: Trial, num_free_slots: int) -> Sequence[Trial]:
        """Waiting trials that could share a process with ``first``, which counts as running already."""
        most = self._packing.most(first, len(self._queue) + 1, num_free_slots)
        if min(most, self._largest.get(first.key, most)) < 2 or self._is_stored(first.key):
            return ()
        signature = pack_signature(first, self._is_stored)
        if signature is None:
            return ()
        holds = self._holds(other for key, other in self._running.items() if key != first.key)
        alike = [
            trial for trial in islice(self._queue, PACK_LOOK_AHEAD)
            if not self._is_stored(trial.key) and pack_signature(trial, self._is_stored) == signature
            and not any(holds(stage.key) for stage in trial.stages)
        ]  # fmt: skip
        queue_per_look = max(
            1.0, len(self._queue) / PACK_LOOK_AHEAD
        )  # the rest of the queue is taken to be alike
        most = self._packing.most(first, 1 + round(len(alike) * queue_per_look), num_free_slots)
        most = min(most, self._largest.get(first.key, most))
        return [trial for trial in alike if self._largest.get(trial.key, most) >= most][: most - 1]

    def _holds(self, others: Iterable[Trial]) -> Callable[[str], bool]:
        """Whether somebody is making a key, here (one of ``others``) or elsewhere. Each key is looked at once."""
        in_work = {stage.key for other in others for stage in other.stages}
        looked: dict[str, bool] = {}

        def holds(key: str) -> bool:
            if key not in looked:
                looked[key] = not self._is_stored(key) and (key in in_work or self._busy(key))
            return looked[key]

        return holds

    def broke(self, pack: Sequence[Trial]) -> None:
        """The process of a pack died: none of these trials is in one of more than half that size again."""
        for trial in pack:
            self._largest[trial.key] = max(1, len(pack) // 2)

    @property
    def finished(self) -> bool:
        """Whether every trial has ended and no more will come."""
        self.draw()
        return not self._running and (self._cancelled or (not self._queue and self._sampler.exhausted))

    @property
    def cancelled(self) -> bool:
        """Whether nothing more is started."""
        return self._cancelled

    @property
    def complete(self) -> bool:
        """Whether nothing was left undone, also after ``cancel_waiting``."""
        confirmed = self._confirming or not self._search.confirm.top
        return self._sampler.exhausted and confirmed and self.trials.keys() <= self.outcomes.keys()

    @property
    def waiting(self) -> Sequence[Trial]:
        return tuple(self._queue)

    @property
    def num_waiting(self) -> int:
        return len(self._queue)

    @property
    def running(self) -> Mapping[str, Trial]:
        return dict(self._running)

    def missing(self, trial: Trial) -> tuple[PlannedStage, ...]:
        """The stages of ``trial`` that nobody has made yet; none where its last one is stored."""
        if self._is_stored(trial.key):
            return ()
        return tuple(stage for stage in trial.stages if not self._is_stored(stage.key))

    def ended(self, trial: Trial, outcome: Outcome) -> None:
        """Take in how a started trial ended."""
        self._running.pop(trial.key, None)
        if outcome.alone:
            self._largest[trial.key] = 1
        if outcome.status != "deferred":
            self._record(trial, outcome)
        elif not self._cancelled:
            self._known_stored.difference_update(stage.key for stage in trial.stages)  # one may be set aside
            self._queue.push(trial)

    def cancel_waiting(self) -> None:
        """Start nothing more: for an interrupted run."""
        self._cancelled = True
        self._queue.clear()

    def give_up(self, reason: str) -> Sequence[tuple[Trial, Outcome]]:
        """Start nothing more: every trial that waits has failed, and why. For a cluster that has no room for it."""
        waiting, outcome = self.waiting, Outcome(status="failed", reason=reason)
        self.cancel_waiting()
        for trial in waiting:
            self._record(trial, outcome)
        return [(trial, outcome) for trial in waiting]

    def values(self, point_id: str) -> tuple[float, ...] | None:
        """The point's worth: the mean over its seeds, one number per objective; None while a seed is out or failed."""
        return self._values(self._points[point_id])

    def _values(self, state: _PointState) -> tuple[float, ...] | None:
        outcomes = [self.outcomes.get(trial.key) for trial in state.trials.values()]
        if not outcomes or any(outcome is None or not outcome.values for outcome in outcomes):
            return None
        columns = zip(*(outcome.values for outcome in outcomes if outcome is not None), strict=True)
        return tuple(sum(column) / len(outcomes) for column in columns)

    def _record(self, trial: Trial, outcome: Outcome) -> None:
        self._keep(trial, outcome)
        self._queue.learn_costs()
        for state in self._users[trial.key]:
            self._answer(state)

    def _keep(self, trial: Trial, outcome: Outcome) -> None:
        self.outcomes[trial.key] = outcome
        self.num_failed += outcome.status == "failed"
        if outcome.status == "done":
            for stage in trial.stages:
                self.tally.end(stage, "done")
        else:
            self.tally.end(trial.final, "failed")

    def _answer(self, state: _PointState) -> None:
        """Tell the sampler what a point was worth, once all of its seeds have ended. Once per question."""
        if not all(trial.key in self.outcomes for trial in state.trials.values()):
            return
        values = self._values(state)
        for question in state.questions:
            self._sampler.tell(question, values)
        state.questions.clear()

    def draw(self) -> None:
        """Take as many new points from the sampler as it gives; confirm the best when everything has ended."""
        while not self._cancelled and (values := self._sampler.ask()) is not None:
            self._num_asked += 1
            self._admit(Point(values=values), self._num_asked - 1)
        searched = self._sampler.exhausted and not self._queue and not self._running
        if searched and self._search.confirm.top and not self._confirming and not self._cancelled:
            self._confirming = True
            for point_id in self._best_points():
                self._add_seeds(point_id, self._search.confirm.seeds)

    def _admit(self, point: Point, question: int | None) -> None:
        """Take in a point. One that trains the same as an earlier one is not run again; it shares its answer."""
        try:
            point_id = self._planner.trial(point, 0).point_id
        except ConfigurationError as error:
            self.broken.append((point, str(error)))
            if question is not None:
                self._sampler.tell(question, None)
            return
        state = self._points.setdefault(point_id, _PointState(point))
        if question is not None:
            state.questions.append(question)
        self._add_seeds(point_id, self._search.num_seeds(point.label))
        self._answer(state)

    def _add_seeds(self, point_id: str, num_seeds: int) -> None:
        state = self._points[point_id]
        for seed in range(num_seeds):
            if seed in state.trials:
                continue
            trial = self._planner.trial(state.point, seed)
            if state in self._users.setdefault(
                trial.key, []
            ):  # the stage does not depend on the trial's seed
                continue
            self._users[trial.key].append(state)
            known = (
                trial.key in self.trials
            )  # a point that fixes the seed of its last stage trains what another does
            state.trials[seed] = trial = self.trials.setdefault(trial.key, trial)
            if known:
                continue
            self.tally.add(trial)
            outcome = self._recall(trial)
            if outcome is None:
                self._queue.push(trial)
            else:
                self._keep(trial, outcome)

    def _best_points(self) -> list[str]:
        objective = self._search.objectives[0]
        judged = {
            point_id: values[0]
            for point_id, state in self._points.items()
            if state.point.label is None and self._is_done(state)
            and (values := self._values(state)) is not None and not math.isnan(values[0])
        }  # fmt: skip
        return sorted(judged, key=judged.__getitem__, reverse=objective.maximize)[: self._search.confirm.top]

    def _is_done(self, state: _PointState) -> bool:
        """Whether every seed has run to its end: what a stopped one reached is no fair comparison."""
        outcomes = [self.outcomes.get(trial.key) for trial in state.trials.values()]
        return all(outcome is not None and outcome.status == "done" for outcome in outcomes)

    def _is_stored(self, key: str) -> bool:
        if key not in self._known_stored and self._stored(key):
            self._known_stored.add(key)
        return key in self._known_stored
