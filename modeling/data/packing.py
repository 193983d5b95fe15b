"""Packing: whole documents side by side in rows, none cut that would fit.

    <split>-00000.pieces.arrow   Arrow IPC file of one uncompressed record batch, one row of the
                                 cache a row: (pieces: large_list<struct<start: int64,
                                 length: int32>>), spans of the split's token stream, left to right

Documents longer than a row are cut into rows of their own and a rest, cut short, or left out, as
`long_documents` says. Pieces are then laid into rows by best fit decreasing (Ding et al. 2024,
"Fewer Truncations Improve Language Modeling", arXiv:2404.10830): the longest first, each into the
fullest row that still has room for it.

That is done window by window: a window is the shortest run of documents, in the order of the
stream, with `WINDOW_TOKENS` tokens or `WINDOW_ROWS` rows' worth, whichever is more, or with
`WINDOW_DOCUMENTS` of them. Memory is bounded so, and rows are known as soon as the documents of
their window are, whatever comes after. Rows of a window stand in the order of their first pieces,
and pieces of a row in that of the stream.

The index is all that is stored: 12 bytes a piece and 8 a row, proportional to documents.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from jaxtyping import Int32, Int64, Integer

from modeling.data.config import LongDocuments
from modeling.data.rows import PADDING_SEGMENT, Rows
from modeling.data.shards import FlatTokens, sync_file
from modeling.merkle import MerkleHasher

WINDOW_TOKENS = 1 << 20
WINDOW_ROWS = 64
WINDOW_DOCUMENTS = 1 << 18
PIECES_OF_A_SHARD = 1 << 22

_SCHEMA = pa.schema(
    [
        (
            "pieces",
            pa.large_list(
                pa.field(
                    "item",
                    pa.struct(
                        [
                            pa.field("start", pa.int64(), nullable=False),
                            pa.field("length", pa.int32(), nullable=False),
                        ]
                    ),
                    nullable=False,
                )
            ),
        )
    ]
)


@dataclass(frozen=True)
class Pieces:
    """Which spans of the stream make up each row: row i has those from bounds[i] to bounds[i+1]."""

    bounds: Int64[np.ndarray, " bounds"]
    starts: Int64[np.ndarray, " pieces"]
    lengths: Int32[np.ndarray, " pieces"]

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def row(self, index: int) -> list[tuple[int, int]]:
        """Returns the (start, length) of each piece of one row."""
        here = slice(self.bounds[index], self.bounds[index + 1])
        return list(zip(self.starts[here].tolist(), self.lengths[here].tolist(), strict=True))

    def faults(self, num_tokens: int, sequence_length: int) -> Iterator[str]:
        """Yields what no packing may do: overfull rows, spans outside the stream, tokens twice."""
        used = np.add.reduceat(self.lengths, self.bounds[:-1]) if len(self) else np.zeros(0, int)
        if overfull := int((used > sequence_length).sum()):
            yield f"{overfull} rows hold more than {sequence_length} tokens."
        order = np.argsort(self.starts)
        starts, ends = self.starts[order], (self.starts + self.lengths)[order]
        if len(self.starts) and not (starts[0] >= 0 and ends[-1] <= num_tokens):
            yield f"pieces from {starts[0]} to {ends[-1]} of {num_tokens} tokens."
        if twice := int((starts[1:] < ends[:-1]).sum()):
            yield f"{twice} pieces overlap others."

    def digest_into(self, hasher: MerkleHasher) -> None:
        """Adds, row by row, the number of pieces and each one's start and length, as `<i8`."""
        counts = np.diff(self.bounds)
        table = np.empty(len(counts) + 2 * len(self.starts), "<i8")
        at = np.arange(len(self.starts)) * 2 + np.repeat(np.arange(len(counts)), counts) + 1
        table[self.bounds[:-1] * 2 + np.arange(len(counts))] = counts
        table[at], table[at + 1] = self.starts, self.lengths
        hasher.update(table.data.cast("B"))

    @classmethod
    def join(cls, parts: Sequence["Pieces"]) -> "Pieces":
        """Returns the rows of all parts, one after another."""
        ends = np.cumsum([0, *(len(part.starts) for part in parts)])
        bounds = [part.bounds[1:] + end for part, end in zip(parts, ends[:-1], strict=True)]
        empty = np.zeros(1, np.int64)
        return cls(
            np.concatenate([empty, *bounds]),
            np.concatenate([empty[:0], *(part.starts for part in parts)]),
            np.concatenate([np.zeros(0, np.int32), *(part.lengths for part in parts)]),
        )


@dataclass
class Fate:
    """What became of documents."""

    documents: int = 0
    cut: int = 0
    """Longer than a row, and in several pieces or cut short."""
    dropped: int = 0
    """Longer than a row, or empty, and left out."""
    lost_tokens: int = 0
    """In no row."""


class Packer:
    """Takes the lengths of documents as they become known and gives the rows of whole windows."""

    def __init__(self, sequence_length: int, long_documents: LongDocuments) -> None:
        """Packs rows of `sequence_length` tokens."""
        self._length = sequence_length
        self._long_documents: LongDocuments = long_documents
        self._window_tokens = max(WINDOW_TOKENS, WINDOW_ROWS * sequence_length)
        self._pending = np.zeros(0, np.int64)
        self._start = 0
        self.fate = Fate()

    def add(self, lengths: Integer[np.ndarray, " documents"]) -> Iterator[Pieces]:
        """Takes the next documents and yields the rows of each window that they fill."""
        self._pending = np.concatenate([self._pending, lengths.astype(np.int64)])
        ends = np.cumsum(self._pending)
        first, before = 0, 0
        while True:
            last = int(np.searchsorted(ends, before + self._window_tokens))
            stop = min(last + 1, first + WINDOW_DOCUMENTS)
            if stop > len(ends):
                break
            yield self._pack(self._pending[first:stop])
            first, before = stop, int(ends[stop - 1])
        self._pending = self._pending[first:]

    def finish(self) -> Iterator[Pieces]:
        """Yields the rows of the last window, which need not be full."""
        if len(self._pending):
            yield self._pack(self._pending)
            self._pending = self._pending[:0]

    def _pack(self, documents: Int64[np.ndarray, " documents"]) -> Pieces:
        starts = self._start + np.cumsum(documents) - documents
        self._start += int(documents.sum())
        starts, lengths = self._cut(starts, documents)
        return _best_fit_decreasing(starts, lengths, self._length)

    def _cut(
        self, starts: Int64[np.ndarray, " documents"], lengths: Int64[np.ndarray, " documents"]
    ) -> tuple[Int64[np.ndarray, " pieces"], Int64[np.ndarray, " pieces"]]:
        """Returns pieces that fit into a row, and counts what that does to documents."""
        is_long = lengths > self._length
        self.fate.documents += len(lengths)
        if self._long_documents == "split":
            counts = -(-lengths // self._length)
            of_document = np.repeat(np.arange(len(lengths)), counts)
            offsets = _ranges(np.zeros_like(counts), counts) * self._length
            pieces = np.minimum(lengths[of_document] - offsets, self._length)
            self.fate.cut += int(is_long.sum())
            self.fate.dropped += int((lengths == 0).sum())
            return starts[of_document] + offsets, pieces
        if self._long_documents == "truncate":
            kept, pieces = lengths > 0, np.minimum(lengths, self._length)
            self.fate.cut += int(is_long.sum())
        else:
            kept, pieces = (lengths > 0) & ~is_long, lengths
        self.fate.dropped += int((~kept).sum())
        self.fate.lost_tokens += int(lengths.sum() - pieces[kept].sum())
        return starts[kept], pieces[kept]


def _best_fit_decreasing(
    starts: Int64[np.ndarray, " pieces"], lengths: Int64[np.ndarray, " pieces"], row_length: int
) -> Pieces:
    row_of = np.empty(len(lengths), np.int64)
    by_length = np.argsort(-lengths, kind="stable")
    num_full = int((lengths == row_length).sum())
    row_of[by_length[:num_full]] = np.arange(num_full)
    num_rows = num_full
    rows = []
    # Rows with room, as room * 2^32 + row: the first that is not below length * 2^32 fits best.
    open_rows: list[int] = []
    for length in lengths[by_length[num_full:]].tolist():
        at = bisect_left(open_rows, length << 32)
        if at < len(open_rows):
            row = open_rows.pop(at) - (length << 32)
        else:
            row = (row_length - length << 32) + num_rows
            num_rows += 1
        rows.append(row & 0xFFFFFFFF)
        if row >> 32:
            insort(open_rows, row)
    row_of[by_length[num_full:]] = rows
    # Number the rows by their first piece; pieces are in the order of the stream already.
    first_piece = np.full(num_rows, len(lengths), np.int64)
    np.minimum.at(first_piece, row_of, np.arange(len(lengths)))
    rank = np.empty(num_rows, np.int64)
    rank[np.argsort(first_piece)] = np.arange(num_rows)
    row_of = rank[row_of]
    order = np.argsort(row_of, kind="stable")
    bounds = np.searchsorted(row_of[order], np.arange(num_rows + 1))
    return Pieces(bounds, starts[order], lengths[order].astype(np.int32))


def write_pieces(path: Path, pieces: Pieces) -> None:
    """Writes the rows of one shard of the index, and waits until they are on disk."""
    item = _SCHEMA.field(0).type.value_type
    children = [_array(pieces.starts), _array(pieces.lengths)]
    spans = pa.Array.from_buffers(item, len(pieces.starts), [None], children=children)
    column = pa.Array.from_buffers(
        _SCHEMA.field(0).type, len(pieces), [None, pa.py_buffer(pieces.bounds)], children=[spans]
    )
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, _SCHEMA) as writer:
        writer.write_batch(pa.record_batch([column], schema=_SCHEMA))
    sync_file(path)


def map_pieces(path: Path) -> Pieces:
    """Returns one shard of the index, in the file's own memory, read only.

    Raises:
        ValueError: the file is no such shard.
    """
    with pa.memory_map(str(path)) as mapped, pa.ipc.open_file(mapped) as reader:
        if reader.schema != _SCHEMA or reader.num_record_batches != 1:
            raise ValueError(
                f"{path}: expected one batch of {_SCHEMA}, found {reader.num_record_batches} of "
                f"{reader.schema}. Build the artifact again."
            )
        batch = reader.get_batch(0)
    batch.validate()
    column = batch.column(0)
    _, bounds, _, _, starts, _, lengths = column.buffers()
    ends = np.frombuffer(bounds, np.int64, len(column) + 1)
    count = int(ends[-1])
    return Pieces(
        ends, np.frombuffer(starts, np.int64, count), np.frombuffer(lengths, np.int32, count)
    )


class PackedRows:
    """Rows of pieces of a token stream, put together when they are asked for."""

    def __init__(
        self,
        shards: Sequence[Pieces],
        tokens: FlatTokens,
        loss_mask: FlatTokens | None,
        *,
        sequence_length: int,
        padding_id: int,
    ) -> None:
        """Takes the index, in order, and what it is an index into."""
        self._shards = list(shards)
        self._first_rows = np.cumsum([0, *(len(shard) for shard in shards)])
        self._tokens = tokens
        self._loss_mask = loss_mask
        self._length = sequence_length
        self._padding_id = padding_id

    def __len__(self) -> int:
        return int(self._first_rows[-1])

    def pieces(self) -> Pieces:
        """Returns the whole index, in memory."""
        return Pieces.join(self._shards)

    def gather(self, indices: Integer[np.ndarray, " rows"]) -> Rows:
        """Returns the rows at `indices`, with nothing done row by row in Python."""
        columns = [
            np.empty((len(indices), self._length), dtype) for dtype in (np.int32, np.int32, bool)
        ]
        # In the order of the stream, few runs of pieces lie in one shard of tokens each.
        order = np.argsort(indices, kind="stable")
        shard_of = np.searchsorted(self._first_rows, indices[order], side="right") - 1
        for shard in np.unique(shard_of).tolist():
            here = order[shard_of == shard]
            rows = self._laid_out(self._shards[shard], indices[here] - self._first_rows[shard])
            for whole, part in zip(columns, rows, strict=True):
                whole[here] = part
        return Rows(*columns)

    def _laid_out(
        self, pieces: Pieces, rows: Integer[np.ndarray, " rows"]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns rows of one shard of the index; each gets a last span, its padding."""
        shape = len(rows), self._length
        counts = pieces.bounds[rows + 1] - pieces.bounds[rows]
        last = np.cumsum(counts + 1) - 1
        numbers = np.arange(1, last[-1] + 2) - np.repeat(last - counts, counts + 1)
        numbers[last] = PADDING_SEGMENT
        at = _ranges(pieces.bounds[rows], counts)
        starts, lengths = np.full(len(numbers), -1), np.zeros(len(numbers), np.int64)
        starts[numbers > 0], lengths[numbers > 0] = pieces.starts[at], pieces.lengths[at]
        lengths[last] = self._length - np.add.reduceat(lengths, last - counts)
        segment_ids = np.repeat(numbers.astype(np.int32), lengths).reshape(shape)
        is_padding = segment_ids == PADDING_SEGMENT
        tokens = self._tokens.gather_spans(starts, lengths).reshape(shape)
        np.copyto(tokens, self._padding_id, where=is_padding)
        loss_mask = ~is_padding
        if self._loss_mask is not None:
            loss_mask &= self._loss_mask.gather_spans(starts, lengths).reshape(shape) != 0
        return tokens, segment_ids, loss_mask


def _ranges(
    starts: Int64[np.ndarray, " count"], counts: Int64[np.ndarray, " count"]
) -> Int64[np.ndarray, " total"]:
    """Returns `counts[i]` consecutive numbers from `starts[i]` on, for each i."""
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    return np.repeat(starts - (ends - counts), counts) + np.arange(total)


def _array(values: np.ndarray) -> pa.Array:
    buffers = [None, pa.py_buffer(np.ascontiguousarray(values))]
    return pa.Array.from_buffers(pa.from_numpy_dtype(values.dtype), len(values), buffers)
