"""What the stages in processes of their own take of their inputs."""

import numpy as np
import pytest

from modeling.data.rows import Rows
from resources.stages import PARITY_ROWS, parity_rows


class Cache:
    """A token cache in which every token of a split has the number of the split."""

    def __init__(self, **rows):
        self._rows = {name.replace("__", "/"): count for name, count in rows.items()}
        self.splits = tuple(self._rows)

    def num_rows(self, split):
        return self._rows[split]

    def rows(self, split, indices):
        assert len(indices) <= self._rows[split]
        number = self.splits.index(split)
        return Rows(np.full((len(indices), 8), number, np.int32))


@pytest.mark.parametrize(
    ("cache", "split", "count"),
    [
        (Cache(train=9, validation=9), 1, PARITY_ROWS),
        (Cache(train=9, validation=0), 0, PARITY_ROWS),
        (Cache(train__code=9, train__web=9, validation__code=0, validation__web=1), 3, 1),
        (Cache(train__code=1, train__web=9, validation__code=0, validation__web=0), 0, 1),
    ],
)
def test_logits_are_compared_on_rows_that_are_held_out_if_there_are_any(cache, split, count):
    rows = parity_rows(cache)
    assert rows.shape == (count, 8)
    assert (rows == split).all()
