"""Long texts in pieces: the same ids, wherever they are cut."""

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, models, normalizers, pre_tokenizers, trainers

from modeling.data import compute, corpus, encoding, pieces
from modeling.data.config import TokenizationConfig
from modeling.data.patterns import pre_tokenizer
from modeling.data.pretokens_cased import LLAMA3, O200K
from modeling.data.tokenizer import PROBE_TEXTS, Tokenizer
from tests.data.conftest import HOSTILE

PATTERNS = {
    "gpt2": pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    "llama3": pre_tokenizers.Split(Regex(LLAMA3), "isolated"),
    "o200k": pre_tokenizers.Split(Regex(O200K), "isolated"),
}
SCALE = Path(__file__).parents[2] / "benchmarks" / "scale.py"
HARD = "aZ9'stmdrevl \n\r\t.,/(-é\u0301日本。\u3000\u00a0\u2028²٣ǅʰक्ह🎉"


def words(pattern, text):
    return [word for word, _ in PATTERNS[pattern].pre_tokenize_str(text)]


@pytest.mark.parametrize("pattern", PATTERNS)
@given(text=st.text(HARD, min_size=2, max_size=60), size=st.integers(1, 30))
def test_cuts_fall_between_pre_tokens_that_do_not_see_each_other(pattern, text, size):
    parts = [piece.decode() for piece in pieces.pieces(text.encode(), size)]
    assert "".join(parts) == text
    assert [word for part in parts for word in words(pattern, part)] == words(pattern, text)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_hostile_texts_are_cut_often(pattern):
    for text in [*HOSTILE, *PROBE_TEXTS, "don't they'll " * 50, "x=1;y=22\n" * 40]:
        parts = [piece.decode() for piece in pieces.pieces(text.encode(), 16)]
        assert [word for part in parts for word in words(pattern, part)] == words(pattern, text)
    assert len(list(pieces.pieces(b"some words " * 100, 16))) > 60


def test_pieces_are_not_longer_than_they_must_be():
    text = ("word " * 1000 + "x" * 500 + " end").encode()
    found = list(pieces.pieces(text, 64))
    assert sorted(map(len, found))[-2] <= 64
    assert 500 <= max(map(len, found)) <= 600
    assert list(pieces.pieces(b"x" * 1000, 64)) == [b"x" * 1000]
    assert list(pieces.pieces(b"", 64)) == [b""]


@pytest.mark.parametrize(("bos", "eos"), [(True, True), (False, True), (True, False)])
def test_a_long_document_has_the_ids_of_the_library(bos, eos, chain, monkeypatch):
    draw = random.Random(0)
    long = " ".join(draw.choice(HOSTILE) for _ in range(40))
    texts = ["short", long, "also short", long + "!"]
    tokenizer = Tokenizer.load(chain.tokenizer_dir)
    config = TokenizationConfig(append_bos=bos, append_eos=eos)
    encoder = encoding.document_encoder(tokenizer, config, corpus.TEXT)
    monkeypatch.setattr(compute, "PIECE_BYTES", 100)
    monkeypatch.setattr(encoding, "pieces", lambda text: pieces.pieces(text, 100))
    data = [text.encode() for text in texts]
    data[1] = memoryview(data[1])
    unit = compute.encode_unit(encoder, ["a", "b", "c", "d"], data)
    encoded = unit.encoded
    expected = [
        [*[0] * bos, *tokenizer.backend.encode(text, add_special_tokens=False).ids, *[0] * eos]
        for text in texts
    ]
    ends = np.cumsum(encoded.lengths)[:-1]
    assert [part.tolist() for part in np.split(encoded.tokens, ends)] == expected
    assert unit.text_bytes == sum(map(len, data))


def trained(model, trainer, pre_tokenizer, normalizer=None, added=()):
    """A tokenizer of the library's that knows some of the words that tests use."""
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer, backend.normalizer = pre_tokenizer, normalizer
    draw = random.Random(0)
    texts = [" ".join(draw.choices([*HOSTILE, *HARD, "ab", "a b", "the"], k=30)) for _ in range(99)]
    backend.train_from_iterator(
        texts, trainer(vocab_size=400, special_tokens=["<unk>", "<s>"], show_progress=False)
    )
    backend.add_tokens(list(added))
    backend.encode_special_tokens = True
    return backend


def bpe(*setup, **options):
    return trained(models.BPE(unk_token="<unk>"), trainers.BpeTrainer, *setup, **options)


def unigram(*setup):
    def trainer(**options):
        return trainers.UnigramTrainer(unk_token="<unk>", **options)

    return trained(models.Unigram(), trainer, *setup)


def wordpiece(*setup):
    return trained(models.WordPiece(unk_token="<unk>"), trainers.WordPieceTrainer, *setup)


QWEN2 = LLAMA3.replace("{1,3}", "")
SPACES = Regex(" {2,}")
PARTING = {
    "T5": lambda: unigram(
        pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]),
        normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(SPACES, " ")]),
    ),
    "XLM-R": lambda: unigram(
        pre_tokenizers.Metaspace(prepend_scheme="first"),
        normalizers.Sequence([normalizers.Strip(left=False), normalizers.Replace(SPACES, "▁")]),
    ),
    "ALBERT": lambda: unigram(
        pre_tokenizers.Metaspace(),
        normalizers.Sequence([normalizers.Replace("``", '"'), normalizers.StripAccents()]),
    ),
    "BERT": lambda: wordpiece(pre_tokenizers.BertPreTokenizer(), normalizers.BertNormalizer()),
    "RoBERTa": lambda: bpe(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "Qwen2": lambda: bpe(
        pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(QWEN2), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        ),
        normalizers.NFC(),
    ),
    "StarCoder": lambda: bpe(
        pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizer("gpt2")])
    ),
    "words": lambda: bpe(pre_tokenizers.Whitespace(), normalizers.Lowercase()),
    "added": lambda: bpe(pre_tokenizers.Whitespace(), added=["ab", "'s"]),
}
WHOLE = {
    "Llama 2": lambda: bpe(
        None, normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    ),
    "one word": lambda: bpe(pre_tokenizers.ByteLevel(use_regex=False)),
    "no split": lambda: bpe(pre_tokenizers.Metaspace(split=False)),
    "prefix of the first": lambda: bpe(
        pre_tokenizers.Sequence(
            [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="first")]
        )
    ),
    "strips": lambda: bpe(pre_tokenizers.Metaspace(), normalizers.Strip()),
    "no spaces": lambda: bpe(pre_tokenizers.Whitespace(), normalizers.Replace(" ", "_")),
    "unknown pattern": lambda: bpe(pre_tokenizers.Split(Regex(r"\w+ \w+|."), "isolated")),
    "added words": lambda: bpe(pre_tokenizers.Whitespace(), added=["a b"]),
}


@pytest.mark.parametrize("kind", PARTING)
def test_other_tokenizers_give_parts_the_ids_of_the_whole(kind):
    backend = PARTING[kind]()
    assert pieces.parts_at_spaces(backend)

    def ids(texts):
        found = backend.encode_batch_fast(texts, add_special_tokens=False)
        return [token for encoding in found for token in encoding.ids]

    @settings(max_examples=60, deadline=None)
    @given(st.text(HARD + "abc    ", min_size=2, max_size=60), st.integers(1, 20))
    def check(text, size):
        parts = list(pieces.pieces(text.encode(), size, pieces.AT_SPACES))
        assert ids([part.decode() for part in parts]) == ids([text])

    check()
    text = " ".join([*HOSTILE, *PROBE_TEXTS, "the words of a long text " * 5])
    parts = list(pieces.pieces(text.encode(), 16, pieces.AT_SPACES))
    assert ids([part.decode() for part in parts]) == ids([text])
    assert len(parts) > 9


@pytest.mark.parametrize("kind", WHOLE)
def test_tokenizers_that_may_look_across_a_space_take_texts_whole(kind):
    assert not pieces.parts_at_spaces(WHOLE[kind]())


def test_the_library_is_given_a_long_document_in_parts(monkeypatch):
    monkeypatch.setattr(encoding, "_LIBRARY_PIECE_BYTES", 50)
    tokenizer = Tokenizer(PARTING["BERT"](), bos_token="<s>", eos_token="<s>")
    config = TokenizationConfig(append_bos=True, append_eos=True)
    encoder = encoding.document_encoder(tokenizer, config, corpus.TEXT)
    assert isinstance(encoder, encoding.TextEncoder)
    text = " ".join(HOSTILE * 20)
    longest = 0

    def encode_batch(texts):
        nonlocal longest
        longest = max([longest, *map(len, texts)])
        return [tokenizer.encode(text) for text in texts]

    monkeypatch.setattr(tokenizer, "encode_batch", encode_batch)
    encoded = encoder.encode_long(text.encode())
    end = tokenizer.eos_id
    assert encoded.tokens.tolist() == [end, *tokenizer.encode(text), end]
    assert encoded.lengths.tolist() == [len(encoded.tokens)]
    assert longest < 200


@pytest.mark.slow
def test_memory_grows_neither_with_the_corpus_nor_with_a_document():
    def peaks(*options):
        command = [sys.executable, str(SCALE), "--gigabytes", "0.2", "--rounds-of", "0.05"]
        done = subprocess.run([*command, *options], check=True, capture_output=True, text=True)
        _, small, large = map(json.loads, done.stdout.splitlines())
        return small["peak_anonymous_mb"], large["peak_anonymous_mb"]

    small, large = peaks()
    assert large < small + 200
    small, large = peaks("--one-document")
    assert large < small + 200
