"""The table of predictions: merged in any order, recomputed under other rules, and never quoted without them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from grounding_masks import CLASSIC, GENERALISED, batch_of, output_of, random_pairs, rectangles

from methods.grounding.contracts import GroundingBatch, GroundingOutput
from methods.grounding.evaluator import Evaluator, evaluate_network
from methods.grounding.metrics import grounding_sums, summarise_grounding
from methods.grounding.shapes_ref import ShapesRef
from methods.grounding.stream import GroundingStream

IDS = [f"set/val/ref{number}/sent0" for number in range(6)]


def generalised() -> tuple[GroundingOutput, GroundingBatch]:
    truths, masks, flags = zip(*GENERALISED, strict=True)
    return output_of(masks, flags), batch_of(truths, [not truth.any() for truth in truths])


def one_by_one(order: tuple[int, ...], protocol: str = "ours") -> Evaluator:
    whole = Evaluator(protocol, "set/val")
    for number in order:
        truth, mask, flag = GENERALISED[number]
        part = Evaluator(protocol)
        part.update(
            [IDS[number]], [number // 2], output_of([mask], [flag]), batch_of([truth], [not truth.any()])
        )
        whole.merge(part)
    return whole


def test_any_order_and_partition_gives_the_same_digits() -> None:
    output, batch = generalised()
    expected = summarise_grounding(grounding_sums(output, batch))
    for order in itertools.islice(itertools.permutations(range(6)), 0, 720, 77):
        found = one_by_one(order).compute(expected=IDS)
        assert repr(dict(found.metrics)) == repr(expected)
        assert found.num_expressions == 6


@pytest.mark.parametrize(
    ("protocol", "giou"), [("ours", 1.75 / 6), ("gsva", 2.25 / 6), ("deployed", 1.75 / 6), ("area", 3.25 / 6)]
)
def test_one_table_gives_every_column_that_looks_at_the_same_masks(protocol: str, giou: float) -> None:
    scores = one_by_one((0, 1, 2, 3, 4, 5)).compute(protocol)
    assert scores.metrics["giou"] == pytest.approx(100 * giou)
    assert scores.protocol == protocol


@pytest.mark.parametrize(
    ("protocol", "setting"), [("lavt", "size"), ("cris", "threshold"), ("phrasecut", "rasteriser")]
)
def test_rules_that_need_other_masks_are_refused(protocol: str, setting: str) -> None:
    with pytest.raises(ValueError, match=f"protocol '{protocol}' has {setting}"):
        one_by_one((0, 1)).compute(protocol)
    with pytest.raises(ValueError, match="cannot be added"):
        one_by_one((0,)).merge(Evaluator(protocol))


def test_repeats_conflicts_and_gaps() -> None:
    table = one_by_one((0, 1, 1, 0))
    assert len(table.rows) == 2
    with pytest.raises(ValueError, match="4 expressions were not judged, for instance set/val/ref2"):
        table.compute(expected=IDS)
    truth = CLASSIC[0][0]
    with pytest.raises(ValueError, match="'set/val/ref1/sent0' came twice with other counts"):
        table.update([IDS[1]], [0], output_of([truth], [0]), batch_of([truth]))


def test_a_number_is_quoted_with_its_protocol() -> None:
    text = str(one_by_one((0, 1, 2, 3, 4, 5)).compute())
    assert text.startswith("set/val, protocol ours, 6 expressions: miou ")
    assert "n_acc 33.33" in text
    classic = Evaluator(data="x")
    classic.update(["a"], [0], output_of([rectangles()]), batch_of([rectangles((0, 0, 1, 1))]))
    assert "n_acc" not in str(classic.compute())


def test_subsets_come_from_the_table() -> None:
    table = one_by_one((0, 1, 2, 3, 4, 5))
    empty = table.compute(where=lambda row: row.is_empty)
    assert (empty.num_expressions, empty.metrics["n_acc"]) == (3, pytest.approx(100 / 3))
    assert table.table()[1]["truth"] == 4


def test_the_interval_comes_from_pictures_not_from_expressions() -> None:
    masks, truths, _ = random_pairs(40, seed=5)
    names = [f"{number:03}" for number in range(40)]
    apart, together = Evaluator(), Evaluator()
    apart.update(names, list(range(40)), output_of(masks), batch_of(truths))
    together.update(names, [number // 10 for number in range(40)], output_of(masks), batch_of(truths))
    low, high = apart.interval("miou")
    assert low < apart.compute().metrics["miou"] < high
    assert apart.interval("miou") == (low, high)
    assert together.interval("miou") != (low, high)
    one = Evaluator()
    one.update(names, [7] * 40, output_of(masks), batch_of(truths))
    assert one.interval("miou") == pytest.approx((one.compute().metrics["miou"],) * 2)


class Oracle(torch.nn.Module):
    def forward(self, batch: GroundingBatch) -> GroundingOutput:
        return output_of(list(batch.masks[:, 0] > 0.5))


def test_a_network_is_judged_on_a_whole_stream() -> None:
    source = ShapesRef(num_train=4, num_validation=4, num_test=7, image_size=24)
    parts = [
        GroundingStream(
            source.load().test, source.load().vocabulary, source, ((0.5,) * 3, (0.5,) * 3), indices=np.arange(7), batch_size=3,
            seed=0, shuffle=False, device=torch.device("cpu"), rank=rank, num_workers=2,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    network = Oracle().train()
    first, second = (evaluate_network(network, stream, data="shapes_ref/test") for stream in parts)
    assert network.training
    first.merge(second)
    scores = first.compute(expected=[f"shapes_ref/0/test/{index}" for index in range(7)])
    assert (scores.metrics["miou"], scores.metrics["rec50"], scores.num_expressions) == (100.0, 100.0, 7)
