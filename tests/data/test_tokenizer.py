"""The tokenizer: the textbook's merges, the same everywhere, and ids that mean their bytes."""

import json
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
from modeling.data.config import BpeTokenizerConfig, FilesSource, ValidationConfig
from modeling.data.reading import is_held_out
from modeling.data.tokenizer import PROBE_TEXTS, Tokenizer, build, save

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
from modeling.data.config import BpeTokenizerConfig, TokenizationConfig
corpus_dir, output, tokens = map(pathlib.Path, sys.argv[1:])
config = BpeTokenizerConfig(type="bpe", vocab_size=1500)
print(tokenizer.build(config, corpus_dir, Workspace(output, output)).content_id)
workspace = Workspace(output, tokens)
print(tokenized.build(TokenizationConfig(), corpus_dir, output, workspace).content_id)
slow = {"jax", "pandas", "dagster", "datasets", "transformers"} & set(sys.modules)
assert not slow, f"{slow} are imported for nothing"
"""


def test_the_same_tokenizer_and_tokens_in_any_process_with_any_threads(tmp_path, make_workspace):
    draw = random.Random(1)
    lexicon = ["".join(draw.choices("abcdefgh", k=draw.randint(2, 7))) for _ in range(3000)]
    texts = [" ".join(draw.choices(lexicon, k=60)) for _ in range(2000)]  # many equal counts
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


def test_byte_lengths_of_a_tokenizer_without_bytes_are_refused():
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0, END: 1}, unk_token="a"))
    with pytest.raises(ValueError, match="byte-level"):
        Tokenizer(backend, bos_token=END, eos_token=END).token_byte_lengths()


def test_too_little_text_for_the_vocabulary_is_an_error(tmp_path, make_workspace):
    directory = corpus_of(["abab abab"], tmp_path, make_workspace("corpus"))
    with pytest.raises(ValueError, match=r"tokenizer\.vocab_size: 5000 ids .* gives 259 at"):
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
