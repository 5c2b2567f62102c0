"""From sentences to ids: word level and HuggingFace, and what does not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from methods.data.base import DataError
from methods.grounding.shapes_scene import WORDS
from methods.grounding.vocabulary import (
    END_ID,
    SPECIAL,
    START_ID,
    UNKNOWN_ID,
    HuggingFaceVocabulary,
    WordVocabulary,
    encode,
    mirrored,
    refuse_end_id_two,
    vocabulary_of,
    words_of,
)

SHAPES = WordVocabulary(WORDS)


def test_thirty_four_entries_with_fixed_special_ids() -> None:
    assert len(SHAPES) == 34
    assert SPECIAL == ("[pad]", "[cls]", "[mask]", "[sep]", "[unk]")
    assert (SHAPES.pad_id, SHAPES.start_id, SHAPES.mask_id, SHAPES.end_id, UNKNOWN_ID) == (0, 1, 2, 3, 4)


def test_start_words_end_padding() -> None:
    encoded = encode(SHAPES, ["The small, RED circle!", "object"], 7)
    red = len(SPECIAL) + WORDS.index("red")
    assert encoded.ids[0, :6].tolist()[0] == START_ID
    assert encoded.ids[0, 3] == red
    assert encoded.ids[0].tolist()[5:] == [END_ID, 0]
    assert encoded.mask.sum(axis=1).tolist() == [6, 3]
    assert (encoded.num_truncated, encoded.num_unknown) == (0, 0)


def test_truncation_keeps_the_end_token_and_is_counted() -> None:
    encoded = encode(SHAPES, ["the small red circle on the left", "the circle"], 5)
    assert encoded.ids[0, -1] == END_ID
    assert encoded.ids[0, :-1].tolist() == encode(SHAPES, ["the small red"], 5).ids[0, :-1].tolist()
    assert encoded.mask[0].all()
    assert encoded.num_truncated == 1


def test_unknown_words_are_counted() -> None:
    encoded = encode(SHAPES, ["the mauve circle", "a hexagon"], 6)
    assert encoded.num_unknown == 2
    assert (encoded.ids == UNKNOWN_ID).sum() == 2


@pytest.mark.parametrize("sentence", ["", "   ", "?!"])
def test_an_empty_sentence_is_refused(sentence: str) -> None:
    with pytest.raises(DataError, match="sentence 1 of 2 is empty"):
        encode(SHAPES, ["circle", sentence], 6)


def test_words_are_those_between_the_punctuation() -> None:
    assert words_of("The dog's bowl, 2nd from Left_side (café)") == ["the", "dog's", "bowl", "2nd", "from", "left", "side", "café"]  # fmt: skip


def test_a_vocabulary_from_sentences_is_ordered_by_frequency_then_alphabet() -> None:
    found = vocabulary_of(["b a", "c b", "d b a"], min_count=1, max_words=3)
    assert found.words == ("b", "a", "c")
    assert vocabulary_of(["b a", "c b", "d b a"], min_count=2).words == ("b", "a")
    with pytest.raises(ValueError, match="twice in the vocabulary: a"):
        WordVocabulary(("a", "b", "a"))


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        ("the left one", "the right one"),
        ("rightmost cup, left of the Right hand", "leftmost cup, right of the left hand"),
        ("bright leftovers upright", "bright leftovers upright"),
        ("left-hand side", "right-hand side"),
    ],
)
def test_left_and_right_change_places_as_whole_words(sentence: str, expected: str) -> None:
    assert mirrored(sentence) == expected
    assert mirrored(expected) == sentence.lower()


def saved_tokenizer(folder: Path, kind: str) -> str:
    """A tiny tokenizer as transformers stores it."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "red", "cup"]
    raw = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]"}
    if kind == "bert":
        names |= {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    elif kind == "clip":
        names |= {"bos_token": "[CLS]", "eos_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=raw, **names).save_pretrained(str(folder))
    return str(folder)


@pytest.mark.parametrize(("kind", "mask_id"), [("bert", 4), ("clip", 0)])
def test_a_huggingface_tokenizer_by_its_folder(tmp_path: Path, kind: str, mask_id: int) -> None:
    vocabulary = HuggingFaceVocabulary(saved_tokenizer(tmp_path / kind, kind))
    assert (vocabulary.start_id, vocabulary.end_id, vocabulary.pad_id, vocabulary.mask_id) == (
        2,
        3,
        0,
        mask_id,
    )
    encoded = encode(vocabulary, ["the red cup", "the blue red cup"], 5)
    assert encoded.ids.tolist() == [[2, 5, 6, 7, 3], [2, 5, 1, 6, 3]]
    assert (encoded.num_truncated, encoded.num_unknown) == (1, 1)
    assert vocabulary.described() == {"tokenizer": str(tmp_path / kind)}


def test_a_tokenizer_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is neither 'words', nor a folder"):
        HuggingFaceVocabulary(str(tmp_path / "nothing"))


def test_a_tokenizer_without_an_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no start token"):
        HuggingFaceVocabulary(saved_tokenizer(tmp_path / "plain", "plain"))


def test_end_token_two_of_a_clip_vocabulary_is_refused() -> None:
    refuse_end_id_two(3, "tokenizer 'x'")
    with pytest.raises(DataError, match="tokenizer 'x' has end token 2"):
        refuse_end_id_two(2, "tokenizer 'x'")


def test_clip_pools_at_the_end_token_of_our_vocabulary() -> None:
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=len(SHAPES), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=9, bos_token_id=START_ID, eos_token_id=END_ID, pad_token_id=0,
    )  # fmt: skip
    encoded = encode(SHAPES, ["the small red circle on the left", "the top picture"], 9)
    model = CLIPTextModel(config).eval()
    found = model(
        input_ids=torch.from_numpy(encoded.ids), attention_mask=torch.from_numpy(encoded.mask).long()
    )
    ends = torch.from_numpy((encoded.ids == END_ID).argmax(axis=1))
    torch.testing.assert_close(found.pooler_output, found.last_hidden_state[torch.arange(2), ends])
