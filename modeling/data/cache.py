"""The token cache: rows of `sequence_length` tokens cut from the tokenized corpus end to end.

    index.json              layout, row counts, roots, and what the rows are made of
    <split>-00000.arrow     in the layout `copy` only: Arrow IPC stream of one record batch
                            (input_ids: fixed_size_list<uint16>[L]), as `datasets` opens it

In the layout `view` the tokens stay in the shards of the tokenized corpus and rows are gathered
from there; a `copy` stands alone. Row i of a split is its tokens i * L to (i + 1) * L, the last
incomplete row dropped. The content id covers L, dtype, vocabulary, and for each split the number of
rows and the Merkle root of their bytes, so both layouts have the same. That root is a prefix root
of the token stream, computed from stored leaves and one block: another sequence length costs
milliseconds and reads no corpus.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Integer

from modeling import canonical
from modeling.artifacts import Built, Workspace, write_durably
from modeling.data.corpus import TRAIN
from modeling.data.rows import TOKENS_ALONE, Columns, Rows
from modeling.data.shards import FlatTokens, map_rows, write_rows
from modeling.data.tokenized import Manifest, SplitManifest, flat_tokens
from modeling.merkle import BLOCK_BYTES, prefix_root

Layout = Literal["view", "copy"]
INDEX_FILE = "index.json"
FORMATS: dict[Layout, str] = {"view": "token_cache.view/1", "copy": "token_cache.copy/1"}
SHARD_TOKENS = 1 << 26


@dataclass(frozen=True)
class SplitIndex:
    """The rows of one split."""

    rows: int
    root: str
    """Merkle root of the rows' bytes."""
    shards: tuple[str, ...] = ()
    """Files that hold the rows, in order; none in a view."""


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

    @classmethod
    def read(cls, directory: Path) -> "Index":
        """Reads the index of a built token cache."""
        raw = json.loads((directory / INDEX_FILE).read_text(encoding="utf-8"))
        layouts: dict[str, Layout] = {name: layout for layout, name in FORMATS.items()}
        if (name := raw.pop("format")) not in layouts:
            raise ValueError(f"{directory / INDEX_FILE}: format {name!r} is none of {[*layouts]}.")
        splits = {
            name: SplitIndex(split["rows"], split["root"], tuple(split.get("shards", ())))
            for name, split in raw.pop("splits").items()
        }
        return cls(layout=layouts[name], splits=splits, **raw)

    def write(self, directory: Path) -> None:
        """Writes the index of a token cache."""
        raw = {"format": FORMATS[self.layout]} | asdict(self)
        del raw["layout"]
        write_durably(directory / INDEX_FILE, raw)


def build(
    sequence_length: int,
    tokenized_dir: Path,
    workspace: Workspace,
    *,
    tokenized_id: str,
    tokenizer_id: str,
    layout: Layout = "view",
    shard_tokens: int = SHARD_TOKENS,
) -> Built:
    """Indexes the rows that a tokenized corpus gives at this length, and copies them if asked to.

    Args:
        sequence_length: tokens in a row.
        tokenized_dir: the built tokenized corpus.
        workspace: where the files go.
        tokenized_id: content id of the tokenized corpus.
        tokenizer_id: content id of the tokenizer that it was made with.
        layout: `view` to leave the tokens where they are, `copy` for files that stand alone.
        shard_tokens: most tokens in one file of a copy.

    Raises:
        ValueError: a split that has documents has too few tokens for one row.
    """
    manifest = Manifest.read(tokenized_dir)
    dtype = np.dtype(manifest.dtype)
    splits = {}
    for name, split in manifest.splits.items():
        tokens = flat_tokens(tokenized_dir, split, dtype)
        rows = _count_rows(name, split, sequence_length)
        root = _rows_root(rows * sequence_length, split, tokens)
        shards: tuple[str, ...] = ()
        if layout == "copy":
            starts = _shard_starts(rows * sequence_length, sequence_length, shard_tokens)
            shards = _copy(tokens, starts, sequence_length, workspace.output, name)
        splits[name] = SplitIndex(rows, root, shards)
    index = Index(
        _content_id(sequence_length, manifest, splits),
        layout,
        sequence_length,
        manifest.dtype,
        manifest.vocab_size,
        manifest.eos_id,
        tokenized_id,
        tokenizer_id,
        splits,
    )
    index.write(workspace.output)
    facts = {
        name: {
            "rows": splits[name].rows,
            "tokens": splits[name].rows * sequence_length,
            "dropped_tokens": split.tokens - splits[name].rows * sequence_length,
            "documents": split.documents,
        }
        for name, split in manifest.splits.items()
    }
    return Built(index.content_id, facts=facts, leaves={n: s.root for n, s in splits.items()})


class TokenCache:
    """Rows of tokens, gathered from memory-mapped shards."""

    def __init__(self, index: Index, tokens: dict[str, FlatTokens]) -> None:
        """Takes an index and the token stream of each split; `open` reads both from disk."""
        self.content_id = index.content_id
        self.sequence_length = index.sequence_length
        self.vocab_size = index.vocab_size
        self.eos_id = index.eos_id
        self.tokenized_id = index.tokenized_corpus
        self.tokenizer_id = index.tokenizer
        self._splits = index.splits
        self._tokens = tokens

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
                f"{index.tokenized_corpus[:12]}, or build the cache in the layout `copy`."
            )
        manifest = Manifest.read(tokenized_dir)
        return cls(
            index,
            {
                name: _viewed(cache_dir, index, name, tokenized_dir, manifest)
                for name in index.splits
            },
        )

    def num_rows(self, split: str) -> int:
        """Returns how many rows a split has; none if nothing was held out for it."""
        return self._splits[split].rows

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits."""
        return tuple(self._splits)

    def known_rows(self, split: str, wanted: int) -> int:
        """Returns the number of rows, as a cache that still grows does of `wanted` rows."""
        return self.num_rows(split)

    def stop_waiting(self) -> None:
        """Does nothing: all rows are here."""

    @property
    def columns(self) -> Columns:
        """Which columns rows have besides their tokens."""
        return TOKENS_ALONE

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
        starts = indices.astype(np.int64) * self.sequence_length
        return Rows(self._tokens[split].gather(starts, self.sequence_length))


def _count_rows(name: str, split: SplitManifest, sequence_length: int) -> int:
    rows = split.tokens // sequence_length
    if rows == 0 and (split.documents or name == TRAIN):
        raise ValueError(
            f"split `{name}` has {split.tokens} tokens, fewer than one row of {sequence_length}. "
            f"Add documents, or lower the dataset's `sequence_lengths`."
        )
    return rows


def _content_id(sequence_length: int, manifest: Manifest, splits: Mapping[str, SplitIndex]) -> str:
    identity = {
        "sequence_length": sequence_length,
        "dtype": manifest.dtype,
        "vocab_size": manifest.vocab_size,
        "eos_id": manifest.eos_id,
        "splits": {name: {"rows": s.rows, "root": s.root} for name, s in splits.items()},
    }
    return canonical.digest("token_cache/1", identity)


def _copy(
    tokens: FlatTokens, starts: list[int], sequence_length: int, directory: Path, name: str
) -> tuple[str, ...]:
    """Writes the tokens between each two starts as a file of rows; returns the files' names."""
    files = []
    for start, stop in pairwise(starts):
        files.append(f"{name}-{len(files):05d}.arrow")
        write_rows(directory / files[-1], tokens.span(start, stop), sequence_length)
    return tuple(files)


def _shard_starts(num_tokens: int, sequence_length: int, shard_tokens: int) -> list[int]:
    """Returns where a copy's files begin, each at a whole row, and where the last one ends."""
    step = max(shard_tokens // sequence_length, 1) * sequence_length
    return [*range(0, num_tokens, step), num_tokens]


def _copied(cache_dir: Path, index: Index, name: str) -> FlatTokens:
    """Maps a copy's own files of one split."""
    split, dtype = index.splits[name], np.dtype(index.dtype)
    parts = [map_rows(cache_dir / file, dtype, index.sequence_length) for file in split.shards]
    tokens = FlatTokens(parts)
    if len(tokens) != split.rows * index.sequence_length:
        raise ValueError(
            f"{cache_dir}: its {name} files hold {len(tokens)} tokens, its index says {split.rows} "
            f"rows of {index.sequence_length}. Build the token cache again."
        )
    return tokens


def _viewed(
    cache_dir: Path, index: Index, name: str, tokenized_dir: Path, manifest: Manifest
) -> FlatTokens:
    """Maps the tokens that one split is a view of, making sure that it is."""
    split, stored = index.splits[name], manifest.splits[name]
    tokens = flat_tokens(tokenized_dir, stored, np.dtype(manifest.dtype))
    num_tokens = split.rows * index.sequence_length
    if (
        manifest.dtype != index.dtype
        or len(tokens) < num_tokens
        or _rows_root(num_tokens, stored, tokens) != split.root
    ):
        raise ValueError(
            f"{cache_dir}: its {name} rows are not the tokens of {tokenized_dir}. Open it with "
            f"tokenized corpus {index.tokenized_corpus[:12]}."
        )
    return tokens


def _rows_root(num_tokens: int, split: SplitManifest, tokens: FlatTokens) -> str:
    """Returns the Merkle root of a split's first tokens, reading only their last partial block."""
    leaves = [bytes.fromhex(leaf) for leaf in split.token_leaves]
    if num_tokens == 0:
        return prefix_root(leaves, 0, b"")
    item_bytes = tokens.span(0, 1).itemsize
    num_bytes = num_tokens * item_bytes
    block_start = num_bytes // BLOCK_BYTES * BLOCK_BYTES // item_bytes
    last_block = np.ascontiguousarray(tokens.span(block_start, num_tokens))
    return prefix_root(leaves, num_bytes, last_block.data.cast("B"))
