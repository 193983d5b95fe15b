"""Token shards: files of consecutive documents as ids, read in place as one flat stream of tokens.

    <split>-00000.arrow   Arrow IPC file of one uncompressed record batch, one row a document:
                          (tokens: list<uint16>), uint32 for vocabularies of 65,536 ids and more

One uncompressed batch has its tokens contiguous and little endian in the file, so a mapped shard is
a NumPy array that costs no memory and no copy.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from jaxtyping import Int32, Integer

Ids = Integer[np.ndarray, "_"]


def token_dtype(vocab_size: int) -> np.dtype:
    """Returns the narrowest type of ids below `vocab_size`."""
    return np.dtype(np.uint16 if vocab_size < 65536 else np.uint32)


def write_shard(path: Path, tokens: Ids, lengths: Integer[np.ndarray, " documents"]) -> None:
    """Writes documents, given end to end with their lengths, and waits until they are on disk."""
    schema = _schema(tokens.dtype)
    offsets = np.zeros(len(lengths) + 1, np.int32)
    np.cumsum(lengths, out=offsets[1:])
    # Buffers, not `pa.array` or `to_numpy`: those import pandas, which takes seconds.
    ids_type = schema.field("tokens").type
    ids_buffers = [None, pa.py_buffer(np.ascontiguousarray(tokens))]
    ids = pa.Array.from_buffers(ids_type.value_type, len(tokens), ids_buffers)
    rows_buffers = [None, pa.py_buffer(offsets)]
    rows = pa.Array.from_buffers(ids_type, len(lengths), rows_buffers, children=[ids])
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(pa.record_batch([rows], schema=schema))
    with path.open("rb") as written:
        os.fsync(written.fileno())


def map_shard(path: Path, dtype: np.dtype) -> tuple[Ids, Int32[np.ndarray, " ends"]]:
    """Returns (tokens, offsets) of a shard, in the file's own memory, read only.

    Document i is `tokens[offsets[i] : offsets[i + 1]]`.

    Raises:
        ValueError: the file holds other columns, several batches, or offsets beyond its tokens.
    """
    schema = _schema(dtype)
    with pa.memory_map(str(path)) as mapped, pa.ipc.open_file(mapped) as reader:
        if reader.schema != schema or reader.num_record_batches != 1:
            raise ValueError(
                f"{path}: expected one batch of {schema}, found {reader.num_record_batches} of "
                f"{reader.schema}. Build the tokenized corpus again."
            )
        rows = reader.get_batch(0)
        rows.validate()
        column = rows.column(0)
    _, offsets, _, tokens = column.buffers()
    bounds = np.frombuffer(offsets, np.int32, len(column) + 1)
    return np.frombuffer(tokens, dtype, int(bounds[-1])), bounds


class FlatTokens:
    """The tokens of consecutive shards as one stream, gathered by position."""

    def __init__(self, parts: Sequence[Ids]) -> None:
        """Takes the tokens of each shard, in order; they are not copied."""
        self._parts = list(parts)
        self._starts = np.cumsum([0, *(len(part) for part in parts)])
        self._windows: dict[tuple[int, int], np.ndarray] = {}

    def __len__(self) -> int:
        return int(self._starts[-1])

    def span(self, start: int, stop: int) -> Ids:
        """Returns tokens `start` to `stop`; a copy if they lie in several shards."""
        pieces = [
            part[max(start - first, 0) : max(stop - first, 0)]
            for part, first in zip(self._parts, self._starts.tolist(), strict=False)
            if first < stop and first + len(part) > start
        ]
        return pieces[0] if len(pieces) == 1 else np.concatenate([*pieces, self._parts[0][:0]])

    def gather(
        self, starts: Integer[np.ndarray, " rows"], length: int
    ) -> Int32[np.ndarray, "rows length"]:
        """Returns the `length` tokens from each start on: one copy per shard touched, none per row.

        Only a row that spans two shards, of which each boundary has at most one, is copied alone.
        """
        rows = np.empty((len(starts), length), np.int32)
        first = np.searchsorted(self._starts, starts, side="right") - 1
        last = np.searchsorted(self._starts, starts + (length - 1), side="right") - 1
        whole = first == last
        for shard in np.unique(first[whole]).tolist():
            here = np.flatnonzero(whole & (first == shard))
            rows[here] = self._window(shard, length)[starts[here] - self._starts[shard]]
        for row in np.flatnonzero(~whole).tolist():
            rows[row] = self.span(int(starts[row]), int(starts[row]) + length)
        return rows

    def _window(self, shard: int, length: int) -> np.ndarray:
        """Returns the view whose row i is tokens i to i + length of a shard; it is made once."""
        key = (shard, length)
        if key not in self._windows:
            self._windows[key] = np.lib.stride_tricks.sliding_window_view(
                self._parts[shard], length
            )
        return self._windows[key]


def _schema(dtype: np.dtype) -> pa.Schema:
    return pa.schema([("tokens", pa.list_(pa.from_numpy_dtype(dtype)))])
