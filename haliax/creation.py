"""New named arrays: constants, ranges, and copies of an array's axes.

Floating point defaults to float32. Nothing here is sharded by the axis mapping on its own.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from haliax.axis import Axis, AxisSelector, AxisSpec, axis_spec_to_tuple, to_jax_shape
from haliax.core import NamedArray, named, trusted


def full(shape: AxisSpec, fill_value: Any, dtype: Any = None) -> NamedArray:
    """`fill_value` everywhere."""
    axes = axis_spec_to_tuple(shape)
    if isinstance(fill_value, NamedArray):
        fill_value = fill_value.scalar()
    return NamedArray(jnp.full(to_jax_shape(axes), fill_value, dtype=dtype), axes)


def zeros(shape: AxisSpec, dtype: Any = None) -> NamedArray:
    """Zeros, of float32 unless told otherwise."""
    axes = axis_spec_to_tuple(shape)
    return NamedArray(jnp.zeros(to_jax_shape(axes), dtype=dtype or jnp.float32), axes)


def ones(shape: AxisSpec, dtype: Any = None) -> NamedArray:
    """Ones, of float32 unless told otherwise."""
    axes = axis_spec_to_tuple(shape)
    return NamedArray(jnp.ones(to_jax_shape(axes), dtype=dtype or jnp.float32), axes)


def full_like(a: NamedArray, fill_value: Any, dtype: Any = None) -> NamedArray:
    """`fill_value` in the axes, and by default the dtype, of `a`."""
    if isinstance(fill_value, NamedArray):
        fill_value = fill_value.scalar()
    return trusted(jnp.full_like(a.array, fill_value, dtype=dtype), a.axes)


def zeros_like(a: NamedArray, dtype: Any = None) -> NamedArray:
    """Zeros in the axes, and by default the dtype, of `a`."""
    return trusted(jnp.zeros_like(a.array, dtype=dtype), a.axes)


def ones_like(a: NamedArray, dtype: Any = None) -> NamedArray:
    """Ones in the axes, and by default the dtype, of `a`."""
    return trusted(jnp.ones_like(a.array, dtype=dtype), a.axes)


def arange(axis: AxisSpec, *, start: Any = 0, step: Any = 1, dtype: Any = None) -> NamedArray:
    """`start`, `start + step`, ... along the axis; over several axes, in row-major order.

    `start` and `step` may be traced.
    """
    axes = axis_spec_to_tuple(axis)
    start, step = (x.scalar() if isinstance(x, NamedArray) else x for x in (start, step))
    dtype = jnp.dtype(dtype) if dtype is not None else jnp.result_type(start, step)
    shape = to_jax_shape(axes)
    counts = jax.lax.iota(dtype, int(np.prod(shape, dtype=np.int64)))
    if not (isinstance(step, int) and step == 1):
        counts = counts * jnp.asarray(step, dtype)
    if not (isinstance(start, int) and start == 0):
        counts = counts + jnp.asarray(start, dtype)
    return NamedArray(counts if len(shape) == 1 else counts.reshape(shape), axes)


def _spaced(fn: Callable[..., Any]) -> Callable[..., NamedArray]:
    def spaced(
        axis: AxisSelector,
        *,
        start: Any,
        stop: Any,
        endpoint: bool = True,
        dtype: Any = None,
        **kw: Any,
    ) -> NamedArray:
        """As in `jnp`, with one value per position of the axis; a bare name gets 50."""
        axis = axis if isinstance(axis, Axis) else Axis(axis, 50)
        ends = [x.scalar() if isinstance(x, NamedArray) else x for x in (start, stop)]
        return named(fn(*ends, axis.size, endpoint=endpoint, dtype=dtype, **kw), axis)

    spaced.__name__ = spaced.__qualname__ = fn.__name__
    return spaced


linspace = _spaced(jnp.linspace)
logspace = _spaced(jnp.logspace)
geomspace = _spaced(jnp.geomspace)
