"""The raw corpus: a listing of source files by digest, and a snapshot of their decoded documents.

    documents.arrow   Arrow IPC file, zstd: (doc_id: string, split: string, text: large_string), in
                      the order of sources and logical paths, record batches of about 32 MiB of text
                      (a text of more has several rows of that or up to three bytes less, for whole
                      characters; all but its last have no doc_id: "goes on in the next row")
    files.json        documents and bytes per split, and the listing: logical path, size, SHA-256 of
                      each file, split where it has one

Documents are of the splits `train` and `validation`; where there are several sources, of
`train/<source>` and `validation/<source>`, and ids and logical paths begin with `<source>/`. By
default a document is held out for validation when the hash of its id falls below the configured
fraction, so adding a document moves no other.

The root `documents` covers (doc_id, split, UTF-8 text), each framed by its length, whatever the
files' layout; the content id covers it and each file's (logical path, size, SHA-256). Files of a
split of their own, which validation by files gives them, have it as a fourth.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from modeling import canonical
from modeling.artifacts import Built, Workspace, needing_space, write_durably
from modeling.data import long_texts
from modeling.data.filters import Duplicates
from modeling.data.formats_config import Format, TextFormat
from modeling.data.listing import Listing, Sources, file_rows, named
from modeling.data.listing import scan as scan
from modeling.data.long_texts import LongText, parts_of
from modeling.data.reading import Kept, SourceReader, Tally
from modeling.data.sources import SourceError, SourceFile
from modeling.data.sources_config import Source, Validation, ValidationConfig
from modeling.data.splits import split_name
from modeling.merkle import MerkleHasher
from modeling.progress import Meter, Report, ignore

TEXT = TextFormat()
DOCUMENTS_FILE = "documents.arrow"
FILES_FILE = "files.json"
SCHEMA = pa.schema([("doc_id", pa.string()), ("split", pa.string()), ("text", pa.large_string())])
_BATCH_TEXT_BYTES = 32 * 1024 * 1024
_BATCH_DOCUMENTS = 65536
_LARGE_TEXT_BYTES = 1024 * 1024


@dataclass(frozen=True)
class Document:
    """One decoded document, in memory."""

    doc_id: str
    split: str
    text: str


class StoredDocument(NamedTuple):
    """One document as it lies in the corpus."""

    doc_id: str
    split: str
    text: memoryview | LongText
    """UTF-8, in the memory of a record batch; on disk still, if it has several rows."""


def build(
    sources: Sources,
    listing: Listing,
    workspace: Workspace,
    *,
    document_format: Format = TEXT,
    report: Report = ignore,
) -> Built:
    """Writes the documents of the listed files; empty ones are counted and left out.

    Args:
        sources: what was listed.
        listing: its files.
        workspace: where the corpus goes.
        document_format: what a record of sources is that do not say it themselves.
        report: is told how far it is.

    Raises:
        SourceError: a file is bad or not what was scanned, or a split would hold no document.
        DiskFullError: there is no space for it.
    """
    tally = Tally()
    meter = Meter(report, "raw corpus", len(listing.files), "files")
    kept = _kept(
        named(sources),
        listing,
        document_format,
        tally,
        lambda: meter.advance(1),
        workspace.progress,
    )
    with needing_space("the documents of a raw corpus", workspace.output):
        documents = write_documents(workspace.output / DOCUMENTS_FILE, kept)
    meter.finish()
    _require_splits(named(sources), listing, tally)
    counts = {
        "documents": {split: tally.documents[split] for split in listing.splits},
        "bytes": {split: tally.text_bytes[split] for split in listing.splits},
    }
    files = [_plain(file) for file in listing.files]
    write_durably(workspace.output / FILES_FILE, counts | {"files": files})
    content_id = canonical.digest("raw_corpus/1", [file_rows(listing.files), documents])
    leaves = {f"files/{file.logical_path}": file.sha256 for file in listing.files}
    facts = {"files": len(files), "listing": listing.roots} | counts | tally.facts()
    return Built(
        content_id,
        roots={"documents": documents},
        facts=facts,
        leaves=leaves | {"documents": documents},
    )


def splits(directory: Path) -> tuple[str, ...]:
    """Returns the splits of a built corpus, which may be empty; train before validation."""
    return tuple(_counts(directory, "documents"))


def documents(directory: Path, split: str | None = None) -> Iterator[Document]:
    """Yields the documents of a built corpus in order, of some splits or of all.

    Args:
        directory: the corpus.
        split: one; `train` stands for `train/<source>` of all sources too.
    """
    for stored in stored_documents(directory):
        if _matches(stored.split, split):
            yield Document(stored.doc_id, stored.split, bytes(stored.text).decode())


def texts(directory: Path, split: str) -> Iterator[memoryview | LongText]:
    """Yields the UTF-8 text of each document of one split, in order, uncopied."""
    return (found.text for found in stored_documents(directory) if _matches(found.split, split))


def stored_documents(directory: Path, split: str | None = None) -> Iterator[StoredDocument]:
    """Yields the documents of a built corpus in order, with one record batch in memory at a time.

    Args:
        directory: the corpus.
        split: whose documents alone are yielded; batches without any are not even unpacked.
    """
    path = directory / DOCUMENTS_FILE
    first, num_bytes = None, 0  # of a document that goes on
    for index, batch, rows in _batches_of(path, split):
        doc_ids, splits = (batch.column(name).to_pylist() for name in ("doc_id", "split"))
        documents = map(StoredDocument, doc_ids, splits, _texts_of(batch))
        if first is None and batch.column("doc_id").null_count == 0:
            yield from documents
            continue
        for row, document in zip(rows, documents, strict=True):
            num_bytes += len(document.text)
            if document.doc_id is None:
                first = first or (index, row)
            else:
                if first is not None:
                    document = document._replace(text=_TextInRows(path, *first, num_bytes))
                yield document
                first, num_bytes = None, 0
    if first is not None:
        raise ValueError(f"{path}: ends within a document. Build the artifact again.")


class _TextInRows(LongText):
    """A text that lies in consecutive rows, of which the last alone has a doc_id."""

    def __init__(self, path: Path, batch: int, row: int, num_bytes: int) -> None:
        self._path = path
        self._batch = batch
        self._row = row
        self._num_bytes = num_bytes

    def __len__(self) -> int:
        return self._num_bytes

    def parts(self) -> Iterator[memoryview]:
        for index, batch, _ in _batches_of(self._path, None, start=self._batch):
            doc_ids = batch.column("doc_id").to_pylist()
            for row, (doc_id, text) in enumerate(zip(doc_ids, _texts_of(batch), strict=True)):
                if index > self._batch or row >= self._row:
                    yield text
                    if doc_id is not None:
                        return


def _texts_of(batch: pa.RecordBatch) -> Iterator[memoryview]:
    """Yields the UTF-8 text of each row of a record batch, in the batch's own memory."""
    column = batch.column("text").cast(pa.large_binary())
    _, offsets, data = column.buffers()
    bounds = np.frombuffer(offsets, np.int64)[column.offset : column.offset + len(column) + 1]
    view = memoryview(data if data is not None else b"")
    return (view[start:stop] for start, stop in pairwise(bounds.tolist()))


def num_documents(directory: Path, split: str) -> int:
    """Returns how many documents one split of a built corpus has."""
    counts = _counts(directory, "documents")
    return sum(count for name, count in counts.items() if _matches(name, split))


def num_bytes(directory: Path, split: str) -> int:
    """Returns how many bytes of UTF-8 one split of a built corpus has, or all that begin so."""
    counts = _counts(directory, "bytes")
    return sum(count for name, count in counts.items() if _matches(name, split))


def text_bytes(directory: Path) -> dict[str, int]:
    """Returns how many bytes of UTF-8 each split of a built corpus has; train before validation."""
    return _counts(directory, "bytes")


def _batches_of(
    path: Path, split: str | None, *, start: int = 0
) -> Iterator[tuple[int, pa.RecordBatch, Sequence[int]]]:
    """Yields the record batches of a table of documents, one in memory at a time.

    Args:
        path: the table.
        split: whose rows alone are yielded; batches without any are not even unpacked.
        start: the first batch.

    Yields:
        The number of a batch, its rows or those of the split, and the numbers of these.
    """
    split_alone = pa.ipc.IpcReadOptions(included_fields=[SCHEMA.get_field_index("split")])
    with (
        pa.OSFile(str(path), "rb") as opened,
        pa.ipc.open_file(opened) as reader,
        pa.ipc.open_file(opened, options=split_alone) as of_splits,
    ):
        if reader.schema != SCHEMA:
            raise ValueError(f"{path}: expected columns {SCHEMA}, found {reader.schema}.")
        for index in range(start, reader.num_record_batches):
            if split is None:
                batch = reader.get_batch(index)
                yield index, batch, range(batch.num_rows)
                continue
            found = of_splits.get_batch(index).column("split").to_pylist()
            if count := found.count(split):
                batch = reader.get_batch(index)
                if count == len(found):
                    yield index, batch, range(count)
                else:
                    yield index, *_of_split(batch, found, split)


def _of_split(
    batch: pa.RecordBatch, splits: list[str], split: str
) -> tuple[pa.RecordBatch, list[int]]:
    here = np.flatnonzero([found == split for found in splits])
    rows = pa.Array.from_buffers(pa.int64(), len(here), [None, pa.py_buffer(here)])
    return batch.take(rows), here.tolist()


def _counts(directory: Path, what: str) -> dict[str, int]:
    counts = json.loads((directory / FILES_FILE).read_text(encoding="utf-8"))[what]
    return {split: counts[split] for split in sorted(counts)}


def _matches(split: str, wanted: str | None) -> bool:
    return wanted is None or split == wanted or split.startswith(f"{wanted}/")


def _kept(
    sources: Mapping[str, Source],
    listing: Listing,
    document_format: Format,
    tally: Tally,
    advance: Callable[[], None],
    scratch: Path,
) -> Iterator[Kept]:
    """Yields the documents of all sources, one source after another."""
    duplicates = Duplicates()
    for name, source in sources.items():
        reader = SourceReader(
            name,
            source,
            validation=listing.validation,
            document_format=source.record or document_format,
            duplicates=duplicates,
            tally=tally,
            scratch=scratch,
        )
        yield from reader.documents(listing.of_source(name), advance)


def write_documents(path: Path, kept: Iterable[Kept]) -> str:
    """Writes the table of documents to a file; returns their root."""
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with (
        pa.OSFile(str(path), "wb") as sink,
        pa.ipc.new_file(sink, SCHEMA, options=options) as writer,
    ):
        table = _Table(writer)
        for document in kept:
            table.add(document)
        table.flush()
    return table.root.root()


class _Table:
    """Writes documents as rows, and digests (id, split, text) of each, each behind its length."""

    def __init__(self, writer: pa.RecordBatchFileWriter) -> None:
        self.root = MerkleHasher()
        self._writer = writer
        self._undigested: list[bytes | memoryview] = []
        """Digested many at once."""
        self._rows: list[tuple[bytes | None, bytes, bytes | memoryview]] = []
        self._num_bytes = 0

    def add(self, document: Kept) -> None:
        doc_id, split, content = document.doc_id.encode(), document.split.encode(), document.content
        left = len(content)
        self._undigested += [
            len(doc_id).to_bytes(8, "big"),
            doc_id,
            len(split).to_bytes(8, "big"),
            split,
            left.to_bytes(8, "big"),
        ]
        is_short = left <= long_texts.PART_BYTES
        for part in (content,) if is_short and isinstance(content, bytes) else parts_of(content):
            left -= len(part)
            self._undigested.append(part)
            if len(part) >= _LARGE_TEXT_BYTES:
                self._digest()
            self._rows.append((doc_id if left == 0 else None, split, part))
            self._num_bytes += len(part)
            if self._num_bytes >= _BATCH_TEXT_BYTES or len(self._rows) >= _BATCH_DOCUMENTS:
                self.flush()

    def flush(self) -> None:
        """Writes a record batch of the rows that are waiting."""
        if self._rows:
            self._digest()
            columns = zip(*self._rows, strict=True)
            arrays = [_strings(c, field.type) for c, field in zip(columns, SCHEMA, strict=True)]
            self._rows, self._num_bytes = [], 0
            self._writer.write_batch(pa.record_batch(arrays, schema=SCHEMA))

    def _digest(self) -> None:
        if self._undigested:
            *small, last = self._undigested
            self.root.update(b"".join(small))  # joining a large one would copy it
            self.root.update(last)
            self._undigested = []


def _strings(values: Sequence[Any], kind: pa.DataType) -> pa.Array:
    """Makes a column from buffers, since `pa.array` imports pandas, which takes seconds."""
    validity, data = None, values
    if None in values:
        is_there = [value is not None for value in values]
        validity = pa.py_buffer(np.packbits(is_there, bitorder="little"))
        data = [value or b"" for value in values]
    offsets = np.zeros(len(data) + 1, np.int64 if kind == pa.large_string() else np.int32)
    np.cumsum([len(value) for value in data], out=offsets[1:])
    joined = pa.py_buffer(data[0] if len(data) == 1 else b"".join(data))
    return pa.Array.from_buffers(kind, len(data), [validity, pa.py_buffer(offsets), joined])


def _require_splits(sources: Mapping[str, Source], listing: Listing, tally: Tally) -> None:
    """Refuses a source that gives nothing to train on, or that to be held out where some should."""
    for name, source in sources.items():
        where = f"sources.{name}" if name else "the source"
        validation = source.validation or listing.validation
        train, held_out = (tally.documents[split_name(held, name)] for held in (False, True))
        if train == 0:
            left_out = {reason: count for reason, count in tally.skipped.items() if count}
            why = (
                f" Left out: {left_out}, the first: {tally.first_skipped[:1]}." if left_out else ""
            )
            raise SourceError(
                f"{where} gives {train + held_out} documents and none to train on; add some, or "
                f"hold out fewer ({_told(validation)}).{why}"
            )
        is_wanted = not isinstance(validation, ValidationConfig) or validation.fraction > 0
        if is_wanted and held_out == 0:
            raise SourceError(
                f"{where} holds out none of its {train} documents ({_told(validation)}); hold out "
                f"more, or set `validation: {{fraction: 0.0}}` to do without validation."
            )


def _told(validation: Validation) -> str:
    if isinstance(validation, ValidationConfig):
        return f"validation.fraction is {validation.fraction}"
    return f"validation is by {validation.type}"


def _plain(file: SourceFile) -> dict[str, Any]:
    return {name: getattr(file, name) for name in ("logical_path", "size", "sha256", "split")}
