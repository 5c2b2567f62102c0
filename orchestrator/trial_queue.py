"""The trials that wait for their turn, those first that make what most others wait for. Pure.

A teacher that a hundred students need goes before one that ten need, and a long one before a short one: what is begun
last decides when everything ends. Trials that nobody waits for keep the order in which they came.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Mapping

from orchestrator.plan import PlannedStage, Trial

__all__ = ["TrialQueue"]


class TrialQueue:
    """Waiting trials by the weight of what they will make. A trial that is held back by a key is parked under it.

    Whatever happens costs each trial a few steps of a heap, and nothing is looked at again and again while it waits.

    Args:
        uses: Key -> number of trials that need it; kept up to date by its owner.
        is_known: Whether a key is known to be stored. Asked often: it must not look at the storage.
        seconds: What a stage is expected to take; None where nothing is known of its kind.
    """

    def __init__(
        self,
        uses: Mapping[str, int],
        is_known: Callable[[str], bool],
        seconds: Callable[[PlannedStage], float | None],
    ) -> None:
        self._uses = uses
        self._is_known = is_known
        self._seconds = seconds
        self._costs: dict[str, float] = {}
        """Signature of a kind of stage -> seconds per stage."""
        self._unknown: dict[str, PlannedStage] = {}
        """Signature of a kind of which nothing is known -> one of its stages."""
        self._heap: list[tuple[float, int, Trial]] = []
        self._parked: dict[str, list[tuple[int, Trial]]] = {}
        self._new: list[tuple[int, Trial]] = []
        """Not weighed yet: that would be wrong while more trials come that need the same."""
        self._num_pushed = 0
        self._num_waiting = 0

    def __len__(self) -> int:
        return self._num_waiting

    def __iter__(self) -> Iterator[Trial]:
        """All that wait, in the order in which they came."""
        waiting = [*self._new, *((number, trial) for _, number, trial in self._heap)]
        waiting += [entry for parked in self._parked.values() for entry in parked]
        return iter(trial for _, trial in sorted(waiting, key=lambda entry: entry[0]))

    def push(self, trial: Trial) -> None:
        self._num_waiting += 1
        self._num_pushed += 1
        self._new.append((self._num_pushed, trial))

    def remove(self, trial: Trial) -> None:
        """Take this trial out of its turn. It must be waiting."""
        self._new = [entry for entry in self._new if entry[-1] is not trial]
        self._heap = [entry for entry in self._heap if entry[-1] is not trial]
        heapq.heapify(self._heap)
        for key, parked in list(self._parked.items()):
            self._parked[key] = [entry for entry in parked if entry[-1] is not trial]
            if not self._parked[key]:
                del self._parked[key]
        self._num_waiting -= 1

    def clear(self) -> None:
        self._new.clear()
        self._heap.clear()
        self._parked.clear()
        self._num_waiting = 0

    def take(self, held_by: Callable[[Trial], str | None], is_free: Callable[[str], bool]) -> Trial | None:
        """The trial of most weight that nothing holds back; None when there is none.

        ``held_by`` names a key that holds a trial back, ``is_free`` says whether such a key does so no more.
        """
        new, self._new = self._new, []
        for entry in new:
            self._put(*entry)
        while self._release(is_free) or self._heap:
            trial = self._take(held_by)
            if trial is not None:
                return trial
        return None

    def _release(self, is_free: Callable[[str], bool]) -> bool:
        """Take trials back from under keys that hold nothing back any more; whether there were any.

        All of them where the key is stored; else the first alone, which is to make it and will hold back the others.
        """
        freed = [key for key in self._parked if is_free(key)]
        for key in freed:
            parked = self._parked.pop(key)
            number = len(parked) if self._is_known(key) else 1
            for entry in parked[:number]:
                self._put(*entry)
            if parked[number:]:
                self._parked[key] = parked[number:]
        return bool(freed)

    def _take(self, held_by: Callable[[Trial], str | None]) -> Trial | None:
        while self._heap:
            weight, number, trial = heapq.heappop(self._heap)
            if self._weight(trial) != -weight:  # what it would have made is stored by now, or more need it
                self._put(number, trial)
            elif (key := held_by(trial)) is not None:
                self._parked.setdefault(key, []).append((number, trial))
            elif self._weight(trial) != -weight:  # ``held_by`` has looked at the storage
                self._put(number, trial)
            else:
                self._num_waiting -= 1
                return trial
        return None

    def learn_costs(self) -> None:
        """Ask again for the kinds of stages of which nothing was known, and order anew where that tells something."""
        unknown, self._unknown = self._unknown, {}
        learnt = [stage for stage in unknown.values() if self._cost(stage) is not None]
        if learnt:
            waiting, self._heap = self._heap, []
            for _, number, trial in waiting:
                self._put(number, trial)

    def _put(self, number: int, trial: Trial) -> None:
        heapq.heappush(self._heap, (-self._weight(trial), number, trial))

    def _weight(self, trial: Trial) -> float:
        """Expected seconds of the shared stages that the trial lacks, each times the other trials that need it."""
        return sum(
            (self._uses[stage.key] - 1) * self._cost_or_guess(stage)
            for stage in trial.stages[:-1]
            if not self._is_known(stage.key)
        )

    def _cost_or_guess(self, stage: PlannedStage) -> float:
        """Where nothing is known of a kind of stage, it is taken to cost as much as others do in the mean."""
        seconds = self._cost(stage)
        if seconds is not None:
            return seconds
        return sum(self._costs.values()) / len(self._costs) if self._costs else 1.0

    def _cost(self, stage: PlannedStage) -> float | None:
        signature = stage.signature
        if signature not in self._costs and signature not in self._unknown:
            seconds = self._seconds(stage)
            if seconds is None:
                self._unknown[signature] = stage
            else:
                self._costs[signature] = seconds
        return self._costs.get(signature)
