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
import lzma
import tokenize
import zlib
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

import pyarrow as pa

from modeling.artifacts import DiskFullError
from modeling.data import text_files
from modeling.data.flat_ids import flat_documents
from modeling.data.formats_config import Format, IdsFormat
from modeling.data.found import NO_FIELDS, Documents, Found, Reading, require_texts, utf8
from modeling.data.records import RecordError, ids_text
from modeling.data.sources import (
    BadContentError,
    FoundFile,
    SourceError,
    StoredFile,
    UndecodableError,
    require_moderate,
)
from modeling.data.sources_config import FilesSource, PackageSource, PyStdlibSource, Source
from modeling.data.tables import bounded, checked, inflated_bytes, parquet_batches

_PIECE_BYTES = 1024 * 1024
_DAMAGE = (OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException)


def read_documents(
    source: Source, file: FoundFile, stored: StoredFile, reading: Reading, document_format: Format
) -> Documents:
    """Yields the documents of one file.

    Raises:
        UndecodableError: the bytes are not text in the encoding they should have.
        BadContentError: the file is damaged or holds no documents of its format.
        SourceError: it cannot be read, or is not what the configuration says.
        DiskFullError: there is no space for a long text.
    """
    kind = source.format if isinstance(source, FilesSource) else "Python"
    try:
        match source:
            case PyStdlibSource() | PackageSource():
                require_texts(reading.records, file.shown)
                content = _decode_python(stored.content().read(), file.shown)
                yield Found(file.document_path, content, NO_FIELDS)
            case FilesSource(format="ids"):
                yield from _flat_ids(file, stored, reading, document_format)
            case FilesSource():
                yield from _READERS[source.format](file, stored, reading)
    except DiskFullError:
        raise
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
                yield Found(doc_id, UndecodableError(told), NO_FIELDS)
                continue
            if not isinstance(record, bytes):
                yield reading.found(doc_id, record, where)
                continue
            try:
                yield Found(doc_id, utf8(reading.bounded(record, where), where), NO_FIELDS)
            except BadContentError as error:
                yield Found(doc_id, error, NO_FIELDS)


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
                yield Found(doc_id, ids_text(ids).encode(), NO_FIELDS)
            except RecordError as error:
                told = f"{file.shown}, document {number}: {error}; repair it."
                yield Found(doc_id, BadContentError(told, reason="field"), NO_FIELDS)
    except RecordError as error:
        raise BadContentError(f"{file.shown}: {error}.", reason="no ids") from error


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
    "text": text_files.text,
    "paragraphs": text_files.paragraphs,
    "jsonl": text_files.json_lines,
    "json": text_files.json_array,
    "parquet": _parquet,
    "arrow": _arrow,
}


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


def _decode_python(data: bytes, where: str) -> bytes:
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
        return data.decode(encoding).encode()
    except (SyntaxError, UnicodeError, LookupError) as error:
        raise UndecodableError(f"{where}: {error}") from error
