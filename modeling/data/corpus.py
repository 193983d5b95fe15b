"""The raw corpus: a listing of source files by digest, and a snapshot of their decoded documents.

    documents.arrow   Arrow IPC file, zstd: (doc_id: string, split: string, text: large_string), in
                      the order of sources and logical paths, record batches of about 32 MiB of text
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
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from modeling import canonical
from modeling.artifacts import Built, Workspace, needing_space, write_durably
from modeling.data.filters import Duplicates
from modeling.data.formats_config import Format, TextFormat
from modeling.data.listing import Listing, Sources, file_rows, named
from modeling.data.listing import scan as scan
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
    """One decoded document."""

    doc_id: str
    split: str
    text: str


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
    kept = _kept(named(sources), listing, document_format, tally, lambda: meter.advance(1))
    with needing_space("the documents of a raw corpus", workspace.output):
        documents = _write_documents(workspace.output / DOCUMENTS_FILE, kept)
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
    for batch in record_batches(directory):
        columns = (batch.column(name).to_pylist() for name in SCHEMA.names)
        for doc_id, document_split, text in zip(*columns, strict=True):
            if _matches(document_split, split):
                yield Document(doc_id, document_split, text)


def texts(directory: Path, split: str) -> Iterator[memoryview]:
    """Yields the UTF-8 text of each document of one split, in order, uncopied."""
    for batch in record_batches(directory):
        splits = batch.column("split").to_pylist()
        for text_split, text in zip(splits, texts_of(batch), strict=True):
            if _matches(text_split, split):
                yield text


def texts_of(batch: pa.RecordBatch) -> Iterator[memoryview]:
    """Yields the UTF-8 text of each document of a record batch, in the batch's own memory."""
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


def record_batches(directory: Path, split: str | None = None) -> Iterator[pa.RecordBatch]:
    """Yields the record batches of a built corpus, one in memory at a time.

    Args:
        directory: the corpus.
        split: whose rows alone are yielded; batches without any are not even unpacked.
    """
    path = directory / DOCUMENTS_FILE
    split_alone = pa.ipc.IpcReadOptions(included_fields=[SCHEMA.get_field_index("split")])
    with (
        pa.OSFile(str(path), "rb") as opened,
        pa.ipc.open_file(opened) as reader,
        pa.ipc.open_file(opened, options=split_alone) as of_splits,
    ):
        if reader.schema != SCHEMA:
            raise ValueError(f"{path}: expected columns {SCHEMA}, found {reader.schema}.")
        for index in range(reader.num_record_batches):
            if split is None:
                yield reader.get_batch(index)
                continue
            found = of_splits.get_batch(index).column("split").to_pylist()
            if count := found.count(split):
                batch = reader.get_batch(index)
                yield batch if count == len(found) else _of_split(batch, found, split)


def _of_split(batch: pa.RecordBatch, splits: list[str], split: str) -> pa.RecordBatch:
    here = np.flatnonzero([found == split for found in splits])
    return batch.take(pa.Array.from_buffers(pa.int64(), len(here), [None, pa.py_buffer(here)]))


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
        )
        yield from reader.documents(listing.of_source(name), advance)


def _write_documents(path: Path, kept: Iterable[Kept]) -> str:
    """Writes the table of documents; returns their root."""
    root = MerkleHasher()
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with (
        pa.OSFile(str(path), "wb") as sink,
        pa.ipc.new_file(sink, SCHEMA, options=options) as writer,
    ):
        for batch in _batches(kept):
            rows = [(kept.doc_id.encode(), kept.split.encode(), kept.content) for kept in batch]
            for piece in _framed(rows):
                root.update(piece)
            writer.write_batch(_record_batch(rows))
    return root.root()


def _framed(rows: list[tuple[bytes, bytes, bytes]]) -> Iterator[bytes]:
    """Yields (id, split, text) of each row, each behind its length; small ones many at a time."""
    small: list[bytes] = []
    for row in rows:
        for text in row:
            small.append(len(text).to_bytes(8, "big"))
            if len(text) < _LARGE_TEXT_BYTES:
                small.append(text)
            else:  # joining it would copy it
                yield b"".join(small)
                yield text
                small = []
    yield b"".join(small)


def _batches(documents: Iterable[Kept]) -> Iterator[list[Kept]]:
    batch: list[Kept] = []
    num_bytes = 0
    for document in documents:
        batch.append(document)
        num_bytes += len(document.content)
        if num_bytes >= _BATCH_TEXT_BYTES or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, num_bytes = [], 0
    if batch:
        yield batch


def _record_batch(rows: list[tuple[bytes, bytes, bytes]]) -> pa.RecordBatch:
    columns = zip(*rows, strict=True)
    arrays = [_strings(list(c), field.type) for c, field in zip(columns, SCHEMA, strict=True)]
    return pa.record_batch(arrays, schema=SCHEMA)


def _strings(values: list[bytes], kind: pa.DataType) -> pa.Array:
    """Makes a column from buffers, since `pa.array` imports pandas, which takes seconds."""
    offsets = np.zeros(len(values) + 1, np.int64 if kind == pa.large_string() else np.int32)
    np.cumsum([len(value) for value in values], out=offsets[1:])
    buffers = [
        None,
        pa.py_buffer(offsets),
        pa.py_buffer(values[0] if len(values) == 1 else b"".join(values)),
    ]
    return pa.Array.from_buffers(kind, len(values), buffers)


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
