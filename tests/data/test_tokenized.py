"""The tokenized corpus: the ids of each document, whatever the batches, shards and crashes."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from modeling.artifacts import DamagedArtifactError, Workspace
from modeling.data import corpus, tokenized
from modeling.data.config import TokenizationConfig
from modeling.data.shards import FlatTokens, map_shard, token_dtype, write_shard
from modeling.data.tokenizer import Tokenizer, save
from modeling.merkle import MerkleHasher

DEFAULT = TokenizationConfig()


def build(chain, workspace, config=DEFAULT, **options):
    return tokenized.build(config, chain.corpus_dir, chain.tokenizer_dir, workspace, **options)


def stream(directory: Path, split: str) -> list[int]:
    manifest = tokenized.Manifest.read(directory)
    dtype = np.dtype(manifest.dtype)
    tokens = tokenized.flat_tokens(directory, manifest.splits[split], dtype)
    return tokens.span(0, len(tokens)).tolist()


def test_each_documents_ids_and_one_eos_follow_each_other(chain):
    for split in corpus.SPLITS:
        assert stream(chain.tokenized_dir, split) == chain.tokens(split)
    documents = list(corpus.documents(chain.corpus_dir, "train"))
    assert any("<|endoftext|>" in document.text for document in documents)
    assert stream(chain.tokenized_dir, "train").count(0) == len(documents)


def test_shards_hold_one_document_a_row(chain):
    manifest = tokenized.Manifest.read(chain.tokenized_dir)
    shards = manifest.splits["train"].shards
    assert len(shards) > 3
    assert all(shard.tokens >= 2000 for shard in shards[:-1])
    rows = []
    for shard in shards:
        with pa.memory_map(str(chain.tokenized_dir / shard.file)) as mapped:
            table = pa.ipc.open_file(mapped).read_all()
        assert table.schema == pa.schema([("tokens", pa.list_(pa.uint16()))])
        rows += table.column("tokens").to_pylist()
    encoder = Tokenizer.load(chain.tokenizer_dir)
    documents = corpus.documents(chain.corpus_dir, "train")
    assert rows == [[*encoder.encode(document.text), 0] for document in documents]


def test_digests_are_of_the_flat_tokens_and_the_document_ends(chain):
    encoder = Tokenizer.load(chain.tokenizer_dir)
    for split in corpus.SPLITS:
        documents = corpus.documents(chain.corpus_dir, split)
        lengths = [len(encoder.encode(document.text)) + 1 for document in documents]
        streams = {
            "tokens": np.array(chain.tokens(split), "<u2"),
            "offsets": np.cumsum(lengths).astype("<u8"),
        }
        for name, values in streams.items():
            hasher = MerkleHasher()
            hasher.update(values.tobytes())
            assert chain.tokenized.leaves[f"{split}/{name}"] == hasher.root()


def test_facts_count_each_split(chain):
    facts = chain.tokenized.facts
    for split in corpus.SPLITS:
        documents = list(corpus.documents(chain.corpus_dir, split))
        num_bytes = sum(len(document.text.encode()) for document in documents)
        assert facts[split]["documents"] == len(documents)
        assert facts[split]["tokens"] == len(chain.tokens(split))
        assert facts[split]["bytes"] == num_bytes
        assert facts[split]["bytes_per_token"] == round(num_bytes / facts[split]["tokens"], 4)


@pytest.mark.parametrize("shard_tokens", [1, 700, 10**6])
@pytest.mark.parametrize("batch_documents", [1, 7])
def test_batches_and_shards_leave_no_trace(
    shard_tokens, batch_documents, chain, make_workspace, monkeypatch
):
    monkeypatch.setattr(tokenized, "_BATCH_DOCUMENTS", batch_documents)
    workspace = make_workspace("other")
    built = build(chain, workspace, shard_tokens=shard_tokens)
    assert built.content_id == chain.tokenized.content_id
    assert built.leaves == chain.tokenized.leaves
    assert stream(workspace.output, "train") == chain.tokens("train")


def test_a_shard_is_closed_by_the_document_that_fills_it_exactly(chain, make_workspace):
    encoder = Tokenizer.load(chain.tokenizer_dir)
    documents = list(corpus.documents(chain.corpus_dir, "train"))
    lengths = [len(encoder.encode(document.text)) + 1 for document in documents]
    workspace = make_workspace("exact")
    build(chain, workspace, shard_tokens=lengths[0] + lengths[1])
    first = tokenized.Manifest.read(workspace.output).splits["train"].shards[0]
    assert (first.documents, first.tokens) == (2, lengths[0] + lengths[1])


def test_shard_bounds_do_not_depend_on_batches(chain, make_workspace, monkeypatch):
    monkeypatch.setattr(tokenized, "_BATCH_DOCUMENTS", 3)
    workspace = make_workspace("other")
    build(chain, workspace, shard_tokens=2000)
    assert tokenized.Manifest.read(workspace.output) == tokenized.Manifest.read(chain.tokenized_dir)


@pytest.mark.parametrize(
    ("bos", "eos", "expected"),
    [
        (False, False, lambda ids: ids),
        (True, False, lambda ids: [0, *ids]),
        (True, True, lambda ids: [0, *ids, 0]),
    ],
)
def test_bos_and_eos_go_where_the_policy_says(bos, eos, expected, chain, make_workspace):
    workspace = make_workspace("policy")
    config = TokenizationConfig(append_bos=bos, append_eos=eos)
    built = build(chain, workspace, config)
    encoder = Tokenizer.load(chain.tokenizer_dir)
    documents = corpus.documents(chain.corpus_dir, "validation")
    rows = [expected(encoder.encode(document.text)) for document in documents]
    assert stream(workspace.output, "validation") == [token for row in rows for token in row]
    assert built.content_id != chain.tokenized.content_id


KILLED_BUILD = """
import os, pathlib, signal, sys
from modeling.artifacts import Workspace
from modeling.data import tokenized
from modeling.data.config import TokenizationConfig
corpus_dir, tokenizer_dir, root = map(pathlib.Path, sys.argv[1:4])
writes, write_shard = [], tokenized.write_shard
def killed_in_the_middle(path, *content):
    write_shard(path, *content)
    writes.append(path)
    if len(writes) == 3:
        path.write_bytes(path.read_bytes()[:100])
        os.kill(os.getpid(), signal.SIGKILL)
tokenized.write_shard = killed_in_the_middle
workspace = Workspace(root / "progress", root / "output")
tokenized.build(TokenizationConfig(), corpus_dir, tokenizer_dir, workspace, shard_tokens=2000)
"""


def test_a_killed_build_goes_on_after_its_last_committed_shard(chain, tmp_path, make_workspace):
    killed = make_workspace("killed")
    arguments = [chain.corpus_dir, chain.tokenizer_dir, tmp_path / "killed"]
    done = subprocess.run([sys.executable, "-c", KILLED_BUILD, *map(str, arguments)], check=False)
    assert done.returncode == -signal.SIGKILL
    before = {path.name: path.stat() for path in killed.progress.glob("train-*.arrow")}
    assert sorted(before) == ["train-00000.arrow", "train-00001.arrow"]
    (tmp_path / "again").mkdir()
    reports = []
    built = build(chain, Workspace(killed.progress, tmp_path / "again"), report=reports.append)
    assert built.content_id == chain.tokenized.content_id
    assert stream(tmp_path / "again", "train") == chain.tokens("train")
    for name, stat in before.items():
        after = (killed.progress / name).stat()
        assert (after.st_ino, after.st_mtime_ns) == (stat.st_ino, stat.st_mtime_ns)
    assert reports[-1].done == reports[-1].total == 40


def test_a_build_killed_before_publication_encodes_nothing_again(chain, make_workspace, tmp_path):
    first = make_workspace("first")
    build(chain, first, shard_tokens=2000)
    inodes = {path.name: path.stat().st_ino for path in first.progress.glob("*.arrow")}
    for path in first.output.iterdir():
        path.unlink()
    again = Workspace(first.progress, first.output)
    assert build(chain, again, shard_tokens=2000).content_id == chain.tokenized.content_id
    assert {path.name: path.stat().st_ino for path in first.output.glob("*.arrow")} == inodes


def test_a_damaged_committed_shard_is_named(chain, make_workspace):
    workspace = make_workspace("damaged")
    build(chain, workspace, shard_tokens=2000)
    path = workspace.progress / "train-00001.arrow"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    again = Workspace(workspace.progress, workspace.output)
    with pytest.raises(DamagedArtifactError, match=r"train-00001\.arrow: has other bytes"):
        build(chain, again, shard_tokens=2000)


def test_ids_take_four_bytes_from_65536_on(chain, make_workspace, tmp_path):
    assert token_dtype(65535) == np.uint16
    assert token_dtype(65536) == np.uint32
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocab |= {f"<{i}>": i for i in range(256, 69_999)} | {"<|endoftext|>": 69_999}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    large = Tokenizer(backend, bos_token="<|endoftext|>", eos_token="<|endoftext|>")
    (tmp_path / "tokenizer").mkdir()
    save(large, tmp_path / "tokenizer")
    workspace = make_workspace("wide")
    built = tokenized.build(DEFAULT, chain.corpus_dir, tmp_path / "tokenizer", workspace)
    assert built.facts["dtype"] == "uint32"
    tokens = stream(workspace.output, "validation")
    text = next(corpus.documents(chain.corpus_dir, "validation")).text.encode()
    assert len(text) == tokens.index(69_999)


def test_a_shard_of_other_columns_is_refused(tmp_path):
    path = tmp_path / "x.arrow"
    write_shard(path, np.arange(6, dtype=np.uint32), np.array([2, 0, 4]))
    tokens, offsets, _ = map_shard(path, np.dtype(np.uint32))
    assert (tokens.tolist(), offsets.tolist()) == ([0, 1, 2, 3, 4, 5], [0, 2, 2, 6])
    assert not tokens.flags.writeable
    with pytest.raises(ValueError, match=r"x\.arrow: expected one batch of .*uint16"):
        map_shard(path, np.dtype(np.uint16))


def test_gathering_crosses_shards_of_any_size():
    draw = np.random.default_rng(0)
    whole = draw.integers(0, 60000, 500, dtype=np.uint16)
    cuts = np.sort(draw.integers(0, 500, 40))
    flat = FlatTokens(np.split(whole, cuts))
    assert len(flat) == 500
    for length in (1, 7, 60):
        starts = draw.integers(0, 501 - length, 200)
        expected = [whole[start : start + length] for start in starts]
        rows = flat.gather(starts, length)
        assert rows.dtype == np.int32
        assert np.array_equal(rows, expected)
    assert np.array_equal(flat.span(3, 480), whole[3:480])
    assert flat.span(5, 5).size == 0


def test_rows_inside_a_shard_are_not_copied_one_by_one(monkeypatch):
    flat = FlatTokens(np.split(np.arange(120, dtype=np.uint16), [40, 80]))
    starts = np.array([0, 30, 40, 70, 80, 110])

    def copies_a_row(*bounds):
        raise AssertionError(f"row {bounds} lies inside one shard")

    monkeypatch.setattr(flat, "span", copies_a_row)
    assert np.array_equal(flat.gather(starts, 10), starts[:, None] + np.arange(10))


def test_the_manifest_says_what_its_format_is(chain, tmp_path):
    raw = json.loads((chain.tokenized_dir / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(raw | {"format": "other/1"}))
    with pytest.raises(ValueError, match=r"manifest\.json: not of format"):
        tokenized.Manifest.read(tmp_path)
