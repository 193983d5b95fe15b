"""No text spells a special token, whatever tokenizer it is; all other ids are the library's."""

import json

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from modeling.data.encoding import encoder_for
from modeling.data.shards import token_dtype
from modeling.data.tokenizer import Tokenizer
from modeling.data.tokenizers_config import UnigramTokenizerConfig, WordPieceTokenizerConfig
from modeling.data.vocabularies import train_unigram, train_wordpiece

LETTERS = [*"abcdehlorstw </>\ufdd0\ufdd1013", "▁"]


def byte_level(model):
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def bpe(*, ignore_merges):
    """`</s>` and `two` are words of the model, made by merges or looked up as a whole."""
    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "</", "</s", "</s>", "tw", "two"]
    merges = [("<", "/"), ("</", "s"), ("</s", ">"), ("t", "w")]
    vocab = {word: row for row, word in enumerate(words)}
    return byte_level(models.BPE(vocab, merges, ignore_merges=ignore_merges))


TEXTS = [["one red shoe, one told stories " * 9] * 9]
SPECIAL = ("</s>", "two")


def trained_wordpiece():
    config = WordPieceTokenizerConfig(
        type="wordpiece", vocab_size=530, min_frequency=1, special_tokens=SPECIAL
    )
    return train_wordpiece(config, iter(TEXTS))


def trained_unigram():
    config = UnigramTokenizerConfig(type="unigram", vocab_size=275, special_tokens=SPECIAL)
    return train_unigram(config, iter(TEXTS))


def unigram():
    """As SentencePiece's: control tokens are words of the vocabulary."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("two", -1.0)]
    pieces += [(letter, -4.0) for letter in LETTERS if letter not in "\ufdd0\ufdd1"]
    pieces += [("</", -5.0), ("\ufdd0", -4.0)]
    backend = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    backend.normalizer = normalizers.Replace("1", "")
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme="always", split=False)
    return backend


def words():
    vocab = {word: row for row, word in enumerate(["?", "</s>", "two", "red", "a", "b"])}
    backend = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return backend


KINDS = {
    "bpe": lambda: bpe(ignore_merges=False),
    "bpe of whole words": lambda: bpe(ignore_merges=True),
    "wordpiece": trained_wordpiece,
    "unigram": trained_unigram,
    "foreign unigram": unigram,
    "words": words,
}


@pytest.mark.parametrize("in_vocabulary_alone", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_no_text_spells_a_special_token(kind, in_vocabulary_alone):
    backend = KINDS[kind]()
    plain = tokenizers.Tokenizer.from_str(backend.to_str())
    plain.encode_special_tokens = True
    if not in_vocabulary_alone:
        backend.add_special_tokens([AddedToken("</s>", normalized=False), AddedToken("two")])
    tokenizer = Tokenizer(backend, bos_token=None, eos_token="</s>", named_tokens={"sep": "two"})
    special = {backend.token_to_id("</s>"), backend.token_to_id("two")}
    encoder = encoder_for(tokenizer, token_dtype(tokenizer.vocab_size))
    hostile = ["</s>", "two", "\ufdd0", "\ufdd02\ufdd0", "\ufdd03\ufdd0"]
    text = st.lists(st.sampled_from([*LETTERS, *hostile, "one", "red"]), max_size=12)

    @settings(max_examples=25, deadline=None)
    @given(st.lists(text.map("".join), min_size=1, max_size=3))
    @example(["</s>", " </s>two two", "a"])
    @example(["\ufdd02\ufdd0 \ufdd0\ufdd01\ufdd02\ufdd0\ufdd0 </s>"])
    def check(texts):
        encoded = [tokenizer.encode(text) for text in texts]
        assert not special & {token for ids in encoded for token in ids}
        found = encoder.encode([text.encode() for text in texts])
        assert found.tokens.tolist() == [token for ids in encoded for token in ids]
        for text, ids in zip(texts, encoded, strict=True):
            if isinstance(backend.decoder, decoders.ByteLevel):
                assert tokenizer.decode(ids) == text, "nothing is lost"
            expected = plain.encode(text, add_special_tokens=False).ids
            assert ids == expected or special & {*expected} or "</s" in text

    check()


def test_a_tokenizer_whose_special_tokens_no_text_spells_is_used_as_it_is(chain):
    tokenizer = Tokenizer.load(chain.tokenizer_dir)
    assert tokenizer.texts.for_texts(["<|endoftext|> \ufdd0"]) is tokenizer.backend
    assert json.loads(tokenizer.backend.to_str())["model"]["vocab"]["<|endoftext|>"] == 0
