"""The order of one source: which row is drawn at each position, as a pure function on integers.

Positions run through epochs of all rows, epochs through eras of `era_rows`; the last era of an
epoch may be short. Inside an era of m rows the order is a Feistel network on b = ceil(log2 m) bits,
two unequal halves taking turns (Black & Rogaway 2002, "Ciphers with arbitrary finite domains"):

    (left, right) -> (left xor F(right), right)  then  (left, right xor F(left)),  eight rounds

and any value >= m goes through the network again until it is below m ("cycle walking"), which keeps
it a bijection. F mixes a half with a round key as SplitMix64 does, in exact uint64 arithmetic. The
keys are SHA-256 of (seed, epoch, era, source's name), so neighbouring seeds or epochs share
nothing, and no key waits for the source's content.

An era depends on no row outside it: training may begin before the last row is known, and draws what
it would have drawn had all been there.
"""

import hashlib
from collections.abc import Callable, Iterator
from functools import lru_cache

import numpy as np
from jaxtyping import Int64, UInt64

from modeling import canonical

_ROUNDS = 8
_KEYS_PER_DIGEST = 4
_WINDOW = 4096
_30, _27, _31 = np.uint64(30), np.uint64(27), np.uint64(31)
_FACTOR_1, _FACTOR_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)

KnownRows = Callable[[int], int]
"""Takes how many rows are wanted, and returns as many or more, or all that there will ever be."""
EVERY_ROW = 2**62
"""More rows than there will ever be."""


class EpochLimitError(ValueError):
    """A source would be drawn more often than the experiment allows."""


class RowOrder:
    """Row numbers by position, for all epochs."""

    def __init__(
        self,
        known_rows: KnownRows,
        *,
        seed: int,
        era_rows: int,
        source: str = "",
        max_epochs: int | None = None,
    ) -> None:
        """Orders the rows of a source.

        Args:
            known_rows: tells the number of rows; may wait for more to be written.
            seed: of the keys.
            era_rows: rows permuted among themselves; a whole epoch where it is as large.
            source: its name, empty where there is but one.
            max_epochs: how often each row may be drawn; None for no limit.
        """
        self._known_rows = known_rows
        self._seed = seed
        self._era_rows = era_rows
        self._source = source
        self._max_epochs = max_epochs
        # Drawn in windows, lest every batch pay for eight rounds on a handful of numbers.
        self._window = lru_cache(maxsize=4)(self._permuted_window)

    def rows_at(self, start: int, count: int) -> Int64[np.ndarray, " count"]:
        """Returns the rows at positions `start` to `start + count`, across epochs as need be.

        Raises:
            EpochLimitError: they are beyond `max_epochs`.
        """
        if start < 0 or count < 0:
            raise ValueError(f"positions {start} to {start + count}: both must be at least 0.")
        pieces = list(self._pieces(start, count))
        return pieces[0] if len(pieces) == 1 else np.concatenate([np.empty(0, np.int64), *pieces])

    def _pieces(self, start: int, count: int) -> Iterator[Int64[np.ndarray, " _"]]:
        """Yields the rows of each window of an era that is touched."""
        if count == 0:
            return
        # Up to the end of the era: only then is it known to be a whole one.
        num_rows = self._known_rows(-(-(start + count) // self._era_rows) * self._era_rows)
        if num_rows < 1:
            raise ValueError(f"source {self._source!r} has no rows to draw.")
        position, end = start, start + count
        while position < end:
            epoch, row = divmod(position, num_rows)
            if self._max_epochs is not None and epoch >= self._max_epochs:
                raise EpochLimitError(
                    f"trainer.data_order.max_epochs: {self._max_epochs} epochs of source "
                    f"{self._source!r} are {self._max_epochs * num_rows:,} rows, and row "
                    f"{position + 1:,} is drawn. Train fewer steps, lower the source's weight, "
                    f"add data, or raise max_epochs."
                )
            era, offset = divmod(row, self._era_rows)
            size = min(self._era_rows, num_rows - era * self._era_rows)
            window, first = divmod(offset, _WINDOW)
            rows = self._window(epoch, era, size, window)[first : first + end - position]
            yield rows
            position += len(rows)

    def _permuted_window(
        self, epoch: int, era: int, size: int, window: int
    ) -> Int64[np.ndarray, " _"]:
        keys = round_keys("order.eras/2", self._seed, epoch, era, self._source)
        first = window * _WINDOW
        offsets = np.arange(first, min(first + _WINDOW, size), dtype=np.uint64)
        rows = permute(offsets, size, keys).astype(np.int64) + era * self._era_rows
        rows.flags.writeable = False
        return rows


def round_keys(domain: str, *what: int | str) -> UInt64[np.ndarray, " rounds"]:
    """Returns the keys of the network for what the values tell apart, within a named use."""
    digests = [
        hashlib.sha256(canonical.encode([domain, *what, index])).digest()
        for index in range(_ROUNDS // _KEYS_PER_DIGEST)
    ]
    return np.frombuffer(b"".join(digests), ">u8").astype(np.uint64)


def permute(
    positions: UInt64[np.ndarray, " count"], size: int, keys: UInt64[np.ndarray, " rounds"]
) -> UInt64[np.ndarray, " count"]:
    """Returns where each position below `size` goes under the keyed bijection of [0, size)."""
    values = _network(positions, size, keys)
    while (outside := np.flatnonzero(values >= size)).size:
        values[outside] = _network(values[outside], size, keys)
    return values


def _network(
    values: UInt64[np.ndarray, " count"], size: int, keys: UInt64[np.ndarray, " rounds"]
) -> UInt64[np.ndarray, " count"]:
    bits = (size - 1).bit_length()
    right_bits = np.uint64(bits - bits // 2)
    left_mask = np.uint64((1 << bits // 2) - 1)
    right_mask = np.uint64((1 << (bits - bits // 2)) - 1)
    left, right = values >> right_bits, values & right_mask
    for index, key in enumerate(keys):
        # F is SplitMix64's finalizer (Steele, Lea & Flood 2014); uint64 arrays wrap exactly.
        x = (right if index % 2 == 0 else left) + key
        x = (x ^ (x >> _30)) * _FACTOR_1
        x = (x ^ (x >> _27)) * _FACTOR_2
        x = x ^ (x >> _31)
        if index % 2 == 0:
            left = left ^ (x & left_mask)
        else:
            right = right ^ (x & right_mask)
    return (left << right_bits) | right
