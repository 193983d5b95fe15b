"""Named operations that are neither elementwise by table nor reductions: selection, masks, sets.

`where`, `clip` and comparisons broadcast by name; `tril`, `triu` and `trace` take the two axes of
their matrices; functions whose result size depends on the data take an `Axis` that fixes it.
"""

from typing import Any

import jax.numpy as jnp

from haliax.axis import Axis, AxisSelector, single_position
from haliax.broadcasting import broadcast_arrays, elementwise, permuted
from haliax.core import NamedArray, named, trusted
from haliax.errors import describe


def where(
    condition: Any,
    x: Any = None,
    y: Any = None,
    fill_value: Any = None,
    new_axis: Axis | None = None,
) -> Any:
    """`x` where the condition holds, else `y`.

    With the condition alone, a tuple of index arrays, one per axis, of the positions where it
    holds; under `jit` their number must be fixed by `new_axis`, and missing ones are `fill_value`.
    """
    if (x is None) != (y is None):
        raise ValueError(
            "where: pass both x and y, or neither to get the indices of true elements."
        )
    if x is None:
        return _true_positions(condition, fill_value, new_axis)
    if fill_value is not None or new_axis is not None:
        raise ValueError("where: fill_value and new_axis go with the one-argument form only.")
    return elementwise(jnp.where, "where", condition, x, y)


def _true_positions(condition: Any, fill_value: Any, new_axis: Axis | None) -> Any:
    if not isinstance(condition, NamedArray):
        raise ValueError(
            "where: with a condition alone it must be a NamedArray. Name it with `hax.named`."
        )
    size = None if new_axis is None else new_axis.size
    fill = None if size is None else (0 if fill_value is None else fill_value)
    found = jnp.where(condition.array, size=size, fill_value=fill)
    name = "where" if new_axis is None else new_axis.name
    return tuple(trusted(index, (Axis(name, index.shape[0]),)) for index in found)


def nonzero(array: NamedArray, *, size: Axis | None = None, fill_value: Any = None) -> Any:
    """One index array per axis, of the elements that are not zero; `size` fixes their number."""
    return _true_positions(array != 0, fill_value, size or None)


def clip(array: Any, a_min: Any = None, a_max: Any = None) -> Any:
    """`array` kept between two bounds, each of which must fit the biggest of the three."""
    if a_min is None and a_max is None:
        return array
    present = [array, *(bound for bound in (a_min, a_max) if bound is not None)]

    def limited(x: Any, *bounds: Any) -> Any:
        given = iter(bounds)
        low = next(given) if a_min is not None else None
        return jnp.clip(x, low, next(given) if a_max is not None else None)

    return elementwise(limited, "clip", *present)


def isclose(
    a: Any, b: Any, rtol: float = 1e-05, atol: float = 1e-08, equal_nan: bool = False
) -> Any:
    """Elementwise equality up to a tolerance, broadcast by name."""

    def close(x: Any, y: Any) -> Any:
        return jnp.isclose(x, y, rtol=rtol, atol=atol, equal_nan=equal_nan)

    return elementwise(close, "isclose", a, b)


def allclose(
    a: Any, b: Any, rtol: float = 1e-05, atol: float = 1e-08, equal_nan: bool = False
) -> Any:
    """Whether all elements are equal up to a tolerance."""
    return isclose(a, b, rtol=rtol, atol=atol, equal_nan=equal_nan).all()


def array_equal(a: NamedArray, b: NamedArray) -> Any:
    """Whether two arrays have the same axes, in any order, and the same elements."""
    if set(a.axes) != set(b.axes):
        return jnp.array(False)
    return jnp.array_equal(a.array, permuted(b.array, b.axes, a.axes))


def array_equiv(a: NamedArray, b: NamedArray) -> Any:
    """Whether two arrays have the same elements once broadcast to each other."""
    x, y = broadcast_arrays(a, b)
    return array_equal(x, y)


def tril(array: NamedArray, axis1: AxisSelector, axis2: AxisSelector, k: int = 0) -> NamedArray:
    """Keeps the lower triangle of the matrices over two axes, which move last."""
    return _triangle(jnp.tril, "tril", array, axis1, axis2, k)


def triu(array: NamedArray, axis1: AxisSelector, axis2: AxisSelector, k: int = 0) -> NamedArray:
    """Keeps the upper triangle of the matrices over two axes, which move last."""
    return _triangle(jnp.triu, "triu", array, axis1, axis2, k)


def _two_last(
    operation: str, array: NamedArray, axis1: AxisSelector, axis2: AxisSelector
) -> tuple[Any, tuple[Axis, ...]]:
    first = array.axes[single_position(operation, array.axes, axis1)]
    second = array.axes[single_position(operation, array.axes, axis2)]
    if first == second:
        raise ValueError(f"{operation}: the two axes must be distinct, got '{first.name}' twice.")
    order = (*(axis for axis in array.axes if axis not in (first, second)), first, second)
    return permuted(array.array, array.axes, order), order


def _triangle(
    fn: Any, operation: str, array: NamedArray, axis1: AxisSelector, axis2: AxisSelector, k: int
) -> NamedArray:
    raw, order = _two_last(operation, array, axis1, axis2)
    return trusted(fn(raw, k=k), order)


def trace(
    array: NamedArray, axis1: AxisSelector, axis2: AxisSelector, offset: int = 0, dtype: Any = None
) -> NamedArray:
    """The sum over the diagonal of two axes."""
    raw, order = _two_last("trace", array, axis1, axis2)
    return trusted(jnp.trace(raw, offset, -2, -1, dtype), order[:-2])


def raw_array_or_scalar(x: Any) -> Any:
    """The raw array of a named one; anything else as it is."""
    return x.array if isinstance(x, NamedArray) else x


def searchsorted(
    a: NamedArray, v: Any, *, side: str = "left", sorter: Any = None, method: str = "scan"
) -> NamedArray:
    """Where each of `v` would go in the sorted one-axis array `a`, in the axes of `v`."""
    if a.ndim != 1:
        raise ValueError(
            f"searchsorted: the sorted array must have one axis, got {describe(a.axes)}."
        )
    query = v if isinstance(v, NamedArray) else named(v, ())
    found = jnp.searchsorted(
        a.array, query.array, side=side, sorter=raw_array_or_scalar(sorter), method=method
    )
    return trusted(found, query.axes)


def bincount(
    x: NamedArray, Counts: Axis, *, weights: NamedArray | None = None, minlength: int = 0
) -> NamedArray:
    """How often each of `0 ... Counts.size - 1` occurs in the one-axis array `x`."""
    if x.ndim != 1:
        raise ValueError(f"bincount: the array must have one axis, got {describe(x.axes)}.")
    raw_weights = None if weights is None else permuted(weights.array, weights.axes, x.axes)
    counted = jnp.bincount(x.array, weights=raw_weights, minlength=minlength, length=Counts.size)
    return NamedArray(counted, Counts)


def packbits(a: NamedArray, axis: AxisSelector, *, bitorder: str = "big") -> NamedArray:
    """Packs booleans along an axis into bytes; the axis shrinks eightfold."""
    return _resizing(jnp.packbits, "packbits", a, axis, bitorder=bitorder)


def unpackbits(
    a: NamedArray, axis: AxisSelector, *, count: int | None = None, bitorder: str = "big"
) -> NamedArray:
    """Unpacks bytes along an axis into bits; the axis grows eightfold."""
    return _resizing(jnp.unpackbits, "unpackbits", a, axis, count=count, bitorder=bitorder)


def _resizing(fn: Any, name: str, a: NamedArray, axis: AxisSelector, **kwargs: Any) -> NamedArray:
    at = single_position(name, a.axes, axis)
    result = fn(a.array, axis=at, **kwargs)
    resized = a.axes[at].resize(result.shape[at])
    return trusted(result, (*a.axes[:at], resized, *a.axes[at + 1 :]))


def unique(
    array: NamedArray,
    Unique: Axis,
    *,
    return_index: bool = False,
    return_inverse: bool = False,
    return_counts: bool = False,
    axis: AxisSelector | None = None,
    equal_nan: bool = True,
    fill_value: Any = None,
) -> Any:
    """The distinct elements, or slices along `axis`, sorted, in `Unique.size` places.

    Extra places hold `fill_value` or the smallest element. Further results, in order: where each
    was first seen, the place of each element of the input, and how often each occurs.
    """
    at = None if axis is None else single_position("unique", array.axes, axis)
    found = jnp.unique(
        array.array,
        return_index=return_index,
        return_inverse=return_inverse,
        return_counts=return_counts,
        axis=at,
        equal_nan=equal_nan,
        size=Unique.size,
        fill_value=fill_value,
    )
    parts = list(found) if isinstance(found, tuple) else [found]
    values_axes = (Unique,) if at is None else (*array.axes[:at], Unique, *array.axes[at + 1 :])
    results = [NamedArray(parts.pop(0), values_axes)]
    if return_index:
        results.append(NamedArray(parts.pop(0), Unique))
    if return_inverse:
        inverse = parts.pop(0)
        axes = array.axes if at is None else (array.axes[at],)
        results.append(NamedArray(inverse.reshape([a.size for a in axes]), axes))
    if return_counts:
        results.append(NamedArray(parts.pop(0), Unique))
    return results[0] if len(results) == 1 else tuple(results)


def unique_values(array: NamedArray, Unique: Axis, **kwargs: Any) -> NamedArray:
    """The distinct elements, sorted."""
    return unique(array, Unique, **kwargs)


def unique_counts(array: NamedArray, Unique: Axis, **kwargs: Any) -> Any:
    """The distinct elements, and how often each occurs."""
    return unique(array, Unique, return_counts=True, **kwargs)


def unique_inverse(array: NamedArray, Unique: Axis, **kwargs: Any) -> Any:
    """The distinct elements, and the place of each element of the input among them."""
    return unique(array, Unique, return_inverse=True, **kwargs)


def unique_all(array: NamedArray, Unique: Axis, **kwargs: Any) -> Any:
    """Values, first positions, inverse and counts."""
    return unique(
        array, Unique, return_index=True, return_inverse=True, return_counts=True, **kwargs
    )
