"""Reads documents out of one file of a source, one at a time, by its format.

    text         the file is a document                        id: its path
    paragraphs   runs of lines that are not blank              id: path#number of the first line
    jsonl        a JSON object a line, blank lines skipped     id: path#number of the line
    json         one array of JSON objects                     id: path#number of the object
    parquet      rows of a table                               id: path#number of the row
    arrow        rows of an IPC file or stream, likewise       id: path#number of the row
    ids          a flat array of ids, cut at a separator       id: path#number of the document

Numbers count from 1; with `id_field` a record says its id itself, and moves between files unmoved.
What a record holds, and how it becomes a document, is said by a format of `modeling.data.records`.
Python sources are decoded as the interpreter does (PEP 263). Nothing is repaired: what is not
UTF-8, not JSON, or has no text is an error that says where. That of one record is yielded in its
place, so that whoever reads may go on; that of a whole file is raised.
"""

import io
import json
import lzma
import tokenize
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import pyarrow as pa

from modeling.data.flat_ids import flat_documents
from modeling.data.formats_config import Format, IdsFormat
from modeling.data.records import RecordError, RecordReader, ids_text, record_reader
from modeling.data.sources import (
    BadContentError,
    FoundFile,
    SourceError,
    StoredFile,
    UndecodableError,
    require_moderate,
)
from modeling.data.sources_config import (
    FilesSource,
    PackageSource,
    PyStdlibSource,
    RegexFilter,
    Source,
)
from modeling.data.tables import bounded, checked, inflated_bytes, parquet_batches

_PIECE_BYTES = 1024 * 1024
_DAMAGE = (OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException)
_BLANK = " \t\r\n"
_raw_json = json.JSONDecoder().raw_decode
_NO_FIELDS: Mapping[str, Any] = {}


class Found(NamedTuple):
    """A document, or what is wrong with it."""

    doc_id: str
    content: bytes | BadContentError
    """UTF-8."""
    record: Mapping[str, Any]
    """The fields that it came with, as far as filters ask for them."""
    where: str = ""
    """Its place, if it says its id itself."""


Documents = Iterator[Found]


@dataclass(frozen=True)
class Reading:
    """What is read of the records of a source."""

    records: RecordReader
    id_field: str | None
    prefix: str
    """Of ids that records say: the source's name and a slash, if there are several."""
    filter_fields: tuple[str, ...]
    max_document_bytes: int

    @classmethod
    def of(cls, source: Source, name: str, document_format: Format) -> "Reading":
        """Returns what is read of `source`; an only source has no name."""
        fields = (filter.field for filter in source.filters if isinstance(filter, RegexFilter))
        return cls(
            record_reader(document_format, getattr(source, "text_field", "text")),
            getattr(source, "id_field", None),
            f"{name}/" if name else "",
            tuple(dict.fromkeys(field for field in fields if field is not None)),
            source.max_document_bytes,
        )

    @property
    def text_alone(self) -> bool:
        """Whether a record is no more than its text."""
        return self.records.is_text and not self.other_fields

    @property
    def other_fields(self) -> tuple[str, ...]:
        """What a record must have beside its document."""
        return self.filter_fields if self.id_field is None else (*self.filter_fields, self.id_field)

    def found(self, doc_id: str, record: Any, where: str) -> Found:
        """Returns the document of a record, or what is wrong with it."""
        try:
            if not isinstance(record, dict):
                raise BadContentError(
                    f"{where}: no field {self.records.fields[0]!r}: found a "
                    f"{type(record).__name__}, expected an object.",
                    reason="no object",
                )
            content = self.bounded(self._document(record, where), where)
            if self.id_field is not None:
                doc_id = f"{self.prefix}{_own_id(record, self.id_field, where)}"
        except BadContentError as error:
            return Found(doc_id, error, _NO_FIELDS)
        return Found(doc_id, content, record if self.filter_fields else _NO_FIELDS, where)

    def bounded(self, data: bytes, where: str) -> bytes:
        """Refuses a document that a small compressed file, or a lost line end, has blown up."""
        if len(data) > self.max_document_bytes:
            raise BadContentError(
                f"{where}: a document of over {self.max_document_bytes} bytes; is `source.format` "
                f"right? If it is, raise `source.max_document_bytes`.",
                reason="too long",
            )
        return data

    def _document(self, record: Mapping[str, Any], where: str) -> bytes:
        for field in self.other_fields:
            if field not in record:
                raise BadContentError(
                    f"{where}: no field {field!r} (found {sorted(record)}), which `source.filters` "
                    f"or `source.id_field` names.",
                    reason="field",
                )
        try:
            return self.records.document(record)
        except RecordError as error:
            hint = "`source.text_field`" if self.records.is_text else "`format`"
            raise BadContentError(
                f"{where}: {error}; repair it, or correct {hint}.", reason="field"
            ) from error


def read_documents(
    source: Source, file: FoundFile, stored: StoredFile, reading: Reading, document_format: Format
) -> Documents:
    """Yields the documents of one file.

    Raises:
        UndecodableError: the bytes are not text in the encoding they should have.
        BadContentError: the file is damaged or holds no documents of its format.
        SourceError: it cannot be read, or is not what the configuration says.
    """
    kind = source.format if isinstance(source, FilesSource) else "Python"
    try:
        match source:
            case PyStdlibSource() | PackageSource():
                _require_texts(reading.records, file.shown)
                content = _decode_python(stored.content().read(), file.shown)
                yield Found(file.document_path, content, _NO_FIELDS)
            case FilesSource(format="ids"):
                yield from _flat_ids(file, stored, reading, document_format)
            case FilesSource():
                yield from _READERS[source.format](file, stored, reading)
    except _DAMAGE as error:
        raise BadContentError(
            f"{file.shown}: damaged, or not {kind}: {str(error).rstrip('.')}. Write it anew, take "
            f"it out of the source, or leave such files out with `source.on_error: skip`.",
            reason="damaged file",
        ) from error


def table_documents(
    batches: Iterable[pa.RecordBatch], reading: Reading, path: str, shown: str
) -> Documents:
    """Yields the documents in rows of a table: `path#number`.

    Args:
        batches: the columns of `columns_of` at least.
        reading: what is read of a row.
        path: what ids begin with.
        shown: what errors begin with.
    """
    number = 0
    for batch in chain.from_iterable(map(bounded, batches)):
        for record in _rows(batch, reading):
            number += 1
            where = f"{shown}, row {number}"
            doc_id = f"{path}#{number}"
            if isinstance(record, UnicodeDecodeError):
                told = f"{where}: not UTF-8: {record}; repair it, or leave the row out."
                yield Found(doc_id, UndecodableError(told), _NO_FIELDS)
                continue
            if not isinstance(record, bytes):
                yield reading.found(doc_id, record, where)
                continue
            try:
                yield Found(doc_id, _utf8(reading.bounded(record, where), where), _NO_FIELDS)
            except BadContentError as error:
                yield Found(doc_id, error, _NO_FIELDS)


def columns_of(schema: pa.Schema, reading: Reading, where: str) -> list[str]:
    """Returns the columns to read: all that a record must have, and those that it may.

    Raises:
        BadContentError: one is not there, or a text is no string.
    """
    records = reading.records
    for field in (*records.fields, *reading.other_fields):
        if field not in schema.names:
            hint = "source.text_field" if records.is_text else "the field names of `format`"
            if field not in records.fields:
                hint = "source.filters` or `source.id_field"
            raise BadContentError(
                f"{where}: no column {field!r} (found {schema.names}); set `{hint}`.",
                reason="field",
            )
        if schema.names.count(field) > 1:
            raise BadContentError(
                f"{where}: {schema.names.count(field)} columns are named {field!r}; keep one.",
                reason="field",
            )
    if records.is_text:
        _require_strings(schema, records.fields[0], where)
    optional = (name for name in records.optional_fields if name in schema.names)
    return list(dict.fromkeys([*records.fields, *reading.other_fields, *optional]))


def _flat_ids(
    file: FoundFile, stored: StoredFile, reading: Reading, document_format: Format
) -> Documents:
    if not isinstance(document_format, IdsFormat):
        raise SourceError(
            f"{file.shown}: holds ids, but `format` is {document_format.type}; set `format: "
            f"{{type: ids, separator_id: N}}`, where N is the id that ends each document."
        )
    try:
        documents = flat_documents(stored.content(), document_format)
        for number, ids in enumerate(documents, start=1):
            doc_id = f"{file.document_path}#{number}"
            try:
                yield Found(doc_id, ids_text(ids).encode(), _NO_FIELDS)
            except RecordError as error:
                told = f"{file.shown}, document {number}: {error}; repair it."
                yield Found(doc_id, BadContentError(told, reason="field"), _NO_FIELDS)
    except RecordError as error:
        raise BadContentError(f"{file.shown}: {error}.", reason="no ids") from error


def _text(file: FoundFile, stored: StoredFile, reading: Reading) -> Documents:
    _require_texts(reading.records, file.shown)
    try:
        content = _utf8(_whole(stored, file, reading), file.shown)
    except BadContentError as error:
        content = error
    yield Found(file.document_path, content, _NO_FIELDS)


def _whole(stored: StoredFile, file: FoundFile, reading: Reading) -> bytes:
    stream, pieces, num_bytes = stored.content(), [], 0
    while num_bytes <= reading.max_document_bytes and (piece := stream.read(_PIECE_BYTES)):
        pieces.append(piece)
        num_bytes += len(piece)
    return reading.bounded(b"".join(pieces), file.shown)


def _paragraphs(file: FoundFile, stored: StoredFile, reading: Reading) -> Documents:
    _require_texts(reading.records, file.shown)
    lines: list[bytes] = []
    first = num_bytes = 0
    for number, held in _lines(stored, file, reading):
        if isinstance(held, BadContentError):
            raise held
        line = held.pop()
        if line.strip():
            first = first if lines else number
            lines.append(line)
            num_bytes += len(line)
            if num_bytes > reading.max_document_bytes:
                reading.bounded(b"".join(lines), f"{file.shown}:{first}")
        elif lines:
            yield _paragraph(file, reading, first, lines)
            lines, num_bytes = [], 0
    if lines:
        yield _paragraph(file, reading, first, lines)


def _paragraph(file: FoundFile, reading: Reading, first: int, lines: list[bytes]) -> Found:
    doc_id = f"{file.document_path}#{first}"
    try:
        return Found(doc_id, _utf8(b"".join(lines), f"{file.shown}:{first}"), _NO_FIELDS)
    except BadContentError as error:
        return Found(doc_id, error, _NO_FIELDS)


def _json_lines(file: FoundFile, stored: StoredFile, reading: Reading) -> Documents:
    for number, held in _lines(stored, file, reading):
        doc_id = f"{file.document_path}#{number}"
        if isinstance(held, BadContentError):
            yield Found(doc_id, held, _NO_FIELDS)
        elif not held[0].isspace():
            yield _json_line(doc_id, held, f"{file.shown}:{number}", reading)


def _json_line(doc_id: str, held: list[bytes], where: str, reading: Reading) -> Found:
    try:
        return reading.found(doc_id, _parsed(held, where), where)
    except BadContentError as error:
        return Found(doc_id, error, _NO_FIELDS)


def _json_array(file: FoundFile, stored: StoredFile, reading: Reading) -> Documents:
    values = _parsed([_whole(stored, file, reading)], file.shown)
    if not isinstance(values, list):
        raise BadContentError(
            f"{file.shown}: holds a {type(values).__name__}, expected an array of objects; for an "
            f"object a line set `source.format: jsonl`.",
            reason="no array",
        )
    for number, value in enumerate(values, start=1):
        doc_id = f"{file.document_path}#{number}"
        yield reading.found(doc_id, value, f"{file.shown}, object {number}")


def _parquet(file: FoundFile, stored: StoredFile, reading: Reading) -> Documents:
    # Imported here: it is slow, and few sources need it. Reading jumps about in the file, so it is
    # digested in a pass of its own.
    from pyarrow.parquet import ParquetFile

    with (
        file.open() as handle,
        file.open() as headers,
        ParquetFile(handle, pre_buffer=False, buffer_size=_PIECE_BYTES) as opened,
    ):
        columns = columns_of(opened.schema_arrow, reading, file.shown)
        size = headers.seek(0, io.SEEK_END)
        inflated = sum(
            opened.metadata.row_group(index).total_byte_size
            for index in range(opened.metadata.num_row_groups)
        )
        require_moderate(file, size, inflated, stored.max_expansion)
        batches = parquet_batches(opened, headers, columns)
        yield from table_documents(batches, reading, file.document_path, file.shown)


def _arrow(file: FoundFile, stored: StoredFile, reading: Reading) -> Documents:
    with file.open() as handle:
        size = handle.seek(0, io.SEEK_END)
        require_moderate(file, size, inflated_bytes(handle), stored.max_expansion)
        is_file = handle.read(6) == b"ARROW1"
        handle.seek(0)
        open_it = pa.ipc.open_file if is_file else pa.ipc.open_stream
        with open_it(handle) as opened:
            columns = columns_of(opened.schema, reading, file.shown)
            wanted = [opened.schema.get_field_index(name) for name in columns]
        handle.seek(0)
        # Other columns are not even read.
        with open_it(handle, options=pa.ipc.IpcReadOptions(included_fields=wanted)) as opened:
            batches: Iterable[pa.RecordBatch] = (
                (opened.get_batch(index) for index in range(opened.num_record_batches))
                if isinstance(opened, pa.ipc.RecordBatchFileReader)
                else opened
            )
            yield from table_documents(
                map(checked, batches), reading, file.document_path, file.shown
            )


_READERS: dict[str, Callable[[FoundFile, StoredFile, Reading], Documents]] = {
    "text": _text,
    "paragraphs": _paragraphs,
    "jsonl": _json_lines,
    "json": _json_array,
    "parquet": _parquet,
    "arrow": _arrow,
}


def _require_texts(records: RecordReader, where: str) -> None:
    if not records.is_text:
        raise SourceError(
            f"{where}: holds a text, but `format` takes records with {list(records.fields)}; give "
            f"the source as jsonl, json, parquet or arrow, or set `format: {{type: text}}`."
        )


def _rows(batch: pa.RecordBatch, reading: Reading) -> list[Any]:
    """Returns the bytes of each text that is all that is read of its row; else rows as records.

    In place of a record whose strings are not UTF-8 stands the error.
    """
    if not reading.text_alone:
        try:
            return batch.to_pylist()
        except UnicodeDecodeError as error:
            if batch.num_rows == 1:
                return [error]
            rows = (batch.slice(row, 1) for row in range(batch.num_rows))
            return [record for row in rows for record in _rows(row, reading)]
    column = batch.column(reading.records.fields[0])
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    return [
        {reading.records.fields[0]: None} if text is None else text
        for text in column.cast(pa.large_binary()).to_pylist()
    ]


def _require_strings(schema: pa.Schema, text_field: str, where: str) -> None:
    kind = schema.field(text_field).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise BadContentError(
            f"{where}: column {text_field!r} holds {kind}, expected strings.", reason="field"
        )


def _lines(
    stored: StoredFile, file: FoundFile, reading: Reading
) -> Iterator[tuple[int, list[bytes] | BadContentError]]:
    """Yields the number of each line and a list of it, or what is wrong with one, passed over.

    Whoever takes a line out of its list has it alone: a gigabyte is not kept here as well.
    """
    stream, limit = stored.content(), reading.max_document_bytes
    number = 0
    while (held := [stream.readline(limit + 1)])[0]:
        number += 1
        if len(held[0]) <= limit:
            yield number, held
            continue
        line = held.pop()
        try:
            reading.bounded(line, f"{file.shown}:{number}")
        except BadContentError as error:
            yield number, error
        while not line.endswith(b"\n") and (line := stream.readline(_PIECE_BYTES)):
            pass


def _own_id(record: Mapping[str, Any], field: str, where: str) -> str:
    own = record[field]
    if not isinstance(own, str | int) or isinstance(own, bool) or not str(own).strip():
        raise BadContentError(
            f"{where}: field {field!r} is {own!r}, expected a text or a number that is the "
            f"document's id.",
            reason="field",
        )
    text = str(own)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadContentError(
            f"{where}: field {field!r} holds half a surrogate pair ({text[error.start]!a}), which "
            f"UTF-8 cannot store.",
            reason="field",
        ) from error
    return text


def _decode_python(data: bytes, where: str) -> bytes:
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
        return data.decode(encoding).encode()
    except (SyntaxError, UnicodeError, LookupError) as error:
        raise UndecodableError(f"{where}: {error}") from error


def _utf8(data: bytes, where: str) -> bytes:
    _decoded(data, where)
    return data


def _decoded(data: bytes, where: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise UndecodableError(
            f"{where}: not UTF-8 at byte {error.start} (0x{data[error.start]:02x}); "
            f"convert the file or take it out of `source.paths`."
        ) from error


def _parsed(held: list[bytes], where: str) -> Any:
    """Returns the value of the JSON that a list holds, and takes it out."""
    text = _decoded(held.pop(), where)
    try:
        if not text.startswith("{"):
            return json.loads(text)
        # As `json.loads`, but for two searches and a copy that it spends on white space.
        value, end = _raw_json(text)
        return json.loads(text) if text[end:].strip(_BLANK) else value
    except (ValueError, RecursionError) as error:
        told = str(error)
        if isinstance(error, json.JSONDecodeError):  # whose line is that of the record
            line = f"line {error.lineno}, " if error.lineno > 1 else ""
            told = f"{error.msg} ({line}column {error.colno})"
        raise BadContentError(
            f"{where}: not JSON: {told}. Repair it, or leave such records out with "
            f"`source.on_error: skip`.",
            reason="not JSON",
        ) from error
