"""The data order: a bijection, exact for large sizes, keyed, and independent of how it is asked."""

import hashlib
import random

import numpy as np
import pytest

from modeling.canonical import encode
from modeling.data.order import RowOrder, permute
from modeling.training.config import DataOrderConfig

KEYS = np.array([random.Random(i).getrandbits(64) for i in range(8)], np.uint64)
SOURCE = "ab" * 32


def exact_permute(position: int, size: int, keys: list[int]) -> int:
    """The same network on Python integers, which cannot overflow."""

    def mix(x: int) -> int:
        x &= 2**64 - 1
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
        return x ^ (x >> 31)

    bits = (size - 1).bit_length()
    left_bits, right_bits = bits // 2, bits - bits // 2
    value = position
    while True:
        left, right = value >> right_bits, value % 2**right_bits
        for index, key in enumerate(keys):
            if index % 2 == 0:
                left ^= mix(right + key) % 2**left_bits
            else:
                right ^= mix(left + key) % 2**right_bits
        value = left * 2**right_bits + right
        if value < size:
            return value


def test_every_size_up_to_2000_is_a_bijection():
    for size in range(1, 2001):
        image = permute(np.arange(size, dtype=np.uint64), size, KEYS)
        assert np.array_equal(np.sort(image), np.arange(size)), size


@pytest.mark.parametrize(
    "size", [1, 2, 3, 1000, 2**16, 2**32 - 1, 2**32 + 9, 2**33 + 9, 2**40 - 87, 2**40]
)
def test_large_sizes_agree_with_exact_integers(size):
    draw = random.Random(size)
    positions = [draw.randrange(size) for _ in range(200)] + [0, size - 1]
    image = permute(np.array(positions, np.uint64), size, KEYS).tolist()
    assert image == [exact_permute(p, size, KEYS.tolist()) for p in positions]


def test_neighbours_land_as_if_at_random():
    size = 4096
    image = permute(np.arange(size, dtype=np.uint64), size, KEYS).astype(np.int64)
    distance = np.diff(image) % size
    observed = np.bincount(distance * 64 // size, minlength=64)
    expected = (size - 1) / 64
    chi_square = ((observed - expected) ** 2 / expected).sum()
    assert chi_square < 103.4  # the 0.1 % point of 63 degrees of freedom
    cells = np.bincount((image[:-1] * 8 // size) * 8 + image[1:] * 8 // size, minlength=64)
    assert ((cells - expected) ** 2 / expected).sum() < 103.4


def test_rows_are_golden():
    order = RowOrder(DataOrderConfig(seed=7, era_rows=8), 20, SOURCE)
    assert order.rows_at(0, 40).tolist() == GOLDEN


def test_keys_are_digests_of_seed_epoch_era_and_source():
    order = RowOrder(DataOrderConfig(seed=7, era_rows=8), 20, SOURCE)
    keys = [
        int.from_bytes(digest[i : i + 8], "big")
        for index in range(2)
        for digest in [hashlib.sha256(encode(["order.eras/1", 7, 1, 2, SOURCE, index])).digest()]
        for i in range(0, 32, 8)
    ]
    third_era_of_second_epoch = [16 + exact_permute(i, 4, keys) for i in range(4)]
    assert order.rows_at(36, 4).tolist() == third_era_of_second_epoch


def test_each_era_is_permuted_within_itself_and_each_epoch_anew():
    order = RowOrder(DataOrderConfig(seed=1, era_rows=64), 150, SOURCE)
    epochs = order.rows_at(0, 450).reshape(3, 150)
    for epoch in epochs:
        assert sorted(epoch[:64]) == list(range(64))
        assert sorted(epoch[64:128]) == list(range(64, 128))
        assert sorted(epoch[128:]) == list(range(128, 150))
        assert epoch.tolist() != list(range(150))
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 3


def test_the_order_does_not_depend_on_how_it_is_asked():
    order = RowOrder(DataOrderConfig(seed=3, era_rows=32), 70, SOURCE)
    whole = order.rows_at(0, 300)
    for start, count in [(0, 1), (31, 2), (69, 3), (64, 140), (139, 0), (299, 1)]:
        assert np.array_equal(order.rows_at(start, count), whole[start : start + count])
    assert np.array_equal(np.concatenate([order.rows_at(i, 1) for i in range(300)]), whole)


def test_rows_that_follow_change_no_earlier_era():
    config = DataOrderConfig(seed=3, era_rows=32)
    assert np.array_equal(
        RowOrder(config, 70, SOURCE).rows_at(0, 64), RowOrder(config, 1000, SOURCE).rows_at(0, 64)
    )


def test_seeds_and_sources_have_their_own_orders():
    orders = {
        tuple(RowOrder(DataOrderConfig(seed=seed), 1000, source).rows_at(start, 100).tolist())
        for seed in (0, 1, 2**63 - 1)
        for source in (SOURCE, "cd" * 32)
        for start in (0, 1000)
    }
    assert len(orders) == 12


def test_positions_beyond_32_and_62_bits_are_exact():
    order = RowOrder(DataOrderConfig(era_rows=2**20), 2**40 + 3, SOURCE)
    start = 2**62 + 12345
    row = start % (2**40 + 3)
    era_start = row - row % 2**20
    rows = order.rows_at(start, 10)
    assert rows.dtype == np.int64
    assert len(set(rows.tolist())) == 10
    assert all(era_start <= value < era_start + 2**20 for value in rows.tolist())


def test_nonsense_is_refused():
    with pytest.raises(ValueError, match="at least one row"):
        RowOrder(DataOrderConfig(), 0, SOURCE)
    with pytest.raises(ValueError, match="at least 0"):
        RowOrder(DataOrderConfig(), 5, SOURCE).rows_at(-1, 2)


# fmt: off
GOLDEN = [
    5, 3, 6, 0, 4, 2, 7, 1,  10, 15, 8, 13, 12, 9, 14, 11,  19, 18, 16, 17,
    0, 1, 6, 3, 5, 4, 7, 2,  11, 14, 13, 12, 15, 9, 10, 8,  17, 16, 18, 19,
]
# fmt: on
