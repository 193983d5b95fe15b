"""Which documents of a source are kept: each has to pass the source's filters, in their order.

A filter sees a document as it will be stored. What it depends on is in the configuration and the
documents alone, so the same ones are kept wherever the corpus is built. A pattern is searched for
in the whole text, which is in memory for that, however long it is.
"""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from modeling.data.found import Found
from modeling.data.long_texts import LongText, parts_of, spelled
from modeling.data.sources_config import DuplicatesFilter, Filter, LengthFilter, RegexFilter

_DIGEST_BYTES = 16  # two texts among 2**40 agree by chance once in 2**49 corpora


class Duplicates:
    """Texts that have been seen: those that a `duplicates` filter has let pass, or ids."""

    def __init__(self) -> None:
        self._seen: set[bytes] = set()

    def is_first(self, content: bytes | LongText) -> bool:
        """Whether no equal text has been asked for before."""
        digest = _digest(content)
        before = len(self._seen)
        self._seen.add(digest)
        return len(self._seen) > before


class Filters:
    """The filters of one source, which count what they turn away."""

    def __init__(self, configs: Sequence[Filter], duplicates: Duplicates) -> None:
        """Makes the filters, of which those for duplicates share what they have seen."""
        self._keeps = {
            f"{number} {config.type}": _test(config, duplicates)
            for number, config in enumerate(configs, start=1)
        }
        self.dropped = dict.fromkeys(self._keeps, 0)

    def keep(self, found: Found, content: bytes | LongText) -> bool:
        """Whether a document passes all filters; the first that it does not counts it."""
        for name, keeps in self._keeps.items():
            if not keeps(found, content):
                self.dropped[name] += 1
                return False
        return True


def _digest(content: bytes | LongText) -> bytes:
    if not isinstance(content, LongText):
        return hashlib.blake2b(content, digest_size=_DIGEST_BYTES).digest()
    hasher = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    for part in content.parts():
        hasher.update(part)
    return hasher.digest()


Test = Callable[[Found, bytes | LongText], bool]


def _test(config: Filter, duplicates: Duplicates) -> Test:
    match config:
        case LengthFilter():
            return lambda _, content: _has_length(config, content)
        case RegexFilter():
            return _regex_test(config)
        case DuplicatesFilter():
            return lambda _, content: duplicates.is_first(content)


def _has_length(config: LengthFilter, content: bytes | LongText) -> bool:
    if not _between(config.min_bytes, len(content), config.max_bytes):
        return False
    if config.min_characters is None and config.max_characters is None:
        return True
    num_characters = sum(len(str(part, "utf-8")) for part in parts_of(content))
    return _between(config.min_characters, num_characters, config.max_characters)


def _between(low: int | None, value: int, high: int | None) -> bool:
    return (low is None or low <= value) and (high is None or value <= high)


def _regex_test(config: RegexFilter) -> Test:
    search = re.compile(config.pattern).search
    field, matching = config.field, config.keep == "matching"
    if field is None:
        return lambda _, content: (search(bytes(content).decode()) is not None) == matching
    return lambda found, _: (search(_text_of(found.record[field])) is not None) == matching


def _text_of(value: Any) -> str:
    if isinstance(value, LongText):
        return spelled(value)
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
