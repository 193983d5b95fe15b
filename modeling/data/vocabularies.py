r"""Learns vocabularies from a corpus, the same ones in any process with any number of threads.

The library trains BPE so, whose merges are integers with ties broken by id. Its WordPiece numbers
the pieces in the order of a randomly seeded hash map, and its Unigram adds probabilities in such an
order, in which the last bits differ from process to process. So these two are made here:

WordPiece: BPE over an alphabet of 512, the bytes that begin a word and those that go on with one
(Schuster and Nakajima 2012, with frequencies for likelihoods); a piece is found greedily.

Unigram (Kudo 2018, arXiv:1804.10959): from the most frequent substrings, expectation maximization

    p(x) = c(x) / sum c      c(x) = expected uses of x over all ways to cut the words

and each round drops the pieces without which the words' likelihood falls least, until there are as
many as asked for. Sums are taken by NumPy in the order of the sorted words.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from modeling.data.patterns import pre_tokenizer, splitter
from modeling.data.pretokens import SEPARATOR
from modeling.data.tokenizers_config import (
    BpeTokenizerConfig,
    Pattern,
    UnigramTokenizerConfig,
    WordPieceTokenizerConfig,
)

END_OF_TEXT, UNKNOWN = "<|endoftext|>", "<|unknown|>"
CONTINUES = "\u2040"
"""Begins each piece that goes on with a word; no byte is spelled so."""
_MAX_WORD_BYTES = 100
"""Longer words are cut before WordPiece sees them, which would give up on them."""
_MAX_WORDS, _MAX_VOTING_BYTES = 1 << 17, 32
_SEEDS_PER_PIECE, _KEPT_A_ROUND, _EM_STEPS = 4, 0.75, 2


class TooLittleTextError(ValueError):
    """The training split gives fewer pieces than asked for."""

    def __init__(self, vocab_size: int, found: int) -> None:
        """Says both numbers and the remedy."""
        super().__init__(
            f"tokenizer.vocab_size: {vocab_size} ids were asked for, but the training split gives "
            f"{found}. Lower vocab_size or min_frequency, or add documents."
        )


def train_bpe(config: BpeTokenizerConfig, texts: Iterator[list[str]]) -> tokenizers.Tokenizer:
    """Returns byte-level BPE."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizer(config.pattern)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        min_frequency=config.min_frequency,
        special_tokens=[END_OF_TEXT, *config.special_tokens],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer=trainer)
    if (found := backend.get_vocab_size()) != config.vocab_size:
        raise TooLittleTextError(config.vocab_size, found)
    return backend


def train_wordpiece(
    config: WordPieceTokenizerConfig, texts: Iterator[list[str]]
) -> tokenizers.Tokenizer:
    """Returns byte-level WordPiece, which knows every byte and so loses nothing."""
    special = [END_OF_TEXT, UNKNOWN, *config.special_tokens]
    begins = list(BYTE_SPELLING)
    goes_on = [chr(0x10000 + index) for index in range(256)]
    as_begun = dict(zip(goes_on, BYTE_SPELLING, strict=True))
    learner = tokenizers.Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size - len(special),
        min_frequency=config.min_frequency,
        initial_alphabet=[*begins, *goes_on],
        show_progress=False,
    )
    counts = word_counts(texts, config.pattern)

    def spelled() -> Iterator[str]:
        for word, count in counts.items():
            for start in range(0, len(word), _MAX_WORD_BYTES):
                first, *rest = word[start : start + _MAX_WORD_BYTES]
                text = begins[first] + "".join(goes_on[byte] for byte in rest) + " "
                for _ in range(0, count, 1024):
                    yield text * min(count, 1024)

    learner.train_from_iterator(spelled(), trainer=trainer)
    by_id = sorted(learner.get_vocab().items(), key=lambda item: item[1])
    pieces = []
    for piece, _ in by_id:
        text = "".join(as_begun.get(character, character) for character in piece)
        pieces.append(text if piece[0] not in as_begun else CONTINUES + text)
    vocab = {token: index for index, token in enumerate([*special, *pieces])}
    if len(vocab) != config.vocab_size:
        raise TooLittleTextError(config.vocab_size, len(vocab))
    backend = tokenizers.Tokenizer(
        models.WordPiece(
            vocab,
            unk_token=UNKNOWN,
            max_input_chars_per_word=_MAX_WORD_BYTES,
            continuing_subword_prefix=CONTINUES,
        )
    )
    backend.add_special_tokens(special)
    backend.pre_tokenizer = pre_tokenizer(config.pattern, max_word_bytes=_MAX_WORD_BYTES)
    backend.decoder = decoders.Sequence([decoders.Replace(CONTINUES, ""), decoders.ByteLevel()])
    return backend


def train_unigram(
    config: UnigramTokenizerConfig, texts: Iterator[list[str]]
) -> tokenizers.Tokenizer:
    """Returns byte-level Unigram, which knows every byte and so loses nothing."""
    special = [END_OF_TEXT, *config.special_tokens]
    num_pieces = config.vocab_size - len(special)
    counts = word_counts(texts, config.pattern)
    voting = sorted(
        (word for word in counts if len(word) <= _MAX_VOTING_BYTES),
        key=lambda word: (-counts[word], word),
    )
    words = sorted(voting[:_MAX_WORDS])
    weights = np.array([counts[word] for word in words], np.float64)
    pieces = _seeds(words, counts, num_pieces * _SEEDS_PER_PIECE, config.max_piece_bytes)
    if len(pieces) < num_pieces:
        raise TooLittleTextError(config.vocab_size, len(pieces) + len(special))
    probabilities = np.full(len(pieces), 1.0 / len(pieces))
    while True:
        lattice = _Lattice(words, pieces, config.max_piece_bytes)
        expected = _expected(lattice, probabilities, weights)
        for _ in range(_EM_STEPS - 1):
            expected = _expected(lattice, expected / expected.sum(), weights)
        probabilities = expected / expected.sum()
        if len(pieces) == num_pieces:
            break
        kept = _worth_keeping(pieces, probabilities, expected, num_pieces)
        pieces = [pieces[index] for index in kept]
        probabilities = probabilities[kept] / probabilities[kept].sum()
    # Rounded, for logarithms differ in their last bit from one C library to another.
    scored = sorted(
        (
            (_spelled(p), round(math.log(x), 9))
            for p, x in zip(pieces, probabilities.tolist(), strict=True)
        ),
        key=lambda item: (-item[1], item[0]),
    )
    backend = tokenizers.Tokenizer(models.Unigram([*((token, 0.0) for token in special), *scored]))
    backend.add_special_tokens(special)
    backend.pre_tokenizer = pre_tokenizer(config.pattern)
    backend.decoder = decoders.ByteLevel()
    return backend


def word_counts(texts: Iterable[Sequence[str]], pattern: Pattern) -> dict[bytes, int]:
    """Returns how often each pre-token occurs, in the order of their bytes."""
    find = splitter(pattern)
    counts: Counter[bytes] = Counter()
    for batch in texts:
        joined = b"".join(text.encode() + bytes([SEPARATOR]) for text in batch)
        text = np.frombuffer(joined, np.uint8)
        bounds = np.append(find.starts(text), len(text)).astype(np.int64)
        buffers = [None, pa.py_buffer(bounds), pa.py_buffer(text)]
        words = pa.Array.from_buffers(pa.large_binary(), len(bounds) - 1, buffers)
        found = words.value_counts()
        values, number = found.field("values").to_pylist(), found.field("counts").to_pylist()
        counts.update(dict(zip(values, number, strict=True)))
    del counts[bytes([SEPARATOR])]
    return dict(sorted(counts.items()))


def _seeds(
    words: Sequence[bytes], counts: dict[bytes, int], num_seeds: int, max_bytes: int
) -> list[bytes]:
    """Returns every byte, and the substrings that cover most text, in the order of their bytes."""
    found: Counter[bytes] = Counter()
    for word in words:
        count = counts[word]
        for start in range(len(word)):
            for end in range(start + 2, min(start + max_bytes, len(word)) + 1):
                found[word[start:end]] += count
    covering = sorted(
        (piece for piece, count in found.items() if count > 1),
        key=lambda piece: (-found[piece] * len(piece), piece),
    )
    return sorted([*(bytes([byte]) for byte in range(256)), *covering[: max(num_seeds - 256, 0)]])


def _expected(lattice: "_Lattice", probabilities: np.ndarray, weights: np.ndarray) -> np.ndarray:
    # A byte must stay possible, or some text could not be written.
    return np.maximum(lattice.expected_uses(probabilities, weights), 0.5)


def _worth_keeping(
    pieces: Sequence[bytes], probabilities: np.ndarray, expected: np.ndarray, num_pieces: int
) -> np.ndarray:
    """Returns the bytes, and of the others those whose loss would cost most."""
    lattice = _Lattice(pieces, pieces, max(map(len, pieces)))
    apart = lattice.best_without_itself(probabilities)
    cost = expected * (np.log(probabilities) - np.log(apart))
    is_byte = np.array([len(piece) == 1 for piece in pieces])
    room = max(num_pieces, int(len(pieces) * _KEPT_A_ROUND)) - int(is_byte.sum())
    others = np.flatnonzero(~is_byte)
    # Rounded, so that ties are ties everywhere; they go by the order of the pieces.
    best = others[np.argsort(-np.round(cost[others], 6), kind="stable")[:room]]
    return np.sort(np.concatenate([np.flatnonzero(is_byte), best]))


class _Lattice:
    """All ways to cut words into pieces: words of one length share arrays, a row a word."""

    def __init__(self, words: Sequence[bytes], pieces: Sequence[bytes], max_bytes: int) -> None:
        index_of = {piece: index for index, piece in enumerate(pieces)}
        by_length: dict[int, list[int]] = {}
        for row, word in enumerate(words):
            by_length.setdefault(len(word), []).append(row)
        self._num_pieces = len(pieces)
        self._groups = []
        for length, rows in sorted(by_length.items()):
            edges = {
                (start, end): np.array(
                    [index_of.get(words[row][start:end], -1) for row in rows], np.int32
                )
                for end in range(1, length + 1)
                for start in range(max(0, end - max_bytes), end)
            }
            self._groups.append((length, np.array(rows), edges))

    def expected_uses(self, probabilities: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Returns how often each piece is used over all cuts, by forward and backward sums."""
        padded = np.append(probabilities, 0.0)  # of the piece -1, which is none
        uses = np.zeros(self._num_pieces + 1)
        for length, rows, edges in self._groups:
            forward = np.zeros((length + 1, len(rows)))
            backward = np.zeros((length + 1, len(rows)))
            forward[0] = backward[length] = 1.0
            for (start, end), piece in edges.items():
                forward[end] += forward[start] * padded[piece]
            for (start, end), piece in reversed(edges.items()):
                backward[start] += backward[end] * padded[piece]
            scale = weights[rows] / forward[length]
            for (start, end), piece in edges.items():
                use = forward[start] * padded[piece] * backward[end] * scale
                uses += np.bincount(piece % (self._num_pieces + 1), use, self._num_pieces + 1)
        return uses[:-1]

    def best_without_itself(self, probabilities: np.ndarray) -> np.ndarray:
        """Returns the probability of the likeliest cut of each word, itself as a piece left out."""
        padded = np.append(probabilities, 0.0)
        found = np.ones(sum(len(rows) for _, rows, _ in self._groups))
        for length, rows, edges in self._groups:
            best = np.zeros((length + 1, len(rows)))
            best[0] = 1.0
            for (start, end), piece in edges.items():
                if end - start < length or length == 1:
                    best[end] = np.maximum(best[end], best[start] * padded[piece])
            found[rows] = best[length]
        return found


def _byte_spelling() -> str:
    """Returns the character that stands for each byte (Radford et al. 2019)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return "".join(chr(byte if byte in plain else next(others)) for byte in range(256))


BYTE_SPELLING = _byte_spelling()


def _spelled(piece: bytes) -> str:
    return "".join(BYTE_SPELLING[byte] for byte in piece)


def merges_of(model: Mapping[str, Any]) -> Sequence[Sequence[str]]:
    """Returns the pairs that a BPE model, as JSON, merges, by rank; some are written `"a b"`."""
    merges = model["merges"]
    are_pairs = not merges or not isinstance(merges[0], str)
    return merges if are_pairs else [merge.split(" ") for merge in merges]
