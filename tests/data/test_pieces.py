"""Long texts in pieces: the same ids, wherever they are cut."""

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers

from modeling.data import compute, corpus, encoding, pieces
from modeling.data.config import TokenizationConfig
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


@pytest.mark.slow
def test_memory_does_not_grow_with_the_corpus_and_little_with_a_document():
    def peaks(*options):
        command = [sys.executable, str(SCALE), "--gigabytes", "0.2", "--rounds-of", "0.05"]
        done = subprocess.run([*command, *options], check=True, capture_output=True, text=True)
        _, small, large = map(json.loads, done.stdout.splitlines())
        return small["peak_anonymous_mb"], large["peak_anonymous_mb"]

    small, large = peaks()
    assert large < small + 200
    small, large = peaks("--one-document")
    assert large < 2.5 * 200 + 300
