"""The raw corpus: a listing of source files by digest, and a snapshot of their decoded documents.

    documents.arrow   Arrow IPC file, zstd: (doc_id: string, split: string, text: large_string), in
                      the order of logical paths, record batches of about 32 MiB of text
    files.json        documents and bytes per split, and the listing: logical path, size, SHA-256
                      of each file, split where it has one

A document is held out for validation when the hash of its id falls below the configured fraction,
so adding a document moves no other. The root `documents` covers (doc_id, split, UTF-8 text), each
framed by its length, whatever the files' layout; the content id covers it and each file's (logical
path, size, SHA-256).
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from modeling import canonical
from modeling.artifacts import Built, Workspace, write_durably
from modeling.data.config import (
    FilesSource,
    Format,
    PyStdlibSource,
    Source,
    TextFormat,
    ValidationConfig,
)
from modeling.data.formats import read_documents
from modeling.data.sources import (
    FoundFile,
    SourceError,
    StoredFile,
    UndecodableError,
    find_files,
)
from modeling.merkle import MerkleHasher
from modeling.progress import Meter, Report, ignore

TRAIN, VALIDATION = SPLITS = ("train", "validation")
TEXT = TextFormat()
DOCUMENTS_FILE = "documents.arrow"
FILES_FILE = "files.json"
SCHEMA = pa.schema([("doc_id", pa.string()), ("split", pa.string()), ("text", pa.large_string())])
_BATCH_TEXT_BYTES = 32 * 1024 * 1024
_BATCH_DOCUMENTS = 65536


@dataclass(frozen=True)
class SourceFile:
    """One file as it was when the source was scanned."""

    logical_path: str
    size: int
    sha256: str
    split: str | None
    """None where the file holds many documents, each in a split of its own."""
    location: str = field(compare=False)


@dataclass(frozen=True)
class Listing:
    """All files of a source, sorted by logical path, and how documents are split."""

    files: tuple[SourceFile, ...]
    validation: ValidationConfig

    @property
    def root(self) -> str:
        """Digest over (path, size, SHA-256) of every file: what the recipe of a corpus takes in."""
        return canonical.digest("listing/1", _file_rows(self.files))


@dataclass(frozen=True)
class Document:
    """One decoded document."""

    doc_id: str
    split: str
    text: str


def scan(source: Source, *, validation: ValidationConfig) -> Listing:
    """Lists and digests the files that `source` has now.

    Raises:
        SourceError: nothing matches, or a file is unreadable or empty.
    """
    files = []
    for found in find_files(source):
        with StoredFile(found) as stored:
            stored.drain()
        size, sha256 = stored.num_bytes, stored.sha256.hexdigest()
        if size == 0 and isinstance(source, FilesSource):
            raise SourceError(f"{found.shown}: empty; take it out of `source.paths`.")
        one_document = isinstance(source, PyStdlibSource) or source.format == "text"
        split = split_of(found.document_path, validation) if one_document else None
        files.append(SourceFile(found.logical_path, size, sha256, split, found.location))
    if not files:
        raise SourceError(f"{source}: has no files.")
    return Listing(tuple(files), validation)


def split_of(doc_id: str, validation: ValidationConfig) -> str:
    """Returns the split of a document, a function of its id and the fraction alone."""
    draw = int.from_bytes(hashlib.sha256(b"split/1\0" + doc_id.encode()).digest()[:8], "big")
    return VALIDATION if draw < int(validation.fraction * 2**64) else TRAIN


def build(
    source: Source,
    listing: Listing,
    workspace: Workspace,
    *,
    document_format: Format = TEXT,
    report: Report = ignore,
) -> Built:
    """Writes the documents of the listed files; empty ones are counted and left out.

    Args:
        document_format: what a record of the source is.

    Raises:
        SourceError: a file is not what was scanned, or a split would hold no document.
    """
    tally = _Tally()
    meter = Meter(report, "raw corpus", len(listing.files), "files")
    root = MerkleHasher()
    with pa.OSFile(str(workspace.output / DOCUMENTS_FILE), "wb") as sink:
        options = pa.ipc.IpcWriteOptions(compression="zstd")
        with pa.ipc.new_file(sink, SCHEMA, options=options) as writer:
            documents = _listed_documents(source, document_format, listing, tally, meter)
            for batch in _batches(documents):
                rows = [_encoded(document) for document in batch]
                for row in rows:
                    root.update(b"".join(len(part).to_bytes(8, "big") + part for part in row))
                writer.write_batch(_record_batch(rows))
    meter.finish()
    _require_splits(tally, listing.validation)
    write_durably(
        workspace.output / FILES_FILE,
        {
            "documents": {split: tally.documents[split] for split in SPLITS},
            "bytes": {split: tally.text_bytes[split] for split in SPLITS},
            "files": [_plain(file) for file in listing.files],
        },
    )
    documents = root.root()
    content_id = canonical.digest("raw_corpus/1", [_file_rows(listing.files), documents])
    leaves = {f"files/{file.logical_path}": file.sha256 for file in listing.files}
    return Built(
        content_id,
        roots={"documents": documents},
        facts=tally.facts(len(listing.files)),
        leaves=leaves | {"documents": documents},
    )


def documents(directory: Path, split: str | None = None) -> Iterator[Document]:
    """Yields the documents of a built corpus in order, of one split or of all."""
    for batch in record_batches(directory):
        columns = (batch.column(name).to_pylist() for name in SCHEMA.names)
        for doc_id, document_split, text in zip(*columns, strict=True):
            if split is None or document_split == split:
                yield Document(doc_id, document_split, text)


def texts(directory: Path, split: str) -> Iterator[bytes]:
    """Yields the UTF-8 text of each document of one split, in order."""
    for batch in record_batches(directory):
        contents = batch.column("text").cast(pa.large_binary()).to_pylist()
        for text_split, text in zip(batch.column("split").to_pylist(), contents, strict=True):
            if text_split == split:
                yield text


def num_documents(directory: Path, split: str) -> int:
    """Returns how many documents one split of a built corpus has."""
    return json.loads((directory / FILES_FILE).read_text(encoding="utf-8"))["documents"][split]


def num_bytes(directory: Path, split: str) -> int:
    """Returns how many bytes of UTF-8 one split of a built corpus has."""
    return json.loads((directory / FILES_FILE).read_text(encoding="utf-8"))["bytes"][split]


def record_batches(directory: Path) -> Iterator[pa.RecordBatch]:
    """Yields the record batches of a built corpus, one in memory at a time."""
    path = directory / DOCUMENTS_FILE
    with pa.memory_map(str(path)) as mapped, pa.ipc.open_file(mapped) as reader:
        if reader.schema != SCHEMA:
            raise ValueError(f"{path}: expected columns {SCHEMA}, found {reader.schema}.")
        for index in range(reader.num_record_batches):
            yield reader.get_batch(index)


@dataclass
class _Tally:
    documents: Counter[str] = field(default_factory=Counter)
    text_bytes: Counter[str] = field(default_factory=Counter)
    empty: int = 0
    undecodable: list[str] = field(default_factory=list)

    def facts(self, num_files: int) -> dict[str, Any]:
        return {
            "files": num_files,
            "documents": {split: self.documents[split] for split in SPLITS},
            "bytes": {split: self.text_bytes[split] for split in SPLITS},
            "skipped": {"empty": self.empty, "undecodable": self.undecodable},
        }


def _listed_documents(
    source: Source, document_format: Format, listing: Listing, tally: _Tally, meter: Meter
) -> Iterator[Document]:
    for file in listing.files:
        for doc_id, text in _unchanged_documents(source, document_format, file, tally):
            if text:
                split = split_of(doc_id, listing.validation)
                tally.documents[split] += 1
                tally.text_bytes[split] += len(text.encode())
                yield Document(doc_id, split, text)
            else:
                tally.empty += 1
        meter.advance(1)


def _unchanged_documents(
    source: Source, document_format: Format, file: SourceFile, tally: _Tally
) -> Iterator[tuple[str, str]]:
    """Yields a file's documents; what fails to decode is left out of the standard library alone."""
    found = FoundFile(file.logical_path, file.location)
    with StoredFile(found) as stored:
        try:
            yield from read_documents(source, found, stored, document_format)
        except UndecodableError:
            if not isinstance(source, PyStdlibSource):
                raise
            tally.undecodable.append(file.logical_path)
        stored.drain()
    if stored.sha256.hexdigest() != file.sha256:
        raise SourceError(
            f"{found.shown}: changed while the corpus was being built (SHA-256 "
            f"{stored.sha256.hexdigest()[:12]}, scanned as {file.sha256[:12]}). Run again."
        )


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    num_bytes = 0
    for document in documents:
        batch.append(document)
        num_bytes += len(document.text)
        if num_bytes >= _BATCH_TEXT_BYTES or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, num_bytes = [], 0
    if batch:
        yield batch


def _encoded(document: Document) -> tuple[bytes, bytes, bytes]:
    return document.doc_id.encode(), document.split.encode(), document.text.encode()


def _record_batch(rows: list[tuple[bytes, bytes, bytes]]) -> pa.RecordBatch:
    columns = zip(*rows, strict=True)
    arrays = [_strings(list(c), field.type) for c, field in zip(columns, SCHEMA, strict=True)]
    return pa.record_batch(arrays, schema=SCHEMA)


def _strings(values: list[bytes], kind: pa.DataType) -> pa.Array:
    """Makes a column from buffers, since `pa.array` imports pandas, which takes seconds."""
    offsets = np.zeros(len(values) + 1, np.int64 if kind == pa.large_string() else np.int32)
    np.cumsum([len(value) for value in values], out=offsets[1:])
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(b"".join(values))]
    return pa.Array.from_buffers(kind, len(values), buffers)


def _require_splits(tally: _Tally, validation: ValidationConfig) -> None:
    total = tally.documents.total()
    if tally.documents[TRAIN] == 0:
        raise SourceError(
            f"the source gives {total} documents and none to train on; add some, or lower "
            f"validation.fraction (now {validation.fraction})."
        )
    if validation.fraction > 0 and tally.documents[VALIDATION] == 0:
        raise SourceError(
            f"validation.fraction {validation.fraction} of {total} documents holds out none; "
            f"raise it, or set 0.0 to do without validation."
        )


def _file_rows(files: Iterable[SourceFile]) -> list[list[Any]]:
    return [[file.logical_path, file.size, file.sha256] for file in files]


def _plain(file: SourceFile) -> dict[str, Any]:
    return {key: value for key, value in asdict(file).items() if key != "location"}
