"""The account of a sweep: machine time that its runs have held, whatever came of it.

Each run of the sweep keeps one document ``accounts/<sweep>/<run>.json`` up to date, so a killed driver loses at most
the last few seconds of its account, two drivers never write the same file, and every run is counted once.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from orchestrator.clock import SYSTEM_CLOCK, Clock
from orchestrator.cost import NO_TIME, NOTHING_SPENT, MachineTime, Resources, Spent
from orchestrator.errors import DamagedArtifactError, StorageError
from orchestrator.store import Store

__all__ = ["Account", "read_spent"]

logger = logging.getLogger(__name__)

WRITE_SECONDS = 5.0
"""A driver that is killed loses at most this much of the account."""


def read_spent(store: Store, sweep: str, *, except_run: str = "") -> Spent:
    """What the recorded runs of ``sweep`` have held. A stage that was finished later counts as finished."""
    spent = NOTHING_SPENT
    for path in store.list_json(f"accounts/{sweep}/"):
        if path.endswith(f"/{except_run}.json"):
            continue
        record = store.read_json(path)
        if record is not None:
            spent += _spent_of(record, store, path)
    return spent


def _spent_of(record: Any, store: Store, path: str) -> Spent:
    try:
        finished = [MachineTime(**record["finished"])]
        unfinished: list[MachineTime] = []
        for key, time in record["unfinished"].items():
            (finished if store.has(key) else unfinished).append(MachineTime(**time))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DamagedArtifactError(
            f"{store.url}/{path} is no account of a sweep ({error!r}): delete it; that run is then not counted"
        ) from error
    return Spent(finished=_total(finished), unfinished=_total(unfinished))


def _total(times: Iterable[MachineTime]) -> MachineTime:
    return sum(times, NO_TIME)


class Account:
    """The open account of one run, kept by its driver. Times are read off the driver's own clock."""

    def __init__(self, store: Store, sweep: str, run_id: str, *, clock: Clock = SYSTEM_CLOCK) -> None:
        self._store = store
        self._path = f"accounts/{sweep}/{run_id}.json"
        self._clock = clock
        self._earlier = read_spent(store, sweep, except_run=run_id)
        self._since: dict[str, float] = {}
        """Trial -> until when its time is booked."""
        self._finished = NO_TIME
        self._finished_stages: set[str] = set()
        self._unfinished: dict[str, MachineTime] = {}
        """Stage that has no artifact yet -> time held for it."""
        self._written = float("-inf")
        self._is_dirty = self._is_failing = False

    @property
    def spent(self) -> Spent:
        """All runs of the sweep, this one included."""
        own = Spent(finished=self._finished, unfinished=_total(self._unfinished.values()))
        return self._earlier + own

    def placed(self, trial: str) -> None:
        """From now on the trial holds its place."""
        self._since[trial] = self._clock.monotonic()

    def hold(self, trial: str, stage: str, resources: Resources) -> None:
        """Book the time since the last booking for the stage that the trial is at. Nothing for one without a place."""
        if trial not in self._since:
            return
        now = self._clock.monotonic()
        held = resources.over(now - self._since[trial])
        self._since[trial] = now
        if stage in self._finished_stages:
            self._finished += held
        else:
            self._unfinished[stage] = self._unfinished.get(stage, NO_TIME) + held
        self._is_dirty = True

    def left(self, trial: str) -> None:
        """The trial holds nothing any more."""
        self._since.pop(trial, None)

    def finished(self, stage: str) -> None:
        """The stage has its artifact: what was held for it is not lost."""
        self._finished_stages.add(stage)
        self._finished += self._unfinished.pop(stage, NO_TIME)

    def write(self, *, now: bool = False) -> None:
        """Bring the document up to date, every few seconds or ``now``. A storage that fails is tried again later."""
        due = self._clock.monotonic() - self._written >= WRITE_SECONDS
        if not self._is_dirty or not (now or due):
            return
        self._written = self._clock.monotonic()
        record = {
            "finished": asdict(self._finished),
            "unfinished": {key: asdict(time) for key, time in self._unfinished.items()},
            "at": self._clock.time(),
        }
        try:
            self._store.write_json(self._path, record, durable=now)
        except StorageError as error:
            if not self._is_failing:
                logger.warning("the account of what this sweep costs is not up to date: %s", error)
            self._is_failing = True
        else:
            self._is_dirty = self._is_failing = False
