"""The token cache: rows of `sequence_length` tokens cut from the tokenized corpus end to end.

    index.json   a view: row counts and what the rows are made of; the tokens stay in the shards of
                 the tokenized corpus and are gathered from them on reading

Row i of a split is its tokens i * L to (i + 1) * L, the last incomplete row dropped. The content id
covers L, dtype, vocabulary, and for each split the number of rows and the Merkle root of their
bytes. That root is a prefix root of the token stream, computed from stored leaves and one block, so
that another sequence length costs milliseconds and reads no corpus.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int32, Integer

from modeling import canonical
from modeling.artifacts import Built, Workspace, write_durably
from modeling.data.corpus import TRAIN
from modeling.data.shards import FlatTokens
from modeling.data.tokenized import Manifest, SplitManifest, flat_tokens
from modeling.merkle import BLOCK_BYTES, prefix_root

INDEX_FILE = "index.json"
FORMAT = "token_cache.view/1"


@dataclass(frozen=True)
class SplitIndex:
    """The rows of one split."""

    rows: int
    root: str
    """Merkle root of the rows' bytes."""


@dataclass(frozen=True)
class Index:
    """`index.json`."""

    content_id: str
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
        if raw.pop("format") != FORMAT:
            raise ValueError(f"{directory / INDEX_FILE}: not of format {FORMAT}.")
        splits = {name: SplitIndex(**split) for name, split in raw.pop("splits").items()}
        return cls(splits=splits, **raw)


def build(
    sequence_length: int,
    tokenized_dir: Path,
    workspace: Workspace,
    *,
    tokenized_id: str,
    tokenizer_id: str,
) -> Built:
    """Indexes the rows that a tokenized corpus gives at this length.

    Raises:
        ValueError: a split that has documents has too few tokens for one row.
    """
    manifest = Manifest.read(tokenized_dir)
    splits, facts = {}, {}
    for name, split in manifest.splits.items():
        rows = split.tokens // sequence_length
        if rows == 0 and (split.documents or name == TRAIN):
            raise ValueError(
                f"split `{name}` has {split.tokens} tokens, fewer than one row of "
                f"{sequence_length}. Add documents, or lower the dataset's `sequence_lengths`."
            )
        tokens = flat_tokens(tokenized_dir, split, np.dtype(manifest.dtype))
        splits[name] = SplitIndex(rows, _rows_root(rows * sequence_length, split, tokens))
        facts[name] = {
            "rows": rows,
            "tokens": rows * sequence_length,
            "dropped_tokens": split.tokens - rows * sequence_length,
            "documents": split.documents,
        }
    identity = {
        "sequence_length": sequence_length,
        "dtype": manifest.dtype,
        "vocab_size": manifest.vocab_size,
        "eos_id": manifest.eos_id,
        "splits": {name: asdict(split) for name, split in splits.items()},
    }
    index = Index(
        canonical.digest("token_cache/1", identity),
        sequence_length,
        manifest.dtype,
        manifest.vocab_size,
        manifest.eos_id,
        tokenized_id,
        tokenizer_id,
        splits,
    )
    write_durably(workspace.output / INDEX_FILE, {"format": FORMAT} | asdict(index))
    leaves = {name: split.root for name, split in splits.items()}
    return Built(index.content_id, facts=facts, leaves=leaves)


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
    def open(cls, cache_dir: Path, tokenized_dir: Path) -> "TokenCache":
        """Opens a built cache over the tokenized corpus that it is a view of.

        Raises:
            ValueError: the tokenized corpus holds other tokens than the cache was made of.
        """
        index, manifest = Index.read(cache_dir), Manifest.read(tokenized_dir)
        tokens = {}
        for name, split in index.splits.items():
            stream = flat_tokens(tokenized_dir, manifest.splits[name], np.dtype(manifest.dtype))
            num_tokens = split.rows * index.sequence_length
            if (
                manifest.dtype != index.dtype
                or len(stream) < num_tokens
                or _rows_root(num_tokens, manifest.splits[name], stream) != split.root
            ):
                raise ValueError(
                    f"{cache_dir}: its {name} rows are not the tokens of {tokenized_dir}. Open it "
                    f"with tokenized corpus {index.tokenized_corpus[:12]}."
                )
            tokens[name] = stream
        return cls(index, tokens)

    def num_rows(self, split: str) -> int:
        """Returns how many rows a split has; none if nothing was held out for it."""
        return self._splits[split].rows

    def rows(
        self, split: str, indices: Integer[np.ndarray, " rows"]
    ) -> Int32[np.ndarray, "rows Pos"]:
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
        return self._tokens[split].gather(starts, self.sequence_length)


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
