"""Pooling over named windows: `max_pool((H(2), W(2)), x, stride=2)`.

A window is an axis of the input with the window's size; all other axes are carried along.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from haliax.axis import Axis, AxisSpec, axis_spec_to_tuple
from haliax.core import NamedArray, honest, trusted
from haliax.errors import axis_not_found, describe
from haliax.partitioning import auto_sharded

Padding = str | int | Sequence[int] | Sequence[tuple[int, int]]


def max_pool(
    Window: AxisSpec,
    inputs: NamedArray,
    stride: int | Sequence[int] | None = None,
    padding: Padding = 0,
    use_ceil: bool = False,
) -> NamedArray:
    """The largest element of each window."""
    lowest = _extreme(inputs.dtype, smallest=True)
    return _pool("max_pool", Window, inputs, lax.max, lowest, stride, padding, use_ceil)


def min_pool(
    Window: AxisSpec,
    inputs: NamedArray,
    stride: int | Sequence[int] | None = None,
    padding: Padding = 0,
    use_ceil: bool = False,
) -> NamedArray:
    """The smallest element of each window."""
    highest = _extreme(inputs.dtype, smallest=False)
    return _pool("min_pool", Window, inputs, lax.min, highest, stride, padding, use_ceil)


def mean_pool(
    Window: AxisSpec,
    inputs: NamedArray,
    stride: int | Sequence[int] | None = None,
    padding: Padding = 0,
    use_ceil: bool = False,
    count_include_pad: bool = False,
) -> NamedArray:
    """The mean of each window; padding counts as elements only with `count_include_pad`."""
    if not jnp.issubdtype(inputs.dtype, jnp.inexact):
        inputs = inputs.astype(jnp.float32)
    zero = np.zeros((), inputs.dtype)
    total = _pool("mean_pool", Window, inputs, lax.add, zero, stride, padding, use_ceil)
    if count_include_pad:
        return total / np.prod([axis.size for axis in axis_spec_to_tuple(Window)]).astype(
            inputs.dtype
        )
    own = {axis.name for axis in axis_spec_to_tuple(Window)}
    spatial = tuple(axis for axis in inputs.axes if axis.name in own)
    ones = trusted(jnp.ones([axis.size for axis in spatial], inputs.dtype), spatial)
    return total / _pool("mean_pool", Window, ones, lax.add, zero, stride, padding, use_ceil)


def _extreme(dtype: Any, *, smallest: bool) -> Any:
    if jnp.issubdtype(dtype, jnp.floating):
        return np.asarray(-np.inf if smallest else np.inf, dtype)
    info = jnp.iinfo(dtype)
    return np.asarray(info.min if smallest else info.max, dtype)


def _pool(
    operation: str,
    Window: AxisSpec,
    x: NamedArray,
    combine: Callable[..., Any],
    initial: Any,
    stride: int | Sequence[int] | None,
    padding: Padding,
    use_ceil: bool,
) -> NamedArray:
    raw = honest(operation, x)
    windows = axis_spec_to_tuple(Window)
    positions = [_position(operation, x, axis) for axis in windows]
    strides = _strides(operation, windows, stride)
    dims, steps, pads = [1] * x.ndim, [1] * x.ndim, [(0, 0)] * x.ndim
    for at, axis, step in zip(positions, windows, strides, strict=True):
        dims[at], steps[at] = axis.size, step
    given = padding
    if isinstance(given, str):
        given_pads = lax.padtype_to_pads(raw.shape, dims, steps, given.upper())
        pads = list(given_pads)
    else:
        for at, one in zip(positions, _paddings(operation, windows, given), strict=True):
            pads[at] = one
    if use_ceil:
        pads = [
            (low, high + (-(n + low + high - d) % s))
            for n, (low, high), d, s in zip(raw.shape, pads, dims, steps, strict=True)
        ]
    out = lax.reduce_window(raw, initial, combine, dims, steps, pads)
    axes = tuple(axis.resize(n) for axis, n in zip(x.axes, out.shape, strict=True))
    return auto_sharded(trusted(out, axes))


def _position(operation: str, x: NamedArray, window: Axis) -> int:
    for i, axis in enumerate(x.axes):
        if axis.name == window.name:
            return i
    raise axis_not_found(operation, window.name, x.axes)


def _strides(
    operation: str, windows: tuple[Axis, ...], stride: int | Sequence[int] | None
) -> tuple[int, ...]:
    if stride is None:
        return (1,) * len(windows)
    each = (stride,) * len(windows) if isinstance(stride, int) else tuple(stride)
    if len(each) != len(windows):
        raise ValueError(
            f"{operation}: stride={stride} must be one, or one per axis of {describe(windows)}."
        )
    return each


def _paddings(operation: str, windows: tuple[Axis, ...], padding: Any) -> list[tuple[int, int]]:
    each = (padding,) * len(windows) if isinstance(padding, int) else tuple(padding)
    if len(each) != len(windows):
        raise ValueError(
            f"{operation}: padding={padding} must be one, or one per axis of {describe(windows)}."
        )
    return [(p, p) if isinstance(p, int) else tuple(p) for p in each]
