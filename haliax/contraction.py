"""`dot`: multiply any number of named arrays and sum over axes.

Axes are matched by name: those to contract are summed, those that several operands share are
batched, the rest appear once. Pairs go straight to `lax.dot_general`, in the operand order that
needs no transpose of the result where there is one; three or more operands are contracted greedily,
the pair with the smallest result first.
"""

import warnings
from collections.abc import Callable, Sequence
from math import prod
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from haliax.axis import (
    Axis,
    AxisSelection,
    PartialAxisSpec,
    pairs,
    rearrange_for_partial_order,
)
from haliax.core import NamedArray, honest, trusted
from haliax.dot_general import DefaultDotGeneralOp
from haliax.errors import axis_not_found, describe, size_mismatch
from haliax.partitioning import auto_sharded

DotGeneral: TypeAlias = Callable[..., jax.Array]
_MISSING: Any = object()


def dot(
    *arrays: NamedArray | Any,
    axis: AxisSelection | None = _MISSING,
    precision: Any = None,
    preferred_element_type: Any = None,
    out_axes: PartialAxisSpec | None = None,
    dot_general: DotGeneral = lax.dot_general,
) -> NamedArray:
    """Multiplies arrays by name and sums over `axis`; `None` sums over every axis, `()` over none.

    The result has the other axes in the order of their first occurrence, or in the partial order
    `out_axes`, as in `("batch", ..., "embed")`.
    """
    if axis is _MISSING or not all(isinstance(a, NamedArray) for a in arrays):
        arrays, axis = _from_old_order(arrays, axis)
    for a in arrays:
        honest("dot", a)
    axes = matched_axes("dot", [a.axes for a in arrays])
    contracted = {a.name for a in axes} if axis is None else _to_contract("dot", axes, axis)
    kept = tuple(a for a in axes if a.name not in contracted)
    out = (
        kept if out_axes is None else rearrange_for_partial_order(out_axes, kept, "dot(out_axes=)")
    )
    options = {"precision": precision, "preferred_element_type": preferred_element_type}
    return auto_sharded(contract(arrays, out, dot_general, **options))


def _from_old_order(arrays: tuple[Any, ...], axis: Any) -> tuple[tuple[Any, ...], Any]:
    """Accepts `dot(axis, a, b)` and `a.dot(axis, b)`, the order of long ago."""
    selectors = [a for a in arrays if not isinstance(a, NamedArray)]
    if axis is not _MISSING or len(selectors) != 1 or hasattr(selectors[0], "dtype"):
        strange = [
            type(a).__name__ for a in selectors if hasattr(a, "dtype") or axis is not _MISSING
        ]
        if strange:
            raise TypeError(
                f"dot: every operand must be a NamedArray, got {strange}. Name plain arrays with "
                "`hax.named(array, axes)`."
            )
        raise TypeError(
            "dot: say what to sum over: `dot(a, b, axis=...)`; `None` means every axis."
        )
    warnings.warn(
        "dot(axis, a, b) is deprecated; write dot(a, b, axis=axis).",
        DeprecationWarning,
        stacklevel=3,
    )
    return tuple(a for a in arrays if isinstance(a, NamedArray)), selectors[0]


def matched_axes(operation: str, many: Sequence[tuple[Axis, ...]]) -> tuple[Axis, ...]:
    """Every axis once, in order of first occurrence; one name with two sizes is an error."""
    if len(many) == 2 and many[0] == many[1]:
        return many[0]
    found: dict[str, Axis] = {}
    for axes in many:
        for axis in axes:
            known = found.setdefault(axis.name, axis)
            if known is not axis and known.size != axis.size:
                sides = " and ".join(describe(a) for a in many)
                raise ValueError(
                    f"{operation}: axis '{axis.name}' has size {known.size} in one operand and "
                    f"size {axis.size} in another: {sides}. Slice one of them, or rename it if it "
                    "is another axis."
                )
    return tuple(found.values())


def _to_contract(operation: str, axes: tuple[Axis, ...], selection: AxisSelection) -> set[str]:
    sizes = {axis.name: axis.size for axis in axes}
    for name, size in pairs(selection):
        if name not in sizes:
            raise axis_not_found(operation, name, axes)
        if size is not None and size != sizes[name]:
            raise size_mismatch(operation, name, size, sizes[name], axes)
    return {name for name, _ in pairs(selection)}


def contract(
    arrays: Sequence[NamedArray],
    out: tuple[Axis, ...],
    dot_general: DotGeneral = lax.dot_general,
    *,
    precision: Any = None,
    preferred_element_type: Any = None,
) -> NamedArray:
    """The product of the arrays, summed over every axis not in `out`, in the order of `out`."""
    if not arrays:
        raise ValueError("dot: there is nothing to multiply. Pass at least one array.")
    kept = {axis.name for axis in out}
    operands = _same_dtype(arrays)

    def multiply(a: NamedArray, b: NamedArray, needed: set[str], order: Any) -> NamedArray:
        general = (dot_general, precision, preferred_element_type)
        return _contract_pair(a, b, needed, order, *general)

    if len(operands) == 1:
        result = _summed(operands[0], kept, preferred_element_type)
    else:
        while len(operands) > 2:
            i, j = _cheapest_pair(operands, kept)
            rest = [a for k, a in enumerate(operands) if k not in (i, j)]
            needed = kept.union(*({axis.name for axis in a.axes} for a in rest))
            operands = [multiply(operands[i], operands[j], needed, None), *rest]
        result = multiply(operands[0], operands[1], kept, out)
    if result.axes == out:
        return result
    return trusted(lax.transpose(result.array, [result.axes.index(axis) for axis in out]), out)


def _same_dtype(arrays: Sequence[NamedArray]) -> list[NamedArray]:
    first = arrays[0].array.dtype
    if all(a.array.dtype == first for a in arrays):
        return list(arrays)
    dtype = jnp.result_type(*[a.array for a in arrays])
    return [trusted(lax.convert_element_type(a.array, dtype), a.axes) for a in arrays]


def _summed(a: NamedArray, kept: set[str], dtype: Any = None) -> NamedArray:
    """`a` without the axes that are not kept."""
    gone = tuple(i for i, axis in enumerate(a.axes) if axis.name not in kept)
    if not gone:
        return a if dtype is None else trusted(lax.convert_element_type(a.array, dtype), a.axes)
    axes = tuple(axis for axis in a.axes if axis.name in kept)
    return trusted(jnp.sum(a.array, axis=gone, dtype=dtype), axes)


def _cheapest_pair(operands: list[NamedArray], kept: set[str]) -> tuple[int, int]:
    """The pair whose product shrinks the work most: the greedy rule of opt_einsum."""
    best, best_cost = (0, 1), None
    for i in range(len(operands)):
        for j in range(i + 1, len(operands)):
            others = (a for k, a in enumerate(operands) if k not in (i, j))
            needed = kept.union(*({axis.name for axis in a.axes} for a in others))
            union = {*operands[i].axes, *operands[j].axes}
            size = prod(axis.size for axis in union if axis.name in needed)
            cost = size - prod(operands[i].array.shape) - prod(operands[j].array.shape)
            if best_cost is None or cost < best_cost:
                best, best_cost = (i, j), cost
    return best


def _is_symmetric(dot_general: DotGeneral) -> bool:
    """Whether operands may change places; a quantized product scales each in its own way."""
    return dot_general is lax.dot_general or isinstance(dot_general, DefaultDotGeneralOp)


def _contract_pair(
    a: NamedArray,
    b: NamedArray,
    needed: set[str],
    order: tuple[Axis, ...] | None,
    dot_general: DotGeneral,
    precision: Any,
    preferred_element_type: Any,
) -> NamedArray:
    # An axis that one operand alone has, and nobody needs, is summed before the product.
    a_names, b_names = {x.name for x in a.axes}, {x.name for x in b.axes}
    a, b = _summed(a, needed | b_names), _summed(b, needed | a_names)
    shared = [axis for axis in a.axes if axis in b.axes]
    batch = [axis for axis in shared if axis.name in needed]
    summed = [axis for axis in shared if axis.name not in needed]
    if order is not None:
        batch.sort(key=order.index)
    if order is not None and _is_symmetric(dot_general):
        free_a = [axis for axis in a.axes if axis not in shared]
        free_b = [axis for axis in b.axes if axis not in shared]
        if tuple(batch + free_a + free_b) != order and tuple(batch + free_b + free_a) == order:
            a, b = b, a
    free = [axis for axis in (*a.axes, *b.axes) if axis not in shared]
    numbers = (
        ([a.axes.index(x) for x in summed], [b.axes.index(x) for x in summed]),
        ([a.axes.index(x) for x in batch], [b.axes.index(x) for x in batch]),
    )
    product = dot_general(
        a.array,
        b.array,
        numbers,
        precision=precision,
        preferred_element_type=preferred_element_type,
    )
    return trusted(product, (*batch, *free))
