"""Documents to ids in bulk, bit for bit as `encode_batch_fast` of `tokenizers` gives them.

A byte-level tokenizer never looks beyond a pre-token, and text repeats its pre-tokens: 31 MB of
Python source hold 7.8 million, 95,000 of them distinct. So where the pattern is GPT-2's, Llama 3's
or o200k's, `WordEncoder` splits with NumPy (`modeling.data.pretokens`, `pretokens_cased`), numbers
the distinct ones with Arrow's `dictionary_encode`, has the library encode each once, and gathers.
Any other tokenizer goes through the library as it is, and an artifact's facts say so.
"""

import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
from jaxtyping import Int32, Int64, Integer, UInt8

from modeling.data.chat import ChatTemplate, Piece, TemplateProblem
from modeling.data.config import TokenizationConfig
from modeling.data.formats_config import ChatFormat, Format, IdsFormat, SupervisedFormat, TextFormat
from modeling.data.joint import JointEncoder
from modeling.data.long_texts import Text
from modeling.data.merging import WordMerger
from modeling.data.patterns import longest_word, pattern_of, splitter
from modeling.data.pieces import AT_SPACES, parts_at_spaces, pieces
from modeling.data.pretokens import SEPARATOR
from modeling.data.records import COMPLETION, PROMPT
from modeling.data.shards import SpilledIds, token_dtype
from modeling.data.tokenizer import PassthroughTokenizer, Tokenizer
from modeling.data.tokenizers_config import Pattern
from modeling.data.vocabularies import BYTE_SPELLING

TEXT = TextFormat()
_SEPARATOR_WORD = bytes([SEPARATOR])
_SPELL = dict(enumerate(BYTE_SPELLING))
_MAX_KNOWN_WORDS = 1 << 18
_MAX_KNOWN_IDS = 1 << 24
_MAX_TEXT_BYTES = (1 << 31) - 1
_LIBRARY_PIECE_BYTES = 1 << 18
_LIBRARY_PIECES = 16  # at once, for the library's threads


@dataclass(frozen=True)
class Encoded:
    """Consecutive documents as ids, end to end, and how many each has."""

    tokens: Integer[np.ndarray, "_"]
    lengths: Int64[np.ndarray, "_"]
    loss_mask: UInt8[np.ndarray, "_"] | None = None
    """1 for each token that is to be predicted; None where all are."""

    def split_at(self, document: int) -> tuple["Encoded", "Encoded"]:
        """Returns the documents before `document`, and the others."""
        token = int(self.lengths[:document].sum())
        mask = self.loss_mask
        return (
            Encoded(
                self.tokens[:token],
                self.lengths[:document],
                None if mask is None else mask[:token],
            ),
            Encoded(
                self.tokens[token:],
                self.lengths[document:],
                None if mask is None else mask[token:],
            ),
        )

    @staticmethod
    def join(parts: Sequence["Encoded"]) -> "Encoded":
        """Returns the documents of all parts, of which all or none have a loss mask."""
        masks = [part.loss_mask for part in parts if part.loss_mask is not None]
        assert len(masks) in (0, len(parts))
        return Encoded(
            np.concatenate([part.tokens for part in parts]),
            np.concatenate([part.lengths for part in parts]),
            np.concatenate(masks) if masks else None,
        )


@dataclass(frozen=True)
class Spilled:
    """One document as ids that are on disk."""

    tokens: SpilledIds
    lengths: Int64[np.ndarray, " one"]
    loss_mask: SpilledIds | None


@dataclass(frozen=True)
class EncodedUnit:
    """The documents of a unit as ids, but for those that were left out."""

    encoded: Encoded | Spilled
    text_bytes: int
    """Of the documents that have ids."""
    skipped: int = 0
    skipped_bytes: int = 0
    first_skipped: tuple[tuple[int, str], ...] = ()
    """The place of some of those that were left out, and what is wrong."""


class DocumentError(ValueError):
    """A document cannot be encoded; whoever knows its name puts it before the message."""

    def __init__(self, index: int, message: str) -> None:
        """Blames the document at `index` of the batch."""
        super().__init__(message)
        self.index = index


@runtime_checkable
class DocumentEncoder(Protocol):
    """Turns the documents of a corpus into what a tokenized corpus holds, bounds included.

    The result for a document never depends on those around it.
    """

    @property
    def name(self) -> str:
        """How ids are found, for an artifact's facts."""
        ...

    @property
    def has_loss_mask(self) -> bool:
        """Whether `encode` says of each token if it is to be predicted."""
        ...

    def encode(self, documents: Sequence[bytes]) -> Encoded:
        """Returns the ids of each document, with what begins and ends it.

        Raises:
            DocumentError: a document has no ids, and why.
        """
        ...


class LibraryEncoder:
    """Encodes by `encode_batch_fast`: any tokenizer, each occurrence of each word."""

    name = "library"

    def __init__(self, tokenizer: Tokenizer, dtype: np.dtype) -> None:
        """Encodes with `tokenizer` to ids of type `dtype`."""
        self._tokenizer = tokenizer
        self._dtype = dtype

    def encode_pieces(self, text: Text) -> Iterator[Integer[np.ndarray, "_"]]:
        """Yields the ids of a long text, of one stretch after another; at once if it has to be."""
        if not parts_at_spaces(self._tokenizer.backend):
            yield self.encode([bytes(text)]).tokens
            return
        cut = pieces(text, _LIBRARY_PIECE_BYTES, AT_SPACES)
        while some := list(islice(cut, _LIBRARY_PIECES)):
            yield self.encode(some).tokens

    def encode(self, texts: Sequence[bytes]) -> Encoded:
        """Returns the ids of UTF-8 texts, none added and none recognized as special."""
        ids = self._tokenizer.encode_batch([text.decode() for text in texts])
        lengths = np.fromiter(map(len, ids), np.int64, len(ids))
        tokens = np.fromiter(chain.from_iterable(ids), self._dtype, int(lengths.sum()))
        return Encoded(tokens, lengths)


class WordEncoder:
    """Encodes each distinct pre-token once and remembers it."""

    name = "distinct words"

    def __init__(self, tokenizer: Tokenizer, dtype: np.dtype) -> None:
        """Encodes with `tokenizer`, whose pattern `split_pattern` must know, to ids of `dtype`."""
        pattern = split_pattern(tokenizer)
        assert pattern is not None
        self._splitter = splitter(pattern)
        self._library = LibraryEncoder(tokenizer, dtype)
        setup, is_safe = tokenizer.texts.setup, tokenizer.texts.is_safe
        self._merger = WordMerger.of(setup["model"]) if is_safe else None
        self._texts = tokenizer.texts
        self._longest_word = longest_word(setup["pre_tokenizer"])
        self._dtype = dtype
        self._forget()

    def encode_pieces(self, text: Text) -> Iterator[Integer[np.ndarray, "_"]]:
        """Yields the ids of a long text, of one stretch after another."""
        return (self.encode([piece]).tokens for piece in pieces(text))

    def encode(self, texts: Sequence[bytes]) -> Encoded:
        """Returns the ids of UTF-8 texts, none added and none recognized as special."""
        if not texts:
            return self._library.encode(texts)
        text = np.frombuffer(_SEPARATOR_WORD.join([*texts, b""]), np.uint8)
        if len(text) > _MAX_TEXT_BYTES:  # Arrow counts with 32 bits here
            return self._library.encode(texts)
        starts = self._splitter.starts(text)
        words = _binary_array(text, starts).dictionary_encode()
        ids = self._ids_of(words.dictionary.to_pylist()).take(words.indices)
        _, offsets, _, tokens = ids.buffers()
        bounds = np.frombuffer(offsets, np.int32, len(ids) + 1)
        ends = bounds[np.flatnonzero(text[starts] == SEPARATOR)].astype(np.int64)
        return Encoded(
            np.frombuffer(tokens, self._dtype, int(bounds[-1])), np.diff(ends, prepend=0)
        )

    def _ids_of(self, words: list[bytes]) -> pa.ListArray:
        """Returns the ids of each word, a row a word; the library is asked for new ones."""
        rows = self._rows_of(words)
        (new,) = np.nonzero(rows < 0)
        if len(self._known) + len(new) > _MAX_KNOWN_WORDS or len(self._tokens) > _MAX_KNOWN_IDS:
            self._forget()
            rows = self._rows_of(words)
            (new,) = np.nonzero(rows < 0)
        if len(new):
            unknown = _taken(words, new)
            encoded = self._encode_new(unknown)
            first = len(self._known)
            self._known.update(zip(unknown, range(first, first + len(new)), strict=True))
            self._bounds = np.append(self._bounds, len(self._tokens) + np.cumsum(encoded.lengths))
            self._tokens = np.append(self._tokens, encoded.tokens)
            rows[new] = np.arange(first, first + len(new))
        return self._table().take(_array(rows))

    def _rows_of(self, words: list[bytes]) -> Int32[np.ndarray, " words"]:
        """Returns the row of each word in the table, or -1."""
        return np.fromiter(map(self._known.get, words, repeat(-1)), np.int32, len(words))

    def _encode_new(self, words: list[bytes]) -> Encoded:
        """Returns the ids of words: of most at once, of others by the model, then the library."""
        tokens, lengths = np.empty(0, self._dtype), np.zeros(len(words), np.int64)
        for encode in (self._merged, self._modelled, self._by_library):
            left = np.flatnonzero(lengths == 0)
            if not len(left):
                break
            found, counts = encode(_taken(words, left))
            is_left = lengths == 0
            lengths[left] = counts
            is_found = np.repeat(is_left, lengths)
            before, tokens = tokens, np.empty(len(is_found), self._dtype)
            tokens[is_found], tokens[~is_found] = found, before
        return Encoded(tokens, lengths)

    def _merged(self, words: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """Returns the ids of words by their merges; none of those that are better left."""
        if self._merger is None:
            return np.empty(0, self._dtype), np.zeros(len(words), np.int64)
        return self._merger.encode(words)

    def _modelled(self, words: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """Returns the ids of words by the library's model alone; none of those to be cut first."""
        tokenize = self._texts.for_texts([word.decode() for word in words]).model.tokenize
        ids = [
            [token.id for token in tokenize(word.decode("latin-1").translate(_SPELL))]
            if len(word) <= self._longest_word
            else []
            for word in words
        ]
        lengths = np.fromiter(map(len, ids), np.int64, len(ids))
        return np.fromiter(chain.from_iterable(ids), self._dtype, int(lengths.sum())), lengths

    def _by_library(self, words: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
        encoded = self._library.encode(words)
        return encoded.tokens, encoded.lengths

    def _table(self) -> pa.ListArray:
        bounds = self._bounds.astype(np.int32)
        return pa.Array.from_buffers(
            pa.list_(pa.from_numpy_dtype(self._dtype)),
            len(bounds) - 1,
            [None, pa.py_buffer(bounds)],
            children=[_array(self._tokens)],
        )

    def _forget(self) -> None:
        """Starts anew, knowing that a separator is no token: bounds the memory used."""
        self._known: dict[bytes, int] = {_SEPARATOR_WORD: 0}
        self._bounds = np.zeros(2, np.int64)
        self._tokens = np.empty(0, self._dtype)


def encoder_for(tokenizer: Tokenizer, dtype: np.dtype) -> WordEncoder | LibraryEncoder:
    """Returns the fastest encoder that gives exactly the ids of `tokenizer`."""
    kind = LibraryEncoder if split_pattern(tokenizer) is None else WordEncoder
    return kind(tokenizer, dtype)


class TextEncoder:
    """Encodes documents that are text, with the special tokens that the policy asks for."""

    def __init__(
        self, tokenizer: Tokenizer, bounds: "Bounds", *, has_loss_mask: bool = False
    ) -> None:
        """Encodes with `tokenizer`, bounding documents by `bounds`.

        Args:
            tokenizer: encodes.
            bounds: begin and end documents.
            has_loss_mask: whether to say of the text's tokens, which all are learned, that they
                are; documents beside these need it said.
        """
        self.has_loss_mask = has_loss_mask
        self._bounds = bounds
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._encoder = encoder_for(tokenizer, self._dtype)

    @property
    def name(self) -> str:
        """How ids are found, for an artifact's facts."""
        return self._encoder.name

    def encode(self, documents: Sequence[bytes]) -> Encoded:
        """Returns the ids of each UTF-8 text, with what begins and ends it."""
        return self._bounds.added(self._masked(self._encoder.encode(documents)))

    def encode_long(self, document: Text) -> Encoded:
        """Returns the ids of one UTF-8 text, using little memory beside it and them.

        It goes piece by piece where it is known that ids part there (`modeling.data.pieces`).
        """
        parts = deque(self._stretches(document))
        num_tokens = sum(len(part.tokens) for part in parts)
        tokens = np.empty(num_tokens, parts[0].tokens.dtype)
        mask = np.empty(num_tokens, np.uint8) if self.has_loss_mask else None
        filled = 0
        while parts:  # each is let go as soon as it is copied
            part = parts.popleft()
            here = slice(filled, filled + len(part.tokens))
            tokens[here] = part.tokens
            if mask is not None and part.loss_mask is not None:
                mask[here] = part.loss_mask
            filled = here.stop
        return Encoded(tokens, np.array([num_tokens]), mask)

    def spilled(self, document: Text, scratch: Path) -> Spilled:
        """Returns the ids of one UTF-8 text on disk, using as little memory as it can be cut.

        Raises:
            DiskFullError: there is no space for them.
        """
        tokens = SpilledIds(scratch, self._dtype)
        mask = SpilledIds(scratch, np.dtype(np.uint8)) if self.has_loss_mask else None
        for part in self._stretches(document):
            tokens.append(part.tokens)
            if mask is not None and part.loss_mask is not None:
                mask.append(part.loss_mask)
        return Spilled(tokens, np.array([len(tokens)]), mask)

    def _stretches(self, document: Text) -> Iterator[Encoded]:
        """Yields the ids of a text, of one stretch after another, with what begins and ends it."""
        found = (
            self._masked(Encoded(ids, np.array([len(ids)])))
            for ids in self._encoder.encode_pieces(document)
        )
        # Bounds look at the first and the last id.
        held = self._bounds.only(bos=True, eos=False).added(next(found))
        for part in found:
            yield held
            held = part
        yield self._bounds.only(bos=False, eos=True).added(held)

    def _masked(self, encoded: Encoded) -> Encoded:
        if not self.has_loss_mask:
            return encoded
        return replace(encoded, loss_mask=np.ones(len(encoded.tokens), np.uint8))


class PieceEncoder:
    """Encodes documents that are rendered as pieces of text and special tokens.

    Where a token never reaches over a pre-token, as in byte-level BPE, each piece is encoded apart,
    as the last one is when a model goes on from a prompt. With any other tokenizer, and where a
    special token swallows the spaces beside it, pieces are encoded together.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        bounds: "Bounds",
        render: Callable[[str], Sequence[Piece]],
        *,
        has_loss_mask: bool,
    ) -> None:
        """Encodes with `tokenizer` what `render` makes of a document."""
        self.has_loss_mask = has_loss_mask
        self._bounds = bounds
        self._render = render
        self._dtype = token_dtype(tokenizer.vocab_size)
        encoder = encoder_for(tokenizer, self._dtype)
        added = tokenizer.backend.get_added_tokens_decoder().values()
        swallows = any(token.lstrip or token.rstrip for token in added)
        if isinstance(encoder, WordEncoder) and not swallows:
            self._encoder = encoder
        else:
            self._encoder = JointEncoder(tokenizer)

    @property
    def name(self) -> str:
        """How ids are found, for an artifact's facts."""
        return self._encoder.name

    def encode(self, documents: Sequence[bytes]) -> Encoded:
        """Returns the ids of each document, with what begins and ends it."""
        rendered = [self._rendered(index, text) for index, text in enumerate(documents)]
        if isinstance(self._encoder, JointEncoder):
            encoded = self._encoded_together(self._encoder, rendered)
        else:
            encoded = self._encoded_apart(self._encoder, rendered)
        if not self.has_loss_mask:
            encoded = replace(encoded, loss_mask=None)
        return self._bounds.added(encoded)

    def _encoded_together(
        self, encoder: JointEncoder, rendered: Sequence[Sequence[Piece]]
    ) -> Encoded:
        joined = []
        for index, parts in enumerate(rendered):
            try:
                joined.append(encoder.join(parts))
            except TemplateProblem as error:
                raise DocumentError(index, str(error)) from error
        found = encoder.encode(joined)
        nothing = np.empty(0, self._dtype)
        return Encoded(
            np.concatenate([nothing, *(ids.astype(self._dtype) for ids, _ in found)]),
            np.fromiter((len(ids) for ids, _ in found), np.int64, len(found)),
            np.concatenate([np.empty(0, np.uint8), *(counts for _, counts in found)]),
        )

    def _encoded_apart(self, encoder: WordEncoder, rendered: Sequence[Sequence[Piece]]) -> Encoded:
        pieces = list(chain.from_iterable(rendered))
        texts = [piece.content.encode() for piece in pieces if isinstance(piece.content, str)]
        encoded = encoder.encode(texts)

        is_text = np.fromiter((isinstance(p.content, str) for p in pieces), np.bool_, len(pieces))
        lengths = np.ones(len(pieces), np.int64)
        lengths[is_text] = encoded.lengths
        special = [piece.content for piece in pieces if isinstance(piece.content, int)]
        tokens = np.empty(int(lengths.sum()), encoded.tokens.dtype)
        of_text = np.repeat(is_text, lengths)
        tokens[of_text] = encoded.tokens
        tokens[~of_text] = special
        counts = np.fromiter((piece.counts for piece in pieces), np.uint8, len(pieces))
        num_pieces = np.fromiter(map(len, rendered), np.int64, len(rendered))
        document = np.repeat(np.arange(len(rendered)), num_pieces)
        return Encoded(
            tokens,
            np.bincount(document, lengths, len(rendered)).astype(np.int64),
            np.repeat(counts, lengths),
        )

    def _rendered(self, index: int, document: bytes) -> Sequence[Piece]:
        try:
            return self._render(document.decode())
        except TemplateProblem as error:
            raise DocumentError(index, str(error)) from error


class IdsEncoder:
    """Takes the ids that documents are given as, and checks them against the vocabulary."""

    name = "passthrough"
    has_loss_mask = False

    def __init__(self, tokenizer: PassthroughTokenizer, bounds: "Bounds") -> None:
        """Admits ids of the vocabulary that `tokenizer` declares."""
        self._vocab_size = tokenizer.vocab_size
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._bounds = bounds

    def encode(self, documents: Sequence[bytes]) -> Encoded:
        """Returns the ids of each document, with what begins and ends it."""
        if not documents:  # NumPy finds no number in no text
            return Encoded(np.empty(0, self._dtype), np.empty(0, np.int64))
        ids = np.fromstring(b" ".join(documents).decode(), np.int64, sep=" ")
        lengths = np.fromiter(
            (1 + text.count(b" ") for text in documents), np.int64, len(documents)
        )
        assert len(ids) == lengths.sum()
        if (beyond := np.flatnonzero(ids >= self._vocab_size)).size:
            first = int(beyond[0])
            ends = lengths.cumsum()
            index = int(np.searchsorted(ends, first, side="right"))
            raise DocumentError(
                index,
                f"id {ids[first]}, number {first - int(ends[index] - lengths[index]) + 1} of the "
                f"document, is not below tokenizer.vocab_size {self._vocab_size}. Declare the "
                f"vocabulary that the ids were made with.",
            )
        return self._bounds.added(Encoded(ids.astype(self._dtype), lengths))


@dataclass(frozen=True)
class Bounds:
    """The ids that begin and end every document; one that does so already gets no second."""

    bos_id: int | None
    eos_id: int | None
    eos_counts: bool = True
    """Whether an appended end is to be predicted, where there is a loss mask."""

    def only(self, *, bos: bool, eos: bool) -> "Bounds":
        """Returns these bounds without those that are not wanted."""
        return replace(
            self, bos_id=self.bos_id if bos else None, eos_id=self.eos_id if eos else None
        )

    def added(self, encoded: Encoded) -> Encoded:
        """Returns the documents with their bounds."""
        if self.eos_id is not None:
            ends = encoded.lengths.cumsum()
            encoded = _inserted(encoded, ends, ends - 1, self.eos_id, counts=self.eos_counts)
        if self.bos_id is not None:
            starts = encoded.lengths.cumsum() - encoded.lengths
            encoded = _inserted(encoded, starts, starts, self.bos_id, counts=False)
        return encoded


def _inserted(
    encoded: Encoded,
    positions: Int64[np.ndarray, " documents"],
    present: Int64[np.ndarray, " documents"],
    token_id: int,
    *,
    counts: bool,
) -> Encoded:
    """Inserts an id at each document's position, unless the one at `present` is that id."""
    lacks = encoded.lengths == 0
    lacks[~lacks] = encoded.tokens[present[~lacks]] != token_id
    mask = encoded.loss_mask
    return Encoded(
        np.insert(encoded.tokens, positions[lacks], token_id),
        encoded.lengths + lacks,
        None if mask is None else np.insert(mask, positions[lacks], counts),
    )


def document_encoder(
    tokenizer: Tokenizer | PassthroughTokenizer,
    config: TokenizationConfig,
    document_format: Format = TEXT,
    *,
    has_loss_mask: bool | None = None,
) -> DocumentEncoder:
    """Returns what encodes the documents of a source.

    Args:
        tokenizer: of the dataset.
        config: the policy on special tokens.
        document_format: what the documents are.
        has_loss_mask: whether to say which tokens are learned; None: where not all are.

    Raises:
        ValueError: the format needs another tokenizer, or a chat template that there is not.
    """
    bounds = Bounds(
        _bound(tokenizer.bos_id, config.append_bos, "bos"),
        _bound(tokenizer.eos_id, config.append_eos, "eos"),
        eos_counts=not isinstance(document_format, ChatFormat),
    )
    if isinstance(tokenizer, PassthroughTokenizer):
        if not isinstance(document_format, IdsFormat):
            raise ValueError(
                f"format: {document_format.type} needs a tokenizer, but tokenizer is passthrough; "
                f"set `format: {{type: ids}}`, or another tokenizer."
            )
        return IdsEncoder(tokenizer, bounds)
    if has_loss_mask is None:
        has_loss_mask = not document_format.learns_all
    match document_format:
        case TextFormat():
            return TextEncoder(tokenizer, bounds, has_loss_mask=has_loss_mask)
        case ChatFormat():
            template = _chat_template(tokenizer, document_format)
            return PieceEncoder(tokenizer, bounds, template.render, has_loss_mask=has_loss_mask)
        case SupervisedFormat():
            separator = document_format.separator

            def render(document: str) -> list[Piece]:
                record = json.loads(document)
                prompt, completion = record[PROMPT] + separator, record[COMPLETION]
                return [Piece(prompt, False), Piece(completion, True)]

            return PieceEncoder(tokenizer, bounds, render, has_loss_mask=True)
        case IdsFormat():
            raise ValueError(
                "format: ids takes `tokenizer: {type: passthrough, vocab_size: N, eos_id: M}`, "
                "since nothing says that another tokenizer made the ids."
            )


def _bound(token_id: int | None, is_asked_for: bool, name: str) -> int | None:
    if is_asked_for and token_id is None:
        raise ValueError(
            f"tokenization.append_{name}: the tokenizer has no {name} token; set "
            f"`tokenizer.{name}_id` or `tokenizer.{name}_token`, or `append_{name}: false`."
        )
    return token_id if is_asked_for else None


def _chat_template(tokenizer: Tokenizer, chat: ChatFormat) -> ChatTemplate:
    template = chat.template if chat.template is not None else tokenizer.chat_template
    if template is None:
        raise ValueError(
            "format.template: the tokenizer has no chat template of its own; set `format.template` "
            "or `format.template_file`."
        )
    named = {f"{name}_token": token for name, token in tokenizer.named_tokens.items()}
    return ChatTemplate(
        template,
        tokenizer.special_tokens,
        named | dict(chat.variables),
        counts_all=chat.loss == "all",
    )


def split_pattern(tokenizer: Tokenizer) -> Pattern | None:
    """Returns the pattern that pre-tokens are split by, if ids depend on each of them alone."""
    setup = tokenizer.texts.setup
    model = setup["model"]
    depends_on_words_alone = (
        setup["normalizer"] is None
        and setup["truncation"] is None
        and setup["padding"] is None
        and not model.get("dropout")
        and not model.get("end_of_word_suffix")
        and tokenizer.backend.encode_special_tokens
        and all(token["special"] for token in setup["added_tokens"])
    )
    return pattern_of(setup["pre_tokenizer"] or {}) if depends_on_words_alone else None


def _binary_array(text: np.ndarray, starts: Int64[np.ndarray, " words"]) -> pa.BinaryArray:
    bounds = np.append(starts, len(text)).astype(np.int32)
    buffers = [None, pa.py_buffer(bounds), pa.py_buffer(text)]
    return pa.Array.from_buffers(pa.binary(), len(starts), buffers)


def _taken(words: list[bytes], places: Int64[np.ndarray, "_"]) -> list[bytes]:
    return words if len(places) == len(words) else [words[place] for place in places.tolist()]


def _array(values: np.ndarray) -> pa.Array:
    """Wraps values without `pa.array`, which imports pandas for seconds."""
    kind = pa.from_numpy_dtype(values.dtype)
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(values)])
