"""Token shards: Arrow files of ids, read in place as one flat stream of tokens.

    documents   Arrow IPC file of one uncompressed record batch, one row a document:
                (tokens: list<uint16>), uint32 for vocabularies of 65,536 ids and more; where not
                every token is to be predicted also (loss_mask: list<uint8>), 1 for those that are
    rows        Arrow IPC stream of one uncompressed record batch, one row of L ids each, which
                `datasets` opens as it is: (input_ids: fixed_size_list<uint16>[L]), and alike, where
                rows have them, (segment_ids: uint16), uint32 from 65,536 on, (loss_mask: uint8)

One uncompressed batch has its ids contiguous and little endian in the file, so a mapped shard is a
NumPy array that costs no memory and no copy.
"""

import io
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Int32, Int64, Integer, UInt8

from modeling.data.long_texts import ScratchFile
from modeling.data.spans import SpanTable
from modeling.merkle import BLOCK_BYTES, prefix_root

Ids = Integer[np.ndarray, "_"]
_MOST_TOKENS = (1 << 31) - 1
_WRITTEN_AT_ONCE = 1 << 20
_READ_AT_ONCE = 1 << 22


class MappedShard(NamedTuple):
    """A shard of documents in the file's own memory: `tokens[offsets[i] : offsets[i + 1]]`."""

    tokens: Ids
    offsets: Int32[np.ndarray, " ends"]
    loss_mask: UInt8[np.ndarray, "_"] | None


class ReadShard(NamedTuple):
    """A shard of documents, whose ids are read in pieces, from beginning to end."""

    num_tokens: int
    offsets: Int32[np.ndarray, " ends"]
    tokens: Iterator[Ids]
    loss_mask: Iterator[Ids] | None


def token_dtype(vocab_size: int) -> np.dtype:
    """Returns the narrowest type of ids below `vocab_size`."""
    return np.dtype(np.uint16 if vocab_size < 65536 else np.uint32)


class SpilledIds:
    """Ids, or a loss mask, that are written to disk as they come: too many for memory."""

    def __init__(self, directory: Path, dtype: np.dtype) -> None:
        """Holds none, and goes to the disk of `directory`."""
        self._scratch = ScratchFile(directory, "the ids of a long document")
        self.dtype = dtype

    def append(self, ids: Ids) -> None:
        """Adds ids of this type.

        Raises:
            DiskFullError: there is no space for them.
        """
        assert ids.dtype == self.dtype
        if len(ids):
            self._scratch.append(np.ascontiguousarray(ids).data)

    def __len__(self) -> int:
        """Returns how many there are."""
        return self._scratch.num_bytes // self.dtype.itemsize

    def pieces(self) -> Iterator[bytes]:
        """Yields them all as bytes."""
        for start in range(0, self._scratch.num_bytes, _WRITTEN_AT_ONCE):
            stop = min(start + _WRITTEN_AT_ONCE, self._scratch.num_bytes)
            yield self._scratch.read(start, stop)


def write_shard(
    path: Path,
    tokens: Ids | SpilledIds,
    lengths: Integer[np.ndarray, " documents"],
    loss_mask: UInt8[np.ndarray, "_"] | SpilledIds | None = None,
) -> None:
    """Writes documents, given end to end with their lengths, and waits until they are on disk.

    The bytes do not depend on whether they come from memory.

    Raises:
        ValueError: there are more tokens than offsets of 32 bits can count.
    """
    if (num_tokens := int(np.sum(lengths, dtype=np.int64))) > _MOST_TOKENS:
        raise ValueError(
            f"{path}: {num_tokens:,} tokens, a shard holds {_MOST_TOKENS:,} at most. Part its "
            f"longest document."
        )
    schema = _documents_schema(tokens.dtype, with_loss_mask=loss_mask is not None)
    offsets = np.zeros(len(lengths) + 1, np.int32)
    np.cumsum(lengths, out=offsets[1:])
    buffers = [None, pa.py_buffer(offsets)]
    contents = [tokens] if loss_mask is None else [tokens, loss_mask]
    arrays = [np.empty(len(c), c.dtype) if isinstance(c, SpilledIds) else c for c in contents]
    columns = [
        pa.Array.from_buffers(field.type, len(lengths), buffers, children=[_wrapped(array)])
        for field, array in zip(schema, arrays, strict=True)
    ]
    pieces = {
        array.ctypes.data: content.pieces()
        for array, content in zip(arrays, contents, strict=True)
        if isinstance(content, SpilledIds)
    }
    batch = pa.record_batch(columns, schema=schema)
    if pieces:
        _write_substituting(path, pieces, batch, pa.ipc.new_file)
    else:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            writer.write_batch(batch)
    sync_file(path)


def map_shard(path: Path, dtype: np.dtype, *, with_loss_mask: bool = False) -> MappedShard:
    """Returns a shard of documents, read only.

    Raises:
        ValueError: the file holds other columns, several batches, offsets beyond its tokens, or a
            mask of other lengths than the tokens.
    """
    with pa.memory_map(str(path)) as mapped:
        return _shard_in(mapped, path, dtype, with_loss_mask=with_loss_mask)


def read_shard(path: Path, dtype: np.dtype, *, with_loss_mask: bool = False) -> ReadShard:
    """Returns a shard of documents, to be read through once.

    What is mapped would count as memory of this process as soon as it is looked at.

    Raises:
        ValueError: as `map_shard`.
    """
    with pa.memory_map(str(path)) as mapped:
        start = mapped.read_buffer(1).address
        tokens, offsets, mask = _shard_in(mapped, path, dtype, with_loss_mask=with_loss_mask)

        def pieces(column: Ids) -> Iterator[Ids]:
            return _read(path, column.ctypes.data - start, len(column), column.dtype)

        return ReadShard(
            len(tokens), offsets.copy(), pieces(tokens), None if mask is None else pieces(mask)
        )


def _shard_in(
    mapped: pa.MemoryMappedFile, path: Path, dtype: np.dtype, *, with_loss_mask: bool
) -> MappedShard:
    schema = _documents_schema(dtype, with_loss_mask=with_loss_mask)
    with pa.ipc.open_file(mapped) as reader:
        batches = [reader.get_batch(index) for index in range(reader.num_record_batches)]
        columns = _only_columns(path, reader.schema, schema, batches)
    _, offsets, _, tokens = columns[0].buffers()
    bounds = np.frombuffer(offsets, np.int32, len(columns[0]) + 1)
    ids = np.frombuffer(tokens, dtype, int(bounds[-1]))
    if not with_loss_mask:
        return MappedShard(ids, bounds, None)
    _, mask_offsets, _, mask = columns[1].buffers()
    if not np.array_equal(np.frombuffer(mask_offsets, np.int32, len(columns[1]) + 1), bounds):
        raise ValueError(
            f"{path}: the loss_mask has other lengths than the tokens. Build the artifact again."
        )
    return MappedShard(ids, bounds, np.frombuffer(mask, np.uint8, len(ids)))


def _read(path: Path, place: int, count: int, dtype: np.dtype) -> Iterator[Ids]:
    if count == 0:  # which may be anywhere
        return
    with path.open("rb") as file:
        file.seek(place)
        while count:
            size = min(count, _READ_AT_ONCE // dtype.itemsize)
            yield np.frombuffer(file.read(size * dtype.itemsize), dtype)
            count -= size


def write_rows(path: Path, columns: Mapping[str, Sequence[Ids]], row_length: int) -> None:
    """Writes columns, each given flat in pieces, as rows of `row_length`, which divides each.

    Putting the pieces side by side in memory first would take several times as long as copying
    the file.
    """
    schema = _rows_schema({name: pieces[0].dtype for name, pieces in columns.items()}, row_length)
    # Never written to or read, so that they take no memory.
    stand_ins = [np.empty(sum(map(len, pieces)), pieces[0].dtype) for pieces in columns.values()]
    arrays = [
        pa.Array.from_buffers(
            field.type, len(column) // row_length, [None], children=[_wrapped(column)]
        )
        for field, column in zip(schema, stand_ins, strict=True)
    ]
    of_address = dict(zip((c.ctypes.data for c in stand_ins), columns.values(), strict=True))
    _write_substituting(path, of_address, pa.record_batch(arrays, schema=schema), pa.ipc.new_stream)
    sync_file(path)


def _write_substituting(
    path: Path,
    pieces: Mapping[int, Iterable[Ids | bytes]],
    batch: pa.RecordBatch,
    new_writer: Callable[..., Any],
) -> None:
    """Writes a batch with pieces in place of the columns at their addresses."""
    with path.open("wb") as file:
        sink = _Substituting(file, pieces)
        with new_writer(sink, batch.schema) as writer:
            writer.write_batch(batch)
        sink.require_all()


class _Substituting:
    """A file that pyarrow writes, in which pieces take the place of columns that stand for them."""

    closed = False

    def __init__(
        self, file: io.BufferedWriter, pieces: Mapping[int, Iterable[Ids | bytes]]
    ) -> None:
        """Takes the pieces by the address of their column."""
        self._file = file
        self._pieces = dict(pieces)
        self._room = np.empty(_WRITTEN_AT_ONCE, np.uint8)

    def write(self, data: Any) -> int:
        """Writes what it is given: bytes, or a `pa.Buffer`, which has an address, of a column."""
        pieces = self._pieces.pop(getattr(data, "address", 0), None)
        if pieces is None:
            self._file.write(data)
        else:
            for piece in pieces:
                content = np.frombuffer(piece, np.uint8)
                for start in range(0, len(content), len(self._room)):
                    part = content[start : start + len(self._room)]
                    # What is mapped takes the kernel twice as long to write as what is in memory.
                    self._room[: len(part)] = part
                    self._file.write(self._room[: len(part)].data)
        return len(data)

    def flush(self) -> None:
        """Does nothing yet: the file is flushed when it is closed."""

    def require_all(self) -> None:
        """Makes sure that pyarrow has given each column as it is, and copied none."""
        assert not self._pieces, "pyarrow copies what it writes"


def map_rows(path: Path, dtypes: Mapping[str, np.dtype], row_length: int) -> dict[str, Ids]:
    """Returns the columns of a shard of rows, each flat in the file's own memory, read only.

    Raises:
        ValueError: the file holds other columns or several batches.
    """
    schema = _rows_schema(dtypes, row_length)
    with pa.memory_map(str(path)) as mapped, pa.ipc.open_stream(mapped) as reader:
        columns = _only_columns(path, reader.schema, schema, list(reader))
    return {
        name: np.frombuffer(column.buffers()[-1], dtype, len(column) * row_length)
        for (name, dtype), column in zip(dtypes.items(), columns, strict=True)
    }


class FlatTokens:
    """The tokens of consecutive shards as one stream, gathered by position."""

    def __init__(self, parts: Sequence[Ids]) -> None:
        """Takes the tokens of each shard, in order; they are not copied."""
        self._parts = list(parts)
        self._dtype = parts[0].dtype if parts else np.dtype(np.uint16)
        self._starts = np.cumsum([0, *(len(part) for part in parts)])
        self._blocks: dict[int, tuple[list[np.ndarray], np.ndarray, np.ndarray]] = {}

    def __len__(self) -> int:
        return int(self._starts[-1])

    def span(self, start: int, stop: int) -> Ids:
        """Returns tokens `start` to `stop`; a copy if they lie in several shards."""
        pieces = self.pieces(start, stop)
        return pieces[0] if len(pieces) == 1 else np.concatenate([*pieces, self._parts[0][:0]])

    def pieces(self, start: int, stop: int) -> list[Ids]:
        """Returns tokens `start` to `stop` as they lie in each shard, in place."""
        return [
            part[max(start - first, 0) : max(stop - first, 0)]
            for part, first in zip(self._parts, self._starts.tolist(), strict=False)
            if first < stop and first + len(part) > start
        ]

    def rows(
        self, indices: Integer[np.ndarray, " rows"], length: int
    ) -> Int32[np.ndarray, "rows length"]:
        """Returns rows of `length`, of which row i has the ids from `i * length` on.

        One copy is made per shard touched and none per row; only a row that spans two shards, of
        which each boundary has at most one, is copied alone.
        """
        blocks, firsts, ends = self._blocks_of(length)
        of = np.searchsorted(firsts, indices, side="right") - 1
        of[indices >= ends[of]] = len(blocks)
        counts = np.bincount(of, minlength=len(blocks) + 1)
        if counts.max() == len(indices) > counts[-1]:
            block = int(of[0])
            return blocks[block].take(indices - firsts[block], axis=0).astype(np.int32)
        # By shard, so that each has one run of what is copied.
        order = of.argsort(kind="stable")
        in_order, bounds = indices[order], np.cumsum(counts)
        found = np.empty((len(indices), length), self._dtype)
        for block in np.flatnonzero(counts[:-1]).tolist():
            here = slice(int(bounds[block] - counts[block]), int(bounds[block]))
            local = in_order[here] - firsts[block]
            blocks[block].take(local, axis=0, out=found[here], mode="clip")
        for place in range(int(bounds[-1] - counts[-1]), len(indices)):
            start = int(in_order[place]) * length
            found[place] = self.span(start, start + length)
        rows = np.empty(found.shape, np.int32)
        rows[order] = found
        return rows

    def spans(self, filler: int, longest: int) -> SpanTable:
        """Returns what copies spans of different lengths: see `SpanTable`."""
        return SpanTable(self._parts, self._dtype, filler, longest)

    def _blocks_of(
        self, length: int
    ) -> tuple[list[np.ndarray], Int64[np.ndarray, " shards"], Int64[np.ndarray, " shards"]]:
        """Returns the rows whole in each shard, and the number of its first and one past its last.

        Views, made once. The rows between two shards' are those that span a boundary.
        """
        if length not in self._blocks:
            firsts = -(-self._starts[:-1] // length)
            ends = np.maximum(self._starts[1:] // length, firsts)
            blocks = [
                part[first * length - start : end * length - start].reshape(-1, length)
                for part, start, first, end in zip(
                    self._parts, self._starts.tolist(), firsts.tolist(), ends.tolist(), strict=False
                )
            ]
            self._blocks[length] = blocks, firsts, ends
        return self._blocks[length]


def prefix_root_of(tokens: FlatTokens, leaves: Sequence[bytes], num_tokens: int) -> str:
    """Returns the Merkle root of a stream's first tokens, reading only their last partial block.

    Args:
        tokens: the stream.
        leaves: of the tree over all of it, as far as its blocks are full.
        num_tokens: how many count.
    """
    if num_tokens == 0:
        return prefix_root(leaves, 0, b"")
    item_bytes = tokens.span(0, 1).itemsize
    num_bytes = num_tokens * item_bytes
    start = num_bytes // BLOCK_BYTES * BLOCK_BYTES // item_bytes
    last_block = np.ascontiguousarray(tokens.span(start, num_tokens))
    return prefix_root(leaves, num_bytes, last_block.data.cast("B"))


def _documents_schema(dtype: np.dtype, *, with_loss_mask: bool) -> pa.Schema:
    fields = [("tokens", pa.list_(pa.from_numpy_dtype(dtype)))]
    if with_loss_mask:
        fields.append(("loss_mask", pa.list_(pa.uint8())))
    return pa.schema(fields)


def _rows_schema(dtypes: Mapping[str, np.dtype], row_length: int) -> pa.Schema:
    return pa.schema(
        [(name, pa.list_(pa.from_numpy_dtype(dtype), row_length)) for name, dtype in dtypes.items()]
    )


def _wrapped(tokens: Ids) -> pa.Array:
    """Wraps ids by their buffer: `pa.array` and `to_numpy` import pandas, which takes seconds."""
    buffers = [None, pa.py_buffer(np.ascontiguousarray(tokens))]
    return pa.Array.from_buffers(pa.from_numpy_dtype(tokens.dtype), len(tokens), buffers)


def _only_columns(
    path: Path, found: pa.Schema, expected: pa.Schema, batches: list[pa.RecordBatch]
) -> list[pa.Array]:
    if found != expected or len(batches) != 1:
        raise ValueError(
            f"{path}: expected one batch of {expected}, found {len(batches)} of {found}. "
            f"Build the artifact again."
        )
    batches[0].validate()
    return batches[0].columns


def sync_file(path: Path) -> None:
    """Waits until what was written to a file is on disk."""
    with path.open("rb") as written:
        os.fsync(written.fileno())
