"""Tables a few megabytes at a time, however few bytes stand for many rows of them.

A table can be small where it is stored and large in memory: pages and buffers are compressed, and a
row of a dictionary-encoded column is a number that stands for a text of any length. So what is
decoded at once is bounded by bytes, not by rows; and what a file says that it holds is known before
any of it is decompressed, from the headers of its pages (Parquet) or buffers (Arrow):

    page header of Parquet    Thrift, compact: field 1 type, 2 uncompressed bytes, 3 compressed
    Arrow IPC                 messages: -1, size, Flatbuffers table `Message`, body. A compressed
                              buffer begins with its uncompressed bytes as int64, -1: not compressed

See https://parquet.apache.org/docs/file-format/ and https://arrow.apache.org/docs/format/.
"""

import io
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from jaxtyping import Int64

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

ROWS_AT_ONCE = 1024
FEW_ROWS = 64
"""Where rows may be of any size: so few that this bounds them, and not so few that it costs."""
_BYTES_AT_ONCE = 64 * 1024 * 1024
_PIECE_BYTES = 1024 * 1024
_TEXTS = (pa.string(), pa.large_string(), pa.binary(), pa.large_binary())
_AS_BYTES = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary()}
_MAGIC = b"ARROW1"
_DICTIONARY, _RECORDS = 2, 3
"""Kinds of messages."""


def bounded(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    """Yields the rows of a batch in pieces that are small as Python values too, one row at least.

    Rows of types of which that is not known come one by one.
    """
    sizes = np.zeros(batch.num_rows, np.int64)
    for column in batch.columns:
        of_column = _bytes_of_rows(column)
        if of_column is None:
            yield from (batch.slice(row, 1) for row in range(batch.num_rows))
            return
        sizes += of_column
    ends = sizes.cumsum()
    start = 0
    while start < batch.num_rows:
        before = ends[start - 1] if start else 0
        fits = int(np.searchsorted(ends, before + _BYTES_AT_ONCE, side="right"))
        stop = max(min(fits, start + ROWS_AT_ONCE), start + 1)
        yield batch.slice(start, stop - start)
        start = stop


def checked(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Returns a batch that was read as it lies in a file, if nothing in it leads out of it.

    Whether texts are UTF-8 is left to whoever reads them, row by row.

    Raises:
        pa.ArrowInvalid: an offset or index is out of bounds.
    """
    for column in batch.columns:
        plain = _AS_BYTES.get(column.type)
        (column if plain is None else column.view(plain)).validate(full=True)
    return batch


def parquet_batches(
    opened: "ParquetFile", handle: Any, columns: Sequence[str]
) -> Iterator[pa.RecordBatch]:
    """Yields the rows of a Parquet file, of each group as many at once as are sure to be few bytes.

    Args:
        opened: the file.
        handle: its stored bytes, for the headers of its pages.
        columns: to read.
    """
    for number in range(opened.metadata.num_row_groups):
        group = opened.metadata.row_group(number)
        if not group.num_rows:
            continue
        chunks = [group.column(index) for index in range(group.num_columns)]
        wanted = [chunk for chunk in chunks if chunk.path_in_schema.split(".")[0] in columns]
        size = sum(chunk.total_uncompressed_size for chunk in wanted)
        # A row is a value of the dictionary, or stands in a page as it is.
        row = sum(_dictionary_bytes(handle, chunk) for chunk in wanted) + size // group.num_rows
        most = ROWS_AT_ONCE if size <= _BYTES_AT_ONCE else FEW_ROWS
        count = max(min(_BYTES_AT_ONCE // max(row, 1), most), 1)
        yield from opened.iter_batches(count, row_groups=[number], columns=list(columns))


def inflated_bytes(handle: Any) -> int:
    """Returns how many bytes an Arrow IPC file or stream has in memory, by what it says itself.

    Raises:
        EOFError: its messages are damaged.
    """
    size = handle.seek(0, io.SEEK_END)
    handle.seek(0)
    is_file = handle.read(len(_MAGIC)) == _MAGIC
    try:
        places = _blocks(handle, size) if is_file else _messages(handle, size)
        return sum(_message_bytes(handle, place) for place in places)
    except (struct.error, IndexError, ValueError, OverflowError) as error:
        raise EOFError(f"its messages are damaged ({error})") from error
    finally:
        handle.seek(0)


def _bytes_of_rows(column: pa.Array) -> Int64[np.ndarray, " rows"] | None:
    """Returns about how many bytes each row of a column has as a value, if that is known."""
    import pyarrow.compute as pc  # imported here: few sources need it

    kind = column.type
    if pa.types.is_dictionary(kind):
        of_values = _bytes_of_rows(column.dictionary)
        indices = _integers(pc.fill_null(column.indices, 0))
        if of_values is None or not len(of_values):
            return of_values if of_values is None else np.zeros(len(column), np.int64)
        return of_values[indices]
    if kind in _TEXTS:
        return _integers(pc.fill_null(pc.call_function("binary_length", [column]), 0))
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        of_values = _bytes_of_rows(column.values)
        if of_values is None:
            return None
        before = np.concatenate([[0], of_values.cumsum()])
        offsets = _integers(column.offsets)
        return before[offsets[1:]] - before[offsets[:-1]]
    if pa.types.is_struct(kind):
        sizes = np.zeros(len(column), np.int64)
        for index in range(kind.num_fields):
            of_field = _bytes_of_rows(column.field(index))
            if of_field is None:
                return None
            sizes += of_field
        return sizes
    if pa.types.is_primitive(kind) or pa.types.is_null(kind):
        return np.full(len(column), 8)
    return None


def _integers(array: pa.Array) -> Int64[np.ndarray, "_"]:
    """Returns integers without `to_numpy`, which imports pandas for seconds."""
    data = array.buffers()[1]
    dtype = np.dtype(str(array.type))
    values = np.frombuffer(data, dtype) if data is not None else np.empty(0, dtype)
    return values[array.offset : array.offset + len(array)].astype(np.int64)


def _dictionary_bytes(handle: Any, chunk: Any) -> int:
    """Returns the uncompressed bytes of the dictionary of a column's chunk; 0 if it has none."""
    if not chunk.has_dictionary_page or not chunk.dictionary_page_offset:
        return 0
    handle.seek(chunk.dictionary_page_offset)
    header = handle.read(32)
    sizes, at = [], 0
    for _ in range(2):  # type and uncompressed bytes, each a field one beyond the last, of type i32
        if header[at : at + 1] != b"\x15":
            return chunk.total_uncompressed_size  # of an unknown writer: no more than all
        value, shift, at = 0, 0, at + 1
        while True:
            byte = header[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
        sizes.append((value >> 1) ^ -(value & 1))
    return max(sizes[1], 0)


@dataclass(frozen=True)
class _Table:
    """A table of Flatbuffers: its fields by number, as they lie in `data`."""

    data: bytes
    place: int

    @classmethod
    def root(cls, data: bytes) -> "_Table":
        return cls(data, _number("<I", data, 0))

    def field(self, index: int) -> int | None:
        """Returns where a field lies; None if it is left at its default."""
        fields = self.place - _number("<i", self.data, self.place)
        entry = 4 + 2 * index
        if entry >= _number("<H", self.data, fields):
            return None
        offset = _number("<H", self.data, fields + entry)
        return self.place + offset if offset else None

    def number(self, pattern: str, index: int) -> int:
        """Returns an integer."""
        place = self.field(index)
        return 0 if place is None else _number(pattern, self.data, place)

    def table(self, index: int) -> "_Table":
        """Returns a table."""
        place = self.field(index)
        if place is None:
            raise ValueError(f"field {index} of a table is missing")
        return _Table(self.data, place + _number("<I", self.data, place))

    def structs(self, pattern: str, index: int) -> list[tuple[Any, ...]]:
        """Returns the structs of a vector."""
        place = self.field(index)
        if place is None:
            return []
        start = place + _number("<I", self.data, place)
        size = struct.calcsize(pattern)
        count = _number("<I", self.data, start)
        whole = self.data[start + 4 : start + 4 + count * size]
        if len(whole) != count * size:
            raise ValueError(f"a vector of {count} is cut short")
        return list(struct.iter_unpack(pattern, whole))


def _number(pattern: str, data: bytes, place: int) -> int:
    return struct.unpack_from(pattern, data, place)[0]


def _read(handle: Any, place: int, size: int) -> bytes:
    handle.seek(place)
    pieces = []
    while size > 0 and (piece := handle.read(min(size, _PIECE_BYTES))):
        pieces.append(piece)
        size -= len(piece)
    return b"".join(pieces)


def _blocks(handle: Any, size: int) -> Iterator[int]:
    """Yields where the messages of a file are, by its footer."""
    end = _read(handle, size - 10, 10)
    length = _number("<i", end, 0)
    if end[4:] != _MAGIC or not 0 < length <= size:
        raise ValueError("it has no footer")
    footer = _Table.root(_read(handle, size - 10 - length, length))
    for index in (2, 3):  # dictionaries, record batches
        yield from (place for place, _, _ in footer.structs("<qi4xq", index))


def _messages(handle: Any, size: int) -> Iterator[int]:
    """Yields where the messages of a stream are."""
    place = 0
    while place < size:
        yield place
        start, length = _header(handle, place)
        if not length:
            return
        message = _Table.root(_read(handle, start, length))
        place = start + length + _size(message.number("<q", 3))


def _header(handle: Any, place: int) -> tuple[int, int]:
    """Returns where the metadata of a message begins, and its bytes: 0 at the end of a stream."""
    first, second = struct.unpack("<ii", _read(handle, place, 8).ljust(8, b"\0"))
    return (place + 8, _size(second)) if first == -1 else (place + 4, _size(first))


def _size(number: int) -> int:
    """Returns a number of bytes, which is none if it is negative."""
    if number < 0:
        raise ValueError(f"a size is {number}")
    return number


def _message_bytes(handle: Any, place: int) -> int:
    """Returns how many bytes the body of a message has once it is decompressed."""
    start, length = _header(handle, place)
    if not length:
        return 0
    message = _Table.root(_read(handle, start, length))
    kind = message.number("<B", 1)
    if kind not in (_DICTIONARY, _RECORDS):
        return 0
    batch = message.table(2)
    batch = batch.table(1) if kind == _DICTIONARY else batch
    buffers = batch.structs("<qq", 2)
    if batch.field(3) is None:  # not compressed
        return sum(_size(size) for _, size in buffers)
    total = 0
    for offset, size in buffers:
        if size:
            inflated = _number("<q", _read(handle, start + length + offset, 8), 0)
            total += _size(size - 8 if inflated == -1 else inflated)
    return total
