"""From the files of a source to the documents that a corpus keeps, and the count of all others.

    empty         documents without text are left out
    undecodable   of Python sources, which include files that only tests of decoders can love
    by reason     bad records and damaged files, if `on_error: skip`; else they are errors. A file
                  that its store does not give is always one
    by filter     whatever a filter of the source turns away

A damaged file is left out as a whole, since how much of it can be read depends on the library that
reads: with `on_error: skip` each file is read through once before its documents are taken.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from modeling.data.filters import Duplicates, Filters
from modeling.data.formats import read_documents
from modeling.data.formats_config import Format
from modeling.data.found import Documents, Found, Reading
from modeling.data.hub import dataset_documents, dataset_path, dataset_splits
from modeling.data.long_texts import LongText
from modeling.data.sources import (
    BadContentError,
    FoundFile,
    SourceError,
    SourceFile,
    StoredFile,
    UndecodableError,
    require_moderate,
)
from modeling.data.sources_config import (
    HuggingFaceSource,
    PackageSource,
    PyStdlibSource,
    SavedDatasetSource,
    Source,
    Validation,
    ValidationConfig,
)
from modeling.data.splits import split_name

_SHOWN_SKIPPED = 10


class Kept(NamedTuple):
    """A document of the corpus."""

    doc_id: str
    split: str
    content: bytes | LongText
    """UTF-8; never empty."""


@dataclass
class Tally:
    """What became of the documents of all sources."""

    documents: Counter[str] = field(default_factory=Counter)
    text_bytes: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=lambda: Counter(empty=0))
    first_skipped: list[str] = field(default_factory=list)
    filtered: dict[str, int] = field(default_factory=dict)

    def keep(self, document: Kept) -> None:
        """Counts a document of the corpus."""
        self.documents[document.split] += 1
        self.text_bytes[document.split] += len(document.content)

    def skip(self, error: BadContentError) -> None:
        """Counts what was left out for what is wrong with it."""
        self.skipped[error.reason] += 1
        if len(self.first_skipped) < _SHOWN_SKIPPED:
            self.first_skipped.append(str(error))

    def facts(self) -> dict[str, Any]:
        """Returns what an artifact shows of what is not in it."""
        return {
            "skipped": dict(self.skipped),
            "first_skipped": self.first_skipped,
            "filtered": self.filtered,
        }


def is_held_out(doc_id: str, validation: ValidationConfig) -> bool:
    """Whether a document is held out, a function of its id and the fraction alone."""
    draw = int.from_bytes(hashlib.sha256(b"split/1\0" + doc_id.encode()).digest()[:8], "big")
    return draw < int(validation.fraction * 2**64)


class SourceReader:
    """Reads one source."""

    def __init__(
        self,
        name: str,
        source: Source,
        *,
        validation: Validation,
        document_format: Format,
        duplicates: Duplicates,
        tally: Tally,
        scratch: Path,
    ) -> None:
        """Reads `source`, counting in `tally`.

        Args:
            name: of the source, or empty.
            source: it.
            validation: how documents are held out, unless the source says it.
            document_format: what a record is.
            duplicates: the texts of all sources.
            tally: of all sources.
            scratch: where long texts go until they are kept or left out.
        """
        self._name = name
        self._source = source
        self._validation = source.validation or validation
        self._format = document_format
        self._reading = Reading.of(source, name, document_format, scratch)
        self._ids = Duplicates()
        self._filters = Filters(source.filters, duplicates)
        self._tally = tally
        self._num_skipped = 0

    def documents(self, files: Sequence[SourceFile], advance: Callable[[], None]) -> Iterator[Kept]:
        """Yields the documents that are kept of files that are as they were scanned.

        Raises:
            SourceError: a file has changed, or is bad, or too many are.
        """
        if isinstance(self._source, HuggingFaceSource | SavedDatasetSource):
            yield from self._of_dataset(self._source, files, advance)
        else:
            for file in files:
                yield from self._of_file(file)
                advance()
        for name, count in self._filters.dropped.items():
            self._tally.filtered[f"{self._name} {name}".strip()] = count

    def _of_file(self, file: SourceFile) -> Iterator[Kept]:
        found = FoundFile(file.logical_path, file.location)
        if file.size == 0 and not isinstance(self._source, PyStdlibSource | PackageSource):
            self._skip(BadContentError(f"{found.shown}: empty.", reason="empty file"))
            return
        if self._source.on_error == "skip" and self._is_faulty(file, found):
            # Only what was listed is left out, and not what was cut short meanwhile.
            self._require_unchanged(found, file)
            return
        with self._opened(found) as stored:
            try:
                yield from self._kept(self._read(file, found, stored), file.held_out)
            except UndecodableError as error:
                if not isinstance(self._source, PyStdlibSource | PackageSource):
                    raise
                self._tally.skip(error)
            stored.drain()
        _require_unchanged(found, file, stored)

    def _of_dataset(
        self,
        source: HuggingFaceSource | SavedDatasetSource,
        files: Sequence[SourceFile],
        advance: Callable[[], None],
    ) -> Iterator[Kept]:
        prefix = f"{self._name}/" if self._name else ""
        for split, held_out in dataset_splits(source, self._validation).items():
            path = prefix + dataset_path(source, split)
            found = dataset_documents(source, split, self._reading, path)
            yield from self._kept(found, held_out)
        for file in files:
            if file.location:
                self._require_unchanged(FoundFile(file.logical_path, file.location), file)
            advance()

    def _kept(self, found: Documents, held_out: bool | None) -> Iterator[Kept]:
        validation = self._validation
        splits = split_name(False, self._name), split_name(True, self._name)
        for document in found:
            content = document.content
            if isinstance(content, BadContentError):
                self._skip(content)
            elif not content:
                self._tally.skipped["empty"] += 1
            elif self._filters.keep(document, content) and self._is_new(document):
                if held_out is None:
                    assert isinstance(validation, ValidationConfig)
                    kept = Kept(
                        document.doc_id, splits[is_held_out(document.doc_id, validation)], content
                    )
                else:
                    kept = Kept(document.doc_id, splits[held_out], content)
                self._tally.keep(kept)
                yield kept

    def _is_new(self, document: Found) -> bool:
        """Whether no document before has the id that this one says itself, if it does."""
        if self._reading.id_field is None or self._ids.is_first(document.doc_id.encode()):
            return True
        told = (
            f"{document.where}: field {self._reading.id_field!r} is that of an earlier document, "
            f"{document.doc_id!r}; make ids unique, or leave out `source.id_field`."
        )
        self._skip(BadContentError(told, reason="duplicate id"))
        return False

    def _is_faulty(self, file: SourceFile, found: FoundFile) -> bool:
        """Whether a file is damaged, and left out for it; it is read through to see that."""
        with self._opened(found) as stored:
            try:
                for _ in self._read(file, found, stored):
                    pass
            except BadContentError as error:
                self._skip(error)
                return True
        return False

    def _skip(self, error: BadContentError) -> None:
        if self._source.on_error == "fail":
            raise error
        self._num_skipped += 1
        if self._num_skipped > self._source.max_skipped:
            raise BadContentError(
                f"{error} With this, more is bad than `source.max_skipped` "
                f"({self._source.max_skipped}) lets be left out.",
                reason=error.reason,
            ) from error
        self._tally.skip(error)

    def _opened(self, found: FoundFile) -> StoredFile:
        return StoredFile(found, max_expansion=self._source.max_expansion)

    def _require_unchanged(self, found: FoundFile, file: SourceFile) -> None:
        """Reads a file for its digest alone."""
        with self._opened(found) as stored:
            stored.drain()
        _require_unchanged(found, file, stored)

    def _read(self, file: SourceFile, found: FoundFile, stored: StoredFile) -> Documents:
        """Yields what is in a file, as long as it is not far more than the file's own bytes."""
        num_bytes = 0
        for document in read_documents(self._source, found, stored, self._reading, self._format):
            if not isinstance(document.content, BadContentError):
                num_bytes += len(document.content)
                require_moderate(found, file.size, num_bytes, self._source.max_expansion)
            yield document


def _require_unchanged(found: FoundFile, file: SourceFile, stored: StoredFile) -> None:
    sha256 = stored.sha256.hexdigest()
    if sha256 != file.sha256:
        raise SourceError(
            f"{found.shown}: changed while the corpus was being built (SHA-256 {sha256[:12]}, "
            f"scanned as {file.sha256[:12]}). Run again; with `--rehash` if it has not changed."
        )
