"""The token cache: rows cut from the stream of tokens, whatever shards it stands in."""

import resource
from collections import Counter

import numpy as np
import pytest

from modeling import merkle
from modeling.artifacts import DiskFullError
from modeling.canonical import digest
from modeling.data import cache, corpus, shards, tokenized
from modeling.data.cache import TokenCache
from modeling.data.config import TokenCacheConfig, TokenizationConfig
from modeling.data.sources_config import FilesSource, ValidationConfig
from modeling.data.splits import ROLES

IDS = {"tokenized_id": "a" * 64, "tokenizer_id": "b" * 64}


def rows_of(length: int) -> TokenCacheConfig:
    return TokenCacheConfig(length=length)


def documents_of(chain, split: str) -> list[list[int]]:
    """The stream cut after each end-of-text id, which stands nowhere else."""
    documents, document = [], []
    for token in chain.tokens(split):
        document.append(token)
        if token == 0:
            documents.append(document)
            document = []
    assert not document
    return documents


def expected_rows(chain, split: str, length: int) -> np.ndarray:
    stream = np.array(chain.tokens(split), np.int32)
    return stream[: len(stream) // length * length].reshape(-1, length)


@pytest.mark.parametrize("length", [8, 13, 128, 700])
def test_rows_are_the_stream_cut_at_the_length(length, chain, make_workspace):
    workspace = make_workspace("cache")
    built = cache.build(rows_of(length), chain.tokenized_dir, workspace, **IDS)
    opened = TokenCache.open(workspace.output, chain.tokenized_dir)
    assert (opened.sequence_length, opened.vocab_size, opened.eos_id) == (length, 300, 0)
    for split in ROLES:
        expected = expected_rows(chain, split, length)
        num_rows = opened.num_rows(split)
        rows = opened.rows(split, np.arange(num_rows)).tokens
        assert rows.dtype == np.int32
        assert np.array_equal(rows, expected)
        stream_length = len(chain.tokens(split))
        sizes = [len(document) for document in documents_of(chain, split)]
        powers = Counter(1 << size.bit_length() - 1 for size in sizes)
        num_bytes = chain.corpus.facts["bytes"][split]
        assert built.facts[split] == {
            "rows": num_rows,
            "tokens": num_rows * length,
            "dropped_tokens": stream_length - num_rows * length,
            "padding_tokens": 0,
            "padding_share": 0.0,
            "documents": len(sizes),
            "cut_documents": 0,
            "dropped_documents": 0,
            "bytes_per_token": round(num_bytes / stream_length, 4),
            "document_lengths": [[power, powers[power]] for power in sorted(powers)],
        }


def test_rows_come_in_the_order_asked_and_may_repeat(chain):
    opened = TokenCache.open(chain.cache_dir, chain.tokenized_dir)
    expected = expected_rows(chain, "train", 16)
    indices = np.random.default_rng(0).integers(0, len(expected), 300)
    assert np.array_equal(opened.rows("train", indices).tokens, expected[indices])
    assert opened.rows("train", indices[:0]).tokens.shape == (0, 16)


@pytest.mark.parametrize("block_bytes", [10, 64, 4096])
def test_the_content_id_is_that_of_copied_rows(block_bytes, chain, make_workspace, monkeypatch):
    monkeypatch.setattr(merkle, "BLOCK_BYTES", block_bytes)
    monkeypatch.setattr(shards, "BLOCK_BYTES", block_bytes)
    tokens = make_workspace("tokens")
    tokenized.build(TokenizationConfig(), chain.corpus_dir, chain.tokenizer_dir, tokens)
    for length in (8, 37):
        splits = {}
        for split in ROLES:
            rows = expected_rows(chain, split, length)
            hasher = merkle.MerkleHasher()
            hasher.update(rows.astype("<u2").tobytes())
            splits[split] = {"rows": len(rows), "root": hasher.root()}
        identity = {
            "sequence_length": length,
            "dtype": "uint16",
            "vocab_size": 300,
            "eos_id": 0,
            "splits": splits,
        }
        built = cache.build(rows_of(length), tokens.output, make_workspace(f"cache{length}"), **IDS)
        assert built.content_id == digest("token_cache/1", identity)


def test_shards_leave_no_trace_and_any_equal_tokens_will_do(chain, make_workspace):
    tokens, workspace = make_workspace("tokens"), make_workspace("cache")
    tokenized.build(
        TokenizationConfig(), chain.corpus_dir, chain.tokenizer_dir, tokens, unit_bytes=1
    )
    assert (
        cache.build(rows_of(16), tokens.output, workspace, **IDS).content_id
        == chain.cache.content_id
    )
    opened = TokenCache.open(chain.cache_dir, tokens.output)
    expected = expected_rows(chain, "train", 16)
    assert np.array_equal(opened.rows("train", np.arange(len(expected))).tokens, expected)


def test_other_tokens_are_refused(chain, make_workspace):
    tokens = make_workspace("tokens")
    policy = TokenizationConfig(append_bos=True)
    tokenized.build(policy, chain.corpus_dir, chain.tokenizer_dir, tokens)
    with pytest.raises(ValueError, match="train rows are not the tokens"):
        TokenCache.open(chain.cache_dir, tokens.output)


def test_a_cache_knows_what_it_was_made_of(chain):
    opened = TokenCache.open(chain.cache_dir, chain.tokenized_dir)
    assert opened.content_id == chain.cache.content_id
    assert opened.tokenized_id == chain.tokenized.content_id
    assert opened.tokenizer_id == chain.tokenizer.content_id


def test_a_split_without_one_row_is_an_error(chain, make_workspace):
    with pytest.raises(ValueError, match=r"split `\w+` has \d+ tokens, fewer than one row"):
        cache.build(rows_of(2**20), chain.tokenized_dir, make_workspace("cache"), **IDS)


def test_a_dataset_without_validation_has_no_validation_rows(chain, make_workspace):
    documents, tokens = make_workspace("corpus"), make_workspace("tokens")
    workspace = make_workspace("cache")
    source = FilesSource(type="files", paths=chain.source.paths)
    listing = corpus.scan(source, validation=ValidationConfig(fraction=0.0))
    corpus.build(source, listing, documents)
    tokenized.build(TokenizationConfig(), documents.output, chain.tokenizer_dir, tokens)
    built = cache.build(rows_of(16), tokens.output, workspace, **IDS)
    opened = TokenCache.open(workspace.output, tokens.output)
    assert opened.num_rows("validation") == built.facts["validation"]["rows"] == 0
    assert opened.num_rows("train") > 0


@pytest.mark.parametrize("indices", [[-1], [0, 10**6], [2**40]])
def test_a_row_out_of_range_is_an_error(indices, chain):
    opened = TokenCache.open(chain.cache_dir, chain.tokenized_dir)
    with pytest.raises(IndexError, match="of split `train`, which has rows 0 to"):
        opened.rows("train", np.array(indices))


def test_a_view_cannot_be_opened_alone(chain):
    with pytest.raises(ValueError, match="a view; open it with tokenized corpus"):
        TokenCache.open(chain.cache_dir)


def test_an_index_of_another_format_is_refused(chain, tmp_path):
    text = (chain.cache_dir / "index.json").read_text()
    (tmp_path / "index.json").write_text(text.replace("token_cache.view/1", "token_cache.view/9"))
    with pytest.raises(ValueError, match=r"index\.json: format 'token_cache\.view/9' is none of"):
        TokenCache.open(tmp_path, chain.tokenized_dir)


def test_a_full_disk_is_said_of_a_copy(chain, make_workspace):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3_000, limits[1]))
    try:
        with pytest.raises(DiskFullError, match="no space for rows of a token cache"):
            cache.copy(chain.cache_dir, chain.tokenized_dir, make_workspace("copy"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
