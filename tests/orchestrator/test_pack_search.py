"""How packs are given to Tune, and what becomes of them when a process dies. Without a cluster."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import pytest
from experiment_cases import planner_of

from orchestrator.capacity import WaitState
from orchestrator.dispatch import Dispatcher, Outcome
from orchestrator.packing import PackPolicy
from orchestrator.placement import TOKEN
from orchestrator.plan import Trial
from orchestrator.retry import Attempts
from orchestrator.search import ListSampler

ray_search = pytest.importorskip("orchestrator.ray_search")
HOLDS, LEADS, PACK = ray_search.HOLDS, ray_search.LEADS, ray_search.PACK
KILLED = "Task was killed due to the node running low on memory"
LOST = "The actor died because its node has died."


class Heard:
    """Notes who held resources, and what was told of returned trials."""

    def __init__(self) -> None:
        self.placed: list[str] = []
        self.returned: list[str] = []
        self.ended: list[str] = []

    def trial_placed(self, trial: Trial) -> None:
        self.placed.append(trial.key)

    def trial_returned(self, trial: Trial, text: str) -> None:
        self.returned.append(text)

    def trial_ended(self, trial: Trial, outcome: Outcome) -> None:
        self.ended.append(outcome.status)

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: None


class Desk:
    """A searcher over five students that learn from stored views, two slots, packs of three."""

    def __init__(self, size: int = 3) -> None:
        planner = planner_of({"baselines": {}, "search/seeds": 1})
        self.stored: set[str] = set()
        points = [{"student.kd_weight": 0.1 * number} for number in range(1, 6)]
        self.dispatcher = Dispatcher(
            planner,
            ListSampler(points),
            stored=self.stored.__contains__,
            busy=lambda key: False,
            recall=lambda trial: None,
            packing=PackPolicy(size=size),
        )
        self.heard = Heard()
        self.lightened: list[str] = []
        self.stopped: list[tuple[str, float]] = []
        self.now = 0.0
        recovery = ray_search.Recovery(
            attempts=Attempts(2),
            room=lambda is_running: WaitState(slots=2),
            lighten=lambda trial, reason, peak: bool(self.lightened.append(trial.key)),
            stop_follower=lambda pack, trial: self.stopped.append(
                (pack, trial.point.values["student.kd_weight"])
            ),
            clock=lambda: self.now,
        )
        self.searcher = ray_search.DispatchSearcher(planner.spec, self.dispatcher, self.heard, recovery)

    def suggest(self, name: str) -> dict[str, Any] | None:
        config: dict[str, Any] | None = self.searcher.suggest(name)
        return config

    def end(self, name: str, outcome: Outcome) -> None:
        self.searcher.on_trial_complete(name, {"outcome": json.dumps(asdict(outcome))})


@pytest.fixture
def desk() -> Desk:
    return Desk()


def test_followers_are_given_out_when_their_leader_has_its_place(desk: Desk) -> None:
    leader = desk.suggest("a")
    assert leader is not None
    assert [choice["values"]["student.kd_weight"] for choice in leader[LEADS]] == [0.2, pytest.approx(0.3)]
    assert leader[HOLDS] == {"CPU": 1.0}
    assert desk.suggest("b") is None  # the others need the stages that this pack makes
    desk.searcher.placed("a")
    followers = [desk.suggest(name) for name in "bc"]
    for follower, choice in zip(followers, leader[LEADS], strict=True):
        assert follower is not None
        assert follower == {**choice, HOLDS: dict(TOKEN), PACK: leader[PACK]}
    assert desk.suggest("d") is None
    for name in "bc":
        desk.searcher.placed(name)
    assert len(desk.heard.placed) == 1  # a follower holds nothing that costs


def test_followers_take_no_slot(desk: Desk) -> None:
    desk.suggest("a")
    desk.searcher.placed("a")
    for name in "bc":
        desk.suggest(name)
    running = next(iter(desk.dispatcher.running.values()))
    desk.stored.update(stage.key for stage in running.stages[:-1])
    second = desk.suggest("d")
    assert second is not None
    assert len(second[LEADS]) == 1


def test_the_leader_is_told_which_follower_the_scheduler_stopped(desk: Desk) -> None:
    leader = desk.suggest("a")
    assert leader is not None
    desk.searcher.placed("a")
    for name in "bc":
        desk.suggest(name)
    row = {"objective": 0.1, "row": json.dumps({"epoch": 1})}
    desk.searcher.on_trial_complete("b", row)
    desk.end("c", Outcome(status="done", values=(0.5,)))
    desk.searcher.on_trial_complete("a", row)  # nobody waits for a leader's own stage
    assert desk.stopped == [(leader[PACK], 0.2)]
    assert desk.heard.ended == ["stopped", "done", "stopped"]


def test_a_leader_that_ends_early_gives_back_whom_it_never_began(desk: Desk) -> None:
    desk.suggest("a")
    desk.end("a", Outcome(status="deferred"))
    assert not desk.dispatcher.running
    assert len(desk.dispatcher.waiting) == 5
    assert len(desk.suggest("b")[LEADS]) == 2  # type: ignore[index]


def test_after_a_death_for_memory_the_pack_is_smaller_and_no_stage_is_blamed(desk: Desk) -> None:
    desk.suggest("a")
    desk.searcher.placed("a")
    desk.suggest("b")
    desk.searcher.died("a", KILLED)
    desk.searcher.died("b", KILLED)
    assert desk.lightened == []
    assert [text.rpartition("; ")[2] for text in desk.heard.returned] == ["tried again in a smaller pack"] * 2
    again = desk.suggest("c")
    assert again is not None
    assert LEADS not in again or len(again[LEADS]) < 2


def test_a_trial_alone_is_asked_to_use_less() -> None:
    desk = Desk(size=1)
    desk.suggest("a")
    desk.searcher.died("a", KILLED)
    assert len(desk.lightened) == 1


def test_a_lost_node_brings_the_pack_back_in_halves(desk: Desk) -> None:
    desk.suggest("a")
    desk.searcher.placed("a")
    desk.suggest("b")
    desk.searcher.died("a", LOST)
    desk.end("b", Outcome(status="deferred"))  # its leader is gone
    desk.now = 10.0
    sizes = []
    for number in range(20):
        config, name = desk.suggest(str(number)), str(number)
        if isinstance(config, dict):
            sizes.append(1 + len(config.get(LEADS, ())))
            desk.end(name, Outcome(status="done", values=(1.0,)))
    assert desk.searcher.suggest("last") == "FINISHED"
    assert set(sizes) == {1, 2}


def test_no_follower_is_begun_once_the_run_is_to_stop(desk: Desk) -> None:
    desk.suggest("a")
    desk.searcher.placed("a")
    desk.dispatcher.cancel_waiting()
    assert desk.suggest("b") is None
    assert len(desk.dispatcher.running) == 1
    desk.end("a", Outcome(status="deferred"))
    assert desk.dispatcher.finished
