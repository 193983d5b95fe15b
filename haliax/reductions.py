"""Reductions by axis name: `sum(x, "embed")`, `mean(x, (Height, Width))`, `max(x)`.

`axis` is any selection of axes, in any order; `None` reduces all of them to a named array without
axes, and `()` none. `where` is a named boolean array that broadcasts to `x`. A pytree of named
arrays is reduced leaf by leaf.
"""

from collections.abc import Callable
from typing import Any, Protocol, overload, runtime_checkable

import jax
import jax.numpy as jnp

from haliax.axis import AxisSelection, axis_positions, single_position, without_selected
from haliax.broadcasting import aligned, cannot_broadcast, contains
from haliax.core import NamedArray, honest, trusted
from haliax.jax_utils import is_jax_array_like


@runtime_checkable
class ReductionFunction(Protocol):
    """Removes axes from a named array; from each array of a tree, if given one."""

    @overload
    def __call__(
        self, array: NamedArray, axis: AxisSelection | None = None, **kwargs: Any
    ) -> NamedArray: ...
    @overload
    def __call__(self, array: Any, axis: AxisSelection | None = None, **kwargs: Any) -> Any: ...
    def __call__(self, array: Any, axis: AxisSelection | None = None, **kwargs: Any) -> Any:
        """Reduces the axes."""
        ...


def _is_named(x: object) -> bool:
    return isinstance(x, NamedArray)


def _leafwise(op: Callable[..., Any], tree: Any, axis: Any, **kwargs: Any) -> Any:
    """Reduces each named leaf; `where` counts for the leaves that have its axes."""

    def reduce_leaf(leaf: Any) -> Any:
        if not isinstance(leaf, NamedArray):
            return op(leaf, axis, **kwargs) if is_jax_array_like(leaf) else leaf
        where = kwargs.get("where")
        if isinstance(where, NamedArray) and not contains(leaf.axes, where.axes):
            return op(leaf, axis, **{**kwargs, "where": None})
        return op(leaf, axis, **kwargs)

    return jax.tree_util.tree_map(reduce_leaf, tree, is_leaf=_is_named)


def reduction(fn: Callable[..., Any], name: str, *options: str) -> ReductionFunction:
    """Lifts a reduction of `jnp` that takes several axes; `options` are its further keywords."""
    allowed = {"where", *options}

    def op(array: Any, axis: AxisSelection | None = None, **kwargs: Any) -> Any:
        unknown = set(kwargs) - allowed
        if unknown:
            raise TypeError(
                f"{name}: unknown arguments {sorted(unknown)}; known are {sorted(allowed)}."
            )
        if not isinstance(array, NamedArray):
            if is_jax_array_like(array) or isinstance(array, (int, float, complex)):
                return fn(array, axis=axis, **_given(kwargs))
            return _leafwise(op, array, axis, **kwargs)
        if axis is None:
            positions = tuple(range(len(array.axes)))
        else:
            positions = axis_positions(name, array.axes, axis)
        kwargs["where"] = _mask(name, array, kwargs.get("where"))
        result = fn(honest(name, array), axis=positions, **_given(kwargs))
        return trusted(result, without_selected(array.axes, positions))

    return _named_like(op, name, fn)


def _given(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Without the `None`s, so that `jnp`'s own defaults hold."""
    return {key: value for key, value in kwargs.items() if value is not None}


def _mask(name: str, array: NamedArray, where: Any) -> Any:
    if where is None:
        return None
    if not isinstance(where, NamedArray):
        raise TypeError(
            f"{name}: `where` must be a NamedArray, so that its axes are known, not "
            f"{type(where).__name__}. Name it with `hax.named(where, axes)`."
        )
    if not contains(array.axes, where.axes):
        raise cannot_broadcast(f"{name}(where=)", array.axes, where.axes)
    return aligned(where.array, where.axes, array.axes)


def single_axis_reduction(fn: Callable[..., Any], name: str) -> ReductionFunction:
    """Lifts `argmax` and its like: one axis, or all of them in row-major order."""

    def op(array: Any, axis: AxisSelection | None = None, **kwargs: Any) -> Any:
        if not isinstance(array, NamedArray):
            return fn(array, axis=axis, **kwargs)
        if axis is None:
            return trusted(fn(honest(name, array), axis=None, **kwargs), ())
        position = single_position(name, array.axes, axis)
        result = fn(honest(name, array), axis=position, **kwargs)
        return trusted(result, without_selected(array.axes, (position,)))

    return _named_like(op, name, fn)


def _named_like(op: Any, name: str, fn: Callable[..., Any]) -> Any:
    op.__name__ = op.__qualname__ = name
    op.__module__ = __name__
    op.__doc__ = f"`jnp.{fn.__name__}` over named axes; `axis=None` reduces all of them."
    return op


all = reduction(jnp.all, "all")
any = reduction(jnp.any, "any")
amax = reduction(jnp.amax, "amax", "initial")
amin = reduction(jnp.amin, "amin", "initial")
max = reduction(jnp.max, "max", "initial")
mean = reduction(jnp.mean, "mean", "dtype")
min = reduction(jnp.min, "min", "initial")
prod = reduction(jnp.prod, "prod", "dtype", "initial")
product = reduction(jnp.prod, "product", "dtype", "initial")
sum = reduction(jnp.sum, "sum", "dtype", "initial")
std = reduction(jnp.std, "std", "dtype", "ddof")
var = reduction(jnp.var, "var", "dtype", "ddof")
ptp = reduction(jnp.ptp, "ptp")
count_nonzero = reduction(jnp.count_nonzero, "count_nonzero")
median = reduction(jnp.median, "median")
logsumexp = reduction(jax.nn.logsumexp, "logsumexp")

nanmax = reduction(jnp.nanmax, "nanmax", "initial")
nanmean = reduction(jnp.nanmean, "nanmean", "dtype")
nanmin = reduction(jnp.nanmin, "nanmin", "initial")
nanprod = reduction(jnp.nanprod, "nanprod", "dtype", "initial")
nanstd = reduction(jnp.nanstd, "nanstd", "dtype", "ddof")
nansum = reduction(jnp.nansum, "nansum", "dtype", "initial")
nanvar = reduction(jnp.nanvar, "nanvar", "dtype", "ddof")

argmax = single_axis_reduction(jnp.argmax, "argmax")
argmin = single_axis_reduction(jnp.argmin, "argmin")
nanargmax = single_axis_reduction(jnp.nanargmax, "nanargmax")
nanargmin = single_axis_reduction(jnp.nanargmin, "nanargmin")
