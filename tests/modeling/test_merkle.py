"""Roots depend on bytes alone; prefixes are cheap and equal to hashing from scratch."""

import hashlib
import random

import pytest

from modeling import merkle
from modeling.merkle import MerkleHasher, prefix_root, root_of_leaves


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(merkle, "BLOCK_BYTES", 16)


def root(data: bytes) -> str:
    hasher = MerkleHasher()
    hasher.update(data)
    return hasher.root()


def rfc6962(leaves: list[bytes]) -> bytes:
    """RFC 6962 section 2.1, written as it stands there: an independent recursion."""
    if not leaves:
        return hashlib.sha256(b"").digest()
    if len(leaves) == 1:
        return leaves[0]
    k = 1
    while k * 2 < len(leaves):
        k *= 2
    return hashlib.sha256(b"\x01" + rfc6962(leaves[:k]) + rfc6962(leaves[k:])).digest()


@pytest.mark.parametrize("num_bytes", [0, 1, 15, 16, 17, 32, 33, 100, 160, 1000, 1024])
def test_roots_are_those_of_the_rfc(num_bytes: int):
    data = random.Random(num_bytes).randbytes(num_bytes)
    leaves = [hashlib.sha256(b"\x00" + data[i : i + 16]).digest() for i in range(0, num_bytes, 16)]
    top = rfc6962(leaves)
    expected = hashlib.sha256(b"\x02" + num_bytes.to_bytes(8, "big") + top).hexdigest()
    assert root(data) == expected


def test_how_bytes_arrive_does_not_count():
    data = random.Random(0).randbytes(1000)
    draw = random.Random(1)
    for _ in range(20):
        hasher, at = MerkleHasher(), 0
        while at < len(data):
            size = draw.randint(0, 50)
            hasher.update(data[at : at + size])
            at += size
        assert hasher.root() == root(data)


def test_every_bit_and_the_length_count():
    data = bytearray(100)
    seen = {root(bytes(data)), root(bytes(101)), root(bytes(99))}
    for i in range(100):
        data[i] ^= 1
        seen.add(root(bytes(data)))
        data[i] ^= 1
    assert len(seen) == 103


def test_prefix_roots_need_only_the_last_block():
    data = random.Random(2).randbytes(200)
    hasher = MerkleHasher()
    hasher.update(data)
    for num_bytes in range(201):
        whole = num_bytes // 16 * 16
        assert prefix_root(hasher.leaves, num_bytes, data[whole:num_bytes]) == root(
            data[:num_bytes]
        )


def test_a_root_can_be_asked_for_midway():
    hasher = MerkleHasher()
    hasher.update(b"a" * 40)
    assert hasher.root() == root(b"a" * 40)
    hasher.update(b"b" * 40)
    assert hasher.root() == root(b"a" * 40 + b"b" * 40)


def test_wrong_leaf_counts_and_blocks_are_refused():
    with pytest.raises(ValueError, match="2 leaves of 16 bytes, got 1"):
        root_of_leaves([b"x" * 32], 17)
    with pytest.raises(ValueError, match="block of 1 bytes, got 3"):
        prefix_root([b"x" * 32], 17, b"abc")
