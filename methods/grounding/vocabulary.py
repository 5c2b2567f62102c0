"""From sentences to token ids: our own word-level vocabulary for small runs, or a HuggingFace tokenizer.

The ids of our special entries are fixed: [pad] 0, [cls] 1, [mask] 2, [sep] 3, [unk] 4. The end token must not be 2:
transformers' CLIP takes an end token of 2 for an old configuration and then pools, silently, at the largest id.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import numpy as np

from methods.data.base import DataError

SPECIAL = ("[pad]", "[cls]", "[mask]", "[sep]", "[unk]")
PAD_ID, START_ID, MASK_ID, END_ID, UNKNOWN_ID = range(5)
_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")


class Encoded(NamedTuple):
    """Sentences as a network takes them."""

    ids: np.ndarray
    """``[n, L]`` int64: start, words, end, padding."""
    mask: np.ndarray
    """``[n, L]`` bool, True where there is a real token."""
    num_truncated: int
    """Sentences that were too long and lost words from their end."""
    num_unknown: int
    """Words that the vocabulary does not have."""


class Vocabulary(Protocol):
    """Whatever turns sentences into ids."""

    name: str
    start_id: int
    end_id: int
    pad_id: int
    mask_id: int

    def __len__(self) -> int: ...

    def pieces(self, sentence: str) -> tuple[list[int], int]:
        """Ids without start and end, and how many of them stand for something unknown."""

    def described(self) -> dict[str, Any]:
        """Enough to make the same ids again, as plain values."""


def encode(vocabulary: Vocabulary, sentences: Sequence[str], length: int) -> Encoded:
    """Ids of ``sentences``, each ``length`` long. A sentence that is too long keeps its beginning and the end token.

    Raises:
        DataError: A sentence holds no word.
    """
    ids = np.full((len(sentences), length), vocabulary.pad_id, dtype=np.int64)
    mask = np.zeros((len(sentences), length), dtype=bool)
    num_truncated = num_unknown = 0
    for row, sentence in enumerate(sentences):
        pieces, unknown = vocabulary.pieces(sentence)
        if not pieces:
            raise DataError(
                f"sentence {row} of {len(sentences)} is empty ({sentence!r}): drop it, or write it"
            )
        num_truncated += len(pieces) > length - 2
        num_unknown += unknown
        tokens = [vocabulary.start_id, *pieces[: length - 2], vocabulary.end_id]
        ids[row, : len(tokens)] = tokens
        mask[row, : len(tokens)] = True
    return Encoded(ids, mask, num_truncated, num_unknown)


def words_of(sentence: str) -> list[str]:
    """Words in lower case, without punctuation."""
    return _WORD.findall(sentence.lower())


def mirrored(sentence: str) -> str:
    """The sentence for the mirrored picture: left and right change places, as whole words."""
    return _SIDE.sub(lambda found: _OTHER_SIDE[found.group().lower()], sentence)


_OTHER_SIDE = {"left": "right", "right": "left", "leftmost": "rightmost", "rightmost": "leftmost"}
_SIDE = re.compile(rf"\b({'|'.join(_OTHER_SIDE)})\b", re.IGNORECASE)


@dataclass(frozen=True)
class WordVocabulary:
    """One id per word; the special entries come first."""

    words: tuple[str, ...]
    """Known words, in the order of their ids."""

    name = "words"
    start_id, end_id, pad_id, mask_id = START_ID, END_ID, PAD_ID, MASK_ID

    def __post_init__(self) -> None:
        twice = [word for word, count in Counter(self.words).items() if count > 1]
        if twice:
            raise ValueError(f"words stand twice in the vocabulary: {', '.join(twice[:5])}")

    def __len__(self) -> int:
        return len(SPECIAL) + len(self.words)

    @cached_property
    def _ids(self) -> Mapping[str, int]:
        return {word: number for number, word in enumerate(self.words, len(SPECIAL))}

    def pieces(self, sentence: str) -> tuple[list[int], int]:
        ids = [self._ids.get(word, UNKNOWN_ID) for word in words_of(sentence)]
        return ids, ids.count(UNKNOWN_ID)

    def described(self) -> dict[str, Any]:
        return {"tokenizer": self.name, "words": list(self.words)}


def vocabulary_of(sentences: Iterable[str], *, min_count: int = 1, max_words: int = 30000) -> WordVocabulary:
    """The most frequent words of ``sentences``, of equal ones the alphabetically first."""
    counts = Counter(word for sentence in sentences for word in words_of(sentence))
    frequent = sorted((-count, word) for word, count in counts.items() if count >= min_count)
    return WordVocabulary(tuple(word for _, word in frequent[:max_words]))


class HuggingFaceVocabulary:
    """A tokenizer from transformers, by the name of a model or the path of its folder."""

    def __init__(self, name: str) -> None:
        """Load it. Raises DataError when it cannot be found, and for a CLIP vocabulary whose end token is 2."""
        from transformers import AutoTokenizer

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise DataError(
                f"tokenizer {name!r} is neither 'words', nor a folder, nor a name that can be loaded: {error}"
            ) from error
        self.name = name
        tokenizer = self._tokenizer
        self.start_id = self._special("start", tokenizer.cls_token_id, tokenizer.bos_token_id)
        self.end_id = self._special("end", tokenizer.sep_token_id, tokenizer.eos_token_id)
        self.pad_id = self._special("padding", tokenizer.pad_token_id, self.end_id)
        self.mask_id = self._special("mask", tokenizer.mask_token_id, self.pad_id)
        own = {self.start_id, self.end_id, self.pad_id, None}
        self._unknown_id = None if tokenizer.unk_token_id in own else tokenizer.unk_token_id
        if "clip" in type(tokenizer).__name__.lower():
            refuse_end_id_two(self.end_id, f"tokenizer {name!r}")

    def __len__(self) -> int:
        return len(self._tokenizer)

    def _special(self, what: str, *ids: int | None) -> int:
        found = [number for number in ids if number is not None]
        if not found:
            raise DataError(f"tokenizer {self.name!r} has no {what} token: choose another")
        return int(found[0])

    def pieces(self, sentence: str) -> tuple[list[int], int]:
        ids = self._tokenizer(sentence.strip(), add_special_tokens=False)["input_ids"]
        return ids, 0 if self._unknown_id is None else ids.count(self._unknown_id)

    def described(self) -> dict[str, Any]:
        return {"tokenizer": self.name}


def vocabulary_from(described: Mapping[str, Any]) -> Vocabulary:
    """The vocabulary that ``described()`` tells about. Raises KeyError when it tells too little."""
    name = str(described["tokenizer"])
    if name == WordVocabulary.name:
        return WordVocabulary(tuple(map(str, described["words"])))
    return HuggingFaceVocabulary(name)


def refuse_end_id_two(end_id: int, what: str) -> None:
    """Raise DataError for a CLIP vocabulary whose end token is 2: transformers would pool at another word."""
    if end_id == 2:
        raise DataError(
            f"{what} has end token 2, which transformers' CLIP takes for an old configuration: it would pool at the "
            "largest id instead of the end token. Renumber the vocabulary so that the end token is not 2"
        )
