"""Corpora for benchmarks to read, written as the stages would: of given texts, of random ids."""

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np

from modeling.artifacts import write_durably
from modeling.data import corpus, token_files
from modeling.data.reading import Kept
from modeling.data.shards import write_shard
from modeling.data.token_files import Manifest, Shard, SplitManifest
from modeling.merkle import MerkleHasher

VOCAB_SIZE, EOS = 50257, 0
Documents = tuple[np.ndarray, np.ndarray]
"""Tokens end to end, and the length of each document."""


def random_documents(
    num_tokens: int, shard_tokens: int, mean_tokens: int = 450
) -> Iterator[Documents]:
    """Yields shards of documents, each closed, of log-normal length: the median is 0.6 means."""
    draw = np.random.default_rng(0)
    written = 0
    while written < num_tokens:
        location = 5.6 + math.log(mean_tokens / 450)
        drawn = draw.lognormal(location, 1.0, shard_tokens // mean_tokens)
        lengths = np.minimum(drawn, 1e6).astype(np.int64)
        lengths += 1
        tokens = draw.integers(EOS + 1, VOCAB_SIZE, int(lengths.sum()), np.uint16)
        tokens[np.cumsum(lengths) - 1] = EOS
        written += len(tokens)
        yield tokens, lengths


def write_tokenized(directory: Path, shards: Iterable[Documents]) -> SplitManifest:
    """Writes documents as a tokenized corpus of one split, `train`."""
    tokens_hasher, offsets_hasher = MerkleHasher(), MerkleHasher()
    files: list[Shard] = []
    counts = np.zeros(40, np.int64)
    num_tokens, longest = 0, 0
    for tokens, lengths in shards:
        name = f"train-{len(files):05d}.arrow"
        write_shard(directory / name, tokens, lengths)
        files.append(Shard(name, len(lengths), len(tokens), 4 * len(tokens), "", ""))
        tokens_hasher.update(tokens.data.cast("B"))
        offsets_hasher.update((np.cumsum(lengths) + num_tokens).astype("<u8").data.cast("B"))
        counts += np.bincount(np.log2(lengths).astype(np.int64), minlength=len(counts))
        num_tokens, longest = num_tokens + len(tokens), max(longest, int(lengths.max()))
    split = SplitManifest(
        documents=sum(file.documents for file in files),
        tokens=num_tokens,
        text_bytes=4 * num_tokens,
        shards=tuple(files),
        token_leaves=tuple(leaf.hex() for leaf in tokens_hasher.leaves),
        tokens_root=tokens_hasher.root(),
        offsets_root=offsets_hasher.root(),
        loss_mask_root=None,
        longest_document=longest,
        document_lengths=tuple(counts.tolist()),
        unknown_tokens=None,
    )
    manifest = Manifest("uint16", VOCAB_SIZE, EOS, False, {"train": split})
    write_durably(
        directory / token_files.MANIFEST_FILE, {"format": token_files.FORMAT} | asdict(manifest)
    )
    return split


def write_table(directory: Path, documents: Iterator[tuple[str, bytes]]) -> None:
    """Writes a raw corpus without a source: what `modeling.data.corpus` says a reader needs."""
    counts = {"documents": 0, "bytes": 0}

    def counted() -> Iterator[Kept]:
        for doc_id, text in documents:
            counts["documents"] += 1
            counts["bytes"] += len(text)
            yield Kept(doc_id, "train", text)

    corpus.write_documents(directory / corpus.DOCUMENTS_FILE, counted())
    splits = {what: {"train": count, "validation": 0} for what, count in counts.items()}
    (directory / corpus.FILES_FILE).write_text(json.dumps(splits | {"files": []}))
