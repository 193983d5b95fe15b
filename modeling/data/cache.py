"""The token cache: rows of `sequence_length` tokens, laid over the tokenized corpus.

    index.json              layout, packing, row counts, roots, and the windows of packed documents
    <split>-00000.arrow     in a copy: the rows themselves, as `datasets` opens them, see `shards`
                            (`train/web` is written `train-web`)

Two packings. `concat` cuts the token stream of a split: row i is its tokens i * L to (i + 1) * L,
the last incomplete row dropped. `documents` lays whole documents side by side, padded with the
end-of-text id; segments tell them apart and a loss mask leaves the padding out.

Two layouts of each. In a view the tokens stay in the shards of the tokenized corpus and rows are
gathered from there; a copy stands alone. Both have one content id, which covers L, dtype,
vocabulary, and for each split the number of rows and a root over what they hold. Of `concat` that
is the Merkle root of the rows' bytes: a prefix root of the stream, computed from stored leaves and
one block. Of `documents` it covers the root of the stream and digests of its spans (`packing`). So
another sequence length reads no tokens.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Integer

from modeling import canonical
from modeling.artifacts import Built, Workspace, needing_space, write_durably
from modeling.data import evidence
from modeling.data.config import LongDocuments, Packing, TokenCacheConfig
from modeling.data.packing import Documents, Fate, PackedRows, Packer, Pieces, Window
from modeling.data.rows import Columns, Rows
from modeling.data.shards import FlatTokens, map_rows, map_shard, prefix_root_of, write_rows
from modeling.data.splits import TRAIN, file_stem, role_of
from modeling.data.token_files import Manifest, SplitManifest

Layout = Literal["view", "copy"]
INDEX_FILE = "index.json"
FORMATS: dict[Layout, str] = {"view": "token_cache.view/1", "copy": "token_cache.copy/1"}
SHARD_TOKENS = 1 << 26
_CHUNK_TOKENS = 1 << 20


@dataclass(frozen=True)
class SplitIndex:
    """The rows of one split."""

    rows: int
    root: str
    """Over what the rows hold."""
    shards: tuple[str, ...] = ()
    """Files that hold the rows of a copy, in order."""
    windows: tuple[Window, ...] | None = None
    """Of packed documents."""
    share: int = 1
    """What it has of an epoch's beginning beside other sources: see `modeling.data.mixture`."""


@dataclass(frozen=True)
class Index:
    """`index.json`."""

    content_id: str
    layout: Layout
    sequence_length: int
    dtype: str
    vocab_size: int
    eos_id: int
    tokenized_corpus: str
    tokenizer: str
    splits: dict[str, SplitIndex]
    packing: Packing = "concat"
    columns: Columns = field(default_factory=Columns)
    long_documents: LongDocuments = "split"

    @classmethod
    def read(cls, directory: Path) -> "Index":
        """Reads the index of a built token cache."""
        raw = json.loads((directory / INDEX_FILE).read_text(encoding="utf-8"))
        layouts: dict[str, Layout] = {name: layout for layout, name in FORMATS.items()}
        if (name := raw.pop("format")) not in layouts:
            raise ValueError(f"{directory / INDEX_FILE}: format {name!r} is none of {[*layouts]}.")
        splits = {name: _split_index(split) for name, split in raw.pop("splits").items()}
        columns = Columns(**raw.pop("columns", {}))
        return cls(layout=layouts[name], splits=splits, columns=columns, **raw)

    def write(self, directory: Path) -> None:
        """Writes the index of a token cache."""
        raw = {"format": FORMATS[self.layout]} | asdict(self)
        raw["columns"] = self.columns._asdict()
        del raw["layout"]
        write_durably(directory / INDEX_FILE, raw)


def _split_index(raw: Mapping[str, Any]) -> SplitIndex:
    windows = raw.get("windows")
    return SplitIndex(
        raw["rows"],
        raw["root"],
        tuple(raw.get("shards", ())),
        None if windows is None else tuple(Window(*window) for window in windows),
        raw.get("share", 1),
    )


def build(
    config: TokenCacheConfig,
    tokenized_dir: Path,
    workspace: Workspace,
    *,
    tokenized_id: str,
    tokenizer_id: str,
) -> Built:
    """Indexes the rows that a tokenized corpus gives; no token is copied.

    Args:
        config: length of a row, and how documents are laid into rows.
        tokenized_dir: the built tokenized corpus.
        workspace: where the index goes.
        tokenized_id: content id of the tokenized corpus.
        tokenizer_id: content id of the tokenizer that it was made with.

    Raises:
        ValueError: a split that has documents has too few tokens for one row.
    """
    manifest = Manifest.read(tokenized_dir)
    splits: dict[str, SplitIndex] = {}
    facts: dict[str, Any] = {"sequence_length": config.length, "packing": config.packing}
    for name, split in manifest.splits.items():
        stream = _Stream.of(tokenized_dir, split, manifest)
        fate = Fate(split.documents)
        if config.packing == "documents":
            splits[name], fate = _packed(config, stream.documents, split)
        else:
            rows = split.tokens // config.length
            root = _prefix_root(rows * config.length, split, stream.tokens)
            splits[name] = SplitIndex(rows, root)
            fate.lost_tokens = split.tokens - rows * config.length
        splits[name] = replace(splits[name], share=manifest.shares.get(name, 1))
        _require_rows(name, split, splits[name].rows, config)
        facts[name] = _facts(config, split, splits[name].rows, fate)
    is_packed = config.packing == "documents"
    index = Index(
        _content_id(config.length, config.packing, manifest, splits),
        "view",
        config.length,
        manifest.dtype,
        manifest.vocab_size,
        manifest.eos_id,
        tokenized_id,
        tokenizer_id,
        splits,
        config.packing,
        Columns(is_packed, is_packed or manifest.has_loss_mask),
        config.long_documents,
    )
    index.write(workspace.output)
    return Built(index.content_id, facts=facts, leaves={n: s.root for n, s in splits.items()})


def copy(
    cache_dir: Path,
    tokenized_dir: Path,
    workspace: Workspace,
    *,
    shard_tokens: int = SHARD_TOKENS,
) -> Built:
    """Writes the rows of a view as files that stand alone; the content id stays.

    Args:
        cache_dir: the view.
        tokenized_dir: what it is a view of.
        workspace: where the files go.
        shard_tokens: most tokens in one file.

    Raises:
        DiskFullError: there is no space for it.
    """
    index, opened = Index.read(cache_dir), TokenCache.open(cache_dir, tokenized_dir)
    splits, facts = {}, {}
    for name, split in index.splits.items():
        step = max(shard_tokens // index.sequence_length, 1)
        files = []
        for start in range(0, split.rows, step):
            files.append(f"{file_stem(name)}-{len(files):05d}.arrow")
            columns = _columns(opened, index, name, start, min(start + step, split.rows))
            with needing_space("rows of a token cache", workspace.output):
                write_rows(workspace.output / files[-1], columns, index.sequence_length)
        splits[name] = replace(split, shards=tuple(files), windows=None)
        facts[name] = {"rows": split.rows, "files": len(files)}
    replace(index, layout="copy", splits=splits).write(workspace.output)
    return Built(index.content_id, facts=facts, leaves={n: s.root for n, s in splits.items()})


@dataclass(frozen=True)
class StoredRows:
    """Rows of L that stand one after another in flat columns."""

    tokens: FlatTokens
    segment_ids: FlatTokens | None
    loss_mask: FlatTokens | None
    sequence_length: int

    def gather(self, indices: Integer[np.ndarray, " rows"]) -> Rows:
        """Returns the rows at `indices`."""
        length, segment_ids, mask = self.sequence_length, self.segment_ids, self.loss_mask
        return Rows(
            self.tokens.rows(indices, length),
            None if segment_ids is None else segment_ids.rows(indices, length),
            None if mask is None else mask.rows(indices, length) != 0,
        )


RowTable = StoredRows | PackedRows


class TokenCache:
    """Rows of tokens, gathered from memory-mapped shards."""

    def __init__(self, index: Index, tables: Mapping[str, RowTable]) -> None:
        """Takes an index and the rows of each split; `open` reads both from disk."""
        self.content_id = index.content_id
        self.sequence_length = index.sequence_length
        self.vocab_size = index.vocab_size
        self.eos_id = index.eos_id
        self.tokenized_id = index.tokenized_corpus
        self.tokenizer_id = index.tokenizer
        self._index = index
        self._tables = tables

    @classmethod
    def open(cls, cache_dir: Path, tokenized_dir: Path | None = None) -> "TokenCache":
        """Opens a built cache; a view needs the tokenized corpus that it is a view of.

        Raises:
            ValueError: the tokenized corpus is missing or holds other tokens than the cache's.
        """
        index = Index.read(cache_dir)
        if index.layout == "copy":
            return cls(index, {name: _copied(cache_dir, index, name) for name in index.splits})
        if tokenized_dir is None:
            raise ValueError(
                f"{cache_dir}: a view; open it with tokenized corpus "
                f"{index.tokenized_corpus[:12]}, or take a copy of it (`layout: copy`)."
            )
        manifest = Manifest.read(tokenized_dir)
        tables = {
            name: _viewed(cache_dir, index, name, tokenized_dir, manifest) for name in index.splits
        }
        found = _content_id(index.sequence_length, index.packing, manifest, index.splits)
        if found != index.content_id:
            raise ValueError(
                f"{cache_dir}: a view of other tokens, or of others that are learned, than those "
                f"of {tokenized_dir}. Open it with tokenized corpus {index.tokenized_corpus[:12]}."
            )
        return cls(index, tables)

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits."""
        return tuple(self._index.splits)

    def known_rows(self, split: str, wanted: int) -> int:
        """Returns the number of rows, as a cache that still grows does of `wanted` rows."""
        return self.num_rows(split)

    def share(self, split: str) -> int:
        """Returns how much of an epoch's beginning a split is, beside what others are."""
        return self._index.splits[split].share

    def stop_waiting(self) -> None:
        """Does nothing: all rows are here."""

    def evidence(self) -> dict[str, Any]:
        """Returns what proves which rows these are."""
        return {"token_cache": self.content_id}

    def refusal(self, seen: Mapping[str, Any]) -> str | None:
        """Returns why work with this evidence was done on other rows; None if on these."""
        if "token_cache" not in seen:
            return evidence.refusal(
                seen,
                {split: self.num_rows(split) for split in self.splits},
                self.rows,
                sequence_length=self.sequence_length,
                dtype=np.dtype(self._index.dtype),
            )
        if seen["token_cache"] == self.content_id:
            return None
        return f"it read token cache {seen['token_cache'][:12]}, this is {self.content_id[:12]}"

    @property
    def columns(self) -> Columns:
        """Which columns rows have besides their tokens."""
        return self._index.columns

    def table(self, split: str) -> RowTable:
        """Returns the rows of a split by themselves."""
        return self._tables[split]

    def pieces(self, split: str) -> Pieces:
        """Returns which spans of the stream the rows of a view of packed documents have."""
        table = self._tables[split]
        if not isinstance(table, PackedRows):
            raise ValueError(f"split `{split}`: its rows are stored, not put together of pieces.")
        return table.pieces()

    def num_rows(self, split: str) -> int:
        """Returns how many rows a split has; none if nothing was held out for it."""
        return self._index.splits[split].rows

    def rows(self, split: str, indices: Integer[np.ndarray, " rows"]) -> Rows:
        """Returns the rows at `indices`, which may repeat and come in any order.

        Raises:
            IndexError: an index is negative or not below the number of rows.
        """
        num_rows = self.num_rows(split)
        if len(indices) and not (indices.min() >= 0 and indices.max() < num_rows):
            raise IndexError(
                f"rows {indices.min()} to {indices.max()} were asked of split `{split}`, which "
                f"has rows 0 to {num_rows - 1}."
            )
        return self._tables[split].gather(indices)


@dataclass(frozen=True)
class _Stream:
    """One split of a tokenized corpus, mapped into memory."""

    tokens: FlatTokens
    loss_mask: FlatTokens | None
    documents: Documents

    @classmethod
    def of(cls, directory: Path, split: SplitManifest, manifest: Manifest) -> "_Stream":
        dtype, has_mask = np.dtype(manifest.dtype), manifest.has_loss_mask
        shards = [
            map_shard(directory / shard.file, dtype, with_loss_mask=has_mask)
            for shard in split.shards
        ]
        masks = [shard.loss_mask for shard in shards if shard.loss_mask is not None]
        return cls(
            FlatTokens([shard.tokens for shard in shards]),
            FlatTokens(masks) if has_mask else None,
            Documents([shard.offsets for shard in shards]),
        )


def _packed(
    config: TokenCacheConfig, documents: Documents, split: SplitManifest
) -> tuple[SplitIndex, Fate]:
    """Packs the documents of one split."""
    packer, fate = Packer(config.length, config.long_documents), Fate()
    windows: list[Window] = []
    for first, stop in packer.windows(documents):
        pieces, of_window = packer.pack(documents, first, stop)
        windows.append(Window.of(stop - first, pieces))
        fate.add(of_window)
    rows = sum(window.rows for window in windows)
    return SplitIndex(rows, _packed_root(split, windows), windows=tuple(windows)), fate


def _packed_root(split: SplitManifest, windows: Sequence[Window]) -> str:
    """Returns the root of rows that these windows of this stream have."""
    identity = {
        "tokens": split.tokens_root,
        "windows": [list(window) for window in windows],
        "loss_mask": split.loss_mask_root,
    }
    return canonical.digest("packed_rows/2", identity)


def _prefix_root(num_tokens: int, split: SplitManifest, tokens: FlatTokens) -> str:
    """Returns the Merkle root of a split's first tokens, reading only their last partial block."""
    return prefix_root_of(tokens, [bytes.fromhex(leaf) for leaf in split.token_leaves], num_tokens)


def _require_rows(name: str, split: SplitManifest, rows: int, config: TokenCacheConfig) -> None:
    if rows or not (split.documents or role_of(name) == TRAIN):
        return
    if config.packing == "documents":
        raise ValueError(
            f"split `{name}`: none of its {split.documents} documents fits into a row of "
            f"{config.length} tokens. Raise the length, or take another `long_documents` than "
            f"{config.long_documents!r}."
        )
    raise ValueError(
        f"split `{name}` has {split.tokens} tokens, fewer than one row of {config.length}. "
        f"Add documents, or lower the dataset's `sequence_lengths`."
    )


def _content_id(
    sequence_length: int, packing: Packing, manifest: Manifest, splits: Mapping[str, SplitIndex]
) -> str:
    identity: dict[str, Any] = {
        "sequence_length": sequence_length,
        "dtype": manifest.dtype,
        "vocab_size": manifest.vocab_size,
        "eos_id": manifest.eos_id,
        "splits": {name: {"rows": s.rows, "root": s.root} for name, s in splits.items()},
    }
    if manifest.shares:
        identity["shares"] = manifest.shares
    if packing == "documents":
        identity["packing"] = packing
    elif manifest.has_loss_mask:
        # Of the whole stream, of which the rows hold all but the end.
        identity["loss_masks"] = {name: s.loss_mask_root for name, s in manifest.splits.items()}
    return canonical.digest("token_cache/1", identity)


def _facts(config: TokenCacheConfig, split: SplitManifest, rows: int, fate: Fate) -> dict[str, Any]:
    tokens = split.tokens - fate.lost_tokens
    room = rows * config.length
    return {
        "rows": rows,
        "tokens": tokens,
        "dropped_tokens": fate.lost_tokens,
        "padding_tokens": room - tokens,
        "padding_share": round((room - tokens) / max(room, 1), 6),
        "documents": split.documents,
        "cut_documents": fate.cut,
        "dropped_documents": fate.dropped,
        "bytes_per_token": round(split.text_bytes / max(split.tokens, 1), 4),
        # From so many tokens on, to below twice as many, there are so many documents.
        "document_lengths": [
            [1 << power, count] for power, count in enumerate(split.document_lengths) if count
        ],
    }


def _columns(
    opened: TokenCache, index: Index, name: str, start: int, stop: int
) -> dict[str, list[np.ndarray]]:
    """Returns rows `start` to `stop` of a split as the flat columns of a file, in pieces."""
    table, length = opened.table(name), index.sequence_length
    if isinstance(table, StoredRows) and table.loss_mask is None:
        return {"input_ids": table.tokens.pieces(start * length, stop * length)}
    columns = {column: [] for column in _column_dtypes(index)}
    step = max(_CHUNK_TOKENS // length, 1)
    for first, last in pairwise([*range(start, stop, step), stop]):
        found = (column for column in table.gather(np.arange(first, last)) if column is not None)
        for (column, dtype), piece in zip(_column_dtypes(index).items(), found, strict=True):
            columns[column].append(piece.reshape(-1).astype(dtype))
    return columns


def _column_dtypes(index: Index) -> dict[str, np.dtype]:
    """Returns the columns of a copy's files, in order, which is that of `Rows`."""
    dtypes = {"input_ids": np.dtype(index.dtype)}
    if index.columns.segment_ids:
        dtypes["segment_ids"] = np.dtype(
            np.uint16 if index.sequence_length < 1 << 16 else np.uint32
        )
    if index.columns.loss_mask:
        dtypes["loss_mask"] = np.dtype(np.uint8)
    return dtypes


def _copied(cache_dir: Path, index: Index, name: str) -> StoredRows:
    """Maps a copy's own files of one split."""
    split, dtypes = index.splits[name], _column_dtypes(index)
    parts = [map_rows(cache_dir / file, dtypes, index.sequence_length) for file in split.shards]
    flat = {column: FlatTokens([part[column] for part in parts]) for column in dtypes}
    tokens = flat["input_ids"]
    if len(tokens) != split.rows * index.sequence_length:
        raise ValueError(
            f"{cache_dir}: its {name} files hold {len(tokens)} tokens, its index says {split.rows} "
            f"rows of {index.sequence_length}. Build the token cache again."
        )
    return StoredRows(tokens, flat.get("segment_ids"), flat.get("loss_mask"), index.sequence_length)


def _viewed(
    cache_dir: Path, index: Index, name: str, tokenized_dir: Path, manifest: Manifest
) -> RowTable:
    """Maps what one split is a view of, making sure that it is."""
    split, stored, length = index.splits[name], manifest.splits[name], index.sequence_length
    stream = _Stream.of(tokenized_dir, stored, manifest)
    num_tokens = split.rows * length
    if split.windows is not None:
        found = _packed_root(stored, split.windows)
    elif len(stream.tokens) >= num_tokens:
        found = _prefix_root(num_tokens, stored, stream.tokens)
    else:
        found = None
    if found != split.root or manifest.dtype != index.dtype:
        raise ValueError(
            f"{cache_dir}: its {name} rows are not the tokens of {tokenized_dir}. Open it with "
            f"tokenized corpus {index.tokenized_corpus[:12]}."
        )
    if split.windows is None:
        return StoredRows(stream.tokens, None, stream.loss_mask, length)
    return PackedRows(
        split.windows,
        stream.documents,
        stream.tokens,
        stream.loss_mask,
        sequence_length=length,
        long_documents=index.long_documents,
        padding_id=index.eos_id,
    )
