"""Reads the documents of text files: whole texts, paragraphs, lines of JSON, an array of JSON.

A text, a paragraph or a line of more than `LONG_BYTES` is read piece by piece onto disk
(`modeling.data.long_records`), so that one of any length takes little memory. An array, and records
that are no texts, are held as a whole.
"""

import io
import json
from collections.abc import Iterator
from typing import Any

from modeling.data import long_records
from modeling.data.found import NO_FIELDS, Documents, Found, Reading, decoded, require_texts
from modeling.data.long_records import Gathered, RecordScan, Utf8Decoder, parsed
from modeling.data.sources import BadContentError, FoundFile, StoredFile

_PIECE_BYTES = 1024 * 1024
_BLANK = " \t\r\n"
_raw_json = json.JSONDecoder().raw_decode


def text(file: FoundFile, stored: StoredFile, reading: Reading) -> Documents:
    """Yields the one document that a file is."""
    require_texts(reading.records, file.shown)
    stream, gathered = stored.content(), Gathered(reading.scratch)
    while gathered.num_bytes <= reading.max_document_bytes and (piece := stream.read(_PIECE_BYTES)):
        gathered.add(piece)
    yield _gathered(gathered, file.document_path, file.shown, reading)


def paragraphs(file: FoundFile, stored: StoredFile, reading: Reading) -> Documents:
    """Yields runs of lines that are not blank."""
    require_texts(reading.records, file.shown)
    long_bytes, most = long_records.LONG_BYTES, reading.max_document_bytes
    gathered = Gathered(reading.scratch)
    lines: list[bytes] = []  # that follow
    first = num_bytes = 0

    def paragraph() -> Found:
        gathered.add(b"".join(lines))
        place = f"{file.document_path}#{first}"
        return _gathered(gathered, place, f"{file.shown}:{first}", reading)

    for number, line in _lines(stored, file, reading, long_bytes):
        before = num_bytes
        if isinstance(line, LongLine):
            gathered.add(b"".join(lines))
            lines = []
            num_bytes = _add_unless_blank(gathered, line)
        elif line[0].strip():
            lines.append(line[0])
            num_bytes += len(line[0])
            if num_bytes - gathered.num_bytes > long_bytes:
                gathered.add(b"".join(lines))
                lines = []
        if num_bytes == before:
            if before:
                yield paragraph()
            if before or isinstance(line, LongLine):
                gathered, lines, num_bytes = Gathered(reading.scratch), [], 0
            continue
        first = first if before else number
        if num_bytes > most:
            raise reading.too_long(f"{file.shown}:{first}")
    if num_bytes:
        yield paragraph()


def json_lines(file: FoundFile, stored: StoredFile, reading: Reading) -> Documents:
    """Yields the document of the object in each line that is not blank."""
    is_text, limit = reading.records.is_text, reading.max_document_bytes
    for number, line in _lines(
        stored, file, reading, long_records.LONG_BYTES if is_text else limit
    ):
        doc_id, where = f"{file.document_path}#{number}", f"{file.shown}:{number}"
        try:
            if isinstance(line, LongLine):
                found = _long_json_line(doc_id, line, where, reading)
            elif line[0].isspace():
                found = None
            else:
                found = reading.found(doc_id, _parsed(line, where), where)
        except BadContentError as error:
            found = Found(doc_id, error, NO_FIELDS)
        if found is not None:
            yield found


def json_array(file: FoundFile, stored: StoredFile, reading: Reading) -> Documents:
    """Yields the document of each object of an array."""
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


class LongLine:
    """A line that is read in pieces, to its end or to where it is too long."""

    def __init__(
        self, first: bytes, stream: io.BufferedIOBase, reading: Reading, where: str
    ) -> None:
        """Takes the beginning of a line of `stream`, of at most one byte more than is allowed."""
        self._last = first
        self._num_bytes = len(first)
        self._stream = stream
        self._reading = reading
        self._where = where

    def pieces(self) -> Iterator[bytes]:
        """Yields the line.

        Raises:
            BadContentError: it is longer than a document may be, as is seen when that much is read.
        """
        limit = self._reading.max_document_bytes
        for start in range(0, min(len(self._last), limit), _PIECE_BYTES):
            yield self._last[start : start + _PIECE_BYTES]
        while self._num_bytes <= limit and self._read_on(limit + 1 - self._num_bytes):
            yield self._last
        if self._num_bytes > limit:
            raise self._reading.too_long(self._where)

    def skip(self) -> None:
        """Reads what is left of the line."""
        while self._read_on(_PIECE_BYTES):
            pass

    def _read_on(self, most: int) -> bool:
        if self._last.endswith(b"\n"):
            return False
        self._last = self._stream.readline(min(most, _PIECE_BYTES))
        self._num_bytes += len(self._last)
        return bool(self._last)


def _lines(
    stored: StoredFile, file: FoundFile, reading: Reading, long_bytes: int
) -> Iterator[tuple[int, list[bytes] | LongLine]]:
    """Yields the number of each line, and a list of it or, if it is long, what reads it.

    Whoever takes a line out of its list has it alone: a gigabyte is not kept here as well.
    """
    stream, most = stored.content(), min(reading.max_document_bytes, long_bytes)
    number = 0
    while (held := [stream.readline(most + 1)])[0]:
        number += 1
        if len(held[0]) <= most:
            yield number, held
            continue
        line = LongLine(held.pop(), stream, reading, f"{file.shown}:{number}")
        yield number, line
        line.skip()


def _long_json_line(doc_id: str, line: LongLine, where: str, reading: Reading) -> Found | None:
    scan, decoder, is_blank = RecordScan(reading.scratch), Utf8Decoder(), True
    for piece in line.pieces():
        is_blank = is_blank and piece.isspace()
        scan.feed(decoder.decode(piece))
    decoder.require(where)
    scan.feed("", is_last=True)
    if is_blank:
        return None
    record = scan.record(reading.records.fields[0], reading.other_fields, where)
    return reading.found(doc_id, record, where)


def _add_unless_blank(gathered: Gathered, line: LongLine) -> int:
    """Adds a line that is not all white space; returns the bytes that there are then."""
    before, is_blank = gathered.num_bytes, True
    for piece in line.pieces():
        is_blank = is_blank and not piece.strip()
        gathered.add(piece)
    if is_blank:
        gathered.cut(before)
    return gathered.num_bytes


def _gathered(gathered: Gathered, doc_id: str, where: str, reading: Reading) -> Found:
    try:
        if gathered.num_bytes > reading.max_document_bytes:
            raise reading.too_long(where)
        return Found(doc_id, gathered.text(where), NO_FIELDS)
    except BadContentError as error:
        return Found(doc_id, error, NO_FIELDS)


def _whole(stored: StoredFile, file: FoundFile, reading: Reading) -> bytes:
    stream, pieces, num_bytes = stored.content(), [], 0
    while num_bytes <= reading.max_document_bytes and (piece := stream.read(_PIECE_BYTES)):
        pieces.append(piece)
        num_bytes += len(piece)
    return reading.bounded(b"".join(pieces), file.shown)


def _parsed(held: list[bytes], where: str) -> Any:
    """Returns the value of the JSON that a list holds, and takes it out."""
    text = decoded(held.pop(), where)
    if text.startswith("{"):
        # As `json.loads`, but for two searches and a copy that it spends on white space.
        try:
            value, end = _raw_json(text)
        except (ValueError, RecursionError):
            return parsed(text, where)  # says what is wrong
        if not text[end:].strip(_BLANK):
            return value
    return parsed(text, where)
