"""Rows: what one step reads. Tokens, and where needed which belong together and which count.

    tokens       [batch, Pos]   ids
    segment_ids  [batch, Pos]   1, 2, ... for the documents of a row from left to right, 0 for
                                padding; None: a row is one stretch of text
    loss_mask    [batch, Pos]   whether a token is to be *predicted*; None: every one is

A token attends to those of its own segment, its position is counted from the start of the segment,
and the first token of a segment is predicted by nothing. `Rows` is a pytree: what is None takes no
part in a compiled program.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int32, Int64

PADDING_SEGMENT = 0


class Rows(NamedTuple):
    """Rows of a batch."""

    tokens: Int32[np.ndarray, "batch Pos"]
    segment_ids: Int32[np.ndarray, "batch Pos"] | None = None
    loss_mask: Bool[np.ndarray, "batch Pos"] | None = None

    def first(self, length: int) -> "Rows":
        """Returns the first `length` tokens of each row."""
        others = (None if column is None else column[:, :length] for column in self[1:])
        return Rows(self.tokens[:, :length], *others)

    def predicted(self) -> Bool[np.ndarray, "batch Pos"]:
        """Returns which tokens a model is scored on; never the first of a row or of a segment."""
        mask = self.loss_mask
        counts = np.ones(self.tokens.shape, bool) if mask is None else mask.astype(bool)
        counts[:, :1] = False
        if self.segment_ids is not None:
            counts[:, 1:] &= self.segment_ids[:, 1:] == self.segment_ids[:, :-1]
        return counts

    def positions(self) -> Int32[np.ndarray, "batch Pos"]:
        """Returns how many tokens of its segment stand before each token."""
        index = np.arange(self.tokens.shape[1], dtype=np.int32)
        if self.segment_ids is None:
            return np.broadcast_to(index, self.tokens.shape)
        starts = np.zeros(self.tokens.shape, np.int32)
        is_start = self.segment_ids[:, 1:] != self.segment_ids[:, :-1]
        starts[:, 1:] = np.where(is_start, index[1:], 0)
        return index - np.maximum.accumulate(starts, axis=1)


class Columns(NamedTuple):
    """Which columns rows have besides their tokens; programs are compiled for them."""

    segment_ids: bool = False
    loss_mask: bool = False


TOKENS_ALONE = Columns()


def spread_rows(available: int, wanted: int) -> Int64[np.ndarray, " rows"]:
    """Returns the indices of at most `wanted` of so many rows, evenly spaced.

    Neighbours come from one document: the first few would speak for it alone.
    """
    taken = min(available, wanted)
    return np.arange(taken) * available // taken
