"""The generator of shapes: deterministic, unambiguous, and with sentences that give nothing away."""

from __future__ import annotations

import pickle
from collections import defaultdict
from functools import cache

import numpy as np
import pytest

from methods.grounding import shapes_scene
from methods.grounding.boxes import box_of_mask, centred
from methods.grounding.shapes_ref import ShapesRef
from methods.grounding.shapes_scene import COLOURS, SHAPES, WORDS, Scene, draw_scene
from methods.grounding.vocabulary import UNKNOWN_ID, WordVocabulary, encode, words_of

NUM_SCENES = 300
PINNED = ("the large triangle on the bottom", 146, 333975)


@cache
def scenes(generalised: bool, canvas: int = 48, seed: int = 0) -> tuple[Scene, ...]:
    return tuple(
        draw_scene(np.random.default_rng([seed, index]), canvas, generalised=generalised)
        for index in range(NUM_SCENES if canvas == 48 else 60)
    )


def form(sentence: str) -> tuple[str, ...]:
    """The sentence without its values: what a rule that sees only the template knows."""
    kinds = {
        **dict.fromkeys(("small", "large"), "SIZE"), **dict.fromkeys(COLOURS, "COLOUR"), **dict.fromkeys(SHAPES, "SHAPE"),
        **{f"{shape}s": "SHAPES" for shape in SHAPES}, **dict.fromkeys(("left", "right", "top", "bottom"), "SIDE"),
    }  # fmt: skip
    return tuple(kinds.get(word, word) for word in words_of(sentence))


def test_the_same_seed_and_index_give_the_same_picture() -> None:
    for generalised in (False, True):
        first, again = (
            draw_scene(np.random.default_rng([3, 7]), 64, generalised=generalised) for _ in range(2)
        )
        assert first.sentence == again.sentence
        np.testing.assert_array_equal(first.image, again.image)
        np.testing.assert_array_equal(first.mask, again.mask)
    other = draw_scene(np.random.default_rng([3, 8]), 64)
    assert (other.image != draw_scene(np.random.default_rng([3, 7]), 64).image).any()


def test_pictures_are_pinned() -> None:
    """Other bits under the same settings need another ``VERSION``: fingerprints would lie."""
    scene = draw_scene(np.random.default_rng([0, 0, 5]), 48)
    assert (scene.sentence, int(scene.mask.sum()), int(scene.image.sum())) == PINNED


@pytest.mark.parametrize("canvas", [48, 64, 96])
def test_a_single_sentence_names_one_connected_object(canvas: int) -> None:
    share = []
    for scene in scenes(False, canvas)[:60]:
        assert scene.kind == "single"
        assert scene.image.shape == (3, canvas, canvas)
        assert scene.image.dtype == np.uint8
        assert box_of_mask(scene.mask) == box_of_mask(scene.mask, largest_component=True)
        share.append(scene.mask.mean())
    assert 0.03 < np.mean(share) < 0.08


def test_colours_and_shapes_are_what_the_sentence_says() -> None:
    checked = 0
    for scene in scenes(False):
        words = words_of(scene.sentence)
        colour = next((name for name in COLOURS if name in words), None)
        if colour is not None:
            seen = np.array([np.median(channel[scene.mask]) for channel in scene.image])
            nearest = min(COLOURS, key=lambda name: np.abs(np.array(COLOURS[name]) - seen).sum())
            assert nearest == colour
            checked += 1
        x, y, width, height = centred(box_of_mask(scene.mask), 48, 48)
        size = max(width, height) * 48 / 2
        for word, holds in {"left": x <= 0.53, "right": x >= 0.47, "top": y <= 0.56, "bottom": y >= 0.44, "small": size <= 6.5, "large": size >= 5.5}.items():  # fmt: skip
            assert word not in words or holds, scene.sentence
    assert checked > 80


def test_sentences_are_of_the_expected_length_and_words() -> None:
    encoded = encode(WordVocabulary(WORDS), [scene.sentence for scene in scenes(True)], 9)
    assert encoded.num_truncated == 0
    assert not (encoded.ids == UNKNOWN_ID).any()
    assert 5.5 < encoded.mask.sum(axis=1).mean() < 7


def test_empty_sentences_have_empty_masks_and_plural_ones_say_all() -> None:
    for scene in scenes(True):
        assert scene.mask.any() == (scene.kind != "none")
        assert scene.kind != "plural" or scene.sentence.startswith("all ")


@pytest.fixture
def unpainted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scenes whose sentences count: painting takes most of the time."""
    blank = np.zeros((1, 1), dtype=bool)
    monkeypatch.setattr(
        shapes_scene, "render", lambda random, things, canvas: (blank, [blank for _ in things])
    )


@pytest.mark.usefixtures("unpainted")
def test_a_rule_that_sees_only_the_template_finds_no_empty_sentence() -> None:
    """It calls a template empty when most of its training sentences were: N-acc must stay below 0.2."""
    first, second = (
        [draw_scene(np.random.default_rng([seed, index]), 48, generalised=True) for index in range(2500)]
        for seed in (0, 1)
    )
    kinds = [scene.kind for scene in first]
    shares = {kind: kinds.count(kind) / len(kinds) for kind in ("single", "plural", "none")}
    assert shares == pytest.approx({"single": 0.6, "plural": 0.2, "none": 0.2}, abs=0.03)
    votes: dict[tuple[str, ...], list[bool]] = defaultdict(list)
    for scene in first:
        votes[form(scene.sentence)].append(scene.kind == "none")
    empty = [scene for scene in second if scene.kind == "none"]
    called = [np.mean(votes.get(form(scene.sentence), [False])) > 0.5 for scene in empty]
    assert len(empty) > 400
    assert np.mean(called) < 0.1


def test_splits_differ_and_reach_other_processes_unchanged() -> None:
    source = ShapesRef(num_train=4, num_validation=4, num_test=4, image_size=24)
    data = source.load()
    first = data.train.sample(2)
    assert (first.image != data.test.sample(2).image).any()
    assert not np.array_equal(
        first.image, ShapesRef(num_train=4, seed=1, image_size=24).load().train.sample(2).image
    )
    sent = pickle.loads(pickle.dumps(data))
    assert len(pickle.dumps(data)) < 4000
    np.testing.assert_array_equal(sent.train.sample(2).image, first.image)
    assert data.train.sample_id(2) == "shapes_ref/0/train/2"


def test_the_fingerprint_covers_every_setting_and_no_default() -> None:
    fingerprints = {
        ShapesRef(**changed).fingerprint()
        for changed in ({}, {"seed": 1}, {"num_train": 5}, {"generalised": True}, {"protocol": "lavt"}, {"image_size": 64}, {"text_length": 13}, {"normalisation": "clip"})
    }  # fmt: skip
    assert len(fingerprints) == 8
    assert ShapesRef(seed=0).fingerprint() == ShapesRef().fingerprint()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_train": 1}, "num_train"), ({"text_length": 8}, "text_length must be at least 9"), ({"seed": -1}, "seed"),
        ({"image_size": 4}, "image_size"), ({"normalisation": "vgg"}, "normalisation"), ({"protocol": "x"}, "not a protocol"),
    ],
)  # fmt: skip
def test_impossible_settings_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ShapesRef(**settings)  # type: ignore[arg-type]
