"""What proves on which rows a piece of training was done, before the cache had a content id.

    {"sequence_length": L, "splits": {split: {"rows": n, "root": Merkle root of the first n L ids}}}

Those are all rows that were there to be read, so work with this evidence may be continued on any
cache whose splits begin with exactly them, and on no other.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from modeling.data.shards import FlatTokens
from modeling.merkle import BLOCK_BYTES, MerkleHasher, prefix_root

_ROWS_AT_ONCE = 1024


def of_rows(
    leaves: Sequence[bytes], tokens: FlatTokens, num_rows: int, sequence_length: int
) -> dict[str, Any]:
    """Returns the evidence of the first rows of one split.

    Args:
        leaves: of the Merkle tree over all tokens, as far as its blocks are full.
        tokens: the tokens themselves.
        num_rows: how many rows count.
        sequence_length: tokens of a row.
    """
    item_bytes = tokens.span(0, 0).itemsize
    num_tokens = num_rows * sequence_length
    num_bytes = num_tokens * item_bytes
    start = num_bytes // BLOCK_BYTES * BLOCK_BYTES // item_bytes
    last_block = np.ascontiguousarray(tokens.span(start, num_tokens))
    root = prefix_root(leaves, num_bytes, last_block.data.cast("B"))
    return {"rows": num_rows, "root": root}


def refusal(
    seen: Mapping[str, Any],
    num_rows: Mapping[str, int],
    stored_rows: Callable[[str, np.ndarray], np.ndarray],
    sequence_length: int,
) -> str | None:
    """Returns how rows differ from those that were read; None if they do not.

    Args:
        seen: the evidence.
        num_rows: how many rows there are, by split.
        stored_rows: gives the ids of rows of a split, in the type that they are stored in. As many
            are read as were read then.
        sequence_length: tokens of a row.
    """
    if seen["sequence_length"] != sequence_length:
        return f"it read rows of {seen['sequence_length']} tokens, these have {sequence_length}"
    for split, part in seen["splits"].items():
        if split not in num_rows:
            return f"it read split `{split}`, which there is no more"
        if num_rows[split] < part["rows"]:
            return (
                f"it read {part['rows']:,} rows of split `{split}`, which has {num_rows[split]:,}"
            )
        hasher = MerkleHasher()
        for start in range(0, part["rows"], _ROWS_AT_ONCE):
            indices = np.arange(start, min(start + _ROWS_AT_ONCE, part["rows"]))
            hasher.update(stored_rows(split, indices).data.cast("B"))
        if hasher.root() != part["root"]:
            return f"the first {part['rows']:,} rows of split `{split}` are not those that it read"
    return None
