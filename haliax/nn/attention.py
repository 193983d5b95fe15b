"""Attention over named positions, and the masks and biases that go with it.

Nothing here asks how many heads there are, whether keys have them, or over how many axes the keys
are laid out: batch, heads and groups are just axes that are carried along.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from haliax import random
from haliax.axis import Axis, AxisSelection, AxisSelector, axis_name, pairs
from haliax.axiswise import softmax
from haliax.contraction import dot
from haliax.core import NamedArray, named
from haliax.creation import arange, ones
from haliax.errors import axis_not_found, describe, size_mismatch
from haliax.jax_utils import named_call
from haliax.ops import where


def dot_product_attention_weights(
    Key: AxisSelector,
    KPos: AxisSelection,
    query: NamedArray,
    key: NamedArray,
    mask: NamedArray | None = None,
    bias: NamedArray | None = None,
    attention_dtype: Any = None,
    precision: Any = None,
    scaling_factor: float | None = None,
) -> NamedArray:
    """Softmax over `KPos` of scaled dot products over `Key`.

    `mask` is true where attention is allowed. The scale is `1 / sqrt(size of Key)` unless given,
    and is applied to the query first, which keeps half-precision products in range.
    """
    _check_axes(Key, KPos, query, key)
    original = query.dtype
    if scaling_factor is None:
        scaling_factor = 1.0 / math.sqrt(query.axis_size(axis_name(Key)))
    query = query * scaling_factor
    if attention_dtype is not None:
        query, key = query.astype(attention_dtype), key.astype(attention_dtype)
    weights = dot(query, key, axis=axis_name(Key), precision=precision)
    if bias is not None:
        weights = weights + bias
    if mask is not None:
        weights = where(mask, weights, jnp.asarray(-1e9, weights.dtype))
    return softmax(weights, axis=KPos).astype(original)


@named_call
def dot_product_attention(
    KPos: AxisSelection,
    Key: AxisSelector,
    query: NamedArray,
    key: NamedArray,
    value: NamedArray,
    mask: NamedArray | None = None,
    bias: NamedArray | None = None,
    attention_dtype: Any = None,
    precision: Any = None,
) -> NamedArray:
    """The values averaged by attention weights: `KPos` is gone, all other axes are kept."""
    for name, size in pairs(KPos):
        found = next((axis for axis in value.axes if axis.name == name), None)
        if found is None:
            raise axis_not_found("attention (value)", name, value.axes)
        if size is not None and size != found.size:
            raise size_mismatch("attention (value)", name, size, found.size, value.axes)
    weights = dot_product_attention_weights(
        Key, KPos, query, key, mask, bias, attention_dtype, precision
    )
    return dot(weights, value, axis=KPos)


def _check_axes(Key: AxisSelector, KPos: AxisSelection, query: NamedArray, key: NamedArray) -> None:
    for side, array, wanted in (("query", query, Key), ("key", key, Key), ("key", key, KPos)):
        for name, size in pairs(wanted):
            found = next((axis for axis in array.axes if axis.name == name), None)
            if found is None:
                raise axis_not_found(f"attention ({side})", name, array.axes)
            if size is not None and size != found.size:
                raise size_mismatch(f"attention ({side})", name, size, found.size, array.axes)
    for name, _ in pairs(KPos):
        if name in query.shape:
            raise ValueError(
                f"attention: query positions and key positions must be distinct, but '{name}' is "
                f"in the query {describe(query.axes)} and in the key {describe(key.axes)}. Rename "
                f"the key's (and the value's): `key.rename({{'{name}': 'key_{name}'}})`."
            )
        if name == axis_name(Key):
            raise ValueError(f"attention: KPos and Key must be distinct, but both are '{name}'.")


def _positions(axis: Axis, start: Any) -> NamedArray:
    """Positions from `start` on; a start with axes gives one row of positions for each."""
    positions = arange(axis)
    if isinstance(start, NamedArray) and start.axes:
        return positions.broadcast_axis(start.axes) + start
    return positions + start


def _compared(a: NamedArray, b: NamedArray, fn: Any) -> NamedArray:
    """`fn` on all pairs, over the axes of both."""
    axes = (*a.axes, *(axis for axis in b.axes if axis not in a.axes))
    return fn(a.broadcast_to(axes), b)


def causal_mask(QPos: Axis, KPos: Axis, q_start: Any = 0, k_start: Any = 0) -> NamedArray:
    """True where the query is at or after the key; starts may be traced, or have axes."""
    return _compared(_positions(QPos, q_start), _positions(KPos, k_start), lambda q, k: q >= k)


def prefix_lm_mask(
    QPos: Axis, KPos: Axis, prefix_len: Any, q_start: Any = 0, k_start: Any = 0
) -> NamedArray:
    """`causal_mask`, and true for all keys in the prefix."""
    in_prefix = _positions(KPos, k_start)
    if isinstance(prefix_len, NamedArray) and prefix_len.axes:
        in_prefix = _compared(in_prefix, prefix_len, lambda k, n: k < n)
    else:
        in_prefix = in_prefix < prefix_len
    return combine_masks_or(causal_mask(QPos, KPos, q_start, k_start), in_prefix)  # pyright: ignore


def combine_masks_and(mask1: NamedArray | None, mask2: NamedArray | None) -> NamedArray | None:
    """Both masks, over the axes of either; `None` allows everything."""
    if mask1 is None or mask2 is None:
        return mask2 if mask1 is None else mask1
    return _compared(mask1, mask2, lambda a, b: a & b)


def combine_masks_or(mask1: NamedArray | None, mask2: NamedArray | None) -> NamedArray | None:
    """Either mask, over the axes of either; an absent one is ignored."""
    if mask1 is None or mask2 is None:
        return mask2 if mask1 is None else mask1
    return _compared(mask1, mask2, lambda a, b: a | b)


def mask_to_bias(mask: NamedArray, mask_value: float = -1e9) -> NamedArray:
    """`mask * mask_value`: here, unlike in every other function, true means *masked out*."""
    return mask.astype(jnp.float32) * mask_value


def forgetful_causal_mask(
    KPos: Axis, mask_prob: float, sample_prob: bool = True, *, key: Any
) -> NamedArray:
    """Hides random keys, but never the first (Liu et al., arXiv:2210.13432).

    With `sample_prob`, the probability itself is drawn uniformly up to `mask_prob`.
    """
    if mask_prob == 0:
        return ones(KPos, dtype=bool)
    prob_key, mask_key = jax.random.split(key)
    prob: Any = mask_prob
    if sample_prob:
        prob = jax.random.uniform(prob_key, (), minval=0.0, maxval=mask_prob)
    kept = random.bernoulli(mask_key, KPos, 1 - prob)
    return kept | (arange(KPos) == 0)


def alibi_attention_bias(Heads: Axis, KPos: Axis, dtype: Any = jnp.float32) -> NamedArray:
    """Biases that fall with distance, one slope per head (Press et al., arXiv:2108.12409)."""
    slopes = named(jnp.asarray(_alibi_slopes(Heads.size), dtype), Heads)
    return slopes.broadcast_axis(KPos).rearrange((Heads, KPos)) * arange(KPos).astype(dtype)


def _alibi_slopes(heads: int) -> list[float]:
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2.0 ** (-8.0 * (i + 1) / power) for i in range(power)]
    if power == heads:
        return slopes
    # The paper's rule for other counts: every other slope of the next power of two.
    return slopes + _alibi_slopes(2 * power)[0::2][: heads - power]
