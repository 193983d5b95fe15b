"""Byte-pair encoding of many words at once, merge for merge as the library does it.

    word    l o w e r       of all neighbours that have a merge, those of the lowest rank are
            lo w e r        joined, the leftmost first, until no two neighbours have one
            low er          (Sennrich et al. 2016, arXiv:1508.07909)

Words of n symbols are the columns of a matrix of n rows. All that still have a merge make one, and
go on with those that had one symbol less from the beginning, until n is 1; so there are as many
steps as the longest word has bytes, whatever the number of words. The ranks of pairs are found in a
hash table, with linear probing; those of two bytes, which each word begins with, in a table of all.

That is the library's order where no two merges give the same token: else its queue may take one for
the other, and such vocabularies (those that come from tiktoken) are left to it.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int32, Int64, UInt8

from modeling.data.vocabularies import BYTE_SPELLING, merges_of

Symbols = Int32[np.ndarray, "_ _"]
"""A column for each word, a row for each symbol in it."""
Pairs = Int32[np.ndarray, "_ _"]
"""Of each two neighbours the rank of their merge and, in the last bits, their place in the word: so
the least of a column is the merge to make."""
_LONGEST_WORD = 32
_FEWEST_WORDS = 64
_WORDS_AT_ONCE = 1 << 15
_SLOTS_A_MERGE = 8
_HASH = np.uint64(0x9E3779B97F4A7C15)  # of the golden ratio: Knuth, volume 3, section 6.4
_ID_BITS, _RANK_BITS, _PLACE_BITS = 20, 24, 5
_NO_PAIR = np.uint64(0xFFFFFFFFFFFFFFFF)
_NO_MERGE = np.int32((1 << _RANK_BITS) - 1)
_LEAST_WITHOUT = np.int32((int(_NO_MERGE) << _PLACE_BITS) - _LONGEST_WORD)
"""No pair with a merge is as much; those without are, also after they have moved in their word."""


class WordMerger:
    """Encodes words by the merges of a byte-level vocabulary."""

    def __init__(self, vocab: Mapping[str, int], merges: Sequence[Sequence[str]]) -> None:
        """Takes the id of each token, all bytes among them, and the pairs by rank."""
        self._of_byte = np.array([vocab[symbol] for symbol in BYTE_SPELLING], np.int32)
        columns = *zip(*merges, strict=True), map("".join, merges)
        first, second, self._merged = (
            np.fromiter(map(vocab.__getitem__, symbols), np.int32, len(merges))
            for symbols in columns
        )
        self._build_table(_keys(first, second))
        byte_of = np.full(1 + max(vocab.values()), -1, np.int32)
        byte_of[self._of_byte] = np.arange(256)
        (ranks,) = np.nonzero((byte_of[first] >= 0) & (byte_of[second] >= 0))
        self._pair_of_bytes = np.full(1 << 16, _NO_MERGE << _PLACE_BITS)
        of_bytes = byte_of[first[ranks]] << 8 | byte_of[second[ranks]]
        self._pair_of_bytes[of_bytes] = ranks << _PLACE_BITS

    @classmethod
    def of(cls, model: Mapping[str, Any]) -> "WordMerger | None":
        """Returns the merger of a model, as JSON; None if it may not do as the library does."""
        if not _is_plain(model):
            return None
        merges = merges_of(model)
        has_room = max(model["vocab"].values()) < 1 << _ID_BITS and len(merges) < _NO_MERGE
        if not (merges and has_room):
            return None
        merger = cls(model["vocab"], merges)
        is_each_made_once = len(np.unique(merger._merged)) == len(merges)
        return merger if is_each_made_once else None

    def encode(
        self, words: Sequence[bytes]
    ) -> tuple[Int32[np.ndarray, " ids"], Int64[np.ndarray, " words"]]:
        """Returns the ids of words end to end, and how many each has; 0 for those left out.

        Long words are left out, and a few alone: not worth an array.
        """
        num_bytes = np.fromiter(map(len, words), np.int64, len(words))
        starts = np.cumsum(num_bytes) - num_bytes
        text = np.frombuffer(b"".join(words), np.uint8)
        lengths = np.zeros(len(words), np.int64)
        (taken,) = np.nonzero((num_bytes > 0) & (num_bytes <= _LONGEST_WORD))
        if len(taken) < _FEWEST_WORDS:
            return np.empty(0, np.int32), lengths
        # Those that go on together lie together, in as little memory as the processor is near to.
        taken = taken[np.argsort(num_bytes[taken].astype(np.uint8), kind="stable")]
        found: list[tuple[np.ndarray, np.ndarray]] = []
        for first in range(0, len(taken), _WORDS_AT_ONCE):
            some = taken[first : first + _WORDS_AT_ONCE]
            found += self._encoded(some, text, starts[some], num_bytes[some])
        for rows, symbols in found:
            lengths[rows] = len(symbols)
        firsts = np.cumsum(lengths) - lengths
        ids = np.empty(int(lengths.sum()), np.int32)
        for rows, symbols in found:
            ids[firsts[rows] + np.arange(len(symbols))[:, None]] = symbols
        return ids, lengths

    def _encoded(
        self,
        rows: Int64[np.ndarray, " words"],
        text: UInt8[np.ndarray, " bytes"],
        starts: Int64[np.ndarray, " words"],
        num_bytes: Int64[np.ndarray, " words"],
    ) -> Iterator[tuple[Int64[np.ndarray, "_"], Symbols]]:
        """Yields the ids of words that lie sorted by length, with the rows that they are of."""
        longest = int(num_bytes[-1])
        ends = np.searchsorted(num_bytes, np.arange(longest + 2))
        nobody = np.empty(0, np.int64)
        going_on = nobody, np.empty((longest, 0), np.int32), np.empty((longest - 1, 0), np.int32)
        for length in range(longest, 1, -1):
            here = slice(ends[length], ends[length + 1])
            begun = self._begun(text[starts[here] + np.arange(length)[:, None]])
            columns = ((rows[here], *begun), going_on)
            of, symbols, pairs = (
                np.concatenate(two, axis=-1) for two in zip(*columns, strict=True)
            )
            least = pairs.min(0)
            has_merge = least < _LEAST_WITHOUT
            (done,), (left,) = np.nonzero(~has_merge), np.nonzero(has_merge)
            if len(done):
                yield of[done], symbols.take(done, axis=1)
                of, symbols, pairs, least = (
                    column.take(left, axis=-1) for column in (of, symbols, pairs, least)
                )
            going_on = of, *self._merged_at(least, symbols, pairs)
        of, symbols, _ = going_on
        yield of, symbols
        here = slice(ends[1], ends[2])
        yield rows[here], self._of_byte[text[starts[here]]][None]

    def _begun(self, spelled: UInt8[np.ndarray, "symbols words"]) -> tuple[Symbols, Pairs]:
        """Returns words of one length as bytes, and the pairs of these."""
        pair = spelled[:-1].astype(np.uint16) << 8 | spelled[1:]
        places = np.arange(len(pair), dtype=np.int32)[:, None]
        return self._of_byte[spelled], self._pair_of_bytes[pair] + places

    def _merged_at(
        self, least: Int32[np.ndarray, " words"], symbols: Symbols, pairs: Pairs
    ) -> tuple[Symbols, Pairs]:
        """Makes one merge in each word; returns the symbols that are left and their pairs."""
        at, merged = least & ((1 << _PLACE_BITS) - 1), self._merged[least >> _PLACE_BITS]
        num_pairs, num_words = pairs.shape
        is_after = (at - np.arange(num_pairs, dtype=np.int32)[:, None]) >> 31
        symbols = _chosen(is_after, symbols[1:], symbols[:-1])
        pairs = _chosen(is_after[1:], pairs[1:] - 1, pairs[:-1])
        word = np.arange(num_words)
        place = at * np.int64(num_words) + word
        flat, flat_pairs = symbols.reshape(-1), pairs.reshape(-1)
        flat[place] = merged
        (has_left,), (has_right,) = np.nonzero(at > 0), np.nonzero(at < num_pairs - 1)
        left, right = place[has_left] - num_words, place[has_right]
        beside = np.concatenate([left, right])
        first, second = flat[beside], flat[beside + num_words]
        found = self._ranks(first, second) << _PLACE_BITS
        flat_pairs[beside] = found | np.concatenate([at[has_left] - 1, at[has_right]])
        return symbols, pairs

    def _build_table(self, keys: np.ndarray) -> None:
        """Puts each pair, with its rank, at its hash, or at the next slot that is free."""
        bits = max(int(_SLOTS_A_MERGE * len(keys)).bit_length(), 4)
        self._shift, self._mask = np.uint64(64 - bits), (1 << bits) - 1
        self._slots = np.full(1 << bits, _NO_PAIR)
        slot = self._hashed(keys)
        entries = keys << np.uint64(_RANK_BITS) | np.arange(len(keys), dtype=np.uint64)
        while len(entries):
            is_free = self._slots[slot] == _NO_PAIR
            self._slots[slot[is_free]] = entries[is_free]  # of several the last one stays
            waits = self._slots[slot] != entries
            entries, slot = entries[waits], (slot[waits] + 1) & self._mask

    def _hashed(self, keys: np.ndarray) -> Int64[np.ndarray, "..."]:
        return ((keys * _HASH) >> self._shift).astype(np.int64)

    def _ranks(self, first: np.ndarray, second: np.ndarray) -> Int32[np.ndarray, " pairs"]:
        """Returns the rank of each pair of ids, or `_NO_MERGE`."""
        keys = _keys(first, second)
        slot = self._hashed(keys)
        found = self._slots[slot]
        is_other = found >> np.uint64(_RANK_BITS) != keys
        ranks = found.astype(np.int32) & _NO_MERGE | is_other * _NO_MERGE
        (asked,) = np.nonzero(is_other & (found != _NO_PAIR))
        while len(asked):
            slot[asked] = (slot[asked] + 1) & self._mask
            found = self._slots[slot[asked]]
            is_it = found >> np.uint64(_RANK_BITS) == keys[asked]
            ranks[asked[is_it]] = found[is_it].astype(np.int32) & _NO_MERGE
            asked = asked[~is_it & (found != _NO_PAIR)]
        return ranks


def _keys(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return first.astype(np.uint64) << np.uint64(_ID_BITS) | second.astype(np.uint64)


def _chosen(is_first: Symbols, first: Symbols, second: Symbols) -> Symbols:
    """Returns `first` where all bits of `is_first` are set, `second` where none is.

    `np.where` takes four times as long for what has no order.
    """
    chosen = first ^ second
    chosen &= is_first
    chosen ^= second
    return chosen


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
