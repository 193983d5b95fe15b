"""What proves on which rows a piece of training was done, before the cache had a content id.

    {"sequence_length": L, "splits": {split: {"rows": n, "root": ..., "segment_ids": ...,
                                              "loss_mask": ...}}}

`root` is the Merkle root of the ids of the first n rows, as they are stored; the others, where rows
have such columns, of their segments as `<i4` and of their loss mask, a byte each. Those are all
rows that may have been read, so work with this evidence may be continued on any cache whose splits
begin with exactly them, and on no other.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from modeling.data.rows import Rows
from modeling.merkle import MerkleHasher

GatherRows = Callable[[str, np.ndarray], Rows]
_ROWS_AT_ONCE = 1024


class RowsProof:
    """Digests the first rows of a split, as they come to be known."""

    def __init__(self, dtype: np.dtype) -> None:
        """Digests ids as `dtype`."""
        self._dtypes = {"tokens": dtype, "segment_ids": np.dtype("<i4"), "loss_mask": np.uint8}
        self._hashers: dict[str, MerkleHasher] = {"tokens": MerkleHasher()}
        self.num_rows = 0

    def take(self, gather: Callable[[np.ndarray], Rows], num_rows: int) -> None:
        """Takes in the rows up to `num_rows`; `gather` returns rows by their numbers."""
        while self.num_rows < num_rows:
            end = min(self.num_rows + _ROWS_AT_ONCE, num_rows)
            found = gather(np.arange(self.num_rows, end))._asdict()
            for name, column in found.items():
                if column is not None:
                    stored = np.ascontiguousarray(column, self._dtypes[name])
                    self._hashers.setdefault(name, MerkleHasher()).update(stored.data.cast("B"))
            self.num_rows = end

    def summary(self) -> dict[str, Any]:
        """Returns the number of rows and the root of each column."""
        roots = {name: hasher.root() for name, hasher in self._hashers.items()}
        return {"rows": self.num_rows, "root": roots.pop("tokens")} | roots


def refusal(
    seen: Mapping[str, Any],
    num_rows: Mapping[str, int],
    gather: GatherRows,
    *,
    sequence_length: int,
    dtype: np.dtype,
) -> str | None:
    """Returns how rows differ from those that were read; None if they do not.

    Args:
        seen: the evidence.
        num_rows: how many rows there are, by split.
        gather: gives rows of a split. As many are read as were read then.
        sequence_length: tokens of a row.
        dtype: that ids are stored in.
    """
    if "splits" not in seen:
        return f"it read token cache {seen['token_cache'][:12]}, which is not known to be this one"
    if seen["sequence_length"] != sequence_length:
        return f"it read rows of {seen['sequence_length']} tokens, these have {sequence_length}"
    for split, part in seen["splits"].items():
        if split not in num_rows:
            return f"it read split `{split}`, which there is no more"
        if num_rows[split] < part["rows"]:
            return (
                f"it read {part['rows']:,} rows of split `{split}`, which has {num_rows[split]:,}"
            )
        proof = RowsProof(dtype)
        proof.take(lambda indices, split=split: gather(split, indices), part["rows"])
        if proof.summary() != dict(part):
            return f"the first {part['rows']:,} rows of split `{split}` are not those that it read"
    return None
