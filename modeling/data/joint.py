r"""Encodes pieces of text and special tokens as one text, by any tokenizer of the library.

Where ids depend on what stands to the left (Metaspace writes `▁` before the first word alone, or
after each special token; a normalizer strips or composes), pieces encoded apart are not those of
the whole. So a document's pieces are joined and encoded at once, as `apply_chat_template` does, by
a clone of the tokenizer in which each special token is called by its id between two marks:

    tokenizer   <s>            [INST]            vocabulary 1: "<s>"
    clone       \ufdd01\ufdd0  \ufdd03\ufdd0     vocabulary 1: "\ufdd01\ufdd0"

The mark is a noncharacter that the document lacks. So a text that spells `<s>` is no `<s>`, even
where the model has a word of that spelling, as Unigram's vocabularies do.

A token that stands half in what counts, counts, since part of it is to be predicted.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import tokenizers
from jaxtyping import Int64, UInt8

from modeling.data.chat import Piece, free_mark
from modeling.data.tokenizer import Tokenizer
from modeling.data.unspelled import renamed


class JointEncoder:
    """Encodes the pieces of a document together, whatever tokenizer it is."""

    name = "library"

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Encodes with `tokenizer`, whose special tokens only a piece that is an id gives."""
        self._json = tokenizer.backend.to_str()
        self._special = tokenizer.special_tokens
        self._clones: dict[str, tokenizers.Tokenizer] = {}

    def join(self, pieces: Sequence[Piece]) -> "Joined":
        """Returns the pieces of a document as one text for `encode`.

        Raises:
            TemplateProblem: the document holds every mark.
        """
        texts = [piece.content for piece in pieces if isinstance(piece.content, str)]
        mark = free_mark(*texts)
        spelled = [
            piece.content if isinstance(piece.content, str) else _name(piece.content, mark)
            for piece in pieces
        ]
        runs = [(len(text), piece.counts) for text, piece in zip(spelled, pieces, strict=True)]
        return Joined("".join(spelled), mark, runs)

    def encode(
        self, documents: Sequence["Joined"]
    ) -> list[tuple[Int64[np.ndarray, "_"], UInt8[np.ndarray, "_"]]]:
        """Returns the ids of each document, and 1 for those that count."""
        found: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        for mark in sorted({document.mark for document in documents}):
            chosen = [index for index, other in enumerate(documents) if other.mark == mark]
            texts = [documents[index].text for index in chosen]
            # Not `encode_batch_fast`, which keeps no offsets.
            encodings = self._clone(mark).encode_batch(texts, add_special_tokens=False)
            for index, encoding in zip(chosen, encodings, strict=True):
                counts = _counts(documents[index].runs, encoding.offsets)
                found[index] = np.array(encoding.ids, np.int64), counts
        return [found[index] for index in range(len(documents))]

    def _clone(self, mark: str) -> tokenizers.Tokenizer:
        if mark not in self._clones:
            names = {token: _name(token_id, mark) for token, token_id in self._special.items()}
            self._clones[mark] = renamed(self._json, self._special, names)
        return self._clones[mark]


class Joined(NamedTuple):
    """A document's pieces as one text."""

    text: str
    mark: str
    """Stands on both sides of a special token's id, and nowhere else."""
    runs: list[tuple[int, bool]]
    """How many characters each piece has, and whether they count."""


def _name(token_id: int, mark: str) -> str:
    return f"{mark}{token_id}{mark}"


def _counts(
    runs: Sequence[tuple[int, bool]], offsets: Sequence[tuple[int, int]]
) -> UInt8[np.ndarray, "_"]:
    """Returns 1 for each token that has a character that counts."""
    lengths, counts = np.array(runs, np.int64).reshape(-1, 2).T
    counted_before = np.concatenate([[0], np.cumsum(np.repeat(counts, lengths))])
    start, end = np.array(offsets, np.int64).reshape(-1, 2).T
    return (counted_before[end] > counted_before[start]).astype(np.uint8)
