"""Metrics of referring segmentation against hand-counted vectors and a plain loop."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from grounding_masks import CLASSIC, GENERALISED, NOTHING, batch_of, output_of, random_pairs, rectangles

from methods.grounding.contracts import GroundingBatch, GroundingOutput
from methods.grounding.metrics import GROUNDING_METRICS, grounding_sums, summarise_grounding
from methods.grounding.protocols import PROTOCOLS, EvaluationProtocol, protocol_named


def scores(output: GroundingOutput, batch: GroundingBatch, protocol: str = "ours") -> dict[str, float]:
    return summarise_grounding(grounding_sums(output, batch, protocol=protocol))


def classic(protocol: str) -> dict[str, float]:
    truths, masks = zip(*CLASSIC, strict=True)
    return scores(output_of(masks), batch_of(truths), protocol)


def generalised(protocol: str) -> dict[str, float]:
    truths, masks, flags = zip(*GENERALISED, strict=True)
    return scores(output_of(masks, flags), batch_of(truths, [not truth.any() for truth in truths]), protocol)


@pytest.mark.parametrize(
    ("protocol", "miou", "pr50"),
    [
        ("ours", 43.75, 50.0),
        ("lavt", 43.75, 50.0),
        ("cris", 43.749990, 25.0),
        ("global_local_clip", 43.75, 50.0),
        ("rela", 43.75, 50.0),
        ("lisa", 43.7498984, 25.0),
        ("phrasecut", 43.75, 25.0),
    ],
)
def test_four_expressions_by_every_protocol(protocol: str, miou: float, pr50: float) -> None:
    found = classic(protocol)
    assert found["miou"] == pytest.approx(miou, abs=1e-6)
    assert found["oiou"] == pytest.approx(100 * 8 / 19)
    assert [found[f"pr{tenth}0"] for tenth in (5, 6, 7, 8, 9)] == [pr50, 25.0, 25.0, 25.0, 25.0]
    assert found["giou"] == pytest.approx(miou, abs=1e-6)
    assert math.isnan(found["n_acc"])


@pytest.mark.parametrize(
    ("protocol", "giou", "ciou", "n_acc", "t_acc"),
    [
        ("ours", 1.75 / 6, 6 / 26, 1 / 3, 2 / 3),
        ("rela", 1.75 / 6, 6 / 26, 1 / 3, 2 / 3),
        ("gsva", 2.25 / 6, 9 / 26, 1 / 3, 2 / 3),
        ("deployed", 1.75 / 6, 6 / 24, 1 / 3, 2 / 3),
        ("area", 3.25 / 6, 9 / 26, 2 / 3, 2 / 3),
    ],
)
def test_the_same_generalised_predictions_in_different_houses(
    protocol: str, giou: float, ciou: float, n_acc: float, t_acc: float
) -> None:
    found = generalised(protocol)
    expected = {"giou": giou, "ciou": ciou, "n_acc": n_acc, "t_acc": t_acc}
    assert {name: found[name] for name in expected} == pytest.approx({name: 100 * value for name, value in expected.items()})  # fmt: skip
    assert (found["pr70"], found["pr80"]) == (pytest.approx(100 / 3), 0.0)


def test_the_gres_case_of_ten_pixels() -> None:
    def pixels(*places: int) -> torch.Tensor:
        mask = torch.zeros(1, 10, dtype=torch.bool)
        mask[0, list(places)] = True
        return mask

    rows = [((2, 3, 4, 5), (0, 1, 2, 3), 0), ((), (), 1), ((), (7, 8), 0), ((1, 2), (1,), 1)]
    truths = [pixels(*truth) for truth, _, _ in rows]
    output = output_of([pixels(*mask) for _, mask, _ in rows], [flag for _, _, flag in rows])
    found = scores(output, batch_of(truths, [not truth.any() for truth in truths]))
    assert [found[name] for name in ("giou", "ciou", "n_acc", "t_acc")] == pytest.approx(
        [100 / 3, 20.0, 50.0, 50.0]
    )


def test_a_network_without_the_output_says_none_by_an_empty_mask() -> None:
    output = output_of([NOTHING, rectangles((0, 0, 1, 1))])
    found = scores(output, batch_of([NOTHING, NOTHING], [True, True]))
    assert (found["giou"], found["n_acc"]) == (50.0, 50.0)
    assert math.isnan(found["miou"])


@pytest.mark.parametrize(("hits", "expected"), [(5, "pr50"), (6, "pr60"), (7, "pr70"), (8, "pr80"), (9, "pr90")])  # fmt: skip
def test_thresholds_are_exact(hits: int, expected: str) -> None:
    truth, mask = rectangles((0, 0, 1, 10), sides=(1, 10)), rectangles((0, 0, 1, hits), sides=(1, 10))
    found = scores(output_of([mask]), batch_of([truth]))
    reached = [f"pr{tenth}0" for tenth in range(5, hits + 1)]
    assert [name for name in found if name.startswith("pr") and found[name] == 100.0] == reached
    assert reached[-1] == expected
    strict = scores(output_of([mask]), batch_of([truth]), "phrasecut")
    assert strict[expected] == 0.0


def test_sums_go_beyond_two_to_the_31() -> None:
    sums = grounding_sums(output_of([NOTHING]), batch_of([rectangles((0, 0, 1, 1))]))
    many = {name: value.double() * 2**33 for name, value in sums.items()}
    many["intersection"] = torch.tensor(2.0**33 + 1, dtype=torch.float64)
    assert summarise_grounding(many)["oiou"] == 100 * (2**33 + 1) / 2**33


def test_a_plain_loop_gives_the_same() -> None:
    masks, truths, empty = random_pairs(200)
    found = scores(output_of(masks), batch_of(truths, empty))
    ratios, intersections, unions = [], 0, 0
    for mask, truth, is_empty in zip(masks, truths, empty, strict=True):
        if not is_empty:
            inside, either = (mask & truth).sum().item(), (mask | truth).sum().item()
            ratios.append(inside / either if either else 0.0)
            intersections, unions = intersections + inside, unions + either
    assert found["miou"] == pytest.approx(100 * np.mean(ratios), abs=1e-7)
    assert found["oiou"] == 100 * intersections / unions
    assert found["pr60"] == pytest.approx(100 * np.mean([ratio >= 0.6 for ratio in ratios]))
    assert min(ratios) * 100 <= found["oiou"] <= max(ratios) * 100


@pytest.mark.parametrize("protocol", sorted(PROTOCOLS))
def test_sums_of_any_two_workers_give_the_same_digits(protocol: str) -> None:
    masks, truths, empty = random_pairs(30, seed=1)
    flags = [number % 3 == 0 for number in range(30)]
    whole = grounding_sums(output_of(masks, flags), batch_of(truths, empty), protocol=protocol)
    parts: dict[str, torch.Tensor] = {}
    for rows in ([*range(0, 30, 2)], [29, *range(1, 29, 2)]):
        pick = [[column[row] for row in rows] for column in (masks, flags, truths, empty)]
        sums = grounding_sums(output_of(pick[0], pick[1]), batch_of(pick[2], pick[3]), protocol=protocol)
        parts = {name: parts.get(name, torch.zeros(())).double() + value.double() for name, value in sums.items()}  # fmt: skip
    found, expected = summarise_grounding(parts), summarise_grounding(whole)
    assert {name: repr(value) for name, value in found.items()} == {name: repr(value) for name, value in expected.items()}  # fmt: skip


def test_perfect_empty_swapped_flipped_and_enlarged() -> None:
    masks, truths, _ = random_pairs(20, seed=2)
    truths = [truth if truth.any() else ~truth for truth in truths]
    perfect = scores(output_of(truths), batch_of(truths))
    assert {value for name, value in perfect.items() if name not in ("n_acc", "rec50")} == {100.0}
    silent = scores(output_of([torch.zeros_like(mask) for mask in masks]), batch_of(truths))
    assert (silent["miou"], silent["oiou"], silent["giou"], silent["rec50"]) == (0.0, 0.0, 0.0, 0.0)
    plain = scores(output_of(masks), batch_of(truths))
    swapped = scores(output_of(truths), batch_of(masks))
    assert (plain["miou"], plain["oiou"]) == (swapped["miou"], swapped["oiou"])
    flipped = scores(output_of([mask.flip(1) for mask in masks]), batch_of([mask.flip(1) for mask in truths]))
    assert repr(flipped) == repr(plain)
    double = torch.ones(2, 2, dtype=torch.bool)
    large = scores(output_of([torch.kron(mask, double) for mask in masks]), batch_of([torch.kron(mask, double) for mask in truths]))  # fmt: skip
    assert large["miou"] == plain["miou"]


def test_generalised_metrics_equal_plain_ones_when_nothing_is_empty() -> None:
    masks, truths, _ = random_pairs(20, seed=3)
    found = scores(output_of(masks, [0] * 20), batch_of(truths))
    assert 0 < found["miou"] < 100
    assert (found["giou"], found["ciou"]) == (found["miou"], found["oiou"])


def test_language_gap_is_the_fall_under_the_control() -> None:
    truths, masks = zip(*CLASSIC, strict=True)
    sums = grounding_sums(output_of(truths), batch_of(truths), rolled=output_of(masks))
    found = summarise_grounding(sums)
    assert (found["miou"], found["miou_rolled"], found["language_gap"]) == (100.0, 43.75, 56.25)
    assert set(found) == set(GROUNDING_METRICS)


def test_size_matters_for_thin_things() -> None:
    """A bar of 3 pixels, shifted by one, half overlaps in the photo and wholly at the size of the network."""
    photo = torch.zeros(427, 640, dtype=torch.uint8)
    photo[100:103, 100:500] = 1
    shifted = torch.full((1, 1, 427, 640), -3.0)
    shifted[:, :, 101:104, 100:500] = 3.0
    batch = batch_of([torch.zeros(427, 640, dtype=torch.bool)])._replace(original_masks=(photo,))
    output = output_of([NOTHING])
    wide = GroundingOutput(mask_logits=shifted, pixel_embed=output.pixel_embed, sentence_embed=output.sentence_embed)  # fmt: skip
    assert scores(wide, batch)["miou"] == 50.0
    rows, columns = torch.arange(224) * 427 // 224, torch.arange(224) * 640 // 224
    small = batch_of([photo[rows][:, columns].bool()])
    seen = GroundingOutput(mask_logits=shifted[:, :, rows][..., columns], pixel_embed=output.pixel_embed, sentence_embed=output.sentence_embed)  # fmt: skip
    assert scores(seen, small, "lavt")["miou"] == 100.0


def test_masks_of_ragged_sizes_are_compared_at_their_own() -> None:
    truths = (rectangles((0, 0, 4, 8), sides=(8, 8)), rectangles((0, 0, 2, 6), sides=(4, 12)))
    output = output_of([rectangles((0, 0, 2, 4), sides=(4, 4)), rectangles((0, 0, 2, 2), sides=(4, 4))])
    batch = batch_of([NOTHING[:, :4]] * 2)._replace(
        original_masks=tuple(truth.byte() for truth in truths),
        original_sizes=torch.tensor([[8, 8], [4, 12]]),
    )
    assert scores(output, batch)["oiou"] == 100.0


def test_truth_at_the_wrong_size_is_refused() -> None:
    batch = batch_of([NOTHING])._replace(original_sizes=torch.tensor([[40, 60]]))
    with pytest.raises(ValueError, match="original_masks"):
        scores(output_of([NOTHING]), batch)
    scores(output_of([NOTHING]), batch, "lavt")


@pytest.mark.parametrize(
    ("found", "rec50"), [((0, 0, 10, 5), 100.0), ((5, 0, 15, 10), 0.0), ((1, 1, 11, 11), 100.0), ((2, 2, 12, 12), 0.0)]
)  # fmt: skip
def test_box_accuracy(found: tuple[int, int, int, int], rec50: float) -> None:
    x0, y0, x1, y1 = found
    truth = rectangles((0, 0, 10, 10), sides=(20, 20))
    mask = rectangles((y0, x0, y1, x1), sides=(20, 20))
    assert scores(output_of([mask]), batch_of([truth]))["rec50"] == rec50
    head = GroundingOutput(
        mask_logits=output_of([NOTHING]).mask_logits.new_zeros(1, 1, 20, 20),
        pixel_embed=torch.zeros(1, 1, 1, 1),
        sentence_embed=torch.zeros(1, 1),
        boxes=torch.tensor([[(x0 + x1) / 40, (y0 + y1) / 40, (x1 - x0) / 20, (y1 - y0) / 20]]),
    )
    assert scores(head, batch_of([truth]))["rec50"] == rec50


def test_a_stray_pixel_does_not_ruin_the_box() -> None:
    truth = rectangles((0, 0, 10, 10), sides=(20, 20))
    mask = rectangles((0, 0, 10, 10), (19, 19, 20, 20), sides=(20, 20))
    assert scores(output_of([mask]), batch_of([truth]))["rec50"] == 100.0


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"threshold": 1.0}, "threshold"), ({"size": "half"}, "size"), ({"epsilon": -1.0}, "epsilon"), ({"min_area": -1}, "min_area")],
)  # fmt: skip
def test_impossible_rules_are_refused(settings: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        EvaluationProtocol(name="x", **settings)  # type: ignore[arg-type]


def test_an_unknown_protocol_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'lvt' is not a protocol; did you mean 'lavt'"):
        protocol_named("lvt")
