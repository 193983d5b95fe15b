"""Builds the tokenized corpus: every document as ids, in the files of `modeling.data.token_files`.

Per split, two byte streams are digested: all tokens, little endian, in document order; and the end
offset of each document, as little-endian uint64; a third where tokens have a loss mask, a byte
each. The content id covers dtype, vocabulary and the streams, so it knows nothing of batches,
shards, threads or crashes.

The documents are cut into units (`modeling.data.units`), each of which becomes a shard, here or on
a Ray cluster (`modeling.data.compute`); finished shards are committed one by one, for a retry to
find (`modeling.data.ledger`). A unit that another tokenized corpus has under the same key is taken
from there. All files are the same whoever encoded, in which order, after how many attempts.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from modeling import canonical
from modeling.artifacts import ArtifactStore, Built, Workspace, link_or_copy, write_durably
from modeling.data import corpus
from modeling.data.compute import SHOWN_SKIPPED, Encoding, Here, Keyed, encoded_by_ray, encoded_here
from modeling.data.config import Compute, LocalCompute, RayCompute, TokenizationConfig
from modeling.data.formats_config import Format
from modeling.data.ledger import FetchEarlier, Ledger, SharedUnits, nothing_earlier
from modeling.data.shards import read_shard, token_dtype
from modeling.data.splits import file_stem, source_of
from modeling.data.token_files import FORMAT, MANIFEST_FILE, Manifest, Shard, SplitManifest
from modeling.data.tokenizer import PassthroughTokenizer, Tokenizer, load_tokenizer
from modeling.data.units import UNIT_BYTES, Unit, cut_units
from modeling.inventory import DamagedArtifactError
from modeling.merkle import MerkleHasher
from modeling.progress import Meter, Report, ignore

LOCAL = LocalCompute()
_MEGABYTE = 1e6
Pace = Callable[[Mapping[str, int], Sequence[str]], str]
"""Says which split a build goes on with, and may wait before that; takes the number of committed
tokens by split, and the splits that have documents left."""


def build(
    config: TokenizationConfig,
    corpus_dir: Path,
    tokenizer_dir: Path,
    workspace: Workspace,
    *,
    document_format: Format | Mapping[str, Format] = corpus.TEXT,
    compute: Compute = LOCAL,
    fetch_earlier: FetchEarlier = nothing_earlier,
    report: Report = ignore,
    unit_bytes: int = UNIT_BYTES,
    pace: Pace | None = None,
    max_skipped: Mapping[str, int] | None = None,
) -> Built:
    """Encodes every document that no shard holds yet.

    Args:
        config: the policy on special tokens.
        corpus_dir: the built raw corpus.
        tokenizer_dir: the built tokenizer.
        workspace: where the files go; its progress is gone on with.
        document_format: what the documents are, of all sources or of each by name.
        compute: who encodes.
        fetch_earlier: finds shards of other builds, to take where the documents are the same.
        report: is told how far it is, and what was reused or damaged.
        unit_bytes: bytes of text in a unit, of which each shard has one.
        pace: asked before each unit for the split to go on with; None goes through the corpus once.
        max_skipped: by name the sources of which documents that have no ids are left out, and how
            many of each may be.

    Raises:
        ValueError: a document has no ids, or too many of a source have none.
        DiskFullError: there is no space for a shard; those before it are kept.
    """
    splits = corpus.splits(corpus_dir)
    formats = (
        {split: document_format[split.partition("/")[2]] for split in splits}
        if isinstance(document_format, Mapping)
        else dict.fromkeys(splits, document_format)
    )
    allowed = max_skipped or {}
    skipping = [split for split in splits if source_of(split) in allowed]
    encoding = Encoding.read(config, formats, tokenizer_dir, skipping=skipping)
    tokenizer = load_tokenizer(tokenizer_dir)
    encoders = encoding.encoders(tokenizer)
    policies = {split: encoding.policy(split) for split in splits}
    dtype = token_dtype(tokenizer.vocab_size)
    header = {
        "dtype": dtype.name,
        "vocab_size": tokenizer.vocab_size,
        "eos_id": tokenizer.eos_id,
        "policy": canonical.digest("stream/1", [encoding.digest, unit_bytes]),
    }
    shared = None if workspace.remote is None else SharedUnits(workspace.remote)
    ledger = Ledger(workspace.progress, header, fetch_earlier, report, shared)
    streams = {
        split: _Stream(split, ledger, dtype, encoding.has_loss_mask, unknown_id(tokenizer))
        for split in splits
    }
    total = sum(corpus.text_bytes(corpus_dir).values())
    meter = Meter(report, "tokenized corpus", total / _MEGABYTE, "MB")
    if pace is None:
        units = cut_units(corpus.stored_documents(corpus_dir), unit_bytes)
    else:
        units = _paced_units(corpus_dir, unit_bytes, pace, streams)

    def unknown_units() -> Iterator[Keyed]:
        under_way = set()
        for unit in units:
            key = unit.key(policies[unit.split])
            streams[unit.split].expect(key, unit.doc_ids)
            if ledger.find(key) is not None:
                meter.skip(unit.num_bytes / _MEGABYTE)
                streams[unit.split].advance()
            elif key not in under_way:
                under_way.add(key)
                yield key, unit

    here = Here(encoders, encoding.skipping, workspace.progress)
    if isinstance(compute, RayCompute):
        results = encoded_by_ray(compute, encoding, unknown_units(), encode_long=here)
    else:
        results = encoded_here(here, unknown_units())
    with ledger.sharing():
        for key, unit in results:
            ledger.commit(key, unit)
            read_bytes = unit.text_bytes + unit.skipped_bytes
            meter.advance(read_bytes / _MEGABYTE, tokens=len(unit.encoded.tokens))
            for stream in streams.values():
                stream.advance()
            _require_few_skipped(streams, allowed)
    meter.finish()
    for stream in streams.values():
        stream.end()
    _require_few_skipped(streams, allowed)
    manifest = Manifest(
        dtype=dtype.name,
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        has_loss_mask=encoding.has_loss_mask,
        splits={split: stream.manifest() for split, stream in streams.items()},
    )
    stored = {}
    for shard in chain.from_iterable(split.shards for split in manifest.splits.values()):
        link_or_copy(ledger.path(shard.key), workspace.output / shard.file)
        if (path := ledger.shared(shard.key)) is not None:
            stored[shard.file] = path
    reuse = _reuse(ledger, manifest)
    if reuse["units"]:
        report(
            f"tokenized corpus: {reuse['units']} of {reuse['of_units']} units reused, "
            f"{reuse['documents']:,} documents and {reuse['tokens']:,} tokens "
            f"({reuse['percent']}%), {reuse['from_other_corpora']} of them from other corpora"
        )
    write_durably(workspace.output / MANIFEST_FILE, manifest.plain())
    used = sorted({encoder.name for encoder in encoders.values()})
    first_skipped = None
    if skipping:
        told = chain.from_iterable(stream.told for stream in streams.values())
        first_skipped = list(islice(told, SHOWN_SKIPPED))
    return replace(_built(manifest, ", ".join(used), reuse, first_skipped), stored=stored)


class EarlierBuilds:
    """The shards of all tokenized corpora in a store."""

    def __init__(self, store: ArtifactStore) -> None:
        """Looks at `store` when first asked."""
        self._store = store
        self._known: dict[str, tuple[str, Shard]] | None = None

    def fetch(self, key: str, target: Path) -> Shard | None:
        """Puts the shard with `key` at `target`, as a hard link where the store is local."""
        if self._known is None:
            self._known = dict(self._shards())
        if key not in self._known:
            return None
        content_id, shard = self._known[key]
        self._store.fetch_file("tokenized_corpus", content_id, shard.file, target)
        return shard

    def _shards(self) -> Iterator[tuple[str, tuple[str, Shard]]]:
        for content_id in self._store.content_ids("tokenized_corpus"):
            raw = json.loads(self._store.read_file("tokenized_corpus", content_id, MANIFEST_FILE))
            if raw["format"] == FORMAT:
                for split in raw["splits"].values():
                    for shard in split["shards"]:
                        yield shard["key"], (content_id, Shard.of(shard))


def _paced_units(
    corpus_dir: Path, unit_bytes: int, pace: Pace, streams: "Mapping[str, _Stream]"
) -> Iterator[Unit]:
    """Yields the units of each split in order, of one split or another as `pace` says.

    The corpus is read through for each split, for which its documents need not wait in memory.
    """
    left = {split: cut_units(corpus.stored_documents(corpus_dir, split), unit_bytes)
            for split in streams}  # fmt: skip
    while left:
        tokens = {split: stream.num_tokens for split, stream in streams.items()}
        split = pace(tokens, tuple(left))
        if (unit := next(left[split], None)) is not None:
            yield unit
        else:
            del left[split]
            streams[split].end()


class _Stream:
    """The shards of a split in their order, digested as far as they are committed."""

    def __init__(
        self, split: str, ledger: Ledger, dtype: np.dtype, has_loss_mask: bool, unknown: int | None
    ) -> None:
        self._keys: list[str] = []
        self._doc_ids: dict[int, list[str]] = {}
        self.told: list[str] = []
        """What is wrong with documents that were left out."""
        self.num_skipped = 0
        self._split = split
        self._ledger = ledger
        self._dtype = dtype
        self._unknown = unknown
        self._shards: list[Shard] = []
        self._token_hasher = MerkleHasher()
        self._offset_hasher = MerkleHasher()
        self._mask_hasher = MerkleHasher() if has_loss_mask else None
        self.num_tokens = 0
        """In the shards that can be read by now."""
        self._has_ended = self._is_told = False
        self._longest = 0
        self._lengths = np.zeros(1, np.int64)
        self._num_unknown = 0

    def expect(self, key: str, doc_ids: list[str]) -> None:
        """Knows of the next unit that the documents make."""
        self._doc_ids[len(self._keys)] = doc_ids
        self._keys.append(key)

    def advance(self) -> None:
        """Takes in the shards up to the first that is not committed yet."""
        while len(self._shards) < len(self._keys):
            key = self._keys[len(self._shards)]
            if not self._ledger.has(key):
                return
            shard = self._ledger.tell(self._split, len(self._shards), key)
            self._fold(shard, self._ledger.path(key))
            doc_ids = self._doc_ids.pop(len(self._shards))
            self.told += [f"{doc_ids[place]}: {told}" for place, told in shard.first_skipped]
            self.num_skipped += shard.skipped
            self._shards.append(replace(shard, file=self._file(len(self._shards))))
        if self._has_ended and not self._is_told:
            self._ledger.complete(self._split)
            self._is_told = True

    def end(self) -> None:
        """Knows that no document will follow."""
        self._has_ended = True
        self.advance()

    def _file(self, index: int) -> str:
        return f"{file_stem(self._split)}-{index:05d}.arrow"

    def manifest(self) -> SplitManifest:
        """Returns what is known when all units are committed."""
        assert len(self._shards) == len(self._keys)
        return SplitManifest(
            documents=sum(shard.documents for shard in self._shards),
            tokens=self.num_tokens,
            text_bytes=sum(shard.text_bytes for shard in self._shards),
            shards=tuple(self._shards),
            token_leaves=tuple(leaf.hex() for leaf in self._token_hasher.leaves),
            tokens_root=self._token_hasher.root(),
            offsets_root=self._offset_hasher.root(),
            loss_mask_root=None if self._mask_hasher is None else self._mask_hasher.root(),
            longest_document=self._longest,
            document_lengths=tuple(self._lengths.tolist()),
            unknown_tokens=None if self._unknown is None else self._num_unknown,
        )

    def _fold(self, shard: Shard, path: Path) -> None:
        with_loss_mask = self._mask_hasher is not None
        read = read_shard(path, self._dtype, with_loss_mask=with_loss_mask)
        lengths = np.diff(read.offsets)
        if (len(lengths), read.num_tokens) != (shard.documents, shard.tokens):
            raise DamagedArtifactError(
                f"{path}: has {len(lengths)} documents and {read.num_tokens} tokens, its "
                f"receipt says {shard.documents} and {shard.tokens}."
            )
        ends = read.offsets[1:].astype("<u8") + self.num_tokens
        self._offset_hasher.update(ends.data.cast("B"))
        for tokens in read.tokens:
            self._token_hasher.update(tokens.data.cast("B"))
            if self._unknown is not None:
                self._num_unknown += int((tokens == self._unknown).sum())
        for mask in read.loss_mask or ():
            assert self._mask_hasher is not None
            self._mask_hasher.update(mask.data)
        self.num_tokens += read.num_tokens
        self._longest = max(self._longest, int(lengths.max(initial=0)))
        binned = np.bincount(np.frexp(np.maximum(lengths, 1))[1] - 1, minlength=len(self._lengths))
        binned[: len(self._lengths)] += self._lengths
        self._lengths = binned


def unknown_id(tokenizer: Tokenizer | PassthroughTokenizer) -> int | None:
    """Returns the id that a tokenizer gives to text it has no other for; None if it needs none."""
    if isinstance(tokenizer, PassthroughTokenizer):
        return None
    model = tokenizer.texts.setup["model"]
    if (index := model.get("unk_id")) is not None:  # Unigram
        return index
    return tokenizer.backend.token_to_id(model.get("unk_token") or "")


def _reuse(ledger: Ledger, manifest: Manifest) -> dict[str, Any]:
    """Returns how much of a corpus was not encoded now."""
    shards = {shard.key: shard for split in manifest.splits.values() for shard in split.shards}
    reused = [shards[key] for key in ledger.from_progress | ledger.from_earlier]
    tokens = sum(shard.tokens for shard in reused)
    return {
        "units": len(reused),
        "of_units": len(shards),
        "from_other_corpora": len(ledger.from_earlier),
        "from_this_build": len(ledger.from_progress),
        "documents": sum(shard.documents for shard in reused),
        "tokens": tokens,
        "percent": round(100 * tokens / max(sum(shard.tokens for shard in shards.values()), 1), 2),
    }


def _require_few_skipped(streams: "Mapping[str, _Stream]", allowed: Mapping[str, int]) -> None:
    """Refuses to leave out more documents of a source than it lets be left out."""
    for source, most in allowed.items():
        found = [stream for split, stream in streams.items() if source_of(split) == source]
        count = sum(stream.num_skipped for stream in found)
        if count > most:
            last = next(stream for stream in reversed(found) if stream.told).told[-1]
            raise ValueError(
                f"{last} With this, {count} documents have no ids, more than `source.max_skipped` "
                f"({most}) lets be left out."
            )


def _built(
    manifest: Manifest, encoder: str, reuse: dict[str, Any], first_skipped: list[str] | None
) -> Built:
    leaves = {}
    facts: dict[str, Any] = {
        "dtype": manifest.dtype,
        "vocab_size": manifest.vocab_size,
        "encoder": encoder,
        "reused": reuse,
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
            "longest_document": split.longest_document,
            "document_lengths": list(split.document_lengths),
        }
        if split.unknown_tokens is not None:
            share = split.unknown_tokens / max(split.tokens, 1)
            facts[name]["unknown_percent"] = round(100 * share, 4)
        if first_skipped is not None:
            facts[name]["skipped"] = sum(shard.skipped for shard in split.shards)
    if first_skipped is not None:
        facts["first_skipped"] = first_skipped
    identity = {
        "dtype": manifest.dtype,
        "vocab_size": manifest.vocab_size,
        "eos_id": manifest.eos_id,
        "leaves": leaves,
    }
    if manifest.shares:
        identity["shares"] = manifest.shares
    return Built(canonical.digest("tokenized_corpus/2", identity), facts=facts, leaves=leaves)
