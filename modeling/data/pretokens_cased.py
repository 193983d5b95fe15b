r"""Splits UTF-8 text into pre-tokens as Llama 3's pattern does, and o200k's, on whole arrays.

    Llama 3   (?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}
              | ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+
    o200k     [^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+C?
              |[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*C?
              |\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+
              where C = (?i:'s|'t|'re|'ve|'m|'ll|'d)

(Meta's `llama3/tokenizer.py`; OpenAI's `tiktoken_ext/openai_public.py`.) They come down to rules on
runs of characters of a kind, of which only two need a loop, and that over rare places:

1. A *word* is a run of letters, in o200k of letters and marks. One character before it that is
   neither a letter, a digit nor a line end belongs to it, if that begins a pre-token.
2. A *cluster* is a run of all else that is no space. From its first two neighbours on (or from its
   start after a U+0020, which then belongs to it; or from a last one with no word after it) it is
   one pre-token together with the line ends behind it, and in o200k slashes among them.
3. Digits go by threes from the start of their run.
4. Spaces up to a run's last line end are one pre-token; of those after it, the last stands apart
   from the others where something follows.
5. In o200k a word ends before an upper-case letter once a lower-case one has been seen; and a word
   that would end in upper-case letters, with none lower-case, ends after its last letter without
   case.
6. Contractions are pre-tokens in Llama 3, and the end of a word in o200k.

Kinds of characters are asked of the library, as in `modeling.data.pretokens`.
"""

from itertools import pairwise
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int64, UInt8
from tokenizers import Regex, pre_tokenizers

from modeling.data.pretokens import SEPARATOR, Bytes, code_points_at, looked_up

_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
LLAMA3 = "|".join(
    [
        _CONTRACTION,
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
_CAPITAL, _SMALL = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
O200K = "|".join(
    [
        rf"[^\r\n\p{{L}}\p{{N}}]?[{_CAPITAL}]*[{_SMALL}]+{_CONTRACTION}?",
        rf"[^\r\n\p{{L}}\p{{N}}]?[{_CAPITAL}]+[{_SMALL}]*{_CONTRACTION}?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)

_UPPER, _LOWER, _UNCASED, _MARK, _DIGIT, _OTHER, _SPACE, _NEWLINE, _END, _UNKNOWN = range(10)
_BLANK, _APOSTROPHE, _SLASH = b" '/"
_LONG_S = 0x17F  # equals `s` where case is ignored

Kinds = UInt8[np.ndarray, " characters"]
Mask = Bool[np.ndarray, " characters"]
Places = Int64[np.ndarray, "_"]


class _Clusters(NamedTuple):
    """Runs `[first, end)` of marks and others, of which `[tail, end)` goes with what follows."""

    first: Places
    end: Places
    tail: Places


class CasedSplitter:
    """Finds where pre-tokens start, by the library's idea of the kinds of characters."""

    def __init__(self, pattern: str) -> None:
        """Asks the installed library.

        Args:
            pattern: `LLAMA3` or `O200K`.
        """
        assert pattern in (LLAMA3, O200K)
        self._is_o200k = pattern == O200K
        self._pre_tokenize = pre_tokenizers.Split(Regex(pattern), "isolated").pre_tokenize_str
        self._kind_of = np.full(0x110000, _UNKNOWN, np.uint8)
        self._learn(np.arange(128))
        self._kind_of_byte = np.full(256, _UNKNOWN, np.uint8)
        self._kind_of_byte[:128] = self._kind_of[:128]
        self._kind_of_byte[SEPARATOR] = _END

    def starts(self, text: Bytes) -> Places:
        """Returns the offset at which each pre-token, and each separator, starts.

        Args:
            text: UTF-8 documents, with a separator byte after each.
        """
        kinds = looked_up(text, self._kind_of_byte)
        if not (kinds == _UNKNOWN).any():
            return self._split(text, text, kinds)
        leads = np.flatnonzero((text & 0xC0) != 0x80)
        chars, kinds = text[leads], kinds[leads]
        beyond_ascii = np.flatnonzero(kinds == _UNKNOWN)
        code_points = code_points_at(text, leads[beyond_ascii])
        found = self._kind_of[code_points]
        if (unknown := found == _UNKNOWN).any():
            self._learn(np.unique(code_points[unknown]))
            found = self._kind_of[code_points]
        kinds[beyond_ascii] = found
        # All that is asked of a character beyond its kind is asked of ASCII, and of the long s.
        chars[beyond_ascii[code_points == _LONG_S]] = ord("s")
        return leads[self._split(text, chars, kinds)]

    def _split(self, text: Bytes, chars: Kinds, kinds: Kinds) -> Places:
        is_letter = kinds <= _UNCASED
        is_other = kinds == _OTHER
        clusters = self._clusters(chars, kinds, is_letter, is_other)
        consumed = _consume_slashes(clusters, chars, kinds, is_other) if self._is_o200k else []
        in_tail = _inside(clusters.tail, clusters.end, len(chars))
        for first, end in consumed:
            in_tail[first:end] = True

        is_word = is_letter | ((kinds == _MARK) & ~in_tail)
        is_start = (kinds == _END) | (is_other & ~in_tail)
        is_start[clusters.tail[clusters.tail < clusters.end]] = True
        is_start[clusters.first[_follows_blank(clusters.first, chars, is_other)]] = False
        _start_digits(kinds, is_start)
        _start_spaces(kinds, in_tail, is_start)
        words = np.flatnonzero(is_word[1:] & ~is_word[:-1]) + 1
        if is_word[0]:
            words = np.insert(words, 0, 0)
        before = words - 1  # -1 is a separator
        is_prefix = (kinds[before] == _SPACE) | (is_other[before] & ~in_tail[before])
        is_start[words[~is_prefix]] = True
        contractions, ends = self._contractions(chars, kinds, is_word, in_tail)
        if self._is_o200k:
            starts_word = np.zeros(len(kinds), np.bool_)
            starts_word[words] = True
            starts_word[ends] = is_word[ends]
            _start_cased(kinds, is_word, starts_word, is_start)
            is_start[contractions] = False
        for longest in (1, 2):
            is_start[contractions[ends - contractions > longest] + longest] = False
        is_start[ends] = True
        return np.flatnonzero(is_start)

    def _clusters(self, chars: Kinds, kinds: Kinds, is_letter: Mask, is_other: Mask) -> _Clusters:
        first, end = _runs(is_other | (kinds == _MARK))
        tail = _tails(first, end, is_letter, is_other)
        at_start = _follows_blank(first, chars, is_other)
        tail[at_start] = first[at_start]
        return _Clusters(first, end, tail)

    def _contractions(
        self, chars: Kinds, kinds: Kinds, is_word: Mask, in_tail: Mask
    ) -> tuple[Places, Places]:
        """Returns where contractions begin and end."""
        marks = np.flatnonzero((chars == _APOSTROPHE) & ~in_tail)
        after_word = is_word[marks - 1]
        if self._is_o200k:
            marks = marks[after_word]
        lower = np.append(chars, np.uint8(0))  # a letter is followed by a separator at least
        first, second = lower[marks + 1] | 0x20, lower[marks + 2] | 0x20
        # Marks and letters beyond ASCII have lead bytes of 0xC0 and more, which stay so.
        short = np.isin(first, np.frombuffer(b"stmd", np.uint8)) & (kinds[marks + 1] <= _UNCASED)
        long = ((first == ord("r")) | (first == ord("v"))) & (second == ord("e"))
        long |= (first == ord("l")) & (second == ord("l"))
        is_contraction = short | long
        marks, ends = marks[is_contraction], (marks + 2 + long)[is_contraction]
        if self._is_o200k and len(marks) and (marks[1:] == ends[:-1]).any():
            kept = _without_seconds(marks, ends)
            marks, ends = marks[kept], ends[kept]
        return marks, ends

    def _learn(self, code_points: Places) -> None:
        ask = self._ask_o200k if self._is_o200k else self._ask_llama3
        for code_point in code_points.tolist():
            self._kind_of[code_point] = (
                _NEWLINE if chr(code_point) in "\r\n" else ask(chr(code_point))
            )

    def _ask_llama3(self, character: str) -> int:
        if self._is_one(f"a{character}a"):
            return _UNCASED
        return self._ask_beyond_letters(character)

    def _ask_o200k(self, character: str) -> int:
        after_lower = self._is_one(f"a{character}a")
        if self._is_one(f"A{character}Aa"):
            if not after_lower:
                return _UPPER
            return _MARK if self._is_one(f"!!{character}!") else _UNCASED
        return _LOWER if after_lower else self._ask_beyond_letters(character)

    def _ask_beyond_letters(self, character: str) -> int:
        if self._is_one(f"1{character}1"):
            return _DIGIT
        return _OTHER if self._is_one(f"!{character}!") else _SPACE

    def _is_one(self, text: str) -> bool:
        return len(self._pre_tokenize(text)) == 1


def _runs(mask: Mask) -> tuple[Places, Places]:
    """Returns where runs start and end; the last character is of none."""
    change = np.flatnonzero(mask[1:] != mask[:-1]) + 1
    if mask[0]:
        change = np.insert(change, 0, 0)
    return change[::2], change[1::2]


def _inside(first: Places, end: Places, size: int) -> Mask:
    """Returns which characters lie in one of the spans `[first, end)`, which are apart."""
    change = np.zeros(size + 1, np.int8)
    change[first] += 1
    change[end] -= 1
    return np.cumsum(change[:-1], dtype=np.int8).astype(np.bool_)


def _follows_blank(first: Places, chars: Kinds, is_other: Mask) -> Bool[np.ndarray, "_"]:
    return (chars[first - 1] == _BLANK) & is_other[first]


def _tails(first: Places, end: Places, is_letter: Mask, is_other: Mask) -> Places:
    """Returns from where on each cluster is one pre-token; its end where it is none."""
    lonely_last = is_other[end - 1] & ~is_letter[end]
    tails = np.where(lonely_last, end - 1, end)
    pairs = np.flatnonzero(is_other[1:] & is_other[:-1])
    pair = np.append(pairs, len(is_other))[np.searchsorted(pairs, first)]
    return np.where(pair < end, pair, tails)


def _consume_slashes(
    clusters: _Clusters, chars: Kinds, kinds: Kinds, is_other: Mask
) -> list[tuple[int, int]]:
    """Gives slashes after a cluster and line ends to that cluster; returns where they stand.

    What is left of their own cluster starts anew. In order, since that may take slashes itself.
    """
    consumed = []
    newline_first, newline_end = _runs(kinds == _NEWLINE)
    cluster_before = np.searchsorted(clusters.end, newline_first)
    own = np.searchsorted(clusters.first, newline_end)
    rare = np.flatnonzero((chars[newline_end] == _SLASH) & (newline_first > 0))
    is_cluster = is_other | (kinds == _MARK)
    rare = rare[is_cluster[newline_first[rare] - 1]]
    ends_whole = set()
    for run in rare.tolist():
        before, cluster = int(cluster_before[run]), int(own[run])
        if clusters.tail[before] == clusters.end[before] and before not in ends_whole:
            continue
        first, end = int(newline_end[run]), int(clusters.end[cluster])
        rest = first
        while chars[rest] == _SLASH:
            rest += 1
        consumed.append((first, rest))
        if rest == end:
            ends_whole.add(cluster)
            clusters.tail[cluster] = end
        else:
            one = slice(rest, end + 1)
            tail = _tails(
                np.zeros(1, np.int64),
                np.array([end - rest]),
                kinds[one] <= _UNCASED,
                is_other[one],
            )
            clusters.tail[cluster] = rest + int(tail[0])
    return consumed


def _start_digits(kinds: Kinds, is_start: Mask) -> None:
    first, end = _runs(kinds == _DIGIT)
    lengths = end - first
    while len(first):
        is_start[first] = True
        first, lengths = first[lengths > 3] + 3, lengths[lengths > 3] - 3


def _start_spaces(kinds: Kinds, in_tail: Mask, is_start: Mask) -> None:
    is_newline = kinds == _NEWLINE
    first, end = _runs(is_newline | (kinds == _SPACE))
    newline_first, newline_end = _runs(is_newline)
    # Line ends right behind a cluster belong to it.
    ends_cluster = in_tail[first - 1] & is_newline[first]
    first[ends_cluster] = newline_end[np.searchsorted(newline_first, first[ends_cluster])]
    ends = np.append(0, newline_end)
    tail = np.maximum(ends[np.searchsorted(newline_end, end, side="right")], first)
    is_start[first[tail > first]] = True
    lengths = end - tail
    goes_on = kinds[end] != _END
    is_start[tail[(lengths > 1) | ((lengths == 1) & ~goes_on)]] = True
    is_start[end[(lengths > 0) & goes_on] - 1] = True


def _start_cased(kinds: Kinds, is_word: Mask, starts_word: Mask, is_start: Mask) -> None:
    """Starts a pre-token wherever letter case ends a word."""
    is_upper = kinds == _UPPER
    inner = np.flatnonzero(is_upper & ~starts_word)
    is_start[inner[kinds[inner - 1] == _LOWER]] = True
    # The rest concerns the few runs with a letter without case, which are looked at apart.
    first, end = _runs(is_word)
    uncased = np.flatnonzero(is_word & ((kinds == _UNCASED) | (kinds == _MARK)))
    if not uncased.size:
        return
    runs = np.unique(np.searchsorted(first, uncased, side="right") - 1)
    chosen = _inside(first[runs], end[runs] + 1, len(kinds))  # and what ends each
    places = np.flatnonzero(chosen)
    begun = np.zeros(len(places), np.bool_)
    _start_uncased(kinds[places], is_word[places], starts_word[places], begun)
    is_start[places[begun]] = True


def _start_uncased(kinds: Kinds, is_word: Mask, starts_word: Mask, is_start: Mask) -> None:
    """Starts a pre-token where letter case ends a word among whose letters are some without."""
    is_upper = kinds == _UPPER
    is_uncased = is_word & ((kinds == _UNCASED) | (kinds == _MARK))
    place = np.arange(len(kinds), dtype=np.int32)

    def last(mask: Mask) -> np.ndarray:
        return np.maximum.accumulate(np.where(mask, place, np.int32(-1)))

    last_upper, last_lower = last(is_upper), last(kinds == _LOWER)
    last_uncased, word_start = last(is_uncased), last(starts_word)

    inner = np.flatnonzero(is_upper & ~starts_word)
    inner = inner[kinds[inner - 1] >= _UNCASED]
    lower, upper = last_lower[inner - 1], last_upper[inner - 1]
    is_start[inner[(lower >= word_start[inner]) & (lower > upper)]] = True

    ends = np.flatnonzero(is_upper[:-1] & (~is_word[1:] | starts_word[1:]))
    uncased, lower, start = last_uncased[ends], last_lower[ends], word_start[ends]
    begun_after_lower = (lower < start) | (last_upper[uncased] > lower)
    splits = (uncased >= start) & (uncased > lower) & begun_after_lower
    is_start[uncased[splits] + 1] = True


def _without_seconds(marks: Places, ends: Places) -> Bool[np.ndarray, "_"]:
    """Drops each contraction right behind another: it has no word before it, but is one itself."""
    kept = [True]
    for (_, end), (mark, _) in pairwise(zip(marks.tolist(), ends.tolist(), strict=True)):
        kept.append(not (kept[-1] and mark == end))
    return np.array(kept)
