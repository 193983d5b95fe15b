"""A document as it was found in a source, and what makes one of a record."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from modeling.data.formats_config import Format
from modeling.data.long_texts import LongText, spelled
from modeling.data.records import RecordError, RecordReader, record_reader
from modeling.data.sources import BadContentError, SourceError, UndecodableError
from modeling.data.sources_config import RegexFilter, Source

NO_FIELDS: Mapping[str, Any] = {}
_Content = TypeVar("_Content", bound=bytes | LongText)


class Found(NamedTuple):
    """A document, or what is wrong with it."""

    doc_id: str
    content: bytes | LongText | BadContentError
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
    scratch: Path
    """Where texts go that are too long for memory."""

    @classmethod
    def of(cls, source: Source, name: str, document_format: Format, scratch: Path) -> "Reading":
        """Returns what is read of `source`; an only source has no name."""
        fields = (filter.field for filter in source.filters if isinstance(filter, RegexFilter))
        return cls(
            record_reader(document_format, getattr(source, "text_field", "text")),
            getattr(source, "id_field", None),
            f"{name}/" if name else "",
            tuple(dict.fromkeys(field for field in fields if field is not None)),
            source.max_document_bytes,
            scratch,
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
            return Found(doc_id, error, NO_FIELDS)
        return Found(doc_id, content, record if self.filter_fields else NO_FIELDS, where)

    def bounded(self, data: _Content, where: str) -> _Content:
        """Refuses a document that a small compressed file, or a lost line end, has blown up."""
        if len(data) > self.max_document_bytes:
            raise self.too_long(where)
        return data

    def too_long(self, where: str) -> BadContentError:
        """Returns the error for a document of too many bytes."""
        return BadContentError(
            f"{where}: a document of over {self.max_document_bytes} bytes; is `source.format` "
            f"right? If it is, raise `source.max_document_bytes`.",
            reason="too long",
        )

    def _document(self, record: Mapping[str, Any], where: str) -> bytes | LongText:
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


def require_texts(records: RecordReader, where: str) -> None:
    """Refuses files of texts where records are something else."""
    if not records.is_text:
        raise SourceError(
            f"{where}: holds a text, but `format` takes records with {list(records.fields)}; give "
            f"the source as jsonl, json, parquet or arrow, or set `format: {{type: text}}`."
        )


def utf8(data: bytes, where: str) -> bytes:
    """Returns the bytes of a text, which are UTF-8, or raises an `UndecodableError`."""
    decoded(data, where)
    return data


def decoded(data: bytes, where: str) -> str:
    """Returns the text that UTF-8 stands for, or raises an `UndecodableError`."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise undecodable(where, error.start, data[error.start]) from error


def undecodable(where: str, place: int, byte: int) -> UndecodableError:
    """Returns the error for a text whose byte at a place is not UTF-8."""
    return UndecodableError(
        f"{where}: not UTF-8 at byte {place} (0x{byte:02x}); "
        f"convert the file or take it out of `source.paths`."
    )


def _own_id(record: Mapping[str, Any], field: str, where: str) -> str:
    own = record[field]
    if isinstance(own, LongText):
        own = spelled(own)
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
