"""Merkle roots over byte streams, as in RFC 6962 section 2.1, with fixed-size leaves.

    leaf  = SHA-256(0x00 ++ block)              blocks of 4 MiB, the last one shorter
    node  = SHA-256(0x01 ++ left ++ right)      split at the largest power of two below the leaf
    count root  = SHA-256(0x02 ++ length as 8 bytes big endian ++ top node)

The root depends on the bytes alone, never on how they arrived or are stored. Keeping the leaves (32
bytes per 4 MiB) gives the root of any *prefix* for the price of its last block: a token cache of
another sequence length, which drops a different tail, needs no second pass over the tokens.
"""

import hashlib
from collections.abc import Sequence

BLOCK_BYTES = 4 * 1024 * 1024


class MerkleHasher:
    """Takes a stream in pieces of any size and yields its Merkle root."""

    def __init__(self) -> None:
        self.leaves: list[bytes] = []
        self.num_bytes = 0
        self._block = _new_leaf()
        self._block_bytes = 0

    def update(self, data: bytes | bytearray | memoryview) -> None:
        """Appends `data`; pass a NumPy array as `memoryview(array).cast("B")`."""
        view = memoryview(data).cast("B")
        self.num_bytes += len(view)
        while len(view):
            piece = view[: BLOCK_BYTES - self._block_bytes]
            self._block.update(piece)
            self._block_bytes += len(piece)
            view = view[len(piece) :]
            if self._block_bytes == BLOCK_BYTES:
                self._close_block()

    def root(self) -> str:
        """Returns the root of everything so far, in hex; more may be appended afterwards."""
        tail = [self._block.digest()] if self._block_bytes else []
        return root_of_leaves([*self.leaves, *tail], self.num_bytes)

    def _close_block(self) -> None:
        self.leaves.append(self._block.digest())
        self._block = _new_leaf()
        self._block_bytes = 0


def root_of_leaves(leaves: Sequence[bytes], num_bytes: int) -> str:
    """Returns the root, in hex, of a stream of `num_bytes` bytes with these leaf digests."""
    expected = -(-num_bytes // BLOCK_BYTES)
    if len(leaves) != expected:
        raise ValueError(
            f"{num_bytes} bytes have {expected} leaves of {BLOCK_BYTES} bytes, got {len(leaves)}."
        )
    return hashlib.sha256(b"\x02" + num_bytes.to_bytes(8, "big") + _top(list(leaves))).hexdigest()


def prefix_root(leaves: Sequence[bytes], num_bytes: int, last_block: bytes | memoryview) -> str:
    """Returns the root of a stream's first `num_bytes` bytes from the whole stream's leaves.

    Args:
        last_block: the prefix's bytes after its last whole block; empty when it ends on a block.
    """
    whole, rest = divmod(num_bytes, BLOCK_BYTES)
    view = memoryview(last_block).cast("B")
    if len(view) != rest:
        raise ValueError(
            f"a prefix of {num_bytes} bytes ends in a block of {rest} bytes, got {len(view)}."
        )
    tail = [hashlib.sha256(b"\x00" + view).digest()] if rest else []
    return root_of_leaves([*leaves[:whole], *tail], num_bytes)


def _new_leaf() -> "hashlib._Hash":
    return hashlib.sha256(b"\x00")


def _top(level: list[bytes]) -> bytes:
    """Pairs neighbours upwards, carrying an odd last one: the tree of RFC 6962's split."""
    if not level:
        return hashlib.sha256(b"").digest()
    while len(level) > 1:
        paired = [
            hashlib.sha256(b"\x01" + a + b).digest()
            for a, b in zip(level[::2], level[1::2], strict=False)
        ]
        level = paired + level[len(paired) * 2 :]
    return level[0]
