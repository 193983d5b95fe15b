"""Examples to look at: what stands for a token, what is told apart, and pages that run nothing."""

from html.parser import HTMLParser

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from modeling.data import examples
from modeling.data.examples import read_example, to_html, to_markdown, to_text
from modeling.data.rows import Rows
from modeling.data.tokenizer import PassthroughTokenizer, Tokenizer

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())


@pytest.fixture(scope="module")
def tokenizer():
    """One token a byte, two merged words, and the token that ends a document."""
    vocab = {character: number for number, character in enumerate(ALPHABET)}
    vocab |= {"Ġthe": 256, "ab": 257}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>"])
    return Tokenizer(backend, bos_token=None, eos_token="<|endoftext|>")


def read(tokenizer, tokens, segment_ids=None, loss_mask=None):
    """The example that a cache gives which holds this row."""
    rows = Rows(
        np.array([tokens], np.int32),
        None if segment_ids is None else np.array([segment_ids], np.int32),
        None if loss_mask is None else np.array([loss_mask], bool),
    )
    return examples._example(rows, examples.Texts(tokenizer), "train", 7, 4321)


def ids_of(text, tokenizer):
    return tokenizer.encode(text)


def test_tokens_are_shown_as_what_they_stand_for(tokenizer):
    ids = [*ids_of("日", tokenizer), 256, 257, *ids_of("a\n\t\x00", tokenizer), tokenizer.eos_id]
    (document,) = read(tokenizer, ids).documents
    shown = [(token.kind, token.text) for token in document.tokens]
    assert shown == [
        ("bytes", "<E6>"),
        ("bytes", "<97>"),
        ("bytes", "<A5 日>"),
        ("text", " the"),
        ("text", "ab"),
        ("text", "a"),
        ("text", "↵\n"),
        ("text", "⇥\t"),
        ("text", "␀"),
        ("special", "<|endoftext|>"),
    ]


def test_every_byte_token_is_the_byte_that_the_library_decodes(tokenizer):
    shown = []
    for number in range(len(ALPHABET)):
        (document,) = read(tokenizer, [number]).documents
        (token,) = document.tokens
        decoded = tokenizer.decode([number])
        if token.kind == "text":
            assert token.text == decoded.translate(examples._SIGN_OF)
        else:
            assert decoded == "\ufffd"
            assert bytes.fromhex(token.text[1:-1])[0] >= 0x80
        shown.append(token.text)
    assert len(set(shown)) == 256


def spelled_by(pieces):
    """What is shown of byte-level tokens of these bytes."""
    found, begun = [], b""
    for piece in pieces:
        _, text, begun = examples._spelled_bytes(piece, begun)
        found.append(text)
    return found


def test_a_character_is_shown_with_its_last_bytes():
    assert spelled_by([b"\xf0\x9f", b"\x98\x80"]) == ["<F0 9F>", "<98 80 😀>"]
    assert spelled_by([b"a\xe2", b"\x80", b"\x94 b\xe2"]) == ["a<E2>", "<80>", "<94 —> b<E2>"]
    assert spelled_by([b"\x80", b"\xff", b"\x80"]) == ["<80>", "<FF>", "<80>"], "no character"
    assert spelled_by([b"\xe2", b"a", b"\x80"]) == ["<E2>", "a", "<80>"], "none either"
    assert spelled_by([b"\xe2\x82a", b"\xac"]) == ["<E2 82 61>", "<AC>"]


def test_byte_pieces_are_shown_as_what_they_stand_for():
    names = ["<unk>", "</s>", "▁a", *(f"<0x{byte:02X}>" for byte in range(256))]
    backend = tokenizers.Tokenizer(
        models.Unigram([(name, -1.0) for name in names], 0, byte_fallback=True)
    )
    tokenizer = Tokenizer(backend, bos_token=None, eos_token="</s>")
    ids = [backend.token_to_id(name) for name in ("▁a", "<0xE2>", "<0x80>", "<0x94>", "<0x0A>")]
    (document,) = read(tokenizer, ids).documents
    shown = [(token.kind, token.text) for token in document.tokens]
    assert [text for _, text in shown] == [" a", "<E2>", "<80>", "<94 —>", "↵\n"]
    assert [kind for kind, _ in shown] == ["text", "bytes", "bytes", "bytes", "text"]


def test_ids_without_a_tokenizer_are_shown_as_such():
    (document,) = read(PassthroughTokenizer(9, 0, None), [5, 0]).documents
    assert [(token.kind, token.text) for token in document.tokens] == [("id", "<5>"), ("id", "<0>")]


def test_plain_text_tells_tokens_documents_and_masks_apart(tokenizer):
    ids = [257, 256, 257, 257, 256, 0, 0]
    mask = [False, True, True, False, False, False, False]
    example = read(tokenizer, ids, [1, 1, 2, 2, 2, 0, 0], mask)
    assert to_text(example).splitlines() == [
        "train, row 7 of 4,321: 5 tokens, 2 learned, 2 of padding",
        "-- document 1: 2 tokens, 1 learned --",
        "[ab|] the|",
        "-- document 2: 3 tokens, 1 learned --",
        "ab|[ab| the|]",
    ]
    assert "257:ab|" in to_text(example, ids=True)
    whole = read(tokenizer, ids[:3])
    assert to_text(whole) == "train, row 7 of 4,321: 3 tokens\nab| the|ab|"


class Tags(HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.tags, self.text, self.classes = [], "", []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.classes += [value for name, value in attrs if name == "class"]

    def handle_data(self, data):
        self.text += data


def test_a_page_shows_text_and_runs_nothing(tokenizer):
    hostile = "<script>alert('x')</script>&amp;<img src=x onerror=y>"
    ids = ids_of(hostile, tokenizer)
    learned = [place % 2 == 0 for place in range(len(ids))]
    page = to_html(hostile, [read(tokenizer, ids, None, learned)], ids=True)
    found = Tags(page)
    assert not {"script", "img", "link", "iframe"} & set(found.tags)
    assert found.tags.count("span") == len(ids)
    assert sum("unlearned" in name for name in found.classes) == len(ids) // 2
    assert found.text.count(hostile[:8]) == 2, "title and heading"
    assert "http" not in page.replace("http-equiv", "")


def test_markdown_cannot_be_broken_out_of(tokenizer):
    example = read(tokenizer, ids_of("a\n````\n# b", tokenizer))
    text = to_markdown(example)
    fence = text.splitlines()[0]
    assert set(fence) == {"`"}
    assert fence not in "\n".join(text.splitlines()[1:-1])
    assert text.endswith(fence)
    assert len(to_markdown(example, most=10)) < 40


def test_a_row_of_a_real_cache_reads_as_its_documents(chain):
    from modeling.data.cache import TokenCache

    cache = TokenCache.open(chain.cache_dir, chain.tokenized_dir)
    tokenizer = Tokenizer.load(chain.tokenizer_dir)
    example = read_example(cache, tokenizer, "train", 3)
    (document,) = example.documents
    ids = [token.token_id for token in document.tokens]
    assert ids == cache.rows("train", np.array([3])).tokens[0].tolist()
