"""Every family's table: any order and partition gives the same digits, repeats count once, conflicts and gaps are refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
from measure_cases import FAMILIES, IDS, LOCALISATION, NUM_SAMPLES, random_samples

from methods.measures.localisation import LocalisationMeasure
from methods.measures.localisation_rules import LOCALISATION_RULES
from methods.measures.table import SampleTable

EVERYTHING = list(range(NUM_SAMPLES))
families = pytest.mark.parametrize("family", sorted(FAMILIES))


@families
def test_any_order_and_partition_gives_the_same_digits(family: str) -> None:
    samples, fill = random_samples(), FAMILIES[family]
    expected = repr(fill(samples, EVERYTHING).compute(expected=IDS))
    random = np.random.default_rng(1)
    for _ in range(5):
        order = random.permutation(NUM_SAMPLES).tolist()
        cuts = sorted(random.integers(0, NUM_SAMPLES + 1, 2).tolist())
        parts = [order[: cuts[0]], order[cuts[0] : cuts[1]], order[cuts[1] :]]
        whole = fill(samples, [])
        for part in parts:
            whole.merge(fill(samples, part))
        assert repr(whole.compute(expected=IDS)) == expected


@families
def test_a_sampler_that_pads_changes_nothing(family: str) -> None:
    """Nine samples on two workers: both get five, one of them twice."""
    samples, fill = random_samples(), FAMILIES[family]
    first, second = fill(samples, EVERYTHING[0::2]), fill(samples, [*EVERYTHING[1::2], 0])
    first.merge(second)
    assert len(first.table) == NUM_SAMPLES
    assert repr(first.compute()) == repr(fill(samples, EVERYTHING).compute())


@families
def test_conflicts_and_gaps_are_refused(family: str) -> None:
    fill = FAMILIES[family]
    measure = fill(random_samples(), [0, 1, 2])
    with pytest.raises(
        ValueError, match=r"6 samples were not judged, for instance set/val/3, set/val/4, set/val/5$"
    ):
        measure.compute(expected=IDS)
    with pytest.raises(ValueError, match="sample 'set/val/0' came twice with other counts"):
        measure.merge(fill(random_samples(seed=5), [0]))


@families
def test_nothing_judged_is_no_number(family: str) -> None:
    found = FAMILIES[family](random_samples(), []).compute()
    assert all(math.isnan(value) for name, value in found.items() if name not in ("num_nonfinite", "best_threshold"))  # fmt: skip


def test_other_rules_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot be added to samples judged by"):
        LocalisationMeasure(LOCALISATION).merge(LocalisationMeasure(LOCALISATION_RULES["wsol"]))


def test_a_table_says_what_its_rows_are() -> None:
    table: SampleTable[int] = SampleTable("expression")
    table.add("b", 2)
    table.add("a", 1)
    table.add("b", 2)
    assert table.rows(["a"]) == [1, 2]
    with pytest.raises(ValueError, match="expression 'a' came twice with other counts: 1 and 3"):
        table.add("a", 3)
    with pytest.raises(ValueError, match="1 expressions were not judged, for instance c"):
        table.rows(["a", "c"])
