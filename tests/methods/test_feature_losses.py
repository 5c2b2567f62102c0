"""Feature and relational losses against plain loops in float64, and what must not change them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from methods.distil import crd
from methods.distil.adapters import Embedding, MapNorm, Regressor, ReviewFusion
from methods.distil.attention import attention_distance
from methods.distil.crd import bank_scores, contrast_loss
from methods.distil.fitnet import hint_distance
from methods.distil.negatives import Negatives
from methods.distil.review import hierarchical_distance
from methods.distil.rkd import angle_loss, distance_loss
from methods.distil.similarity import similarity_distance


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def smooth_l1(difference: float) -> float:
    return 0.5 * difference**2 if abs(difference) < 1 else abs(difference) - 0.5


def norm(vector: list[float]) -> float:
    return math.sqrt(sum(value * value for value in vector))


# --- RKD -----------------------------------------------------------------------------------------


def loop_distances(rows: list[list[float]]) -> list[list[float]]:
    table = [[norm([a - b for a, b in zip(one, two, strict=True)]) for two in rows] for one in rows]
    positive = [value for line in table for value in line if value > 0]
    mean = sum(positive) / len(positive)
    return [[value / mean for value in line] for line in table]


def loop_distance_loss(student: Tensor, teacher: Tensor) -> float:
    mine, theirs = loop_distances(student.tolist()), loop_distances(teacher.tolist())
    size = len(mine)
    return sum(smooth_l1(mine[i][j] - theirs[i][j]) for i in range(size) for j in range(size)) / size**2


def loop_cosine(rows: list[list[float]], i: int, j: int, k: int) -> float:
    first = [a - b for a, b in zip(rows[j], rows[i], strict=True)]
    second = [a - b for a, b in zip(rows[k], rows[i], strict=True)]
    if norm(first) == 0 or norm(second) == 0:
        return 0.0
    return sum(a * b for a, b in zip(first, second, strict=True)) / (norm(first) * norm(second))


def loop_angle_loss(student: Tensor, teacher: Tensor) -> float:
    mine, theirs = student.tolist(), teacher.tolist()
    size = range(len(mine))
    terms = [
        smooth_l1(loop_cosine(mine, i, j, k) - loop_cosine(theirs, i, j, k))
        for i in size for j in size for k in size
    ]  # fmt: skip
    return sum(terms) / len(terms)


RELATIONS = [(distance_loss, loop_distance_loss), (angle_loss, loop_angle_loss)]


@pytest.mark.parametrize(("loss", "loop"), RELATIONS)
@pytest.mark.parametrize("size", [2, 3, 6])
def test_relations_equal_plain_loops(loss, loop, size: int) -> None:
    student, teacher = random(size, 5), random(size, 7, seed=1)
    assert float(loss(student, teacher)) == pytest.approx(loop(student, teacher), abs=1e-9)


@pytest.mark.parametrize("loss", [distance_loss, angle_loss, similarity_distance])
def test_relations_ignore_scale_and_rotation(loss) -> None:
    features = random(6, 5)
    rotation = torch.linalg.qr(random(5, 5, seed=3)).Q
    assert float(loss(3 * features @ rotation, features)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("loss", [distance_loss, angle_loss])
def test_relations_ignore_a_shift(loss) -> None:
    features = random(6, 5)
    assert float(loss(features + 2, features)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("loss", [distance_loss, angle_loss, similarity_distance])
@pytest.mark.parametrize("features", [random(1, 4), torch.ones(4, 4, dtype=torch.float64), torch.zeros(3, 4)])
def test_relations_of_one_sample_or_of_equal_ones_stay_finite(loss, features: Tensor) -> None:
    student = features.clone().requires_grad_()
    value = loss(student, random(len(features), 3).to(features.dtype))
    value.backward()
    assert value.isfinite()
    assert student.grad is not None
    assert student.grad.isfinite().all()


def test_similarity_equals_a_plain_loop() -> None:
    student, teacher = random(4, 3), random(4, 6, seed=1)

    def rows(features: list[list[float]]) -> list[list[float]]:
        gram = [[sum(a * b for a, b in zip(x, y, strict=True)) for y in features] for x in features]
        return [[value / norm(line) for value in line] for line in gram]

    mine, theirs = rows(student.tolist()), rows(teacher.tolist())
    expected = sum((mine[i][j] - theirs[i][j]) ** 2 for i in range(4) for j in range(4)) / 16
    assert float(similarity_distance(student, teacher)) == pytest.approx(expected, rel=1e-9)


# --- maps ----------------------------------------------------------------------------------------


def loop_attention(maps: list) -> list[list[float]]:
    """[B][C][H][W] -> [B][P]"""
    result = []
    for sample in maps:
        height, width = len(sample[0]), len(sample[0][0])
        flat = [
            sum(channel[y][x] ** 2 for channel in sample) / len(sample)
            for y in range(height) for x in range(width)
        ]  # fmt: skip
        result.append([value / norm(flat) for value in flat])
    return result


def test_attention_equals_a_plain_loop() -> None:
    student, teacher = random(2, 3, 4, 4), random(2, 5, 4, 4, seed=1)
    mine, theirs = loop_attention(student.tolist()), loop_attention(teacher.tolist())
    terms = [(a - b) ** 2 for x, y in zip(mine, theirs, strict=True) for a, b in zip(x, y, strict=True)]
    assert float(attention_distance(student, teacher)) == pytest.approx(sum(terms) / len(terms), rel=1e-9)


def test_attention_averages_the_larger_map_down() -> None:
    small, large = random(2, 3, 4, 4), random(2, 5, 8, 8, seed=1)
    averaged = large.unfold(2, 2, 2).unfold(3, 2, 2).mean(dim=(4, 5))
    expected = float(attention_distance(small, averaged))
    assert float(attention_distance(small, large)) == pytest.approx(expected)
    assert float(attention_distance(large, small)) == pytest.approx(expected)
    assert expected > 0


def test_attention_of_silent_maps_has_a_finite_gradient() -> None:
    maps = torch.zeros(2, 3, 4, 4, requires_grad=True)
    attention_distance(maps, random(2, 3, 4, 4).float()).backward()
    assert maps.grad is not None
    assert maps.grad.isfinite().all()


def block_means(channel: list[list[float]], side: int) -> list[float]:
    size = len(channel) // side
    return [
        sum(channel[y * size + v][x * size + u] for v in range(size) for u in range(size)) / size**2
        for y in range(side) for x in range(side)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("side", "sizes"),
    [(8, [(8, 1), (4, 1 / 2), (2, 1 / 4), (1, 1 / 8)]), (4, [(4, 1), (2, 1 / 2), (1, 1 / 4)]), (1, [(1, 1)])],
)
def test_hierarchical_distance_equals_a_plain_loop(side: int, sizes: list[tuple[int, float]]) -> None:
    student, teacher = random(2, 3, side, side), random(2, 3, side, side, seed=1)
    total = 0.0
    for smaller, weight in sizes:
        terms = [
            (a - b) ** 2
            for x, y in zip(student.tolist(), teacher.tolist(), strict=True)
            for mine, theirs in zip(x, y, strict=True)
            for a, b in zip(block_means(mine, smaller), block_means(theirs, smaller), strict=True)
        ]
        total += weight * sum(terms) / len(terms)
    expected = total / sum(weight for _, weight in sizes)
    assert float(hierarchical_distance(student, teacher)) == pytest.approx(expected, rel=1e-9)


def test_hint_equals_a_plain_loop() -> None:
    student, teacher = random(2, 3), random(2, 3, seed=1)
    pairs = zip(student.flatten().tolist(), teacher.flatten().tolist(), strict=True)
    assert float(hint_distance(student, teacher)) == pytest.approx(sum((a - b) ** 2 for a, b in pairs) / 6)


# --- CRD -----------------------------------------------------------------------------------------


def test_contrast_equals_a_plain_loop() -> None:
    scores = random(3, 5).tanh()
    normaliser, num_samples = 40.0, 50
    total = 0.0
    for row in scores.tolist():
        likeness = [math.exp(score / 0.07) / normaliser for score in row]
        noise = 4 / num_samples
        total += math.log(likeness[0] / (likeness[0] + noise + 1e-7))
        total += sum(math.log(noise / (other + noise + 1e-7)) for other in likeness[1:])
    loss = contrast_loss(scores, torch.tensor(normaliser), num_samples=num_samples, contrast_temperature=0.07)
    assert float(loss) == pytest.approx(-total / 3, rel=1e-9)


@pytest.mark.parametrize(
    ("gathering_cost", "max_numbers"), [(0, 1 << 25), (10**9, 1 << 25), (0, 100), (10**9, 50)]
)
def test_scores_do_not_depend_on_how_they_are_computed(
    monkeypatch: pytest.MonkeyPatch, gathering_cost: int, max_numbers: int
) -> None:
    """By looking entries up or by one product with the whole bank, at once or in parts."""
    monkeypatch.setattr(crd, "GATHERING_COST", gathering_cost)
    monkeypatch.setattr(crd, "MAX_NUMBERS", max_numbers)
    bank, indices = (
        random(20, 6, seed=1),
        torch.randint(20, (7, 4), generator=torch.Generator().manual_seed(2)),
    )
    anchors = random(7, 6).requires_grad_()
    scores = bank_scores(anchors, bank, indices)
    weights = random(7, 4, seed=3)
    (scores * weights).sum().backward()
    for row in range(7):
        expected_gradient = torch.zeros(6, dtype=torch.float64)
        for column in range(4):
            entry = bank[indices[row, column]]
            assert float(scores[row, column].detach()) == pytest.approx(float(anchors[row].detach() @ entry))
            expected_gradient += weights[row, column] * entry
        torch.testing.assert_close(anchors.grad[row], expected_gradient)


LABELS = torch.tensor([0, 1, -1, 2, 0, 1, 1, -1, 4, 0])
"""No sample of class 3; samples 2 and 7 are held out."""


def draw(indices: Tensor, *, seed: int = 5, epoch: int = 2, num_negatives: int = 50) -> Tensor:
    return Negatives(LABELS)(indices, seed=torch.tensor(seed), epoch=epoch, num_negatives=num_negatives)


@pytest.mark.parametrize("sample", [0, 1, 3, 8])
def test_negatives_are_of_other_classes_and_evenly_drawn(sample: int) -> None:
    num_draws = 30_000
    drawn = draw(torch.tensor([sample]), num_negatives=num_draws)[0]
    counts = torch.bincount(drawn, minlength=len(LABELS)).tolist()
    allowed = [i for i, label in enumerate(LABELS.tolist()) if label not in (-1, int(LABELS[sample]))]
    expected = num_draws / len(allowed)
    assert [i for i, number in enumerate(counts) if number] == allowed
    assert (
        sum((counts[i] - expected) ** 2 / expected for i in allowed) < 30
    )  # chi-square of at most 8 degrees


def test_negatives_follow_from_seed_epoch_and_sample_alone() -> None:
    both, one = draw(torch.tensor([0, 3])), torch.tensor([3])
    assert torch.equal(draw(one)[0], both[1])
    assert torch.equal(draw(one, num_negatives=20)[0], both[1, :20])
    assert not torch.equal(draw(one, epoch=3)[0], both[1])
    assert not torch.equal(draw(one, seed=6)[0], both[1])
    assert not torch.equal(both[0], both[1])


def test_a_single_class_has_no_negatives() -> None:
    with pytest.raises(ValueError, match="all training samples are of one class"):
        Negatives(torch.tensor([1, 1, -1]))


# --- adapters ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        ((3, 8, 8), (5, 4, 4)),
        ((3, 4, 4), (5, 8, 8)),
        ((3, 7, 7), (5, 4, 4)),
        ((3, 4, 4), (5, 4, 4)),
        ((3, 9, 6), (5, 4, 4)),
    ],
)
def test_a_regressor_gives_the_shape_of_the_teacher(
    student: tuple[int, int, int], teacher: tuple[int, int, int]
) -> None:
    result = Regressor(student, teacher)(random(2, *student).float())
    assert result.shape == (2, *teacher)
    assert bool((result >= 0).all())


def test_a_regressor_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="a map of 3x3 cannot be regressed to one of 8x8"):
        Regressor((4, 3, 3), (4, 8, 8))


def test_the_deepest_fusion_has_nothing_to_join() -> None:
    deep = ReviewFusion(6, 4, (5, 1, 1), (1, 1), is_deepest=True)
    shallow = ReviewFusion(3, 4, (7, 8, 8), (4, 4), is_deepest=False)
    pooled, rest = deep(random(2, 6, 1, 1).float(), None)
    result, handed_on = shallow(random(2, 3, 4, 4).float(), rest)
    assert pooled.shape == (2, 5, 1, 1)
    assert result.shape == (2, 7, 8, 8)
    assert handed_on.shape == (2, 4, 8, 8)


def test_attention_of_a_fusion_weighs_both_sides() -> None:
    fusion = ReviewFusion(3, 4, (7, 4, 4), (4, 4), is_deepest=False).eval()
    maps, deeper = random(2, 3, 4, 4).float(), random(2, 4, 2, 2, seed=1).float()
    with torch.no_grad():
        fusion.attention.weight.zero_()
        fusion.attention.bias.copy_(torch.tensor([math.log(3.0), -50.0]))  # sigmoid: 0.75 and 0
    _, joined = fusion(maps, deeper)
    torch.testing.assert_close(joined, 0.75 * fusion.narrow(maps))


def test_a_norm_with_one_number_per_channel_uses_what_it_knows() -> None:
    norm_layer = MapNorm(3).train()
    norm_layer.running_mean.fill_(2.0)
    value = norm_layer(torch.full((1, 3, 1, 1), 2.0))
    assert torch.equal(value, torch.zeros(1, 3, 1, 1))
    assert torch.equal(norm_layer.running_mean, torch.full((3,), 2.0))
    norm_layer(random(2, 3, 1, 1).float())
    assert not torch.equal(norm_layer.running_mean, torch.full((3,), 2.0))


def test_an_embedding_has_length_one_in_float32() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        embedded = Embedding(5, 3)(random(4, 5).bfloat16())
    assert embedded.dtype == torch.float32
    torch.testing.assert_close(embedded.norm(dim=1), torch.ones(4))


# --- pinned numbers ------------------------------------------------------------------------------


def waves(*shape: int, phase: float) -> Tensor:
    """Numbers that need no random generator."""
    places = torch.arange(math.prod(shape), dtype=torch.float64)
    return (0.7 * places + phase).sin().reshape(shape)


GOLDEN = [
    (lambda: distance_loss(waves(4, 3, phase=0), waves(4, 5, phase=1)), 0.1670655731),
    (lambda: angle_loss(waves(4, 3, phase=0), waves(4, 5, phase=1)), 0.0388641948),
    (lambda: similarity_distance(waves(4, 3, phase=0), waves(4, 5, phase=1)), 0.2832117819),
    (lambda: attention_distance(waves(2, 3, 4, 4, phase=0), waves(2, 5, 8, 8, phase=1)), 0.0038045358),
    (lambda: hierarchical_distance(waves(2, 3, 8, 8, phase=0), waves(2, 3, 8, 8, phase=1)), 0.3557929920),
    (
        lambda: contrast_loss(
            waves(3, 6, phase=0) / 2, torch.tensor(90.0), num_samples=80, contrast_temperature=0.07
        ),
        11.0687477543,
    ),
]


@pytest.mark.parametrize(("loss", "expected"), GOLDEN)
def test_pinned_values(loss, expected: float) -> None:
    assert float(loss()) == pytest.approx(expected, rel=1e-7)
