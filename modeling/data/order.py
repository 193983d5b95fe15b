"""The data order: which row is drawn at each position, as a pure function on integers.

Positions run through epochs of `num_rows`, epochs through eras of `era_rows`; the last era of an
epoch may be short. Inside an era of m rows the order is a Feistel network on b = ceil(log2 m) bits,
two unequal halves taking turns (Black & Rogaway 2002, "Ciphers with arbitrary finite domains"):

    (left, right) -> (left xor F(right), right)  then  (left, right xor F(left)),  eight rounds

and any value >= m goes through the network again until it is below m ("cycle walking"), which keeps
it a bijection. F mixes a half with a round key as SplitMix64 does, in exact uint64 arithmetic. The
keys are SHA-256 of (seed, epoch, era, source), so neighbouring seeds or epochs share nothing.

An era depends on no row outside it, so training may begin before the last row is known.
"""

import hashlib
from collections.abc import Iterator

import numpy as np
from jaxtyping import Int64, UInt64

from modeling import canonical
from modeling.training.config import DataOrderConfig

_ROUNDS = 8
_KEYS_PER_DIGEST = 4


class RowOrder:
    """Row numbers by position, for all epochs."""

    def __init__(self, config: DataOrderConfig, num_rows: int, source_id: str) -> None:
        """Orders `num_rows` rows of the source that has content id `source_id`."""
        if num_rows < 1:
            raise ValueError(f"an order needs at least one row, got {num_rows}.")
        self._config = config
        self._num_rows = num_rows
        self._source_id = source_id

    def rows_at(self, start: int, count: int) -> Int64[np.ndarray, " count"]:
        """Returns the rows at positions `start` to `start + count`, across epochs as need be."""
        if start < 0 or count < 0:
            raise ValueError(f"positions {start} to {start + count}: both must be at least 0.")
        pieces = [
            era_start
            + permute(np.arange(first, stop, dtype=np.uint64), size, keys).astype(np.int64)
            for era_start, size, keys, first, stop in self._eras(start, count)
        ]
        return np.concatenate([np.empty(0, np.int64), *pieces])

    def _eras(
        self, start: int, count: int
    ) -> Iterator[tuple[int, int, UInt64[np.ndarray, " rounds"], int, int]]:
        """Yields each era touched: its first row, size and keys, and the offsets wanted in it."""
        position = start
        while position < start + count:
            epoch, row = divmod(position, self._num_rows)
            era, first = divmod(row, self._config.era_rows)
            era_start = row - first
            size = min(self._config.era_rows, self._num_rows - era_start)
            stop = min(size, first + start + count - position)
            yield era_start, size, self._keys(epoch, era), first, stop
            position += stop - first

    def _keys(self, epoch: int, era: int) -> UInt64[np.ndarray, " rounds"]:
        what = [self._config.seed, epoch, era, self._source_id]
        digests = [
            hashlib.sha256(canonical.encode(["order.eras/1", *what, index])).digest()
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
        if index % 2 == 0:
            left = left ^ (_mix(right + key) & left_mask)
        else:
            right = right ^ (_mix(left + key) & right_mask)
    return (left << right_bits) | right


def _mix(x: UInt64[np.ndarray, " count"]) -> UInt64[np.ndarray, " count"]:
    """SplitMix64's finalizer (Steele, Lea & Flood 2014); NumPy's uint64 arrays wrap exactly."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
