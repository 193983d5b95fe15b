"""Texts of documents: held in memory, or on disk where they are too long for that.

A long text is UTF-8 that is read as often as asked for, a part at a time. `SpilledText` is one that
a source gave, in a scratch file; `modeling.data.corpus` has one for what a corpus holds. Parts end
between characters, after `PART_BYTES` or up to three bytes less: where, depends on the text alone.
"""

import os
import tempfile
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from modeling.artifacts import needing_space

PART_BYTES = 32 * 1024 * 1024


class LongText:
    """A text that is not in memory.

    No `abc.ABC`, since `isinstance` of one takes three times as long, and each short text is asked.
    """

    def __len__(self) -> int:
        """Returns the length of its UTF-8 in bytes."""
        raise NotImplementedError

    def parts(self) -> Iterator[bytes | memoryview]:
        """Yields the text as UTF-8, from its beginning, whole characters each time."""
        raise NotImplementedError

    def __bytes__(self) -> bytes:
        """Returns it in memory, however long it is."""
        data = bytearray()
        for part in self.parts():
            data += part
        return bytes(data)


Text = bytes | memoryview | LongText


def parts_of(text: Text) -> Iterator[bytes | memoryview]:
    """Yields a text part by part; one in memory as views of it."""
    if isinstance(text, LongText):
        return text.parts()
    view = memoryview(text)
    return _cut(lambda start, stop: view[start:stop], len(view))


def spelled(text: LongText) -> str:
    """Returns a long string of JSON, which may hold half a surrogate pair, in memory."""
    return bytes(text).decode("utf-8", "surrogatepass")


def character_start(data: bytes | memoryview, offset: int) -> int:
    """Returns the start of the character of UTF-8 that `offset` is in."""
    while offset < len(data) and data[offset] & 0xC0 == 0x80:
        offset -= 1
    return offset


class ScratchFile:
    """Bytes on disk that have no name: they are gone when nothing refers to them any more."""

    def __init__(self, directory: Path, what: str) -> None:
        """Makes the file on the disk of `directory`.

        Args:
            directory: where there is space.
            what: goes there, for the error if there is none.
        """
        self._directory = directory
        self._what = what
        with needing_space(what, directory):
            # Closed with this object, and not by a `with`: it lives as long as what is in it.
            self._file = tempfile.TemporaryFile(dir=directory, buffering=0)  # noqa: SIM115
        weakref.finalize(self, self._file.close)
        self.num_bytes = 0

    def append(self, data: Any) -> None:
        """Adds the bytes of a buffer at the end.

        Raises:
            DiskFullError: there is no space for them.
        """
        left = memoryview(data).cast("B")
        self.num_bytes += len(left)
        with needing_space(self._what, self._directory):
            while left:
                left = left[self._file.write(left) :]

    def cut(self, num_bytes: int) -> None:
        """Forgets all but the first bytes."""
        self._file.truncate(num_bytes)
        self._file.seek(num_bytes)
        self.num_bytes = num_bytes

    def read(self, start: int, stop: int) -> bytes:
        """Returns some of the bytes, as far as there are any."""
        pieces = []
        while start < stop and (piece := os.pread(self._file.fileno(), stop - start, start)):
            pieces.append(piece)
            start += len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)


class SpilledText(LongText):
    """A text in a scratch file."""

    def __init__(self, scratch: ScratchFile, start: int, stop: int, *, half_pair: str = "") -> None:
        """Takes the bytes from `start` to `stop`.

        Args:
            scratch: where they are.
            start: of the first.
            stop: behind the last.
            half_pair: the first half of a surrogate pair that stands alone, if one does: then this
                is no UTF-8, and can be no document.
        """
        self._scratch = scratch
        self._start = start
        self._stop = stop
        self.half_pair = half_pair

    def __len__(self) -> int:
        """Returns its bytes."""
        return self._stop - self._start

    def parts(self) -> Iterator[bytes | memoryview]:
        """Yields it from its beginning."""
        first = self._start
        return _cut(lambda a, b: self._scratch.read(first + a, first + b), len(self))


def _cut(
    read: Callable[[int, int], bytes | memoryview], num_bytes: int
) -> Iterator[bytes | memoryview]:
    """Yields what can be read from 0 to `num_bytes` in parts."""
    start = 0
    while start < num_bytes:
        data = memoryview(read(start, min(start + PART_BYTES + 1, num_bytes)))
        part = data[: character_start(data, PART_BYTES)]
        yield part
        start += len(part)
