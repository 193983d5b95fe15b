"""The tokenizer: the textbook's merges, the same everywhere, and ids that mean their bytes."""

import itertools
import json
import math
import os
import random
import re
import string
import subprocess
import sys
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from modeling.data import corpus
from modeling.data import tokenizer as tokenizer_module
from modeling.data.encoding import WordEncoder, encoder_for
from modeling.data.pretrained import PretrainedTokenizerError
from modeling.data.reading import is_held_out
from modeling.data.sources_config import FilesSource, ValidationConfig
from modeling.data.tokenizer import PROBE_TEXTS, Tokenizer, build, file_digests, files_root, save
from modeling.data.tokenizers_config import (
    BpeTokenizerConfig,
    PretrainedTokenizerConfig,
    UnigramTokenizerConfig,
    WordPieceTokenizerConfig,
)
from modeling.data.vocabularies import _Lattice, train_unigram, train_wordpiece
from modeling.experiment import ConfigError, validate

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
END = "<|endoftext|>"


def corpus_of(texts, tmp_path, workspace, fraction=0.0):
    path = tmp_path / f"{workspace.output.parent.name}.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    source = FilesSource(type="files", paths=(str(path),), format="jsonl")
    listing = corpus.scan(source, validation=ValidationConfig(fraction=fraction))
    corpus.build(source, listing, workspace)
    return workspace.output


def config(vocab_size, min_frequency=2):
    return BpeTokenizerConfig(type="bpe", vocab_size=vocab_size, min_frequency=min_frequency)


def textbook_merges(texts: list[str], num_merges: int) -> list[tuple[str, str]]:
    """BPE as in Sennrich et al. 2016, on ASCII; of equally frequent pairs the one of lower ids."""
    pattern = r"'(?:[sdmt]|ll|ve|re)| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+"
    counts = Counter(word for text in texts for word in re.findall(pattern, text))
    spelled = {" ": "Ġ", "\n": "Ċ"}
    words = {word: [spelled.get(c, c) for c in word] for word in counts}
    ids = {token: index for index, token in enumerate([END, *ALPHABET])}
    merges = []
    for _ in range(num_merges):
        pairs = Counter()
        for word, pieces in words.items():
            for pair in pairwise(pieces):
                pairs[pair] += counts[word]
        best = min(pairs, key=lambda pair: (-pairs[pair], ids[pair[0]], ids[pair[1]]))
        merges.append(best)
        ids.setdefault("".join(best), len(ids))
        for pieces in words.values():
            at = 0
            while at < len(pieces) - 1:
                if (pieces[at], pieces[at + 1]) == best:
                    pieces[at : at + 2] = ["".join(best)]
                at += 1
    return merges


def test_training_finds_the_textbooks_merges(tmp_path, make_workspace):
    draw = random.Random(0)
    alphabet = string.ascii_lowercase[:6] + "AB12  \n'.s"
    texts = ["".join(draw.choice(alphabet) for _ in range(400)) for _ in range(20)]
    directory = corpus_of(texts, tmp_path, make_workspace("corpus"))
    workspace = make_workspace("tokenizer")
    built = build(config(257 + 40), directory, workspace)
    model = json.loads((workspace.output / "tokenizer.json").read_text())["model"]
    assert [tuple(merge) for merge in model["merges"]] == textbook_merges(texts, 40)
    assert sorted(model["vocab"].values()) == list(range(297))
    assert built.facts == {"vocab_size": 297, "eos_id": 0}


def test_validation_documents_train_nothing(tmp_path, make_workspace):
    halves = ValidationConfig(fraction=0.5)
    names = [f"corpus.jsonl#{i + 1}" for i in range(40)]
    held_out = [is_held_out(name, halves) for name in names]
    texts = ["zq zq zq zq" if held else "ab abc abcd abcde" for held in held_out]
    directory = corpus_of(texts, tmp_path, make_workspace("corpus"), fraction=0.5)
    workspace = make_workspace("tokenizer")
    build(config(260), directory, workspace)
    tokenizer = Tokenizer.load(workspace.output)
    assert len(tokenizer.encode("zq")) == 2
    assert len(tokenizer.encode("ab")) == 1


BUILD = """
import pathlib, sys
import modeling.data.loader
from modeling.artifacts import Workspace
from modeling.data import tokenized, tokenizer
from modeling.data.config import TokenizationConfig
from modeling.data.tokenizers_config import (
    BpeTokenizerConfig,
    UnigramTokenizerConfig,
    WordPieceTokenizerConfig,
)
corpus_dir, output, tokens = map(pathlib.Path, sys.argv[1:])
for config in (
    WordPieceTokenizerConfig(type="wordpiece", vocab_size=900, pattern="o200k"),
    UnigramTokenizerConfig(type="unigram", vocab_size=700),
    BpeTokenizerConfig(type="bpe", vocab_size=900, pattern="llama3", special_tokens=("<|x|>",)),
    BpeTokenizerConfig(type="bpe", vocab_size=1500),
):
    print(tokenizer.build(config, corpus_dir, Workspace(output, output)).content_id)
workspace = Workspace(output, tokens)
print(tokenized.build(TokenizationConfig(), corpus_dir, output, workspace).content_id)
slow = {"jax", "pandas", "dagster", "datasets", "transformers"} & set(sys.modules)
assert not slow, f"{slow} are imported for nothing"
"""


def test_the_same_tokenizer_and_tokens_in_any_process_with_any_threads(tmp_path, make_workspace):
    draw = random.Random(1)
    lexicon = ["".join(draw.choices("abcdefgh", k=draw.randint(2, 7))) for _ in range(3000)]
    texts = [" ".join(draw.choices(lexicon, k=60)) for _ in range(1000)]  # many equal counts
    directory = corpus_of(texts, tmp_path, make_workspace("corpus"))
    surroundings = [
        {"PYTHONHASHSEED": "1", "RAYON_NUM_THREADS": "1"},
        {"PYTHONHASHSEED": "2", "RAYON_NUM_THREADS": "2"},
        {"PYTHONHASHSEED": "3", "RAYON_NUM_THREADS": "7"},
        {"PYTHONHASHSEED": "4", "TOKENIZERS_PARALLELISM": "false"},
    ]
    ids, files = set(), set()
    for index, extra in enumerate(surroundings):
        output, tokens = make_workspace(f"out{index}").output, make_workspace(f"t{index}").output
        arguments = [sys.executable, "-c", BUILD, *map(str, (directory, output, tokens))]
        done = subprocess.run(
            arguments, env=os.environ | extra, capture_output=True, text=True, check=True
        )
        ids.add(done.stdout.strip())
        files.add((output / "tokenizer.json").read_bytes())
    assert len(ids) == 1
    assert len(files) == 1


KINDS = {
    "wordpiece": WordPieceTokenizerConfig(
        type="wordpiece", vocab_size=560, special_tokens=("<s>",)
    ),
    "unigram": UnigramTokenizerConfig(type="unigram", vocab_size=330, special_tokens=("<s>",)),
    "llama3": BpeTokenizerConfig(type="bpe", vocab_size=330, pattern="llama3"),
    "o200k": UnigramTokenizerConfig(type="unigram", vocab_size=330, pattern="o200k"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_loses_nothing_and_is_encoded_word_by_word(
    kind, chain, make_workspace, monkeypatch
):
    workspace = make_workspace(kind)
    built = build(KINDS[kind], chain.corpus_dir, workspace)
    monkeypatch.setattr(tokenizer_module, "_TRAIN_PIECE_BYTES", 40)
    monkeypatch.setattr(tokenizer_module, "_TRAIN_BATCH_BYTES", 1000)
    by_pieces = build(KINDS[kind], chain.corpus_dir, make_workspace("by-pieces"))
    assert by_pieces.content_id == built.content_id
    tokenizer = Tokenizer.load(workspace.output)
    assert built.facts["vocab_size"] == tokenizer.vocab_size == KINDS[kind].vocab_size
    lengths = tokenizer.token_byte_lengths()
    for text in (*PROBE_TEXTS, "<s>", "\u2040a"):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert not set(ids) & set(tokenizer.special_tokens.values())
        assert lengths[ids].sum() == len(text.encode())
    assert set(KINDS[kind].special_tokens) < set(tokenizer.special_tokens)
    encoder = encoder_for(tokenizer, np.dtype(np.uint16))
    assert isinstance(encoder, WordEncoder)
    encoded = encoder.encode([text.encode() for text in PROBE_TEXTS])
    expected = tokenizer.encode_batch(PROBE_TEXTS)
    assert encoded.tokens.tolist() == [token for ids in expected for token in ids]


def test_wordpiece_learns_the_pieces_that_bpe_would_of_begun_and_continued_bytes():
    texts = ["abab xab abx xx " * 5, "q"]
    config = WordPieceTokenizerConfig(type="wordpiece", vocab_size=518)
    backend = train_wordpiece(config, iter([texts]))
    by_id = sorted(backend.get_vocab().items(), key=lambda item: item[1])
    # Of words (abab, Ġxab, Ġabx, Ġxx) 5 times: ⁀b after ⁀a 10 times, then Ġ⁀x, ...
    pieces = [piece for piece, _ in by_id]
    assert pieces[:2] == [END, "<|unknown|>"]
    assert sorted(pieces[2:258]) == ALPHABET
    assert sorted(pieces[258:514]) == [f"\u2040{character}" for character in ALPHABET]
    assert pieces[514:516] == ["\u2040ab", "Ġ\u2040x".replace("\u2040", "")]


def unigram_uses(words, counts, probability):
    """Expected uses of each piece, by listing every way to cut each word."""
    uses = Counter()
    for word in words:
        cuts = []
        for bounds in itertools.product([False, True], repeat=len(word) - 1):
            places = [0, *(i + 1 for i, cut in enumerate(bounds) if cut), len(word)]
            pieces = [word[a:b] for a, b in pairwise(places)]
            if all(piece in probability for piece in pieces):
                cuts.append((math.prod(probability[piece] for piece in pieces), pieces))
        total = sum(chance for chance, _ in cuts)
        for chance, pieces in cuts:
            for piece in pieces:
                uses[piece] += counts[word] * chance / total
    return uses


def test_unigram_expects_the_uses_that_all_cuts_give():
    words = [b"ab", b"abab", b"bab", b"a", b"bbaab"]
    counts = {word: 3 + index for index, word in enumerate(words)}
    pieces = sorted([b"a", b"b", b"ab", b"ba", b"aba", b"bab"])
    draw = random.Random(0)
    chances = [draw.random() for _ in pieces]
    lattice = _Lattice(words, pieces, 3)
    weights = np.array([counts[word] for word in words], np.float64)
    found = lattice.expected_uses(np.array(chances), weights)
    expected = unigram_uses(words, counts, dict(zip(pieces, chances, strict=True)))
    assert found.tolist() == pytest.approx([expected[piece] for piece in pieces], rel=1e-12)


def test_unigram_keeps_the_words_of_a_language_that_has_few():
    draw = random.Random(0)
    texts = ["".join(draw.choices([" tokens", " of", " text", " axes"], k=50)) for _ in range(50)]
    config = UnigramTokenizerConfig(type="unigram", vocab_size=257 + 4)
    tokenizer = Tokenizer(train_unigram(config, iter([texts])), bos_token=END, eos_token=END)
    assert len(tokenizer.encode(" tokens of text axes")) == 4


def test_text_survives_a_round_trip_and_spells_no_special_token(chain):
    tokenizer = Tokenizer.load(chain.tokenizer_dir)
    for text in PROBE_TEXTS:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.eos_id not in ids
    assert tokenizer.encode_batch(PROBE_TEXTS) == [tokenizer.encode(t) for t in PROBE_TEXTS]
    assert tokenizer.decode([tokenizer.eos_id]) == END


def test_token_byte_lengths_add_up_to_the_texts_bytes(chain):
    tokenizer = Tokenizer.load(chain.tokenizer_dir)
    lengths = tokenizer.token_byte_lengths()
    assert lengths.shape == (300,)
    assert lengths[tokenizer.eos_id] == 0
    assert np.delete(lengths, tokenizer.eos_id).min() == 1
    for text in PROBE_TEXTS:
        ids = [*tokenizer.encode(text), tokenizer.eos_id]
        assert lengths[ids].sum() == len(text.encode())


def test_byte_lengths_of_a_tokenizer_without_bytes_are_not_known():
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0, END: 1}, unk_token="a"))
    assert Tokenizer(backend, bos_token=END, eos_token=END).token_byte_lengths() is None


def test_too_little_text_for_the_vocabulary_is_an_error(tmp_path, make_workspace):
    directory = corpus_of(["abab abab"], tmp_path, make_workspace("corpus"))
    with pytest.raises(ValueError, match=r"tokenizer\.vocab_size: 5000 ids .* gives 259\."):
        build(config(5000), directory, make_workspace("tokenizer"))


def test_padding_and_truncation_are_no_part_of_a_tokenizer(chain, make_workspace):
    plain, padded = Tokenizer.load(chain.tokenizer_dir), make_workspace("padded")
    backend = tokenizers.Tokenizer.from_file(str(chain.tokenizer_dir / "tokenizer.json"))
    backend.enable_truncation(5)
    backend.enable_padding(length=9)
    again = Tokenizer(backend, bos_token=END, eos_token=END)
    assert again.encode("a longer text of words") == plain.encode("a longer text of words")
    assert save(again, padded.output).content_id == chain.tokenizer.content_id


def test_another_eos_is_another_tokenizer(chain, make_workspace):
    backend = tokenizers.Tokenizer.from_file(str(chain.tokenizer_dir / "tokenizer.json"))
    other = Tokenizer(backend, bos_token=END, eos_token="!")
    assert save(other, make_workspace("other").output).content_id != chain.tokenizer.content_id


def test_a_tokenizer_that_now_encodes_otherwise_is_refused(chain, make_workspace):
    workspace = make_workspace("copy")
    save(Tokenizer.load(chain.tokenizer_dir), workspace.output)
    path = workspace.output / "tokenizer.json"
    raw = json.loads(path.read_text())
    raw["model"]["merges"] = raw["model"]["merges"][1:]
    path.write_text(json.dumps(raw))
    with pytest.raises(ValueError, match="when it was built with"):
        Tokenizer.load(workspace.output)


def test_a_missing_special_token_is_named():
    with pytest.raises(ValueError, match="no token '<eos>'"):
        Tokenizer(tokenizers.Tokenizer(models.BPE()), bos_token="<eos>", eos_token="<eos>")


def saved(directory, backend, **settings):
    directory.mkdir()
    backend.save(str(directory / "tokenizer.json"))
    for name, content in settings.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    return directory


@pytest.fixture
def backend(chain):
    return tokenizers.Tokenizer.from_file(str(chain.tokenizer_dir / "tokenizer.json"))


def from_path(path, **tokens):
    return PretrainedTokenizerConfig(type="pretrained", path=str(path), **tokens)


def test_a_directory_gives_its_tokens_template_and_ids(backend, tmp_path, make_workspace):
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{END} $A {END}", special_tokens=[(END, 0)]
    )
    config = {"eos_token": {"content": END}, "bos_token": None, "chat_template": "{{ 1 }}"}
    where = saved(
        tmp_path / "a", backend, tokenizer_config=config, special_tokens_map={"pad_token": "!"}
    )
    workspace = make_workspace("t")
    build(from_path(where), None, workspace)
    found = Tokenizer.load(workspace.output)
    assert found.named_tokens == {"eos": END, "pad": "!"}
    assert (found.bos_id, found.eos_id, found.chat_template) == (None, 0, "{{ 1 }}")
    assert found.encode("a b") == backend.encode("a b", add_special_tokens=False).ids
    (where / "chat_template.jinja").write_text("{{ 2 }}")
    again = make_workspace("again")
    other = build(from_path(where), None, again)
    assert Tokenizer.load(again.output).chat_template == "{{ 2 }}"
    assert save(found, make_workspace("same").output).content_id != other.content_id


def test_a_file_is_a_tokenizer_once_its_end_is_named(backend, tmp_path, make_workspace):
    path = saved(tmp_path / "a", backend) / "tokenizer.json"
    with pytest.raises(PretrainedTokenizerError, match=r"set `tokenizer\.eos_token`"):
        build(from_path(path), None, make_workspace("bad"))
    build(from_path(path, eos_token=END), None, make_workspace("good"))
    path.rename(tmp_path / "moved.json")
    again = saved(tmp_path / "b", backend) / "tokenizer.json"
    roots = [files_root(file_digests(from_path(path))) for path in (tmp_path / "moved.json", again)]
    assert roots[0] == roots[1] is not None


def test_a_text_that_spells_the_end_of_a_foreign_tokenizer_ends_nothing(
    backend, tmp_path, make_workspace
):
    backend.add_tokens([tokenizers.AddedToken("<end>", special=False)])
    where = saved(tmp_path / "a", backend, tokenizer_config={"eos_token": "<end>"})
    workspace = make_workspace("t")
    build(from_path(where), None, workspace)
    found = Tokenizer.load(workspace.output)
    assert found.eos_id not in found.encode("the <end> of")


@pytest.mark.parametrize(
    ("settings", "tokens", "complaint"),
    [
        (
            {"tokenizer_config": {"eos_token": "a"}, "special_tokens_map": {"eos_token": "b"}},
            {},
            "'a' in tokenizer_config.json, but 'b' in special_tokens_map.json; set",
        ),
        ({"tokenizer_config": {"eos_token": "<none>"}}, {}, "'<none>', which the vocabulary lacks"),
        ({}, {"eos_token": END, "pad_token": "<p>"}, "pad_token is '<p>'"),
        ({"tokenizer_config": [1]}, {}, r"tokenizer_config.json: expected an object"),
        (
            {
                "tokenizer_config": {
                    "eos_token": "!",
                    "chat_template": [{"name": "x", "template": ""}],
                }
            },
            {},
            r"chat templates \['x'\] and none called `default`",
        ),
    ],
)
def test_unclear_files_are_refused(settings, tokens, complaint, backend, tmp_path, make_workspace):
    where = saved(tmp_path / "a", backend, **settings)
    with pytest.raises(PretrainedTokenizerError, match=complaint):
        build(from_path(where, **tokens), None, make_workspace("t"))


@pytest.mark.parametrize(
    ("content", "complaint"), [("{", "not JSON"), ('{"model": 3}', "cannot read it"), (None, "no")]
)
def test_files_that_are_no_tokenizer_are_refused(content, complaint, tmp_path, make_workspace):
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(PretrainedTokenizerError, match=rf"{tmp_path}.*{complaint}"):
        build(from_path(tmp_path, eos_token=END), None, make_workspace("t"))


COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_a_repository_at_a_commit_comes_from_the_local_cache(
    backend, tmp_path, make_workspace, monkeypatch
):
    snapshots = tmp_path / "hub" / "models--org--name" / "snapshots"
    snapshots.mkdir(parents=True)
    saved(snapshots / COMMIT, backend, tokenizer_config={"eos_token": END})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    config = PretrainedTokenizerConfig(type="pretrained", hub="org/name", revision=COMMIT)
    workspace = make_workspace("t")
    build(config, None, workspace)
    assert Tokenizer.load(workspace.output).eos_id == 0
    other = PretrainedTokenizerConfig(type="pretrained", hub="org/other", revision=COMMIT)
    with pytest.raises(PretrainedTokenizerError, match=r"org/other at 0123.* cannot be fetched"):
        build(other, None, make_workspace("u"))


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"hub": "org/name", "revision": "main"}, "'main' is not the 40 hexadecimal digits"),
        ({"hub": "org/name"}, "None is not the 40 hexadecimal digits"),
        ({}, "set either `path` or `hub`"),
        ({"path": "x", "hub": "y"}, "set either `path` or `hub`"),
        ({"path": "x", "revision": COMMIT}, "`revision` goes with `hub`"),
    ],
)
def test_what_may_move_is_no_name_of_a_tokenizer(fields, complaint):
    with pytest.raises(ConfigError, match=complaint):
        validate(PretrainedTokenizerConfig, {"type": "pretrained"} | fields, "x.yaml")
