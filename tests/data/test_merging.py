"""Merging many words at once: the ids that the library's model gives to each."""

import json
import random

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import models

from modeling.data import merging
from modeling.data.merging import WordMerger
from modeling.data.vocabularies import BYTE_SPELLING
from tests.data.conftest import HOSTILE

SPELL = dict(enumerate(BYTE_SPELLING))
SYMBOLS = "ab é"
words = st.lists(
    st.one_of(
        st.text(SYMBOLS, min_size=1, max_size=12).map(str.encode),
        st.sampled_from(HOSTILE).map(str.encode),
        st.binary(min_size=1, max_size=9),
    ),
    min_size=1,
    max_size=30,
)


@pytest.fixture(autouse=True)
def every_word_at_once(monkeypatch):
    monkeypatch.setattr(merging, "_FEWEST_WORDS", 0)


def model_of(seed, *, in_order):
    """A model with merges of the symbols that tests use; ranks in order of making, or at random."""
    draw = random.Random(seed)
    tokens = list(BYTE_SPELLING)
    known = [SPELL[byte] for byte in SYMBOLS.encode()]
    merges = []
    while len(merges) < 60:
        pair = draw.choice(known), draw.choice(known)
        if "".join(pair) not in tokens:
            merges.append(pair)
            tokens.append("".join(pair))
            known.append("".join(pair))
    if not in_order:
        draw.shuffle(merges)
    return models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges)


def setup_of(model):
    return json.loads(Backend(model).to_str())["model"]


@pytest.mark.parametrize("in_order", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_words_get_the_ids_of_the_model(seed, in_order):
    model = model_of(seed, in_order=in_order)
    merger = WordMerger.of(setup_of(model))
    assert merger is not None

    @settings(max_examples=40, deadline=None)
    @given(words)
    @example([b"a", b"aa", b"aaa", b"aaaa", b"aaaaaaaaaaaa", b"abababab"])
    @example([b"x" * 32, b"x" * 33, b"", b"ab" * 16])
    def check(texts):
        ids, lengths = merger.encode(texts)
        expected = [
            [t.id for t in model.tokenize(w.decode("latin-1").translate(SPELL))] for w in texts
        ]
        is_taken = [0 < len(word) <= 32 for word in texts]
        assert (lengths > 0).tolist() == is_taken
        found = np.split(ids, np.cumsum(lengths)[:-1])
        for part, of_model, taken in zip(found, expected, is_taken, strict=True):
            assert part.tolist() == (of_model if taken else [])

    check()


def test_pairs_are_found_wherever_their_hashes_meet(monkeypatch):
    monkeypatch.setattr(merging, "_SLOTS_A_MERGE", 1)
    monkeypatch.setattr(merging, "_HASH", np.uint64(1))  # nearly all in one slot
    model = model_of(7, in_order=True)
    merger = WordMerger.of(setup_of(model))
    assert merger is not None
    texts = ["".join(random.Random(seed).choices(SYMBOLS, k=9)).encode() for seed in range(60)]
    expected = [[t.id for t in model.tokenize(w.decode("latin-1").translate(SPELL))] for w in texts]
    ids, lengths = merger.encode(texts)
    assert [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])] == expected


def test_a_few_words_are_left_out(monkeypatch):
    monkeypatch.setattr(merging, "_FEWEST_WORDS", 3)
    merger = WordMerger.of(setup_of(model_of(0, in_order=True)))
    assert merger is not None
    assert merger.encode([b"abc", b"ab", b"x" * 33])[1].tolist() == [0, 0, 0]
    assert merger.encode([])[1].tolist() == []
    assert (merger.encode([b"abc", b"ab", b"b"])[1] > 0).all()


@pytest.mark.parametrize("at_once", [1, 7])
def test_words_that_do_not_fit_at_once_get_the_same_ids(at_once, monkeypatch):
    merger = WordMerger.of(setup_of(model_of(1, in_order=True)))
    assert merger is not None
    texts = [
        "".join(random.Random(seed).choices(SYMBOLS, k=seed % 9)).encode() for seed in range(60)
    ]
    ids, lengths = merger.encode(texts)
    monkeypatch.setattr(merging, "_WORDS_AT_ONCE", at_once)
    again, of_each = merger.encode(texts)
    assert again.tolist() == ids.tolist()
    assert of_each.tolist() == lengths.tolist()


MADE_OF = {"a": 0, "b": 1, "c": 2, "ab": 3, "bc": 4, "abc": 5}


@pytest.mark.parametrize(
    "change",
    [
        {"ignore_merges": True},
        {"dropout": 0.5},
        {"end_of_word_suffix": "c"},
        {"continuing_subword_prefix": "c"},
        {"type": "WordPiece"},
        {"vocab": {"a": 0}},
        {"merges": [["a", "b"], ["b", "c"], ["a", "bc"], ["ab", "c"]]},
    ],
    ids=lambda change: next(iter(change)),
)
def test_other_models_are_left_to_the_library(change):
    vocab = {symbol: 10 + byte for byte, symbol in SPELL.items()} | MADE_OF
    plain = {"type": "BPE", "vocab": vocab, "merges": [["a", "b"], ["b", "c"], ["ab", "c"]]}
    assert WordMerger.of(plain) is not None
    assert WordMerger.of(plain | change) is None
