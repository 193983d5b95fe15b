"""Functions along one axis that keep it: cumulative sums, sorting, `top_k`, softmax."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from haliax.axis import (
    Axis,
    AxisSelection,
    AxisSelector,
    axis_positions,
    check_unique,
    single_position,
)
from haliax.core import NamedArray, honest, trusted
from haliax.reductions import logsumexp as logsumexp


def _along(fn: Callable[..., Any], name: str) -> Callable[..., NamedArray]:
    def op(a: NamedArray, axis: AxisSelection | None = None, **kwargs: Any) -> NamedArray:
        """Works along the given axis and keeps it; `axis` may be left out if there is only one."""
        selected = a.axes if axis is None else axis
        at = single_position(name, a.axes, selected)
        return trusted(fn(honest(name, a), axis=at, **kwargs), a.axes)

    op.__name__ = op.__qualname__ = name
    return op


cumsum = _along(jnp.cumsum, "cumsum")
cumprod = _along(jnp.cumprod, "cumprod")
nancumsum = _along(jnp.nancumsum, "nancumsum")
nancumprod = _along(jnp.nancumprod, "nancumprod")
sort = _along(jnp.sort, "sort")


def argsort(a: NamedArray, axis: AxisSelector | None = None, *, stable: bool = True) -> NamedArray:
    """Indices that would sort along the axis; `None` sorts all elements, flattened to one axis.

    The flattened axis is named after the merged ones, joined by `_`.
    """
    if axis is None and a.ndim != 1:
        flat = Axis("_".join(x.name for x in a.axes) or "index", a.array.size)
        return trusted(jnp.argsort(honest("argsort", a), axis=None, stable=stable), (flat,))
    at = 0 if axis is None else single_position("argsort", a.axes, axis)
    return trusted(jnp.argsort(honest("argsort", a), axis=at, stable=stable), a.axes)


def softmax(a: NamedArray, axis: AxisSelection | None = None, *, where: Any = None) -> NamedArray:
    """Exponentials that sum to one over the axis or axes; `None` means all of them."""
    return _normalizing(jax.nn.softmax, "softmax", a, axis, where)


def log_softmax(
    a: NamedArray, axis: AxisSelection | None = None, *, where: Any = None
) -> NamedArray:
    """The logarithm of `softmax`, without underflow."""
    return _normalizing(jax.nn.log_softmax, "log_softmax", a, axis, where)


def _normalizing(
    fn: Callable[..., Any], name: str, a: NamedArray, axis: AxisSelection | None, where: Any
) -> NamedArray:
    positions = tuple(range(a.ndim)) if axis is None else axis_positions(name, a.axes, axis)
    at = positions[0] if len(positions) == 1 else positions
    if where is None:
        return trusted(fn(honest(name, a), axis=at), a.axes)
    mask = where.broadcast_to(a.axes).array
    return trusted(fn(honest(name, a), axis=at, where=mask), a.axes)


def top_k(
    arr: NamedArray, axis: AxisSelector, k: int, new_axis: AxisSelector | None = None
) -> tuple[NamedArray, NamedArray]:
    """The `k` largest values along the axis, descending, and their positions.

    The axis becomes `new_axis`, or keeps its name.
    """
    at = single_position("top_k", arr.axes, axis)
    old = arr.axes[at]
    if not 0 <= k <= old.size:
        raise ValueError(
            f"top_k: k={k} does not fit axis {old} of {arr.shape}; it must be between 0 and "
            f"{old.size}."
        )
    if isinstance(new_axis, Axis) and new_axis.size != k:
        raise ValueError(
            f"top_k: the new axis {new_axis} must have size k={k}. Pass its name alone."
        )
    name = (
        old.name if new_axis is None else new_axis if isinstance(new_axis, str) else new_axis.name
    )
    axes = (*arr.axes[:at], Axis(name, k), *arr.axes[at + 1 :])
    check_unique("top_k", axes)
    values, indices = lax.top_k(jnp.moveaxis(honest("top_k", arr), at, -1), k)
    return (
        trusted(jnp.moveaxis(values, -1, at), axes),
        trusted(jnp.moveaxis(indices, -1, at), axes),
    )
