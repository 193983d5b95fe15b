"""Reads documents out of one file of a source, one at a time, by its format.

    text         the file is a document                        id: its path
    paragraphs   runs of lines that are not blank              id: path#number of the first line
    jsonl        a JSON object a line, blank lines skipped     id: path#number of the line
    json         one array of JSON objects                     id: path#number of the object
    parquet      rows, text in a column of strings             id: path#number of the row
    arrow        rows of an IPC file or stream, likewise       id: path#number of the row

    ids          a flat array of ids, cut at a separator       id: path#number of the document

Numbers count from 1. What a record holds, and how it becomes a document, is said by a format of
`modeling.data.records`. The standard library's files are decoded as the interpreter does (PEP 263).
Nothing is repaired: what is not UTF-8, not JSON, or has no text is an error that says where.
"""

import io
import itertools
import json
import lzma
import tokenize
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pyarrow as pa

from modeling.data.config import FilesSource, Format, IdsFormat, PyStdlibSource, Source
from modeling.data.flat_ids import flat_documents
from modeling.data.records import RecordError, RecordReader, record_reader
from modeling.data.sources import FoundFile, SourceError, StoredFile, UndecodableError

_MAX_DOCUMENT_BYTES = 1 << 30
_ROWS_AT_ONCE = 1024
_DAMAGE = (OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException)

Documents = Iterator[tuple[str, str]]


def read_documents(
    source: Source, file: FoundFile, stored: StoredFile, document_format: Format
) -> Documents:
    """Yields (document id, text) of one file.

    Raises:
        UndecodableError: the bytes are not text in the encoding they should have.
        SourceError: the file is damaged or holds no documents of its format, naming the line.
    """
    try:
        match source:
            case PyStdlibSource():
                _require_texts(record_reader(document_format, "text"), file.shown)
                yield file.document_path, _decode_python(stored.content().read(), file.shown)
            case FilesSource():
                if source.format == "ids":
                    yield from _flat_ids(file, stored, document_format)
                else:
                    records = record_reader(document_format, source.text_field)
                    yield from _READERS[source.format](file, stored, records)
    except _DAMAGE as error:
        raise SourceError(f"{file.shown}: damaged, or not {_kind(source)}: {error}.") from error


def _flat_ids(file: FoundFile, stored: StoredFile, document_format: Format) -> Documents:
    if not isinstance(document_format, IdsFormat):
        raise SourceError(
            f"{file.shown}: holds ids, but `format` is {document_format.type}; set `format: "
            f"{{type: ids, separator_id: N}}`, where N is the id that ends each document."
        )
    try:
        for number, text in enumerate(flat_documents(stored.content(), document_format), start=1):
            yield f"{file.document_path}#{number}", text
    except RecordError as error:
        raise SourceError(f"{file.shown}: {error}.") from error


def _text(file: FoundFile, stored: StoredFile, records: RecordReader) -> Documents:
    _require_texts(records, file.shown)
    data = _bounded(stored.content().read(_MAX_DOCUMENT_BYTES + 1), file.shown)
    yield file.document_path, _decode_utf8(data, file.shown)


def _paragraphs(file: FoundFile, stored: StoredFile, records: RecordReader) -> Documents:
    _require_texts(records, file.shown)
    numbered = enumerate(_lines(stored.content(), file.shown), start=1)
    for is_blank, run in itertools.groupby(numbered, key=lambda item: not item[1].strip()):
        if not is_blank:
            (first, line), *rest = run
            paragraph = line + b"".join(line for _, line in rest)
            text = _decode_utf8(paragraph, f"{file.shown}:{first}")
            yield f"{file.document_path}#{first}", text


def _json_lines(file: FoundFile, stored: StoredFile, records: RecordReader) -> Documents:
    for number, line in enumerate(_lines(stored.content(), file.shown), start=1):
        if line.strip():
            where = f"{file.shown}:{number}"
            text = _document_of(_parsed(line, where), records, where)
            yield f"{file.document_path}#{number}", text


def _json_array(file: FoundFile, stored: StoredFile, records: RecordReader) -> Documents:
    data = _bounded(stored.content().read(_MAX_DOCUMENT_BYTES + 1), file.shown)
    values = _parsed(data, file.shown)
    if not isinstance(values, list):
        raise SourceError(
            f"{file.shown}: holds a {type(values).__name__}, expected an array of objects; for an "
            f"object a line set `source.format: jsonl`."
        )
    for number, value in enumerate(values, start=1):
        where = f"{file.shown}, object {number}"
        yield f"{file.document_path}#{number}", _document_of(value, records, where)


def _parquet(file: FoundFile, stored: StoredFile, records: RecordReader) -> Documents:
    # Imported here: it is slow, and few sources need it. Reading jumps about in the file, so the
    # corpus digests it in a pass of its own.
    from pyarrow.parquet import ParquetFile

    with file.open() as handle, ParquetFile(handle) as opened:
        columns = _columns(opened.schema_arrow, records, file.shown)
        batches = opened.iter_batches(_ROWS_AT_ONCE, columns=columns)
        yield from _rows(file, records, columns, batches)


def _arrow(file: FoundFile, stored: StoredFile, records: RecordReader) -> Documents:
    with file.open() as handle:
        is_file = handle.read(6) == b"ARROW1"
        handle.seek(0)
        if is_file:
            with pa.ipc.open_file(handle) as opened:
                columns = _columns(opened.schema, records, file.shown)
                batches = (opened.get_batch(i) for i in range(opened.num_record_batches))
                yield from _rows(file, records, columns, batches)
        else:
            with pa.ipc.open_stream(handle) as opened:
                columns = _columns(opened.schema, records, file.shown)
                yield from _rows(file, records, columns, opened)


_READERS: dict[str, Callable[[FoundFile, StoredFile, RecordReader], Documents]] = {
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


def _columns(schema: pa.Schema, records: RecordReader, where: str) -> list[str]:
    """Returns the columns to read: all that a record must have, and those that it may."""
    for field in records.fields:
        if field not in schema.names:
            hint = "source.text_field" if records.is_text else "the field names of `format`"
            raise SourceError(f"{where}: no column {field!r} (found {schema.names}); set `{hint}`.")
    if records.is_text:
        _require_strings(schema, records.fields[0], where)
    return [*records.fields, *(name for name in records.optional_fields if name in schema.names)]


def _rows(
    file: FoundFile, records: RecordReader, columns: list[str], batches: Iterable[pa.RecordBatch]
) -> Documents:
    number = 0
    for batch in batches:
        for value in _values(batch, records, columns):
            number += 1
            where = f"{file.shown}, row {number}"
            if value is None:
                raise SourceError(f"{where}: column {columns[0]!r} is null, expected a string.")
            text = (
                _decode_utf8(_bounded(value, where), where)
                if records.is_text
                else _document_of(value, records, where)
            )
            yield f"{file.document_path}#{number}", text


def _values(batch: pa.RecordBatch, records: RecordReader, columns: list[str]) -> list[Any]:
    """Returns the UTF-8 of each text, or each record as plain values."""
    if not records.is_text:
        return batch.select(columns).to_pylist()
    column = batch.column(columns[0])
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    return column.cast(pa.large_binary()).to_pylist()


def _require_strings(schema: pa.Schema, text_field: str, where: str) -> None:
    kind = schema.field(text_field).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise SourceError(f"{where}: column {text_field!r} holds {kind}, expected strings.")


def _lines(stream: io.BufferedIOBase, where: str) -> Iterator[bytes]:
    number = 0
    while line := stream.readline(_MAX_DOCUMENT_BYTES + 1):
        number += 1
        yield _bounded(line, f"{where}:{number}")


def _bounded(data: bytes, where: str) -> bytes:
    """Refuses a document that a small compressed file, or a lost line end, has blown up."""
    if len(data) > _MAX_DOCUMENT_BYTES:
        raise SourceError(
            f"{where}: a document of over {_MAX_DOCUMENT_BYTES} bytes; is `source.format` right?"
        )
    return data


def _decode_python(data: bytes, where: str) -> str:
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
        text = data.decode(encoding)
        text.encode()
    except (SyntaxError, UnicodeError, LookupError) as error:
        raise UndecodableError(f"{where}: {error}") from error
    return text


def _decode_utf8(data: bytes, where: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise UndecodableError(
            f"{where}: not UTF-8 at byte {error.start} (0x{data[error.start]:02x}); "
            f"convert the file or take it out of `source.paths`."
        ) from error


def _parsed(data: bytes, where: str) -> Any:
    text = _decode_utf8(data, where)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{where}: not JSON: {error}.") from error


def _document_of(value: Any, records: RecordReader, where: str) -> str:
    if not isinstance(value, dict):
        raise SourceError(
            f"{where}: no field {records.fields[0]!r}: found a {type(value).__name__}, expected an "
            f"object."
        )
    try:
        return records.document(value)
    except RecordError as error:
        hint = "`source.text_field`" if records.is_text else "`format`"
        raise SourceError(f"{where}: {error}; repair it, or correct {hint}.") from error


def _kind(source: Source) -> str:
    return source.format if isinstance(source, FilesSource) else "Python"
