"""Subsets of PhraseCut on which its paper reports, each with the same metrics as the whole.

By kind of phrase, number of instances, size of the target, how frequent the category is in training, and whether it is
one of the 80 names of COCO (``seen``). Not built: stuff against objects and kinds of attributes, which need word lists
of the release.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from methods.grounding.evaluator import Evaluator, Row, Scores
from methods.grounding.refer_index import Index, Reference
from methods.grounding.refer_split import ReferSplit

COCO_NAMES = frozenset(
    [
        "person",
        "bicycle",
        "car",
        "motorcycle",
        "airplane",
        "bus",
        "train",
        "truck",
        "boat",
        "traffic light",
        "fire hydrant",
        "stop sign",
        "parking meter",
        "bench",
        "bird",
        "cat",
        "dog",
        "horse",
        "sheep",
        "cow",
        "elephant",
        "bear",
        "zebra",
        "giraffe",
        "backpack",
        "umbrella",
        "handbag",
        "tie",
        "suitcase",
        "frisbee",
        "skis",
        "snowboard",
        "sports ball",
        "kite",
        "baseball bat",
        "baseball glove",
        "skateboard",
        "surfboard",
        "tennis racket",
        "bottle",
        "wine glass",
        "cup",
        "fork",
        "knife",
        "spoon",
        "bowl",
        "banana",
        "apple",
        "sandwich",
        "orange",
        "broccoli",
        "carrot",
        "hot dog",
        "pizza",
        "donut",
        "cake",
        "chair",
        "couch",
        "potted plant",
        "bed",
        "dining table",
        "toilet",
        "tv",
        "laptop",
        "mouse",
        "remote",
        "keyboard",
        "cell phone",
        "microwave",
        "oven",
        "toaster",
        "sink",
        "refrigerator",
        "book",
        "clock",
        "vase",
        "scissors",
        "teddy bear",
        "hair drier",
        "toothbrush",
    ]
)
FREQUENCIES = ((20, "frequency_1_20"), (100, "frequency_21_100"), (500, "frequency_101_500"))
"""Ranks of categories by the number of training phrases, up to each number; beyond, and unseen, is the rest."""
REST = "frequency_beyond_500"


def category_ranks(training: Iterable[Reference]) -> dict[str, int]:
    """Category -> place by number of training phrases, from 1; equals by name."""
    counts = Counter(reference.category for reference in training)
    ordered = sorted(counts, key=lambda name: (-counts[name], name))
    return {name: place for place, name in enumerate(ordered, 1)}


def subsets_of(reference: Reference, index: Index, row: Row, ranks: Mapping[str, int]) -> frozenset[str]:
    """Names of the subsets that a judged phrase is in."""
    picture = index.pictures[reference.image_id]
    share = row.truth / (picture["height"] * picture["width"])
    num_instances = len(reference.annotation_ids)
    place = ranks.get(reference.category, FREQUENCIES[-1][0] + 1)
    return frozenset({
        f"type_{reference.kind}",
        "instances_1" if num_instances == 1 else "instances_2_4" if num_instances <= 4 else "instances_beyond_4",
        "size_below_2_percent" if share < 0.02 else "size_2_20_percent" if share <= 0.2 else "size_above_20_percent",
        next((name for most, name in FREQUENCIES if place <= most), REST),
        "seen" if reference.category in COCO_NAMES else "unseen",
    })  # fmt: skip


def subset_scores(
    evaluator: Evaluator, split: ReferSplit, training: Iterable[Reference]
) -> dict[str, Scores]:
    """Scores of every subset that is not empty, and of ``all``.

    Args:
        evaluator: Has judged every phrase of ``split``, at the size of the stored pictures.
        split: The phrases.
        training: References of the training split, by which categories are frequent or not.

    Raises:
        ValueError: A phrase was not judged.
    """
    ranks, members = category_ranks(training), dict[str, set[str]]()
    names = [split.sample_id(number) for number in range(len(split))]
    scores = {"all": evaluator.compute(expected=names)}
    rows = {row.sample_id: row for row in evaluator.rows}
    for number, name in enumerate(names):
        for subset in subsets_of(split.reference(number), split.index, rows[name], ranks):
            members.setdefault(subset, set()).add(name)
    for subset, inside in sorted(members.items()):
        scores[subset] = evaluator.compute(where=lambda row, inside=inside: row.sample_id in inside)  # type: ignore[misc]
    return scores
