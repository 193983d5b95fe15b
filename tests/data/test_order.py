"""The data order: a bijection, exact for large sizes, keyed, and independent of how it is asked."""

import hashlib
import random

import numpy as np
import pytest

from modeling.canonical import encode
from modeling.data.order import EpochLimitError, RowOrder, permute

KEYS = np.array([random.Random(i).getrandbits(64) for i in range(8)], np.uint64)
SOURCE = "web"


def row_order(num_rows: int, *, seed=0, era_rows=65536, source=SOURCE, **options) -> RowOrder:
    return RowOrder(lambda wanted: num_rows, seed=seed, era_rows=era_rows, source=source, **options)


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


def test_every_size_up_to_5000_is_a_bijection():
    positions = np.arange(5000, dtype=np.uint64)
    for size in range(1, 5001):
        hit = np.zeros(size, bool)
        hit[permute(positions[:size], size, KEYS).astype(np.int64)] = True
        assert hit.all(), size


@pytest.mark.parametrize(
    "size", [1, 2, 3, 5001, 2**16, 2**32 - 1, 2**32 + 9, 2**33 + 9, 2**40 - 87, 2**40]
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
    order = row_order(20, seed=7, era_rows=8)
    assert order.rows_at(0, 40).tolist() == GOLDEN


def test_keys_are_digests_of_seed_epoch_era_and_source():
    order = row_order(20, seed=7, era_rows=8)
    keys = order_keys(7, 1, 2)
    third_era_of_second_epoch = [16 + exact_permute(i, 4, keys) for i in range(4)]
    assert order.rows_at(36, 4).tolist() == third_era_of_second_epoch


def test_each_era_is_permuted_within_itself_and_each_epoch_anew():
    order = row_order(150, seed=1, era_rows=64)
    epochs = order.rows_at(0, 450).reshape(3, 150)
    for epoch in epochs:
        assert sorted(epoch[:64]) == list(range(64))
        assert sorted(epoch[64:128]) == list(range(64, 128))
        assert sorted(epoch[128:]) == list(range(128, 150))
        assert epoch.tolist() != list(range(150))
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 3


def test_the_order_does_not_depend_on_how_it_is_asked():
    order = row_order(70, seed=3, era_rows=32)
    whole = order.rows_at(0, 300)
    for start, count in [(0, 1), (31, 2), (69, 3), (64, 140), (139, 0), (299, 1)]:
        assert np.array_equal(order.rows_at(start, count), whole[start : start + count])
    assert np.array_equal(np.concatenate([order.rows_at(i, 1) for i in range(300)]), whole)


def test_windows_of_a_long_era_fit_together():
    order = row_order(10_000, era_rows=9_000)
    rows = order.rows_at(0, 20_000).reshape(2, 10_000)
    assert sorted(rows[0][:9_000]) == list(range(9_000))
    assert sorted(rows[1][9_000:]) == list(range(9_000, 10_000))
    keys = [int(k) for k in order_keys(0, 0, 0)]
    for position in (0, 4095, 4096, 8999):
        assert rows[0][position] == exact_permute(position, 9_000, keys)


def order_keys(seed, epoch, era):
    return [
        int.from_bytes(digest[i : i + 8], "big")
        for index in range(2)
        for digest in [
            hashlib.sha256(encode(["order.eras/2", seed, epoch, era, SOURCE, index])).digest()
        ]
        for i in range(0, 32, 8)
    ]


def test_rows_that_follow_change_no_earlier_era():
    short, long = row_order(70, seed=3, era_rows=32), row_order(1000, seed=3, era_rows=32)
    assert np.array_equal(short.rows_at(0, 64), long.rows_at(0, 64))


class Growing:
    """A source that has a few more rows each time it is asked for what it has not."""

    def __init__(self, total):
        self.total, self.known, self.asked = total, 0, []

    def __call__(self, wanted):
        self.asked.append(wanted)
        while self.known < min(wanted, self.total):
            self.known = min(self.known + 7, self.total)
        return self.known


@pytest.mark.parametrize("batch", [1, 5, 32, 50])
def test_rows_drawn_while_a_source_grows_are_those_of_the_finished_one(batch):
    growing = Growing(150)
    order = RowOrder(growing, seed=3, era_rows=32, source=SOURCE)
    whole = row_order(150, seed=3, era_rows=32).rows_at(0, 400)
    for start in range(0, 400 - batch, batch):
        assert np.array_equal(order.rows_at(start, batch), whole[start : start + batch])
        needed = -(-(start + batch) // 32) * 32
        assert growing.known <= min(needed + 6, 150), "more was waited for than the era needs"


def test_seeds_and_sources_have_their_own_orders():
    orders = {
        tuple(row_order(1000, seed=seed, source=source).rows_at(start, 100).tolist())
        for seed in (0, 1, 2**63 - 1)
        for source in (SOURCE, "code", "")
        for start in (0, 1000)
    }
    assert len(orders) == 18


def test_positions_beyond_32_and_62_bits_are_exact():
    order = row_order(2**40 + 3, era_rows=2**20)
    start = 2**62 + 12345
    row = start % (2**40 + 3)
    era_start = row - row % 2**20
    rows = order.rows_at(start, 10)
    assert rows.dtype == np.int64
    assert len(set(rows.tolist())) == 10
    assert all(era_start <= value < era_start + 2**20 for value in rows.tolist())


def test_an_epoch_too_many_is_refused_at_its_first_row():
    order = row_order(20, era_rows=8, max_epochs=2)
    assert len(order.rows_at(0, 40)) == 40
    with pytest.raises(EpochLimitError, match=r"max_epochs: 2 epochs of source 'web' are 40 rows"):
        order.rows_at(38, 3)


def test_nonsense_is_refused():
    with pytest.raises(ValueError, match="has no rows to draw"):
        row_order(0).rows_at(0, 1)
    with pytest.raises(ValueError, match="at least 0"):
        row_order(5).rows_at(-1, 2)


# fmt: off
GOLDEN = [
    0, 3, 4, 6, 2, 7, 1, 5,  9, 14, 10, 13, 8, 15, 12, 11,  19, 16, 18, 17,
    4, 5, 1, 6, 7, 3, 0, 2,  15, 9, 10, 12, 14, 8, 11, 13,  19, 17, 16, 18,
]
# fmt: on
