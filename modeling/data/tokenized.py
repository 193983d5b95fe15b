"""The tokenized corpus: every document as ids, in Arrow IPC shards that a cache reads in place.

    <split>-00000.arrow   one row a document, see `modeling.data.shards`
    manifest.json         dtype, vocab_size, eos_id, and for each split its shards, its counts, and
                          the Merkle leaves of its flat tokens (see `modeling.merkle`)

Per split, two byte streams are digested: all tokens, little endian, in document order; and the end
offset of each document, as little-endian uint64; a third where tokens have a loss mask, a byte
each. The content id covers dtype, vocabulary and the streams, so it knows nothing of batches,
shards, threads or crashes.

A shard is written beside the others in `Workspace.progress` and its receipt `<shard>.json` last; a
retry digests the shards that have one and goes on after them.
"""

import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np

from modeling import canonical
from modeling.artifacts import Built, DamagedArtifactError, Workspace, file_sha256, write_durably
from modeling.data import corpus
from modeling.data.config import Format, TokenizationConfig
from modeling.data.encoding import DocumentEncoder, Encoded, document_encoder
from modeling.data.shards import FlatTokens, map_shard, token_dtype, write_shard
from modeling.data.tokenizer import load_tokenizer
from modeling.merkle import MerkleHasher
from modeling.progress import Meter, Report, ignore

MANIFEST_FILE = "manifest.json"
FORMAT = "tokenized_corpus/1"
SHARD_TOKENS = 1 << 24
_BATCH_BYTES = 4 * 1024 * 1024
_BATCH_DOCUMENTS = 4096


@dataclass(frozen=True)
class Shard:
    """One file of consecutive documents of a split."""

    file: str
    documents: int
    tokens: int
    text_bytes: int
    sha256: str
    """Of the file as written: a retry checks what an earlier attempt left."""


@dataclass(frozen=True)
class SplitManifest:
    """What is known of one split without reading its shards."""

    documents: int
    tokens: int
    text_bytes: int
    shards: tuple[Shard, ...]
    token_leaves: tuple[str, ...]
    tokens_root: str
    offsets_root: str
    loss_mask_root: str | None
    """None where every token is to be predicted."""


@dataclass(frozen=True)
class Manifest:
    """`manifest.json`."""

    dtype: str
    vocab_size: int
    eos_id: int
    has_loss_mask: bool
    splits: dict[str, SplitManifest]

    @classmethod
    def read(cls, directory: Path) -> "Manifest":
        """Reads the manifest of a built tokenized corpus."""
        raw = json.loads((directory / MANIFEST_FILE).read_text(encoding="utf-8"))
        if raw.pop("format") != FORMAT:
            raise ValueError(f"{directory / MANIFEST_FILE}: not of format {FORMAT}.")
        splits = {
            name: SplitManifest(
                **split
                | {
                    "shards": tuple(Shard(**shard) for shard in split["shards"]),
                    "token_leaves": tuple(split["token_leaves"]),
                }
            )
            for name, split in raw.pop("splits").items()
        }
        return cls(splits=splits, **raw)


def flat_tokens(directory: Path, split: SplitManifest, dtype: np.dtype) -> FlatTokens:
    """Returns the tokens of one split of a built tokenized corpus, mapped into memory."""
    has_loss_mask = split.loss_mask_root is not None
    shards = (
        map_shard(directory / shard.file, dtype, with_loss_mask=has_loss_mask)
        for shard in split.shards
    )
    return FlatTokens([shard.tokens for shard in shards])


def build(
    config: TokenizationConfig,
    corpus_dir: Path,
    tokenizer_dir: Path,
    workspace: Workspace,
    *,
    document_format: Format = corpus.TEXT,
    report: Report = ignore,
    shard_tokens: int = SHARD_TOKENS,
) -> Built:
    """Encodes every document, resuming after the last shard that an earlier attempt committed.

    Args:
        document_format: what the corpus's documents are.
        shard_tokens: closes a shard at the first document that reaches this many tokens.
    """
    tokenizer = load_tokenizer(tokenizer_dir)
    dtype = token_dtype(tokenizer.vocab_size)
    encoder = document_encoder(tokenizer, config, document_format)
    total = sum(corpus.num_documents(corpus_dir, split) for split in corpus.SPLITS)
    meter = Meter(report, "tokenized corpus", total, "documents")
    splits = {}
    for split in corpus.SPLITS:
        digests = _SplitDigests(workspace.progress, dtype, has_loss_mask=encoder.has_loss_mask)
        for shard in _committed_shards(workspace.progress, split):
            digests.add(shard)
            meter.skip(shard.documents)
        texts = islice(corpus.texts(corpus_dir, split), digests.documents, None)
        batches = _encode(encoder, texts, meter)
        for documents in _cut(batches, shard_tokens):
            shard = _commit(documents, workspace.progress, _shard_name(split, len(digests.shards)))
            digests.add(shard)
        splits[split] = digests.manifest()
    meter.finish()
    for shard in (shard for split in splits.values() for shard in split.shards):
        _link(workspace.progress / shard.file, workspace.output / shard.file)
    manifest = Manifest(
        dtype=dtype.name,
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        has_loss_mask=encoder.has_loss_mask,
        splits=splits,
    )
    write_durably(workspace.output / MANIFEST_FILE, {"format": FORMAT} | asdict(manifest))
    return _built(manifest, encoder.name)


@dataclass(frozen=True)
class _Documents:
    """Consecutive documents encoded, and their lengths in bytes."""

    encoded: Encoded
    text_bytes: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        return self.encoded.lengths

    def split_at(self, document: int) -> tuple["_Documents", "_Documents"]:
        head, tail = self.encoded.split_at(document)
        return (
            _Documents(head, self.text_bytes[:document]),
            _Documents(tail, self.text_bytes[document:]),
        )


class _SplitDigests:
    """Folds shards, in order, into the split's digests and its counts."""

    def __init__(self, directory: Path, dtype: np.dtype, *, has_loss_mask: bool) -> None:
        self.shards: list[Shard] = []
        self.documents = 0
        self._directory = directory
        self._dtype = dtype
        self._tokens = 0
        self._token_hasher = MerkleHasher()
        self._offset_hasher = MerkleHasher()
        self._mask_hasher = MerkleHasher() if has_loss_mask else None

    def add(self, shard: Shard) -> None:
        has_loss_mask = self._mask_hasher is not None
        tokens, offsets, mask = map_shard(
            self._directory / shard.file, self._dtype, with_loss_mask=has_loss_mask
        )
        if (len(offsets) - 1, len(tokens)) != (shard.documents, shard.tokens):
            raise DamagedArtifactError(
                f"{shard.file}: has {len(offsets) - 1} documents and {len(tokens)} tokens, its "
                f"receipt says {shard.documents} and {shard.tokens}."
            )
        ends = offsets[1:].astype("<u8") + self._tokens
        self._token_hasher.update(tokens.data.cast("B"))
        self._offset_hasher.update(ends.data.cast("B"))
        if self._mask_hasher is not None and mask is not None:
            self._mask_hasher.update(mask.data)
        self.shards.append(shard)
        self.documents += shard.documents
        self._tokens += shard.tokens

    def manifest(self) -> SplitManifest:
        return SplitManifest(
            documents=self.documents,
            tokens=self._tokens,
            text_bytes=sum(shard.text_bytes for shard in self.shards),
            shards=tuple(self.shards),
            token_leaves=tuple(leaf.hex() for leaf in self._token_hasher.leaves),
            tokens_root=self._token_hasher.root(),
            offsets_root=self._offset_hasher.root(),
            loss_mask_root=None if self._mask_hasher is None else self._mask_hasher.root(),
        )


def _encode(encoder: DocumentEncoder, texts: Iterable[bytes], meter: Meter) -> Iterator[_Documents]:
    """Yields the texts encoded, a few MiB of text at a time."""
    for batch in _batches(texts):
        text_bytes = np.fromiter(map(len, batch), np.int64, len(batch))
        yield _Documents(encoder.encode(batch), text_bytes)
        meter.advance(len(batch))


def _batches(texts: Iterable[bytes]) -> Iterator[list[bytes]]:
    batch: list[bytes] = []
    num_bytes = 0
    for text in texts:
        batch.append(text)
        num_bytes += len(text)
        if num_bytes >= _BATCH_BYTES or len(batch) == _BATCH_DOCUMENTS:
            yield batch
            batch, num_bytes = [], 0
    if batch:
        yield batch


def _cut(batches: Iterable[_Documents], shard_tokens: int) -> Iterator[_Documents]:
    """Regroups batches into shards, each closed by the document that fills it."""
    pending: list[_Documents] = []
    room = shard_tokens
    for batch in batches:
        rest = batch
        while int(rest.lengths.sum()) >= room:
            last = int(np.searchsorted(rest.lengths.cumsum(), room))
            head, rest = rest.split_at(last + 1)
            yield _joined([*pending, head])
            pending, room = [], shard_tokens
        if len(rest.lengths):
            pending.append(rest)
            room -= int(rest.lengths.sum())
    if pending:
        yield _joined(pending)


def _joined(parts: list[_Documents]) -> _Documents:
    return _Documents(
        Encoded.join([part.encoded for part in parts]),
        np.concatenate([part.text_bytes for part in parts]),
    )


def _shard_name(split: str, index: int) -> str:
    return f"{split}-{index:05d}.arrow"


def _commit(documents: _Documents, directory: Path, name: str) -> Shard:
    """Writes a shard, and after it its receipt, so that both survive a crash or neither counts."""
    attempt = directory / f".{name}"
    encoded = documents.encoded
    write_shard(attempt, encoded.tokens, encoded.lengths, encoded.loss_mask)
    shard = Shard(
        file=name,
        documents=len(documents.lengths),
        tokens=len(encoded.tokens),
        text_bytes=int(documents.text_bytes.sum()),
        sha256=file_sha256(attempt),
    )
    attempt.replace(directory / name)
    write_durably(_receipt(directory, name), asdict(shard))
    return shard


def _receipt(directory: Path, name: str) -> Path:
    return directory / f"{name}.json"


def _committed_shards(directory: Path, split: str) -> Iterator[Shard]:
    for index in count():
        receipt = _receipt(directory, _shard_name(split, index))
        if not receipt.exists():
            return
        shard = Shard(**json.loads(receipt.read_text(encoding="utf-8")))
        if file_sha256(directory / shard.file) != shard.sha256:
            raise DamagedArtifactError(
                f"{directory / shard.file}: has other bytes than its receipt says. Delete "
                f"{receipt.name} and what follows it, and run again."
            )
        yield shard


def _link(source: Path, target: Path) -> None:
    """Gives a finished shard a second name, since a crash before publication must not cost it."""
    try:
        target.hardlink_to(source)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)


def _built(manifest: Manifest, encoder: str) -> Built:
    leaves = {}
    facts: dict[str, Any] = {
        "dtype": manifest.dtype,
        "vocab_size": manifest.vocab_size,
        "encoder": encoder,
    }
    for name, split in manifest.splits.items():
        leaves[f"{name}/tokens"] = split.tokens_root
        leaves[f"{name}/offsets"] = split.offsets_root
        if split.loss_mask_root is not None:
            leaves[f"{name}/loss_mask"] = split.loss_mask_root
        facts[name] = {
            "documents": split.documents,
            "tokens": split.tokens,
            "bytes": split.text_bytes,
            "bytes_per_token": round(split.text_bytes / max(split.tokens, 1), 4),
            "shards": len(split.shards),
        }
    identity = {
        "dtype": manifest.dtype,
        "vocab_size": manifest.vocab_size,
        "eos_id": manifest.eos_id,
        "leaves": leaves,
    }
    return Built(canonical.digest("tokenized_corpus/1", identity), facts=facts, leaves=leaves)
