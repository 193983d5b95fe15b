"""Packing: whole documents side by side in rows, none cut that would fit.

Documents longer than a row are cut into rows of their own and a rest, cut short, or left out, as
`long_documents` says. The pieces are then laid into rows by best fit decreasing (Ding et al. 2024,
"Fewer Truncations Improve Language Modeling", arXiv:2404.10830): the longest first, each into the
fullest row that still has room for it. Pieces of one length are laid together, which gives the same
rows in far fewer steps (Krell et al. 2021, arXiv:2107.02027).

That is done window by window: a window is the shortest run of documents, in the order of the
stream, with `WINDOW_TOKENS` tokens or `WINDOW_ROWS` rows' worth, whichever is more, or with
`WINDOW_DOCUMENTS` of them. Rows of a window stand in the order of their first pieces, and pieces of
a row in that of the stream.

So rows are a pure function of the documents' lengths, and are not stored: an index has four figures
a window, one of them the digest of its rows. Whoever reads a row lays its window again, once, in
milliseconds, and compares the digest. That takes 16 bytes of memory a piece and 24 a row, of the
windows that rows were asked of, and 16 of each again for loss masks.
"""

import hashlib
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32, Int64, Integer

from modeling.data.config import LongDocuments
from modeling.data.rows import PADDING_SEGMENT, Rows
from modeling.data.shards import FlatTokens
from modeling.data.spans import NOWHERE

WINDOW_TOKENS = 1 << 24
WINDOW_ROWS = 64
WINDOW_DOCUMENTS = 1 << 20


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

    def digest(self) -> str:
        """Returns a digest of the rows, wherever in the stream they begin."""
        hasher = hashlib.sha256(len(self).to_bytes(8, "little"))
        first = self.starts.min(initial=np.iinfo(np.int64).max)
        columns = (self.bounds, "<i8"), (self.starts - first, "<i8"), (self.lengths, "<i4")
        for column, dtype in columns:
            hasher.update(np.ascontiguousarray(column, dtype).data.cast("B"))
        return hasher.hexdigest()


class Window(NamedTuple):
    """What is stored of the rows of a window."""

    documents: int
    pieces: int
    rows: int
    digest: str

    @classmethod
    def of(cls, documents: int, pieces: Pieces) -> "Window":
        """Returns what is stored of these rows, laid of so many documents."""
        return cls(documents, len(pieces.starts), len(pieces), pieces.digest())


class Documents:
    """The documents of a stream by number: where they begin and how long they are."""

    def __init__(self, offsets: Sequence[Integer[np.ndarray, "_"]]) -> None:
        """Takes the offsets of the documents of each shard, in order; they are not copied."""
        self._offsets = list(offsets)
        self._numbers = np.cumsum([0, *(len(shard) - 1 for shard in offsets)])
        self._starts = np.cumsum([0, *(int(shard[-1]) for shard in offsets)])

    def __len__(self) -> int:
        return int(self._numbers[-1])

    def start(self, document: int) -> int:
        """Returns the place of a document's first token; of the one after all, the stream's end."""
        if document == len(self):
            return int(self._starts[-1])
        shard = int(np.searchsorted(self._numbers, document, side="right")) - 1
        return int(self._starts[shard] + self._offsets[shard][document - self._numbers[shard]])

    def lengths(self, first: int, stop: int) -> Int64[np.ndarray, " documents"]:
        """Returns the lengths of the documents from `first` up to `stop`."""
        parts = [
            np.diff(shard[max(first - number, 0) : stop - number + 1])
            for shard, number in zip(self._offsets, self._numbers.tolist(), strict=False)
            if number < stop and number + len(shard) - 1 > first
        ]
        return np.concatenate([np.zeros(0, np.int64), *parts])


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

    def add(self, other: "Fate") -> None:
        """Counts the documents of `other` too."""
        self.documents += other.documents
        self.cut += other.cut
        self.dropped += other.dropped
        self.lost_tokens += other.lost_tokens


class Packer:
    """Lays documents into rows of `sequence_length` tokens."""

    def __init__(self, sequence_length: int, long_documents: LongDocuments) -> None:
        """Treats documents longer than a row as `long_documents` says."""
        self._length = sequence_length
        self._long_documents: LongDocuments = long_documents

    def windows(self, documents: Documents, first: int = 0) -> Iterator[tuple[int, int]]:
        """Yields the first document of each window and that of the next, from a window's on.

        What ends before the last document ends there whatever follows it.
        """
        most = max(WINDOW_TOKENS, WINDOW_ROWS * self._length)
        while first < len(documents):
            stop = _window_end(documents, first, most)
            yield first, stop
            first = stop

    def pack(self, documents: Documents, first: int, stop: int) -> tuple[Pieces, Fate]:
        """Returns the rows of one window, and what became of its documents."""
        lengths = documents.lengths(first, stop)
        starts = documents.start(first) + np.cumsum(lengths) - lengths
        starts, pieces, fate = self._cut(starts, lengths)
        return _best_fit_decreasing(starts, pieces, self._length), fate

    def _cut(
        self, starts: Int64[np.ndarray, " documents"], lengths: Int64[np.ndarray, " documents"]
    ) -> tuple[Int64[np.ndarray, " pieces"], Int64[np.ndarray, " pieces"], Fate]:
        """Returns pieces that fit into a row, and what that does to documents."""
        is_long, is_empty = lengths > self._length, lengths == 0
        num_long, num_empty = int(is_long.sum()), int(is_empty.sum())
        if self._long_documents == "split":
            counts = -(-lengths // self._length)
            of_document = np.repeat(np.arange(len(lengths)), counts)
            offsets = _ranges(np.zeros_like(counts), counts) * self._length
            pieces = np.minimum(lengths[of_document] - offsets, self._length)
            fate = Fate(len(lengths), cut=num_long, dropped=num_empty)
            return starts[of_document] + offsets, pieces, fate
        if self._long_documents == "truncate":
            kept, pieces = ~is_empty, np.minimum(lengths, self._length)
            fate = Fate(len(lengths), cut=num_long, dropped=num_empty)
        else:
            kept, pieces = ~(is_empty | is_long), lengths
            fate = Fate(len(lengths), dropped=num_empty + num_long)
        fate.lost_tokens = int(lengths.sum() - pieces[kept].sum())
        return starts[kept], pieces[kept], fate


def _window_end(documents: Documents, first: int, num_tokens: int) -> int:
    """Returns the document after the first ones from `first` on that have so many tokens."""
    most = min(first + WINDOW_DOCUMENTS, len(documents))
    ends = range(first + 1, most)
    begin = documents.start(first)
    return first + 1 + bisect_left(ends, num_tokens, key=lambda end: documents.start(end) - begin)


def _best_fit_decreasing(
    starts: Int64[np.ndarray, " pieces"], lengths: Int64[np.ndarray, " pieces"], row_length: int
) -> Pieces:
    by_length = np.argsort(_narrow(row_length - lengths, row_length), kind="stable")
    counts = np.bincount(lengths, minlength=1)
    sizes = np.flatnonzero(counts)[::-1]
    by_size = list(zip(sizes.tolist(), counts[sizes].tolist(), strict=True))
    num_large = int((2 * sizes > row_length).sum())
    rows = _OpenRows(row_length, by_size[:num_large])
    num_alone = rows.count
    laid: list[int] = []
    for length, count in by_size[num_large:]:
        rows.lay(length, count, laid)
    row_of = np.empty(len(lengths), np.int32)
    row_of[by_length[:num_alone]] = np.arange(num_alone)
    row_of[by_length[num_alone:]] = np.fromiter(laid, np.int32, len(laid))
    # Number the rows by their first piece; pieces are in the order of the stream already.
    first_piece = np.empty(rows.count, np.int64)
    first_piece[row_of[::-1]] = np.arange(len(lengths))[::-1]  # the last one assigned stays
    is_first = np.zeros(len(lengths), np.bool_)
    is_first[first_piece] = True
    rank = np.empty(rows.count, np.int32)
    rank[row_of[is_first]] = np.arange(rows.count)
    row_of = rank[row_of]
    order = np.argsort(_narrow(row_of, rows.count), kind="stable")
    bounds = np.cumsum(np.bincount(row_of, minlength=rows.count))
    return Pieces(np.concatenate([[0], bounds]), starts[order], lengths[order].astype(np.int32))


def _narrow(values: Integer[np.ndarray, "_"], most: int) -> Integer[np.ndarray, "_"]:
    """Returns numbers up to `most` in 16 bits, if they are enough, which are sorted faster."""
    return values.astype(np.uint16 if most < 1 << 16 else np.uint32)


class _OpenRows:
    """The rows of a window by the room that they have left."""

    def __init__(self, row_length: int, large: Sequence[tuple[int, int]]) -> None:
        """Opens a row for each piece of more than half a row, which none of its like can share.

        Args:
            row_length: room of an empty row.
            large: (length, count) of these pieces, the longest first.
        """
        self.count = 0
        self._length = row_length
        self._rooms: list[int] = []  # ascending, those that rows have
        self._rows: dict[int, list[int]] = {}  # by room, ascending
        for length, count in large:
            if room := row_length - length:
                self._rooms.append(room)
                self._rows[room] = list(range(self.count, self.count + count))
            self.count += count

    def lay(self, length: int, count: int, laid: list[int]) -> None:
        """Lays `count` pieces, none longer than any before, and appends the row of each.

        A row that takes one and has room for more is the fullest still, so it takes them next.
        """
        rooms = self._rooms
        while count:
            at = bisect_left(rooms, length)
            is_open = at < len(rooms)
            room = rooms[at] if is_open else self._length
            each = room // length
            wanted = -(-count // each)
            taken = self._take(at, wanted) if is_open else self._open(wanted)
            placed = min(len(taken) * each, count)
            laid += taken if each == 1 else sorted(taken * each)[:placed]
            count -= placed
            if in_last := placed % each:
                self._put(room - in_last * length, [taken.pop()])
            if taken and room != each * length:
                self._put(room - each * length, taken)

    def _take(self, at: int, wanted: int) -> list[int]:
        room = self._rooms[at]
        rows = self._rows[room]
        if wanted < len(rows):
            self._rows[room] = rows[wanted:]
            return rows[:wanted]
        del self._rooms[at], self._rows[room]
        return rows

    def _open(self, wanted: int) -> list[int]:
        self.count += wanted
        return list(range(self.count - wanted, self.count))

    def _put(self, room: int, rows: list[int]) -> None:
        if room in self._rows:
            self._rows[room] = sorted(self._rows[room] + rows)
        else:
            self._rows[room] = rows
            insort(self._rooms, room)


class PackedRows:
    """Rows of pieces of a token stream, put together when they are asked for."""

    def __init__(
        self,
        windows: Sequence[Window],
        documents: Documents,
        tokens: FlatTokens,
        loss_mask: FlatTokens | None,
        *,
        sequence_length: int,
        long_documents: LongDocuments,
        padding_id: int,
    ) -> None:
        """Takes the index, and what it is an index into."""
        self._windows = list(windows)
        figures = np.array([window[:3] for window in windows], np.int64).reshape(-1, 3)
        firsts = np.zeros((len(windows) + 1, 3), np.int64)
        np.cumsum(figures, axis=0, out=firsts[1:])
        self._first_documents, self._first_pieces, self._first_rows = firsts.T
        self._documents = documents
        self._packer = Packer(sequence_length, long_documents)
        self._length = sequence_length
        self._spans = tokens.spans(padding_id, sequence_length)
        self._mask_spans = None if loss_mask is None else loss_mask.spans(0, sequence_length)
        # Each row has its padding as a last span. What is never written takes no memory.
        num_rows = int(self._first_rows[-1])
        shape = int(self._first_pieces[-1]) + num_rows, 4
        self._bounds = np.empty(num_rows + 1, np.int64)
        self._views = np.empty(shape, np.int32)
        self._mask_views = np.empty(shape if self._mask_spans else (0, 4), np.int32)
        self._is_laid = np.zeros(len(windows), bool)

    def __len__(self) -> int:
        return int(self._first_rows[-1])

    def pieces(self) -> Pieces:
        """Returns which spans of the stream all rows have."""
        windows = [self._packed(window) for window in range(len(self._windows))]
        nothing = Pieces(np.zeros(1, np.int64), np.zeros(0, np.int64), np.zeros(0, np.int32))
        found = [nothing, *windows]
        ends = np.cumsum([0, *(int(pieces.bounds[-1]) for pieces in found)])
        return Pieces(
            np.concatenate(
                [nothing.bounds, *(p.bounds[1:] + e for p, e in zip(found, ends, strict=False))]
            ),
            np.concatenate([pieces.starts for pieces in found]),
            np.concatenate([pieces.lengths for pieces in found]),
        )

    def gather(self, indices: Integer[np.ndarray, " rows"]) -> Rows:
        """Returns the rows at `indices`, with nothing done row by row in Python.

        Raises:
            ValueError: documents give other rows than when the index was made.
        """
        if not len(indices):
            shape = 0, self._length
            return Rows(np.empty(shape, np.int32), np.empty(shape, np.int32), np.empty(shape, bool))
        rows = indices.astype(np.int64)
        if not self._is_laid.all():
            self._lay(np.unique(np.searchsorted(self._first_rows, rows, side="right") - 1))
        return self._laid_out(rows)

    def _lay(self, windows: Int64[np.ndarray, " windows"]) -> None:
        """Makes the spans of windows known. Threads may do so at once: both write the same."""
        for window in windows[~self._is_laid[windows]].tolist():
            pieces = self._packed(window)
            row, num_rows = int(self._first_rows[window]), len(pieces)
            first = int(self._first_pieces[window]) + row
            here = slice(first, first + len(pieces.starts) + num_rows)
            ends = pieces.bounds[1:]
            room = self._length - np.add.reduceat(pieces.lengths, pieces.bounds[:-1])
            starts = np.insert(pieces.starts, ends, NOWHERE)
            lengths = np.insert(pieces.lengths, ends, room)
            bounds = self._bounds[row : row + num_rows + 1]
            np.add(pieces.bounds, np.arange(first, first + num_rows + 1), out=bounds)
            self._views[here] = self._spans.views(starts, lengths)
            if self._mask_spans is not None:
                self._mask_views[here] = self._mask_spans.views(starts, lengths)
            self._is_laid[window] = True

    def _packed(self, window: int) -> Pieces:
        """Returns the rows of a window, making sure that they are those of the index."""
        first, stop = self._first_documents[window : window + 2].tolist()
        pieces, _ = self._packer.pack(self._documents, first, stop)
        if Window.of(stop - first, pieces) != self._windows[window]:
            raise ValueError(
                f"documents {first} to {stop - 1} give other packed rows than when the token "
                f"cache was built: it is damaged, or made by another version of this program. "
                f"Build it again."
            )
        return pieces

    def _laid_out(self, rows: Int64[np.ndarray, " rows"]) -> Rows:
        """Returns rows whose windows are laid."""
        shape = len(rows), self._length
        first = self._bounds[rows]
        spans = self._bounds[rows + 1] - first
        ends = np.cumsum(spans)
        number = np.arange(1, ends[-1] + 1) - np.repeat(ends - spans, spans)  # from 1 in each row
        at = number + np.repeat(first - 1, spans)
        number[ends - 1] = PADDING_SEGMENT
        views = self._views.take(at, axis=0)
        lengths = self._spans.lengths(views)
        segment_ids = np.repeat(number.astype(np.int32), lengths).reshape(shape)
        tokens = self._spans.joined(views).reshape(shape).astype(np.int32)
        if self._mask_spans is None:
            loss_mask = segment_ids != PADDING_SEGMENT
        else:
            mask = self._mask_spans.joined(self._mask_views.take(at, axis=0))
            loss_mask = mask.reshape(shape) != 0
        return Rows(tokens, segment_ids, loss_mask)


def _ranges(
    starts: Int64[np.ndarray, " count"], counts: Int64[np.ndarray, " count"]
) -> Int64[np.ndarray, " total"]:
    """Returns `counts[i]` consecutive numbers from `starts[i]` on, for each i."""
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    return np.repeat(starts - (ends - counts), counts) + np.arange(total)
