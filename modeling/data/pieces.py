r"""Parts a long text where pre-tokens part anyway, so that it is encoded piece by piece.

A cut at p gives the ids of the whole if pre-tokens meet at p and those before p do not depend on
what follows. The patterns of GPT-2, Llama 3 and o200k match from left to right and look ahead with
`\s+(?!\S)` alone, which is about a space. So it is enough that p stands after a letter or digit and
that no pre-token reaches over p. None does where what follows a letter or digit is

1. white space or punctuation other than an apostrophe: letters and digits are followed in their
   pre-token by nothing but their like, or by `'s` and the other contractions;
2. a digit after a letter, or a letter after a digit: no pre-token has both.

Which characters are letters depends on the library's version of Unicode; those named here have been
since before there was a pattern. Text without such a place in it, like a gigabyte of one letter, is
a single pre-token and stays whole.

Other tokenizers are looked at part by part (`parts_at_spaces`): where letters stand on both sides
of a single U+0020, most of them begin a word with it, or with what comes after, whatever stands
further away. Those of which that is not known take a text whole.
"""

import json
import re
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import tokenizers

from modeling.data.long_texts import LongText, Text, character_start
from modeling.data.patterns import splits_at_spaces

PIECE_BYTES = 8 * 1024 * 1024
_TAIL_BYTES = 1 << 16
_LETTERS = (
    r"A-Za-z\u00e0-\u00f6\u03b1-\u03c9\u0410-\u044f\u05d0-\u05ea\u0627-\u063a\u0915-\u0928"
    r"\u0e01-\u0e2e\u3041-\u3093\u30a1-\u30f3\u4e00-\u9fa5\uac00-\ud7a3"
)
_ENDS = r"\t\n\r !\"#$%&()*+,\-./:;<=>?@\[\\\]^_`{|}~\u3001\u3002\uff01\uff0c\uff1f"
_CUT = re.compile(
    rf"(?<=[0-9{_LETTERS}])(?=[{_ENDS}])|(?<=[A-Za-z])(?=[0-9])|(?<=[0-9])(?=[A-Za-z])"
)
AT_SPACES = re.compile(rf"(?<=[{_LETTERS}])(?= [{_LETTERS}])")
_LOCAL_NORMALIZERS = {
    *("NFC", "NFD", "NFKC", "NFKD", "Nmt", "Lowercase", "StripAccents"),
    *("Precompiled", "BertNormalizer"),
}
_AT_EVERY_SPACE = {"Whitespace", "WhitespaceSplit", "BertPreTokenizer"}
_BESIDE_SPACES = {"Digits", "Punctuation"}


def pieces(text: Text, size: int = PIECE_BYTES, cut_at: re.Pattern[str] = _CUT) -> Iterator[bytes]:
    """Yields UTF-8 text in pieces of about `size` bytes, each cut after that or a little before.

    Only where no place to cut is found a piece is longer, by as much as it has to.

    Args:
        text: what to cut; one on disk is read as far as that takes.
        size: bytes of a piece.
        cut_at: matches nothing, at the places to cut.
    """
    ahead = _Ahead(text)
    while len(ahead.upto(size + 1)) > size:
        length = size
        while (cut := _last_cut(ahead.upto(length + 1), length, cut_at)) is None:
            if length >= len(ahead.view):
                yield bytes(ahead.view)
                return
            length *= 2
        yield bytes(ahead.view[:cut])
        ahead.drop(cut)
    yield bytes(ahead.view)


class _Ahead:
    """What comes next of a text, as much as is asked for."""

    def __init__(self, text: Text) -> None:
        self._parts = text.parts() if isinstance(text, LongText) else iter([text])
        self.view = memoryview(b"")

    def upto(self, num_bytes: int) -> memoryview:
        """Returns what comes next: so many bytes and more, unless the text ends before."""
        held, found = [], len(self.view)
        while found < num_bytes and (part := next(self._parts, None)) is not None:
            held.append(part)
            found += len(part)
        if held:
            # A text in memory is one part, and not copied.
            data = b"".join([self.view, *held]) if len(self.view) or len(held) > 1 else held[0]
            self.view = memoryview(data)
        return self.view

    def drop(self, num_bytes: int) -> None:
        """Goes on behind so many bytes."""
        self.view = self.view[num_bytes:]


def _last_cut(view: memoryview, stop: int, cut_at: re.Pattern[str]) -> int | None:
    """Returns the last place before `stop` to cut at, other than the beginning."""
    stop = character_start(view, min(stop, len(view)))
    for first in (character_start(view, max(stop - _TAIL_BYTES, 0)), 0):
        tail = str(view[first:stop], "utf-8")
        if last := deque(cut_at.finditer(tail), maxlen=1):
            return first + len(tail[: last[0].start()].encode())
    return None


def parts_at_spaces(backend: tokenizers.Tokenizer) -> bool:
    """Returns whether text cut where `AT_SPACES` says gives the ids of the whole, part by part.

    It takes a normalizer that leaves letters and the space between them where they are, a
    pre-tokenizer that parts there, a model that looks at words alone, and no added token that
    reaches over a space. What is not known here does not.
    """
    setup = json.loads(backend.to_str())
    found = [
        token
        for token in setup["added_tokens"]
        if not (token["special"] and backend.encode_special_tokens)
    ]
    return (
        setup["truncation"] is None
        and setup["padding"] is None
        and not setup["model"].get("dropout")
        and all(_stays_in_words(token) for token in found)
        and all(map(_leaves_cuts, _steps(setup["normalizer"], "normalizers")))
        and _separates(_steps(setup["pre_tokenizer"], "pretokenizers"))
    )


def _steps(setup: Mapping[str, Any] | None, name: str) -> list[Mapping[str, Any]]:
    """Returns the steps of a normalizer or pre-tokenizer, sequences in it flattened."""
    if setup is None:
        return []
    if setup["type"] != "Sequence":
        return [setup]
    return [step for inner in setup[name] for step in _steps(inner, name)]


def _stays_in_words(token: Mapping[str, Any]) -> bool:
    content = token["content"]
    return not (
        token["lstrip"] or token["rstrip"] or re.search(r"\s", content) or not content.isascii()
    )


def _leaves_cuts(normalizer: Mapping[str, Any]) -> bool:
    """Whether letters beside a single space stay so, and what is done does not depend on more."""
    match normalizer["type"]:
        case "Strip":
            return not normalizer["strip_left"]
        case "Replace":
            pattern = normalizer["pattern"]
            if pattern.get("Regex") == " {2,}":
                return True
            text = pattern.get("String")
            return bool(text) and re.search(rf"[\s{_LETTERS}]", text) is None
        case kind:
            return kind in _LOCAL_NORMALIZERS


def _separates(pre_tokenizers: Sequence[Mapping[str, Any]]) -> bool:
    """Whether pre-tokens end at a cut, whatever stands beyond it."""
    for place, step in enumerate(pre_tokenizers):
        kind = step["type"]
        is_metaspace = kind == "Metaspace" and step["split"]
        if is_metaspace or kind in _AT_EVERY_SPACE or splits_at_spaces(step):
            # Later steps see words, and all but this one each word alone.
            return not any(
                later["type"] == "Metaspace" and later["prepend_scheme"] == "first"
                for later in pre_tokenizers[max(place, 1) :]
            )
        if kind not in _BESIDE_SPACES:
            return False
    return False
