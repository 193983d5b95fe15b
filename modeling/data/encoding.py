"""Documents to ids in bulk, bit for bit as `encode_batch_fast` of `tokenizers` gives them.

Byte-level BPE with GPT-2's pattern never looks beyond a pre-token, and text repeats its pre-tokens:
31 MB of Python source hold 7.8 million, 95,000 of them distinct. So `WordEncoder` splits with NumPy
(`modeling.data.pretokens`), numbers the distinct ones with Arrow's `dictionary_encode`, has the
library encode each once, and gathers. Any other tokenizer goes through the library as it is.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
import tokenizers
from jaxtyping import Int64, Integer, UInt8

from modeling.data.config import TokenizationConfig
from modeling.data.pretokens import SEPARATOR, Splitter
from modeling.data.shards import token_dtype
from modeling.data.tokenizer import Tokenizer

_SEPARATOR_WORD = bytes([SEPARATOR])
_MAX_KNOWN_WORDS = 1 << 20
_MAX_KNOWN_BYTES = 1 << 26
_MAX_TEXT_BYTES = (1 << 31) - 1
_GPT2_SPLIT = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}


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

    def __init__(self, backend: tokenizers.Tokenizer, dtype: np.dtype) -> None:
        """Encodes with `backend` to ids of type `dtype`."""
        self._backend = backend
        self._dtype = dtype

    def encode(self, texts: Sequence[bytes]) -> Encoded:
        """Returns the ids of UTF-8 texts, none added and none recognized as special."""
        inputs = [text.decode() for text in texts]
        encodings = self._backend.encode_batch_fast(inputs, add_special_tokens=False)
        ids = [encoding.ids for encoding in encodings]
        lengths = np.fromiter(map(len, ids), np.int64, len(ids))
        tokens = np.fromiter(chain.from_iterable(ids), self._dtype, int(lengths.sum()))
        return Encoded(tokens, lengths)


class WordEncoder:
    """Encodes each distinct pre-token once and remembers it."""

    name = "distinct words"

    def __init__(self, backend: tokenizers.Tokenizer, dtype: np.dtype) -> None:
        """Encodes with `backend`, of which `splits_like_gpt2` must hold, to ids of type `dtype`."""
        self._splitter = Splitter(backend.pre_tokenizer.pre_tokenize_str)
        self._library = LibraryEncoder(backend, dtype)
        self._dtype = dtype
        self._forget()

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
        new = [word for word in words if word not in self._known]
        if len(self._known) + len(new) > _MAX_KNOWN_WORDS or len(self._tokens) > _MAX_KNOWN_BYTES:
            self._forget()
            new = [word for word in words if word not in self._known]
        if new:
            encoded = self._library.encode(new)
            first = len(self._known)
            self._known.update(zip(new, range(first, first + len(new)), strict=True))
            self._bounds = np.append(self._bounds, len(self._tokens) + np.cumsum(encoded.lengths))
            self._tokens = np.append(self._tokens, encoded.tokens)
        rows = np.fromiter(map(self._known.__getitem__, words), np.int32, len(words))
        return self._table().take(_array(rows))

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


def encoder_for(backend: tokenizers.Tokenizer, dtype: np.dtype) -> WordEncoder | LibraryEncoder:
    """Returns the fastest encoder that gives exactly the ids of `backend`."""
    kind = WordEncoder if splits_like_gpt2(backend) else LibraryEncoder
    return kind(backend, dtype)


class TextEncoder:
    """Encodes documents that are text, with the special tokens that the policy asks for."""

    has_loss_mask = False

    def __init__(self, tokenizer: Tokenizer, config: TokenizationConfig) -> None:
        """Encodes with `tokenizer`, bounding documents by `config`."""
        self._tokenizer = tokenizer
        self._config = config
        self._encoder = encoder_for(tokenizer.backend, token_dtype(tokenizer.vocab_size))

    @property
    def name(self) -> str:
        """How ids are found, for an artifact's facts."""
        return self._encoder.name

    def encode(self, documents: Sequence[bytes]) -> Encoded:
        """Returns the ids of each UTF-8 text, with what begins and ends it."""
        encoded = self._encoder.encode(documents)
        tokens, lengths = encoded.tokens, encoded.lengths
        if self._config.append_eos:
            tokens = np.insert(tokens, lengths.cumsum(), self._tokenizer.eos_id)
            lengths = lengths + 1
        if self._config.append_bos:
            tokens = np.insert(tokens, lengths.cumsum() - lengths, self._tokenizer.bos_id)
            lengths = lengths + 1
        return Encoded(tokens, lengths)


def document_encoder(tokenizer: Tokenizer, config: TokenizationConfig) -> DocumentEncoder:
    """Returns what encodes the documents of a dataset."""
    return TextEncoder(tokenizer, config)


def splits_like_gpt2(backend: tokenizers.Tokenizer) -> bool:
    """Whether ids depend on each pre-token of GPT-2's pattern alone, and on nothing else."""
    setup = json.loads(backend.to_str())
    model, split = setup["model"], setup["pre_tokenizer"] or {}
    return (
        setup["normalizer"] is None
        and setup["truncation"] is None
        and setup["padding"] is None
        and {key: split.get(key) for key in _GPT2_SPLIT} == _GPT2_SPLIT
        and model["type"] == "BPE"
        and not model["dropout"]
        and not model["continuing_subword_prefix"]
        and not model["end_of_word_suffix"]
        and backend.encode_special_tokens
        and all(token["special"] for token in setup["added_tokens"])
    )


def _binary_array(text: np.ndarray, starts: Int64[np.ndarray, " words"]) -> pa.BinaryArray:
    bounds = np.append(starts, len(text)).astype(np.int32)
    buffers = [None, pa.py_buffer(bounds), pa.py_buffer(text)]
    return pa.Array.from_buffers(pa.binary(), len(starts), buffers)


def _array(values: np.ndarray) -> pa.Array:
    """Wraps values without `pa.array`, which imports pandas for seconds."""
    kind = pa.from_numpy_dtype(values.dtype)
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(values)])
