"""Who may share a process with whom, how many, and how the dispatcher hands packs out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import pytest
from experiment_cases import planner_of, problems_of

from orchestrator.dispatch import Dispatcher, Outcome
from orchestrator.packing import LEAST_SECONDS, MOST_TOGETHER, PackPolicy, pack_signature, stream_signature
from orchestrator.plan import Planner, Point, Trial
from orchestrator.search import ListSampler

CHANGES: dict[str, Any] = {"baselines": {}, "search/seeds": 1}
SEVERAL = {
    "stages/second": {"method": "supervised", "model": "tiny_mlp"},
    "stages/views": {"method": "supervised", "model": "mini_cnn"},
    "stages/student": {"method": "kd", "model": "tiny_mlp", "teacher": ["$teacher", "$second"]},
}


def trial(values: Mapping[str, Any], seed: int = 0, changes: Mapping[str, Any] | None = None) -> Trial:
    return planner_of({**CHANGES, **(changes or {})}).trial(Point(values), seed)


def none_stored(key: str) -> bool:
    return False


@pytest.mark.parametrize(
    ("values", "together"),
    [
        ({"student.kd_weight": 2.0}, True),
        ({"student.train.learning_rate": 0.2}, True),
        ({"student.train.epochs": 3}, True),
        ({"student.model.name": "tiny_mlp"}, True),
        ({"views.num_branches": 3}, True),
        ({"views.margin": 0.33, "student.kd_weight": 2.0}, True),
        ({"student.train.batch_size": 32}, False),
        ({"views.train.batch_size": 32}, False),
        ({"student.seed": 3}, False),
        ({"views.seed": 3}, False),
        ({"teacher.train.learning_rate": 0.2}, False),
        ({"teacher.model.name": "tiny_mlp"}, False),
        ({"student.method": "dkd", "student.teacher": "$teacher"}, False),
    ],
)
def test_trials_make_a_pack_when_batches_and_network_are_the_same(
    values: dict[str, Any], together: bool
) -> None:
    signatures = {pack_signature(trial(each), none_stored) for each in ({"student.ce_weight": 0.7}, values)}
    assert (len(signatures) == 1) == together
    assert None not in signatures


def test_seeds_of_the_trial_have_other_batches() -> None:
    assert pack_signature(trial({}, 0), none_stored) != pack_signature(trial({}, 1), none_stored)


def test_only_stages_that_are_left_to_make_need_the_same_batches() -> None:
    trials = [trial({"views.train.batch_size": size}) for size in (32, 64)]
    views = {each.stages[1].key for each in trials}
    assert len({stream_signature(each.stages[1]) for each in trials}) == 2
    assert len({pack_signature(each, none_stored) for each in trials}) == 2
    assert len({pack_signature(each, views.__contains__) for each in trials}) == 1


def test_without_a_teacher_there_is_nothing_to_share() -> None:
    changes = {"stages": {"student": {"method": "supervised", "model": "mini_cnn"}}, "search/space": {}}
    assert pack_signature(trial({}, changes=changes), none_stored) is None


def measured(seconds: float | None, share: float | None = None) -> PackPolicy:
    return PackPolicy(size="auto", seconds=lambda stage: seconds, memory_share=lambda stage: share)


@pytest.mark.parametrize(
    ("policy", "num_ready", "num_free_slots", "expected"),
    [
        (PackPolicy(size=1), 9, 1, 1),
        (PackPolicy(size=4), 9, 8, 4),
        (PackPolicy(size=4), 2, 1, 2),
        (measured(None), 9, 1, 1),
        (measured(LEAST_SECONDS - 1), 9, 1, 1),
        (measured(600.0), 9, 2, 5),
        (measured(600.0), 9, 9, 1),
        (measured(600.0), 1, 4, 1),
        (measured(600.0), 50, 1, MOST_TOGETHER),
        (measured(600.0), 5, 0, 5),
        (measured(600.0, share=0.25), 50, 1, 3),
        (measured(600.0, share=0.01), 50, 1, MOST_TOGETHER),
        (measured(600.0, share=0.9), 50, 1, 1),
        (measured(600.0, share=0.3), 4, 3, 2),
        (PackPolicy(size=4, memory_share=lambda stage: 0.9), 9, 1, 4),
    ],
)
def test_how_many_make_a_pack(policy: PackPolicy, num_ready: int, num_free_slots: int, expected: int) -> None:
    assert policy.most(trial({}), num_ready, num_free_slots) == expected


@pytest.mark.parametrize(
    ("run", "size"),
    [
        ({}, "auto"),
        ({"run/pack": "auto"}, "auto"),
        ({"run/pack": "off"}, 1),
        ({"run/pack": False}, 1),
        ({"run/pack": 6}, 6),
        ({"run/pack": 6, "run/workers": 2}, 1),
        ({"run/pack": 6, "run/stages": {"teacher": {"gpus_per_worker": 1}}}, 1),
        ({"run/pack": 6, "run/gpus_per_worker": 1}, 6),
    ],
)
def test_what_the_experiment_allows(run: dict[str, Any], size: int | str) -> None:
    policy = PackPolicy.of(planner_of(run).spec, lambda stage: None)
    assert policy.size == size
    assert policy.is_off == (size == 1)


@pytest.mark.parametrize("value", [0, -2, True, "on", 1.5])
def test_impossible_packs_are_refused(value: Any) -> None:
    (problem,) = problems_of({"run/pack": value})
    assert problem.startswith("run.pack")
    assert repr(value) in problem


def test_packing_is_in_no_key() -> None:
    assert trial({}, changes={"run/pack": 4}).key == trial({}, changes={"run/pack": "off"}).key


class World:
    """A dispatcher over points, whose finished stages are a set."""

    def __init__(self, points: list[dict[str, Any]], policy: PackPolicy) -> None:
        self.stored: set[str] = set()
        self.busy: set[str] = set()
        self.planner: Planner = planner_of(CHANGES)
        self.dispatcher = Dispatcher(
            self.planner,
            ListSampler(points),
            stored=self.stored.__contains__,
            busy=self.busy.__contains__,
            recall=lambda trial: None,
            packing=policy,
        )

    def finish(self, pack: tuple[Trial, ...]) -> None:
        for each in pack:
            self.stored.update(stage.key for stage in each.stages)
            self.dispatcher.ended(each, Outcome(status="done", values=(1.0,)))


WEIGHTS = [{"student.kd_weight": 0.1 * number} for number in range(1, 8)]


def test_packs_are_handed_out_until_everything_has_ended() -> None:
    world = World(WEIGHTS, PackPolicy(size=3))
    sizes = []
    while not world.dispatcher.finished:
        pack = world.dispatcher.next_pack()
        assert set(world.dispatcher.running) == {each.key for each in pack}
        sizes.append(len(pack))
        world.finish(pack)
    assert sizes == [3, 3, 1]
    assert len(world.dispatcher.outcomes) == 7


def test_a_pack_takes_the_stage_along_that_its_members_share() -> None:
    """The leader makes the teacher for all; trials outside of the pack wait for it as ever."""
    world = World(WEIGHTS, PackPolicy(size=3))
    pack = world.dispatcher.next_pack()
    assert len(pack) == 3
    assert len({each.stages[0].key for each in pack}) == 1
    assert world.dispatcher.next_pack() == ()
    world.stored.add(pack[0].stages[0].key)
    assert world.dispatcher.next_pack() == ()  # the views of this experiment are shared too
    world.stored.add(pack[0].stages[1].key)
    assert len(world.dispatcher.next_pack()) == 3


def test_what_somebody_else_makes_is_not_taken_into_a_pack() -> None:
    world = World(WEIGHTS, PackPolicy(size=3))
    world.busy.add(world.planner.trial(Point(WEIGHTS[1]), 0).key)
    pack = world.dispatcher.next_pack()
    assert [each.point.values for each in pack] == [WEIGHTS[0], WEIGHTS[2], WEIGHTS[3]]


@pytest.mark.parametrize(("num_free_slots", "size"), [(1, MOST_TOGETHER), (50, 3), (200, 1)])
def test_a_large_cluster_is_filled_before_trials_share(num_free_slots: int, size: int) -> None:
    world = World([{"student.kd_weight": 0.1 * number} for number in range(1, 131)], measured(600.0))
    assert len(world.dispatcher.next_pack(num_free_slots)) == size


def test_strangers_are_not_packed() -> None:
    points = [{"student.kd_weight": 0.3}, {"student.seed": 5}, {"student.kd_weight": 0.7}]
    world = World(points, PackPolicy(size=3))
    assert [each.point.values for each in world.dispatcher.next_pack()] == [points[0], points[2]]


def test_a_pack_that_died_comes_back_in_halves_and_one_that_must_be_alone_is() -> None:
    world = World(WEIGHTS[:4], PackPolicy(size=4))
    pack = world.dispatcher.next_pack()
    world.dispatcher.broke(pack)
    for each in pack:
        world.dispatcher.ended(each, Outcome(status="deferred"))
    half = world.dispatcher.next_pack()
    assert len(half) == 2
    for each in half:
        world.dispatcher.ended(each, Outcome(status="deferred", alone=each is half[0]))
    world.stored.update(stage.key for stage in half[0].stages[:2])
    sizes = []
    while pack := world.dispatcher.next_pack():
        sizes.append((len(pack), half[0] in pack))
    assert sorted(sizes) == [(1, False), (1, True), (2, False)]


def test_outcomes_survive_json() -> None:
    for outcome in (
        Outcome(status="done", values=(1.5, 2.0)),
        Outcome(status="deferred", alone=True, reason="x"),
    ):
        assert Outcome.from_plain(json.loads(json.dumps(asdict(outcome)))) == outcome
