r"""Reads texts that are too long for memory, piece by piece, onto disk: plain, or a string of JSON.

What is wrong with one is told in the words, and with the place, that it would have in memory.
Of a JSON text this holds because `json` itself reads it, shortened: `RecordScan` takes out of each
string that goes on beyond a piece what has nothing wrong in it, and puts it on disk:

    {"id": 7, "text": "It was a\ndark and st|ormy night", "n": 1}       | is where a piece ends
    {"id": 7, "text": "<0>", "n": 1}                                    <0> is a gigabyte on disk

Where a string has an error, it is left as it is from there on. So `json` finds the same first
error, whose place is counted back.
"""

import codecs
import json
import re
from bisect import bisect_right
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from modeling.data.found import undecodable, utf8
from modeling.data.long_texts import ScratchFile, SpilledText, spelled
from modeling.data.sources import BadContentError

LONG_BYTES = 32 * 1024 * 1024
"""A text of more is read onto disk."""

_WHAT = "a long document"
_HIGH = r"\\u[dD][89abAB][0-9a-fA-F]{2}"
_LOW = r"\\u[dD][c-fC-F][0-9a-fA-F]{2}"
_INSIDE = re.compile(
    # What may follow each other in a string. Half a surrogate pair is only taken together with
    # the other half, or when it is seen that this does not follow; and such an escape only where
    # more follows, since `json` finds one at the very end to be cut off.
    r'(?:[^"\\\x00-\x1f]++'
    r'|\\["\\/bfnrt]'
    r"|\\u(?![dD][89abAB])[0-9a-fA-F]{4}(?=[\s\S])"
    rf"|{_HIGH}{_LOW}(?=[\s\S])"
    rf"|{_HIGH}(?=[^\\]|\\[^u]|\\u[^dD]|\\u[dD][^c-fC-F]))*+"
)
_LONGEST_INSIDE = 13  # characters that have to be seen to know whether one fits
_KEY = re.compile(r'"[ \t\n\r]*:')
_HALF = "\ud800"
_ESCAPED_HALF = re.compile(r"\\u[dD]800")


class Utf8Decoder:
    """Decodes pieces, and remembers where they are no UTF-8."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._num_bytes = 0
        self._wrong: tuple[int, int] | None = None

    def decode(self, data: bytes, *, is_last: bool = False) -> str:
        """Returns the next characters; none any more once something is wrong."""
        if self._wrong is not None:
            return ""
        first = self._num_bytes - len(self._decoder.getstate()[0])
        self._num_bytes += len(data)
        try:
            return self._decoder.decode(data, is_last)
        except UnicodeDecodeError as error:
            self._wrong = first + error.start, error.object[error.start]
            return ""

    def require(self, where: str) -> None:
        """Raises an `UndecodableError` if all that was decoded is no UTF-8."""
        self.decode(b"", is_last=True)
        if self._wrong is not None:
            raise undecodable(where, *self._wrong)


class Gathered:
    """A text that is put together from pieces, on disk once it is long."""

    def __init__(self, scratch: Path) -> None:
        """Goes to the disk of `scratch` if it has to."""
        self._directory = scratch
        self._held: list[bytes] = []
        self._scratch: ScratchFile | None = None
        self._decoder = Utf8Decoder()
        self.num_bytes = 0

    def add(self, data: bytes) -> None:
        """Appends a piece.

        Raises:
            DiskFullError: there is no space for it.
        """
        self.num_bytes += len(data)
        self._held.append(data)
        if self._scratch is None and self.num_bytes > LONG_BYTES:
            self._scratch = ScratchFile(self._directory, _WHAT)
        if self._scratch is not None:
            for held in self._held:
                self._decoder.decode(held)
                self._scratch.append(held)
            self._held = []

    def cut(self, num_bytes: int) -> None:
        """Forgets white space at the end: all but the first bytes. None may follow."""
        if self._scratch is None:
            self._held = [b"".join(self._held)[:num_bytes]]
        else:
            self._scratch.cut(num_bytes)
        self.num_bytes = num_bytes

    def text(self, where: str) -> bytes | SpilledText:
        """Returns the text.

        Raises:
            UndecodableError: it is no UTF-8.
        """
        if self._scratch is None:
            return utf8(b"".join(self._held), where)
        self._decoder.require(where)
        return SpilledText(self._scratch, 0, self.num_bytes)


class RecordScan:
    """A JSON text that is read in pieces."""

    def __init__(self, scratch: Path) -> None:
        """Puts long strings on the disk of `scratch`."""
        self._directory = scratch
        self._scratch: ScratchFile | None = None
        self._left: list[str | SpilledText] = []
        self._places: list[int] = []
        """In the text, of the beginning of each that is left."""
        self._ahead = ""
        self._place = 0
        """Of what is ahead."""
        self._is_inside = self._has_error = False
        self._start: int | None = None
        """In the scratch file, of the string that this is inside of, if it began earlier."""
        self._half_pair = ""

    def feed(self, piece: str, *, is_last: bool = False) -> None:
        """Reads on.

        Raises:
            DiskFullError: there is no space for a long string.
        """
        if self._has_error:
            return
        text = self._ahead + piece
        left = place = 0  # what is between the two is left as it is
        while True:
            if not self._is_inside:
                quote = text.find('"', place)
                if quote < 0:
                    place = len(text)
                    break
                place = quote + 1
                self._is_inside = True
            found = _INSIDE.match(text, place)
            assert found is not None
            end = found.end()
            if text.startswith('"', end):
                if self._start is not None:
                    self._spill(text[place:end])
                    self._close_string()
                    left = end
                place = end + 1
                self._is_inside = False
                continue
            if is_last or len(text) - end >= _LONGEST_INSIDE:
                self._leave(text[left:place], self._place + left)
                self._leave(text[end:] if is_last else text[end:][:_LONGEST_INSIDE],
                            self._place + end)  # fmt: skip
                self._has_error = True
                return
            self._leave(text[left:place], self._place + left)
            if self._start is None:
                self._open_string()
            self._spill(text[place:end])
            left = place = end
            break
        self._leave(text[left:place], self._place + left)
        self._ahead = text[place:]
        self._place += place

    def record(self, text_field: str, other_fields: Collection[str], where: str) -> Any:
        """Returns the value of the JSON, in which a long text is one on disk.

        Args:
            text_field: the field of an object that may be long.
            other_fields: those that are asked for besides; they are in memory.
            where: what errors begin with.

        Raises:
            BadContentError: it is no JSON.
        """
        text, starts, marker = self._shortened()
        value = parsed(text, where, lambda place: self._place_of(place, starts))
        if not isinstance(value, dict):
            return value
        for field in {text_field, *other_fields} & value.keys():
            string = self._spilled(value[field], marker)
            is_text = string is not None and field == text_field
            value[field] = string if is_text else self._restored(value[field], marker)
        return value

    def _leave(self, text: str, place: int) -> None:
        if text:
            self._left.append(text)
            self._places.append(place)

    def _open_string(self) -> None:
        if self._scratch is None:
            self._scratch = ScratchFile(self._directory, _WHAT)
        self._start, self._half_pair = self._scratch.num_bytes, ""

    def _close_string(self) -> None:
        assert self._scratch is not None
        assert self._start is not None
        end = self._scratch.num_bytes
        self._left.append(SpilledText(self._scratch, self._start, end, half_pair=self._half_pair))
        self._places.append(self._place)  # no error is within it
        self._start = None

    def _spill(self, inside: str) -> None:
        assert self._scratch is not None
        text = json.loads(f'"{inside}"') if "\\" in inside else inside
        try:
            data = text.encode()
        except UnicodeEncodeError as error:
            self._half_pair = self._half_pair or text[error.start]
            data = text.encode("utf-8", "surrogatepass")
        self._scratch.append(data)

    def _shortened(self) -> tuple[str, list[int], str]:
        """Returns what is left, where in it each part begins, and what stands for long strings.

        They are named by a marker and their number. It has more of U+D800 than any other string.
        """
        while True:
            halves = sum(
                len(_ESCAPED_HALF.findall(part)) for part in self._left if isinstance(part, str)
            )
            marker = _HALF * (halves + 1)
            parts = [
                part if isinstance(part, str) else f"{marker}{index}"
                for index, part in enumerate(self._left)
            ]
            starts = [0]
            for part in parts:
                starts.append(starts[-1] + len(part))
            text = "".join(parts)
            keys = [
                (index, part)
                for index, part in enumerate(self._left)
                if isinstance(part, SpilledText) and _KEY.match(text, starts[index + 1])
            ]
            if not keys:
                return text, starts, marker
            for index, key in keys:
                self._left[index] = json.dumps(spelled(key))[1:-1]

    def _place_of(self, place: int, starts: list[int]) -> int:
        """Returns the place in the whole text of one in what is left of it."""
        part = min(bisect_right(starts, place), len(self._places)) - 1
        return self._places[part] + place - starts[part] if part >= 0 else place

    def _spilled(self, value: Any, marker: str) -> SpilledText | None:
        if not isinstance(value, str) or not value.startswith(marker):
            return None
        part = self._left[int(value[len(marker) :])]
        assert isinstance(part, SpilledText)
        return part

    def _restored(self, value: Any, marker: str) -> Any:
        """Returns a value with all its strings in memory."""
        match value:
            case str():
                string = self._spilled(value, marker)
                return value if string is None else spelled(string)
            case list():
                return [self._restored(inner, marker) for inner in value]
            case dict():
                return {key: self._restored(inner, marker) for key, inner in value.items()}
            case _:
                return value


def parsed(text: str, where: str, place_of: Callable[[int], int] | None = None) -> Any:
    """Returns the value of JSON.

    Args:
        text: it.
        where: what errors begin with.
        place_of: says where the character at a place was, of a text that is shortened.

    Raises:
        BadContentError: it is no JSON.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        told = str(error)
        if isinstance(error, json.JSONDecodeError):  # whose line is that of the record
            line = f"line {error.lineno}, " if error.lineno > 1 else ""
            column = error.colno
            if place_of is not None:
                line_end = text.rfind("\n", 0, error.pos)
                column = place_of(error.pos) - (place_of(line_end) if line_end >= 0 else -1)
            told = f"{error.msg} ({line}column {column})"
        raise BadContentError(
            f"{where}: not JSON: {told}. Repair it, or leave such records out with "
            f"`source.on_error: skip`.",
            reason="not JSON",
        ) from error
