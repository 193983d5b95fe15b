"""Bulk encoding: bit for bit the library's ids, however hostile the text."""

import json
import random

import numpy as np
import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from modeling.data import corpus, encoding, merging, tokenized
from modeling.data.config import TokenizationConfig
from modeling.data.encoding import LibraryEncoder, WordEncoder, encoder_for, split_pattern
from modeling.data.patterns import pre_tokenizer, splitter
from modeling.data.tokenizer import PROBE_TEXTS, Tokenizer, save

U16 = np.dtype(np.uint16)
END = "<|endoftext|>"
PIECES = [
    *("'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "'S", "'LL", "'", "''", "’s", "l", "re", "d"),
    *(" ", "  ", "\n", "\t", "\r\n", "\x0b", "\x0c", "\x1c", "\x1f", "\x85", "\xa0", "\u1680"),
    *("\u2003", "\u2028", "\u202f", "\u3000", "\u180e", "\u200b", "\ufeff", "\u2060"),
    *("a", "Z", "é", "e\u0301", "ß", "ǅ", "ª", "日本", "한", "ไท", "שלום", "𐐀", "𝒜", "ʼ"),
    *("1", "42", "²", "½", "٣", "Ⅷ", "一", "𝟘", "௧"),
    *("!", "...", "_", "\x00", "\x7f", "🎉", "👩\u200d👧", "\U0010ffff", "\ufffd", "\u0301", "€"),
    *(
        "/",
        "//",
        "\n/",
        "\r",
        "S",
        "'ſ",
        "'RE",
        "日A",
        "aB",
        "ʰ",
        "\u0903",
        "\u0301\u0301",
        "333",
        ";",
    ),
    END,
]
documents = st.lists(
    st.one_of(
        st.lists(st.sampled_from(PIECES), max_size=12).map("".join),
        st.text(st.characters(exclude_categories=("Cs",)), max_size=30),
    ),
    max_size=8,
)


def train(pre_tokenizer, *, normalizer=None) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizer
    backend.normalizer = normalizer
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    draw = random.Random(0)
    texts = ["".join(draw.choices(PIECES, k=40)) for _ in range(500)]
    backend.train_from_iterator(texts, trainer)
    backend.encode_special_tokens = True
    return backend


@pytest.fixture(scope="module", params=["gpt2", "llama3", "o200k"])
def pattern(request):
    return request.param


@pytest.fixture(scope="module")
def backend(pattern):
    return train(pre_tokenizer(pattern))


def encoder_of(backend):
    return encoder_for(Tokenizer(backend, bos_token=None, eos_token=END), U16)


def pattern_of(backend):
    return split_pattern(Tokenizer(backend, bos_token=None, eos_token=END))


def assert_same(fast, backend, texts):
    expected = backend.encode_batch_fast(texts, add_special_tokens=False)
    found = fast.encode([text.encode() for text in texts])
    assert found.tokens.dtype == U16
    assert found.lengths.tolist() == [len(encoding) for encoding in expected]
    pieces = np.split(found.tokens, found.lengths.cumsum()[:-1]) if texts else []
    assert [piece.tolist() for piece in pieces] == [encoding.ids for encoding in expected]


def test_hostile_text_gets_the_librarys_ids(backend):
    fast = encoder_of(backend)
    assert isinstance(fast, WordEncoder)

    @settings(max_examples=250, deadline=None)
    @given(documents)
    @example(["it's", "'s", "s'", "", "'", "  ", "ll"])
    @example(["\u3000", "\u3000a", " \u3000a", "\u3000 a", "\u3000\u2003a"])
    @example(list(PROBE_TEXTS))
    def check(texts):
        assert_same(fast, backend, texts)

    check()


def test_hostile_text_is_split_where_the_library_splits_it(backend, pattern):
    pre_tokenize = backend.pre_tokenizer.pre_tokenize_str
    by_pattern = splitter(pattern)

    def split(texts):
        joined = b"".join(text.encode() + b"\xff" for text in texts)
        starts = by_pattern.starts(np.frombuffer(joined, np.uint8)).tolist()
        return [joined[a:b] for a, b in zip(starts, [*starts[1:], len(joined)], strict=True)]

    @settings(max_examples=250, deadline=None)
    @given(documents.filter(len))
    @example(["we'really", "it'sn't", "x'llx'vex'mx'dx", "'re", "'r", "'ve're", "a's's's's"])
    @example(["日AB", "aA日B", "\u0301ABC", " \u0301ABC", "!\u0301", "!!\u0301abc", "ABC's"])
    @example(["!\n/abc", "!\n//!\n/\n /", "!\u0301\n/", " /\n/!\u0301", "\n//\n", "!\n/\n/?\n/"])
    def check(texts):
        expected = []
        for text in texts:
            words = [text[a:b].encode() for _, (a, b) in pre_tokenize(text)]
            expected += [*words, b"\xff"]
        assert split(texts) == expected

    check()


@pytest.mark.parametrize("ignore_merges", [False, True])
def test_many_new_words_at_once_get_the_librarys_ids(backend, ignore_merges, monkeypatch):
    raw = json.loads(backend.to_str())
    raw["model"]["ignore_merges"] = ignore_merges
    other = tokenizers.Tokenizer.from_str(json.dumps(raw))
    fast = encoder_of(other)
    assert isinstance(fast, WordEncoder)
    draw = random.Random(5)
    texts = ["".join(draw.choices(PIECES, k=draw.randint(1, 9))) for _ in range(3000)]
    assert_same(fast, other, texts)
    monkeypatch.setattr(merging, "_FEWEST_WORDS", 0)
    assert_same(encoder_of(other), other, texts[:300])


def test_every_four_kinds_of_character_in_a_row(backend, pattern):
    fast = encoder_of(backend)
    kinds = ["'", "s", "l", "a", " ", "\n", "\u3000", "1", "!", "日", "\u0301"]
    kinds += ["r", "e", "²", "🎉"] if pattern == "gpt2" else ["A", "/"]
    texts = [a + b + c + d for a in kinds for b in kinds for c in kinds for d in kinds]
    assert_same(fast, backend, texts)


def test_each_region_of_unicode_is_classed_as_the_library_classes_it(backend):
    fast = encoder_of(backend)
    code_points = [c for c in range(0, 0x110000, 211) if not 0xD800 <= c < 0xE000]
    assert_same(fast, backend, [f"a{chr(c)}1{chr(c)} {chr(c)}'s {chr(c)}" for c in code_points])


WORDS_BY_HAND = {
    "gpt2": ["aéB", "'s", "1²34", " '", "\xa0", "X", " ;", "\n", "//"],
    "llama3": ["aéB", "'s", "1²3", "4", " '", "\xa0X", " ;\n", "//"],
    "o200k": ["aé", "B's", "1²3", "4", " '", "\xa0X", " ;\n//"],
}


@pytest.mark.parametrize("pattern", WORDS_BY_HAND)
def test_words_are_what_the_patterns_say(pattern):
    text = "aéB's1²34 '\xa0X ;\n//".encode() + b"\xff"
    starts = splitter(pattern).starts(np.frombuffer(text, np.uint8)).tolist()
    words = [text[a:b] for a, b in zip(starts, [*starts[1:], len(text)], strict=True)]
    assert words == [*(word.encode() for word in WORDS_BY_HAND[pattern]), b"\xff"]


def test_real_text_gets_the_librarys_ids(chain):
    backend = Tokenizer.load(chain.tokenizer_dir).backend
    texts = [document.text for document in corpus.documents(chain.corpus_dir)]
    assert_same(encoder_of(backend), backend, texts)


def test_words_forgotten_for_lack_of_room_are_asked_again(backend, monkeypatch):
    monkeypatch.setattr(encoding, "_MAX_KNOWN_WORDS", 20)
    fast = encoder_of(backend)
    draw = random.Random(3)
    for _ in range(30):
        assert_same(fast, backend, ["".join(draw.choices(PIECES, k=30)) for _ in range(5)])
        assert len(fast._known) < 200  # of about 1,500 distinct words in all


def test_text_beyond_arrows_reach_goes_through_the_library(backend, monkeypatch):
    monkeypatch.setattr(encoding, "_MAX_TEXT_BYTES", 10)
    assert_same(encoder_of(backend), backend, ["short", "and a long one's end"])


def gpt2_split():
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def with_added_tokens():
    backend = train(gpt2_split())
    backend.add_tokens(["!a", "  "])
    return backend


OTHERS = {
    "prefix space": lambda: train(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "no pattern": lambda: train(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)),
    "normalizer": lambda: train(gpt2_split(), normalizer=normalizers.NFKC()),
    "digits": lambda: train(pre_tokenizers.Sequence([pre_tokenizers.Digits(True), gpt2_split()])),
    "added tokens": with_added_tokens,
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_tokenizers_go_through_the_library(kind):
    backend = OTHERS[kind]()
    assert pattern_of(backend) is None
    encoder = encoder_of(backend)
    assert isinstance(encoder, LibraryEncoder)
    draw = random.Random(4)
    texts = ["".join(draw.choices(PIECES, k=30)) for _ in range(50)]
    # Without a pattern merges give the special token, which here no text spells.
    assert_same(encoder, backend, [text.replace(END, "") for text in texts])


def test_dropout_goes_through_the_library(backend):
    raw = json.loads(backend.to_str())
    raw["model"]["dropout"] = 0.1
    other = tokenizers.Tokenizer.from_str(json.dumps(raw))
    other.encode_special_tokens = True
    assert pattern_of(other) is None


def test_both_encoders_make_one_tokenized_corpus(chain, make_workspace, tmp_path, monkeypatch):
    fast = make_workspace("fast")
    built = tokenized.build(TokenizationConfig(), chain.corpus_dir, chain.tokenizer_dir, fast)
    monkeypatch.setattr(encoding, "split_pattern", lambda tokenizer: None)
    slow = make_workspace("slow")
    again = tokenized.build(TokenizationConfig(), chain.corpus_dir, chain.tokenizer_dir, slow)
    assert (built.facts["encoder"], again.facts["encoder"]) == ("distinct words", "library")
    assert built.content_id == again.content_id
    for path in sorted(fast.output.glob("*.arrow")):
        assert path.read_bytes() == (slow.output / path.name).read_bytes()


def test_an_untrained_tokenizer_of_single_bytes(tmp_path):
    vocab = {c: i for i, c in enumerate([END, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    bytewise = Tokenizer(backend, bos_token=END, eos_token=END)
    save(bytewise, tmp_path)
    found = encoder_for(bytewise, U16).encode([b"ab", b"", "é".encode()])
    assert found.lengths.tolist() == [2, 0, 2]
    assert bytewise.decode(found.tokens.tolist()) == "abé"
