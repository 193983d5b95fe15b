"""Examples to look at: rows of a token cache, token by token, as text, Markdown or a page.

A token is shown as the text that it stands for. Of one that is part of a character only, the bytes
are shown in hex (`<E6 97>`), and the character with its last ones (`<A5 日>`); a special one by its
name, and padding not at all. Tokens that the loss mask leaves out are told apart, and so are the
documents of a row.

In plain text a bar ends each token, `[...]` holds what is not learned, and a line above each
document says which it is.
"""

import dataclasses
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Literal

import numpy as np
from tokenizers import decoders

from modeling import pages
from modeling.data.cache import TokenCache
from modeling.data.rows import PADDING_SEGMENT, Rows
from modeling.data.tokenizer import PassthroughTokenizer, Tokenizer

Kind = Literal["text", "bytes", "special", "id"]

# Characters that a reader could not see, each drawn as a sign; a line break also breaks the line.
_SIGNS = {"\n": "↵\n", "\r": "␍", "\t": "⇥\t", "\x7f": "␡"} | {
    chr(code): chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\r\t"
}
_SIGN_OF = str.maketrans(_SIGNS)
_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
"""How SentencePiece spells a byte of text that its other pieces cannot."""


@dataclasses.dataclass(frozen=True)
class ShownToken:
    """One token of an example."""

    token_id: int
    kind: Kind
    text: str
    """With signs for what could not be seen."""
    learned: bool
    """Whether it is one to be predicted."""


@dataclasses.dataclass(frozen=True)
class Document:
    """The tokens of a row that belong together."""

    number: int
    tokens: tuple[ShownToken, ...]

    @property
    def num_learned(self) -> int:
        """How many of its tokens the loss mask leaves in."""
        return sum(token.learned for token in self.tokens)

    def __str__(self) -> str:
        """Returns what stands above it."""
        learned = f", {self.num_learned} learned" if self.num_learned < len(self.tokens) else ""
        return f"document {self.number}: {len(self.tokens)} tokens{learned}"


@dataclasses.dataclass(frozen=True)
class Example:
    """One row."""

    split: str
    number: int
    num_rows: int
    documents: tuple[Document, ...]
    """In a row without segments, the whole row."""
    padding: int
    """Tokens that only fill the row up."""
    has_segments: bool

    def __str__(self) -> str:
        """Returns what stands above it."""
        tokens = sum(len(document.tokens) for document in self.documents)
        num_learned = sum(document.num_learned for document in self.documents)
        learned = f", {num_learned} learned" if num_learned < tokens else ""
        padding = f", {self.padding} of padding" if self.padding else ""
        return (
            f"{self.split}, row {self.number} of {self.num_rows:,}: {tokens} tokens{learned}"
            f"{padding}"
        )


def read_example(
    cache: TokenCache,
    tokenizer: Tokenizer | PassthroughTokenizer,
    split: str = "train",
    number: int = 0,
) -> Example:
    """Returns one row of a split, counted from 0."""
    rows = cache.rows(split, np.array([number]))
    return _example(rows, Texts(tokenizer), split, number, cache.num_rows(split))


def _example(rows: Rows, texts: "Texts", split: str, number: int, num_rows: int) -> Example:
    ids = rows.tokens[0].tolist()
    segments = [1] * len(ids) if rows.segment_ids is None else rows.segment_ids[0].tolist()
    learned = [True] * len(ids) if rows.loss_mask is None else rows.loss_mask[0].tolist()
    documents, padding = [], 0
    for segment, members in groupby(zip(segments, ids, learned, strict=True), lambda each: each[0]):
        found = list(members)
        if segment == PADDING_SEGMENT:
            padding = len(found)
        else:
            tokens = texts.shown((token, is_learned) for _, token, is_learned in found)
            documents.append(Document(segment, tuple(tokens)))
    return Example(split, number, num_rows, tuple(documents), padding, rows.segment_ids is not None)


class Texts:
    """What ids stand for."""

    def __init__(self, tokenizer: Tokenizer | PassthroughTokenizer) -> None:
        """Takes the ids of `tokenizer`."""
        self._backend = tokenizer.backend if isinstance(tokenizer, Tokenizer) else None
        self._special = (
            {number: name for name, number in tokenizer.special_tokens.items()}
            if isinstance(tokenizer, Tokenizer)
            else {}
        )
        self._is_byte_level = self._backend is not None and isinstance(
            self._backend.decoder, decoders.ByteLevel
        )
        self._has_byte_pieces = (
            self._backend is not None
            and not self._is_byte_level
            and bool(json.loads(self._backend.to_str())["model"].get("byte_fallback"))
        )
        self._added = {} if self._backend is None else self._backend.get_added_tokens_decoder()

    def shown(self, tokens: Iterable[tuple[int, bool]]) -> Iterator[ShownToken]:
        """Yields consecutive ids, and whether each is learned, as a reader can see them."""
        begun = b""  # of a character that the tokens before have not ended
        for token_id, is_learned in tokens:
            kind, text = self._kind_and_text(token_id)
            if isinstance(text, bytes):
                kind, text, begun = _spelled_bytes(text, begun)
            else:
                begun = b""
            yield ShownToken(token_id, kind, text.translate(_SIGN_OF), is_learned)

    def _kind_and_text(self, token_id: int) -> tuple[Kind, str | bytes]:
        """Returns the text of an id, or the bytes where it need not be a whole one."""
        if token_id in self._special:
            return "special", self._special[token_id]
        piece = None if self._backend is None else self._backend.id_to_token(token_id)
        if piece is None:
            return "id", f"<{token_id}>"
        if token_id in self._added:
            return "text", piece
        if self._is_byte_level:
            return "bytes", bytes(_BYTE_OF[character] for character in piece)
        if self._has_byte_pieces and (found := _BYTE_PIECE.fullmatch(piece)):
            return "bytes", bytes.fromhex(found[1])
        return "text", piece.replace("▁", " ")


def _spelled_bytes(raw: bytes, begun: bytes) -> tuple[Kind, str, bytes]:
    """Returns the bytes of a token for people, and what it leaves of a character begun.

    Bytes of a part of a character are shown in hex, and with its last ones the character.
    """
    num_rest = next((n for n, byte in enumerate(raw) if byte & 0xC0 != 0x80), len(raw))
    rest, raw = raw[:num_rest], raw[num_rest:]
    character = _decoded(begun + rest)
    text = f"<{rest.hex(' ').upper()}{f' {character}' if character else ''}>" if rest else ""
    if rest and not raw:
        return "bytes", text, b"" if character else begun + rest
    whole = next(
        (raw[:end] for end in range(len(raw), -1, -1) if _decoded(raw[:end]) is not None), b""
    )
    left = raw[len(whole) :]
    text += whole.decode() + (f"<{left.hex(' ').upper()}>" if left else "")
    return "bytes" if rest or left else "text", text, left


def _decoded(data: bytes) -> str | None:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None


def _byte_alphabet() -> dict[str, int]:
    """Returns the byte that each character of a byte-level token stands for.

    Printable bytes stand for themselves, the others for characters from U+0100 on, in order (as
    GPT-2 has it; Radford et al. 2019, section 2.2).
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + place): byte for place, byte in enumerate(others)
    }


_BYTE_OF = _byte_alphabet()


def to_text(example: Example, *, ids: bool = False) -> str:
    """Returns an example as plain text, readable without colours."""
    return f"{example}\n" + "\n".join(_lines(example, ids))


def _lines(example: Example, ids: bool) -> Iterator[str]:
    for document in example.documents:
        if example.has_segments:
            yield f"-- {document} --"
        parts = []
        for learned, run in groupby(document.tokens, lambda token: token.learned):
            text = "".join(f"{_spelled(token, ids)}|" for token in run)
            parts.append(text if learned else f"[{text}]")
        yield "".join(parts)


def _spelled(token: ShownToken, ids: bool) -> str:
    return f"{token.token_id}:{token.text}" if ids else token.text


def to_markdown(example: Example, *, most: int = 2000) -> str:
    """Returns the beginning of an example as a block of plain text."""
    text = to_text(example)
    shown = text if len(text) <= most else f"{text[:most]}..."
    longest = max((len(list(run)) for tick, run in groupby(shown) if tick == "`"), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}\n{shown}\n{fence}"


def to_html(title: str, examples: Sequence[Example], *, ids: bool = False) -> str:
    """Returns examples as one page that loads nothing from elsewhere; all text is escaped."""
    template = pages.templates("modeling.data").get_template("examples.html")
    return template.render(title=title, examples=examples, ids=ids)
