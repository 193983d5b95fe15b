"""Work units: the documents of each split, cut into pieces that are encoded and stored alone.

A unit becomes one token shard, a pure function of its documents, the tokenizer and the policy on
special tokens; its *key* digests these three. So shards do not depend on who encodes them, or when,
and a changed file costs the units that hold its documents: the others are found by their keys.

For this a change must not move the cuts far away from it. They are therefore defined by content, as
in Muthitacharoen et al. 2001 (LBFS), here between whole documents:

1. A unit that has an eighth of the limit ends with a document whose hash is below its length over
   half the limit: one cut in half a limit of text, wherever one starts to read.
2. A unit that has no room for the next document ends: before the file of that document, if the unit
   began with earlier files, or else before the document.
3. After a file of half the limit and more a new unit begins.

By 2 and 3 a large file shares its units with no other, up to a start that still had room.
"""

import hashlib
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from modeling.data.corpus import StoredDocument
from modeling.data.long_texts import LongText, Text

UNIT_BYTES = 64 * 1024 * 1024
_TAIL_BYTES = 256
_DIGESTED_AT_ONCE = 64


@dataclass(frozen=True)
class Unit:
    """Consecutive documents of one split."""

    split: str
    doc_ids: list[str]
    texts: list[Text]
    """UTF-8; a document longer than the limit stays where it is, and is alone in its unit."""

    @property
    def num_bytes(self) -> int:
        """Bytes of text."""
        return sum(map(len, self.texts))

    def key(self, policy: str) -> str:
        """Returns the digest of the documents and of how they are encoded."""
        lengths = np.fromiter(map(len, self.texts), "<u8", len(self.texts))
        hasher = hashlib.sha256(f"unit/1\0{policy}\0{len(self.texts)}\0".encode())
        hasher.update(lengths.data.cast("B"))
        for first in range(0, len(self.texts), _DIGESTED_AT_ONCE):
            some = self.texts[first : first + _DIGESTED_AT_ONCE]
            hasher.update(b"".join(text for text in some if not isinstance(text, LongText)))
            for text in some:
                if isinstance(text, LongText):  # which is alone
                    for part in text.parts():
                        hasher.update(part)
        return hasher.hexdigest()


def cut_units(documents: Iterable[StoredDocument], limit: int = UNIT_BYTES) -> Iterator[Unit]:
    """Yields the units of every split as soon as they are whole, those of a split in order.

    Args:
        documents: of the corpus; those of a file follow each other.
        limit: bytes of text in a unit, which only a document longer than that exceeds.
    """
    splits: dict[str, _Cutter] = {}
    for doc_id, split, text in documents:
        if split not in splits:
            splits[split] = _Cutter(split, limit)
        # One that fills a unit stays in place, others are copied, since they may wait.
        held = text if len(text) > limit else bytes(text)
        if units := splits[split].add(doc_id, held):
            yield from units
    for cutter in splits.values():
        yield from cutter.rest()


class _Cutter:
    """The documents of one split that no unit has yet."""

    def __init__(self, split: str, limit: int) -> None:
        self._split = split
        self._limit = limit
        self._doc_ids: list[str] = []
        self._texts: list[Text] = []
        self._num_bytes = 0
        self._file = ""
        self._file_bytes = 0
        self._first_of_file = 0
        """Index of the current file's first document; 0 if the unit began with it or within it."""

    def add(self, doc_id: str, text: Text) -> list[Unit]:
        """Takes the next document; returns the units that it completes."""
        units: list[Unit] = []
        if (file := _file_of(doc_id)) != self._file:
            if self._file_bytes >= self._limit // 2:
                units += self.rest()
            self._file, self._file_bytes, self._first_of_file = file, 0, len(self._texts)
        num_bytes = len(text)
        if self._num_bytes + num_bytes > self._limit:
            if self._first_of_file:
                units.append(self._take(self._first_of_file))
            if self._num_bytes + num_bytes > self._limit:
                units += self.rest()
        self._doc_ids.append(doc_id)
        self._texts.append(text)
        self._num_bytes += num_bytes
        self._file_bytes += num_bytes
        if self._num_bytes >= self._limit // 8 and self._ends_unit(text):
            units += self.rest()
        return units

    def rest(self) -> list[Unit]:
        """Returns what is left, if anything is, as a unit."""
        return [self._take(len(self._texts))] if self._texts else []

    def _take(self, count: int) -> Unit:
        unit = Unit(self._split, self._doc_ids[:count], self._texts[:count])
        self._doc_ids, self._texts = self._doc_ids[count:], self._texts[count:]
        self._num_bytes -= unit.num_bytes
        self._first_of_file = 0
        return unit

    def _ends_unit(self, text: Text) -> bool:
        """Whether the text's own hash makes it a last one; likelier, the longer it is."""
        if isinstance(text, LongText):  # which is longer than half of the limit
            return True
        draw = zlib.crc32(text[-_TAIL_BYTES:], len(text) & 0xFFFFFFFF)
        return draw * (self._limit // 2) < len(text) << 32


def _file_of(doc_id: str) -> str:
    """Returns the file that a document is of: ids are `path` or `path#number`."""
    path, _, number = doc_id.rpartition("#")
    return path if number.isdecimal() else doc_id
