"""Segments: rows that hold several documents, none of which knows of the others.

`segment_ids` numbers the documents of a row (see `modeling.data.rows`). Attention stays within a
segment, and positions are counted from its start, so that a document in the middle of a row is to
the model what it would be alone.
"""

import jax
import jax.numpy as jnp

import haliax as hax
from haliax import Axis, NamedArray


def attendable(Pos: Axis, KPos: Axis, segment_ids: NamedArray | None = None) -> NamedArray:
    """Returns which keys each position may see: its own and those before it in its segment."""
    causal = hax.arange(Pos).broadcast_axis(KPos) >= hax.arange(KPos)
    if segment_ids is None:
        return causal
    return causal & (segment_ids.broadcast_axis(KPos) == segment_ids.rename({Pos: KPos}))


def positions(segment_ids: NamedArray, Pos: Axis) -> NamedArray:
    """Returns how many tokens of its segment stand before each token."""
    index = hax.arange(Pos)
    is_start = segment_ids != hax.roll(segment_ids, 1, Pos)
    starts = hax.where(is_start, index, 0).rearrange((..., Pos))
    latest = NamedArray(jax.lax.cummax(starts.array, axis=starts.array.ndim - 1), starts.axes)
    return (index - latest).rearrange(segment_ids.axes).astype(jnp.int32)
