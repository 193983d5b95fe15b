"""Byte-pair encoding of many words at once, merge for merge as the library does it.

    word    l o w e r       of all neighbours that have a merge, those of the lowest rank are
            lo w e r        joined, the leftmost first, until no two neighbours have one
            low er          (Sennrich et al. 2016, arXiv:1508.07909)

Words of one length are rows of a matrix of ids. In each round every row that still has a merge
makes one, so that all rows that go on are one id shorter; the others are done. The ranks of pairs
are found in a hash table of arrays, with linear probing.

That is the library's order where no two merges give the same token: else its queue may take one for
the other, and such vocabularies (those that come from tiktoken) are left to it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int32, Int64, UInt8

from modeling.data.vocabularies import BYTE_SPELLING

Words = Int32[np.ndarray, "words symbols"]
Ranks = Int32[np.ndarray, "words symbols-1"]
_NO_MERGE = np.iinfo(np.int32).max
_LONGEST_WORD = 32
_FEWEST_WORDS_A_BYTE = 4
_SLOTS_A_MERGE = 8
_HASH = np.uint64(0x9E3779B97F4A7C15)  # of the golden ratio: Knuth, volume 3, section 6.4
_NO_PAIR = np.uint64(0xFFFFFFFFFFFFFFFF)


class WordMerger:
    """Encodes words by the merges of a byte-level vocabulary."""

    def __init__(self, vocab: Mapping[str, int], merges: Sequence[Sequence[str]]) -> None:
        """Takes the id of each token, all bytes among them, and the pairs by rank."""
        self._of_byte = np.array([vocab[symbol] for symbol in BYTE_SPELLING], np.int32)
        pairs = np.array([(vocab[a], vocab[b], vocab[a + b]) for a, b in merges], np.int32)
        first, second, self._merged = pairs.reshape(-1, 3).T
        self._build_table(_keys(first, second))

    @classmethod
    def of(cls, model: Mapping[str, Any]) -> "WordMerger | None":
        """Returns the merger of a model, as JSON; None if it may not do as the library does."""
        if not _is_plain(model):
            return None
        merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        if len({a + b for a, b in merges}) != len(merges):
            return None
        return cls(model["vocab"], merges)

    def encode(
        self, words: Sequence[bytes]
    ) -> tuple[Int32[np.ndarray, " ids"], Int64[np.ndarray, " words"]]:
        """Returns the ids of words end to end, and how many each has; 0 for those left out.

        Long words are left out, and those of a length that few have: not worth an array.
        """
        num_bytes = np.fromiter(map(len, words), np.int64, len(words))
        starts = np.cumsum(num_bytes) - num_bytes
        text = np.frombuffer(b"".join(words), np.uint8)
        found: list[tuple[np.ndarray, np.ndarray]] = []
        for length, count in enumerate(np.bincount(num_bytes)[: _LONGEST_WORD + 1].tolist()):
            if length and count >= _FEWEST_WORDS_A_BYTE * length:
                rows = np.flatnonzero(num_bytes == length)
                found += self._merge(rows, text[starts[rows, None] + np.arange(length)])
        lengths = np.zeros(len(words), np.int64)
        for rows, symbols in found:
            lengths[rows] = symbols.shape[1]
        firsts = np.cumsum(lengths) - lengths
        ids = np.empty(int(lengths.sum()), np.int32)
        for rows, symbols in found:
            ids[firsts[rows, None] + np.arange(symbols.shape[1])] = symbols
        return ids, lengths

    def _merge(
        self, rows: Int64[np.ndarray, " words"], spelled: UInt8[np.ndarray, "words bytes"]
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Returns the ids of words of one length, with the rows that they are of, by length."""
        symbols, found = self._of_byte[spelled], []
        ranks = self._ranks(symbols[:, :-1], symbols[:, 1:])
        while symbols.shape[1] > 1:
            at = ranks.argmin(1)
            rank = ranks[np.arange(len(at)), at]
            goes_on = rank != _NO_MERGE
            if not goes_on.all():
                found.append((rows[~goes_on], symbols[~goes_on]))
                rows, symbols, ranks, at, rank = (
                    column[goes_on] for column in (rows, symbols, ranks, at, rank)
                )
            if not len(rows):
                return found
            symbols, ranks = self._merged_at(at, rank, symbols, ranks)
        return [*found, (rows, symbols)]

    def _merged_at(
        self, at: np.ndarray, rank: np.ndarray, symbols: Words, ranks: Ranks
    ) -> tuple[Int32[np.ndarray, "words symbols-1"], Int32[np.ndarray, "words symbols-2"]]:
        """Makes one merge in each row; returns the ids that are left and the ranks of pairs."""
        place, row = np.arange(symbols.shape[1] - 1), np.arange(len(at))
        symbols[row, at] = self._merged[rank]
        symbols = np.where(place > at[:, None], symbols[:, 1:], symbols[:, :-1])
        ranks = np.where(place[:-1] >= at[:, None], ranks[:, 1:], ranks[:, :-1])
        for has_pair, first in ((at > 0, at - 1), (at < len(place) - 1, at)):
            row_of, first = row[has_pair], first[has_pair]
            ranks[row_of, first] = self._ranks(symbols[row_of, first], symbols[row_of, first + 1])
        return symbols, ranks

    def _build_table(self, keys: np.ndarray) -> None:
        """Puts each pair at its hash, or at the next slot that is free."""
        bits = max(int(_SLOTS_A_MERGE * len(keys)).bit_length(), 4)
        self._shift, self._mask = np.uint64(64 - bits), (1 << bits) - 1
        self._slots = np.full(1 << bits, _NO_PAIR)
        self._rank_of_slot = np.full(1 << bits, _NO_MERGE, np.int32)
        slot, rank = self._hashed(keys), np.arange(len(keys), dtype=np.int32)
        while len(keys):
            is_free = self._slots[slot] == _NO_PAIR
            self._slots[slot[is_free]] = keys[is_free]  # of several the last one stays
            self._rank_of_slot[slot[is_free]] = rank[is_free]
            waits = self._slots[slot] != keys
            keys, rank, slot = keys[waits], rank[waits], (slot[waits] + 1) & self._mask

    def _hashed(self, keys: np.ndarray) -> Int64[np.ndarray, "..."]:
        return ((keys * _HASH) >> self._shift).astype(np.int64)

    def _ranks(self, first: np.ndarray, second: np.ndarray) -> Int32[np.ndarray, "..."]:
        """Returns the rank of each pair of ids, or `_NO_MERGE`."""
        shape, keys = first.shape, _keys(first, second).ravel()
        slot = self._hashed(keys)
        ranks = self._rank_of_slot[slot]
        found = self._slots[slot]
        (asked,) = np.nonzero((found != keys) & (found != _NO_PAIR))
        ranks[asked] = _NO_MERGE
        while len(asked):
            slot[asked] = (slot[asked] + 1) & self._mask
            found = self._slots[slot[asked]]
            is_it = found == keys[asked]
            ranks[asked[is_it]] = self._rank_of_slot[slot[asked[is_it]]]
            asked = asked[~is_it & (found != _NO_PAIR)]
        return ranks.reshape(shape)


def _keys(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return first.astype(np.uint64) << np.uint64(32) | second.astype(np.uint64)


def _is_plain(model: Mapping[str, Any]) -> bool:
    """Whether a model does nothing but merge bytes, each of which it knows."""
    return (
        model["type"] == "BPE"
        and not model.get("ignore_merges")
        and not model.get("dropout")
        and not model.get("continuing_subword_prefix")
        and not model.get("end_of_word_suffix")
        and all(symbol in model["vocab"] for symbol in BYTE_SPELLING)
    )
