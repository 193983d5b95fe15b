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
"""

import re
from collections import deque
from collections.abc import Iterator

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


def pieces(text: bytes | memoryview, size: int = PIECE_BYTES) -> Iterator[bytes]:
    """Yields UTF-8 text in pieces of about `size` bytes, each cut after that or a little before.

    Only where no place to cut is found a piece is longer, by as much as it has to.
    """
    view = memoryview(text)
    start = 0
    while len(view) - start > size:
        length = size
        while (cut := _last_cut(view, start, start + length)) is None:
            if start + length >= len(view):
                yield bytes(view[start:])
                return
            length *= 2
        yield bytes(view[start:cut])
        start = cut
    yield bytes(view[start:])


def _last_cut(view: memoryview, start: int, stop: int) -> int | None:
    """Returns the last place between `start` and `stop` to cut at."""
    stop = _character_start(view, min(stop, len(view)))
    for first in (_character_start(view, max(stop - _TAIL_BYTES, start)), start):
        tail = str(view[first:stop], "utf-8")
        if last := deque(_CUT.finditer(tail), maxlen=1):
            return first + len(tail[: last[0].start()].encode())
    return None


def _character_start(view: memoryview, offset: int) -> int:
    """Returns the start of the character that `offset` is in."""
    while offset < len(view) and view[offset] & 0xC0 == 0x80:
        offset -= 1
    return offset
