r"""Splits UTF-8 text into pre-tokens as GPT-2's pattern does, on whole arrays of bytes.

    's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+

(Radford et al. 2019, `encoder.py`.) With each character a letter, digit, space or other, the
pattern comes down to rules on neighbours, so that no byte needs a loop:

1. a pre-token starts where the class changes;
2. of the spaces before anything else the last one stands alone (the pattern backs off by one for
   `(?!\S)`), and if it is U+0020 it belongs to what follows;
3. `'s` and its like are a pre-token where an apostrophe starts one, and end it early.

Documents are parted by a byte that UTF-8 never has, which is of a fifth class: nothing looks
across it. Which class a character has is asked of the tokenizer itself, since libraries differ in
their Unicode tables; so the splits are the library's own, whatever its version.
"""

import numpy as np
from jaxtyping import Int64, UInt8
from tokenizers import pre_tokenizers

SEPARATOR = 0xFF
_LETTER, _DIGIT, _OTHER, _SPACE, _SEPARATOR, _UNKNOWN = range(6)
_APOSTROPHE, _BLANK = ord("'"), ord(" ")

Bytes = UInt8[np.ndarray, " bytes"]


class Splitter:
    """Finds where pre-tokens start, by the library's idea of letters, digits and spaces."""

    def __init__(self) -> None:
        """Asks the installed library."""
        by_pattern = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        self._pre_tokenize = by_pattern.pre_tokenize_str
        self._class_of = np.full(0x110000, _UNKNOWN, np.uint8)
        self._learn(np.arange(128))
        self._class_of_byte = np.full(256, _UNKNOWN, np.uint8)
        self._class_of_byte[:128] = self._class_of[:128]
        self._class_of_byte[SEPARATOR] = _SEPARATOR

    def starts(self, text: Bytes) -> Int64[np.ndarray, " words"]:
        """Returns the offset at which each pre-token, and each separator, starts.

        Args:
            text: UTF-8 documents, with a separator byte after each.
        """
        classes = looked_up(text, self._class_of_byte)
        long_spaces = self._classify_beyond_ascii(text, classes)
        is_start = np.empty(len(text), np.bool_)
        is_start[:1] = True
        np.not_equal(classes[1:], classes[:-1], out=is_start[1:])
        is_start |= text == SEPARATOR

        is_word = classes <= _OTHER
        before_word = is_word[1:] & (classes[:-1] == _SPACE)
        is_start[:-1] |= before_word
        is_start[1:] &= ~(before_word & (text[:-1] == _BLANK))
        # Of a space of several bytes the rule has marked the last byte; it starts at the first.
        lasts = long_spaces + 1 + (text[long_spaces] >= 0xE0)
        marked = is_start[lasts]
        is_start[lasts[marked]] = False
        is_start[long_spaces[marked]] = True
        self._part_contractions(text, is_start)
        return np.flatnonzero(is_start)

    def _classify_beyond_ascii(self, text: Bytes, classes: Bytes) -> Int64[np.ndarray, " spaces"]:
        """Gives every byte of a longer character its class; returns where longer spaces start."""
        high = np.flatnonzero(classes == _UNKNOWN)
        values = text[high]
        is_lead = values >= 0xC0
        leads = high[is_lead]
        if not len(leads):
            return leads
        lead_values = values[is_lead]
        lengths = 2 + (lead_values >= 0xE0) + (lead_values >= 0xF0)
        code_points = code_points_at(text, leads)
        found = self._class_of[code_points]
        if (unknown := found == _UNKNOWN).any():
            self._learn(np.unique(code_points[unknown]))
            found = self._class_of[code_points]
        classes[high] = np.repeat(found, lengths)
        return leads[found == _SPACE]

    def _learn(self, code_points: Int64[np.ndarray, " characters"]) -> None:
        for code_point in code_points.tolist():
            self._class_of[code_point] = self._ask(chr(code_point))

    def _ask(self, character: str) -> int:
        """Returns the class whose runs the pre-tokenizer lets `character` join."""
        spans = [
            span for _, span in self._pre_tokenize(f"a{character}a 1{character}1 !{character}!")
        ]
        for kind, span in ((_LETTER, (0, 3)), (_DIGIT, (3, 7)), (_OTHER, (7, 11))):
            if span in spans:
                return kind
        return _SPACE

    def _part_contractions(self, text: Bytes, is_start: np.ndarray) -> None:
        """Parts `'s 't 'm 'd 're 've 'll`; the separators keep this inside a document."""
        marks = np.flatnonzero(text == _APOSTROPHE)
        marks = marks[is_start[marks]]
        # A document never ends the text: at least its separator follows an apostrophe.
        first = text[marks + 1]
        second = text[np.minimum(marks + 2, len(text) - 1)]
        short = np.isin(first, np.frombuffer(b"stmd", np.uint8))
        long = ((first == ord("r")) | (first == ord("v"))) & (second == ord("e"))
        long |= (first == ord("l")) & (second == ord("l"))
        is_start[marks[short | long] + 1] = False
        is_start[marks[short] + 2] = True
        is_start[marks[long] + 3] = True


def looked_up(text: Bytes, of_byte: UInt8[np.ndarray, "256"]) -> Bytes:
    """Returns what a table has for each byte, in a fifth of the time of an index."""
    return np.frombuffer(bytearray(text).translate(of_byte.data), np.uint8)


def code_points_at(
    text: Bytes, leads: Int64[np.ndarray, " characters"]
) -> Int64[np.ndarray, " characters"]:
    """Returns the characters that start at `leads`, of several bytes each."""
    values = text[leads].astype(np.int64)
    lengths = 2 + (values >= 0xE0) + (values >= 0xF0)
    code_points = values & (0xFF >> (lengths + 1))
    for index in (1, 2, 3):
        longer = lengths > index
        tail = text[leads[longer] + index] & np.int64(0x3F)
        code_points[longer] = code_points[longer] << 6 | tail
    return code_points
