"""Changing the axes of an array and nothing else: order, names, grouping, joining, cutting.

None of these computes on elements. Order matters only here and where arrays leave the named world;
everything else goes by name.
"""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, overload

import jax
import jax.numpy as jnp
from jax import lax

from haliax.axis import (
    Axis,
    AxisSelection,
    AxisSelector,
    PartialAxisSpec,
    axis_name,
    axis_positions,
    axis_spec_to_tuple,
    check_unique,
    pairs,
    rearrange_for_partial_order,
    renamed,
    resolve_axes,
    single_position,
)
from haliax.broadcasting import permuted
from haliax.core import NamedArray, honest, trusted
from haliax.errors import axis_not_found, describe, size_mismatch
from haliax.partitioning import auto_sharded


def rearrange(array: NamedArray, axes: PartialAxisSpec | str, **bindings: Any) -> NamedArray:
    """Reorders axes: `rearrange(x, ("batch", ..., "embed"))`, or by an einops-like string.

    With a sequence, `...` stands for the axes not named. For strings, see `haliax.patterns`.
    """
    if isinstance(axes, str):
        from haliax.patterns import rearrange_by_pattern

        return auto_sharded(rearrange_by_pattern(array, axes, **bindings))
    if bindings:
        raise TypeError(f"rearrange: {sorted(bindings)} are only understood with a string pattern.")
    if isinstance(axes, Axis):
        axes = (axes,)
    order = rearrange_for_partial_order(axes, array.axes)
    return trusted(permuted(honest("rearrange", array), array.axes, order), order)


def rename(array: NamedArray, renames: Mapping[Any, Any]) -> NamedArray:
    """The same data under other names: `rename(x, {"pos": "key_pos"})`. Swaps are fine."""
    return trusted(array.array, renamed("rename", array.axes, renames))


@overload
def flatten_axes(
    array: NamedArray, old_axes: AxisSelection, new_axis: AxisSelector
) -> NamedArray: ...
@overload
def flatten_axes(
    array: Axis | Sequence[Axis] | Mapping[str, int],
    old_axes: AxisSelection,
    new_axis: AxisSelector,
) -> Any: ...
def flatten_axes(array: Any, old_axes: AxisSelection, new_axis: AxisSelector) -> Any:
    """Merges axes into one, row-major in the order of `old_axes`, where the first of them was.

    No axes at all make a new one of size 1, in front. Works on axis specs as well.
    """
    if not isinstance(array, NamedArray):
        flat = _flattened(axis_spec_to_tuple(array), old_axes, new_axis)[1]
        return {axis.name: axis.size for axis in flat} if isinstance(array, Mapping) else flat
    before, after = _flattened(array.axes, old_axes, new_axis)
    raw = permuted(honest("flatten_axes", array), array.axes, before)
    return trusted(jnp.reshape(raw, [axis.size for axis in after]), after)


def _flattened(
    axes: tuple[Axis, ...], old_axes: AxisSelection, new_axis: AxisSelector
) -> tuple[tuple[Axis, ...], tuple[Axis, ...]]:
    """The order that makes the old axes neighbours, and the axes after merging them."""
    old = resolve_axes("flatten_axes", axes, old_axes)
    [(name, size)] = pairs(new_axis)
    total = prod(axis.size for axis in old)
    if size is not None and size != total:
        raise ValueError(
            f"flatten_axes: {describe(old)} hold {total} elements, but the new axis '{name}' has "
            f"size {size}. Pass the name '{name}' alone to get the right size."
        )
    at = min((axes.index(axis) for axis in old), default=0)
    head = tuple(axis for axis in axes[:at] if axis not in old)
    tail = tuple(axis for axis in axes[at:] if axis not in old)
    after = (*head, Axis(name, total), *tail)
    check_unique("flatten_axes", after)
    return (*head, *old, *tail), after


def unflatten_axis(array: NamedArray, axis: AxisSelector, new_axes: AxisSelection) -> NamedArray:
    """Splits an axis into several, row-major; one size may be left out. `()` drops size 1."""
    at = single_position("unflatten_axis", array.axes, axis)
    new = _complete("unflatten_axis", array.axes[at], new_axes)
    axes = (*array.axes[:at], *new, *array.axes[at + 1 :])
    check_unique("unflatten_axis", axes)
    return trusted(jnp.reshape(honest("unflatten_axis", array), [a.size for a in axes]), axes)


def _complete(operation: str, old: Axis, new_axes: AxisSelection) -> tuple[Axis, ...]:
    new = pairs(new_axes)
    unknown = [name for name, size in new if size is None]
    known = prod(size for _, size in new if size is not None)
    if len(unknown) > 1 or (unknown and (known == 0 or old.size % known)):
        raise ValueError(
            f"{operation}: cannot find the sizes of {unknown} from {old} and {describe(new_axes)}. "
            "Give all sizes but one, and let them divide the old size."
        )
    if not unknown and known != old.size:
        raise ValueError(
            f"{operation}: {old} has {old.size} elements, but {describe(new_axes)} has {known}. "
            "The product of the new sizes must be the old size."
        )
    return tuple(Axis(name, old.size // known if size is None else size) for name, size in new)


def ravel(array: NamedArray, new_axis_name: AxisSelector) -> NamedArray:
    """All axes merged into one."""
    return flatten_axes(array, array.axes, new_axis_name)


flatten = ravel


def split(a: NamedArray, axis: AxisSelector, new_axes: Sequence[Axis]) -> Sequence[NamedArray]:
    """Cuts along an axis into pieces with the new axes, whose sizes must add up."""
    at = single_position("split", a.axes, axis)
    total = sum(new.size for new in new_axes)
    if total != a.axes[at].size:
        raise ValueError(
            f"split: the sizes of {[str(new) for new in new_axes]} add up to {total}, but "
            f"{a.axes[at]} of {describe(a.axes)} has size {a.axes[at].size}."
        )
    pieces = lax.split(jnp.asarray(honest("split", a)), [new.size for new in new_axes], axis=at)
    found = []
    for piece, new in zip(pieces, new_axes, strict=True):
        axes = (*a.axes[:at], new, *a.axes[at + 1 :])
        check_unique("split", axes)
        found.append(trusted(piece, axes))
    return found


def unbind(array: NamedArray, axis: AxisSelector) -> list[NamedArray]:
    """One array per position of the axis, without it."""
    at = single_position("unbind", array.axes, axis)
    rest = (*array.axes[:at], *array.axes[at + 1 :])
    return [
        auto_sharded(trusted(lax.index_in_dim(array.array, i, at, keepdims=False), rest))
        for i in range(array.axes[at].size)
    ]


def stack(axis: AxisSelector, arrays: Sequence[NamedArray]) -> NamedArray:
    """Joins arrays along a new axis, in front; all take the axis order of the first."""
    [(name, size)] = pairs(axis)
    if not arrays:
        raise ValueError(
            f"stack: there is nothing to stack along '{name}'. Pass at least one array."
        )
    if size is not None and size != len(arrays):
        raise size_mismatch("stack", name, size, len(arrays), arrays[0].axes)
    axes = arrays[0].axes
    for a in arrays:
        if set(a.axes) != set(axes):
            raise ValueError(
                f"stack: the arrays must have the same axes, got {describe(axes)} and "
                f"{describe(a.axes)}. Broadcast or slice them to the same axes first."
            )
    joint = (Axis(name, len(arrays)), *axes)
    check_unique("stack", joint, fix="Use `concatenate` to join along an axis that is there.")
    return trusted(jnp.stack([permuted(a.array, a.axes, axes) for a in arrays]), joint)


def concatenate(axis: AxisSelector, arrays: Sequence[NamedArray]) -> NamedArray:
    """Joins arrays along an axis that all have, in any sizes; all take the order of the first."""
    [(name, size)] = pairs(axis)
    if not arrays:
        raise ValueError(
            f"concatenate: there is nothing to join along '{name}'. Pass at least one array."
        )
    at = single_position("concatenate", arrays[0].axes, name)
    axes = arrays[0].axes
    rest = {a for a in axes if a.name != name}
    pieces, total = [], 0
    for a in arrays:
        own = next((x for x in a.axes if x.name == name), None)
        if own is None:
            raise axis_not_found("concatenate", name, a.axes)
        if {x for x in a.axes if x.name != name} != rest:
            raise ValueError(
                f"concatenate: all axes but '{name}' must agree, got {describe(axes)} and "
                f"{describe(a.axes)}. Broadcast or slice them to the same axes first."
            )
        order = tuple(own if x.name == name else x for x in axes)
        pieces.append(permuted(a.array, a.axes, order))
        total += own.size
    if size is not None and size != total:
        raise size_mismatch("concatenate", name, size, total)
    joint = (*axes[:at], Axis(name, total), *axes[at + 1 :])
    return trusted(jnp.concatenate(pieces, axis=at), joint)


def repeat(
    a: NamedArray, repeats: Any, axis: AxisSelector, total_repeat_length: int | None = None
) -> NamedArray:
    """Repeats each element along an axis: `a b` becomes `a a b b`."""
    at = single_position("repeat", a.axes, axis)
    raw = repeats.array if isinstance(repeats, NamedArray) else repeats
    result = jnp.repeat(a.array, raw, axis=at, total_repeat_length=total_repeat_length)
    return _resized(result, a.axes, at)


def _resized(array: jax.Array, axes: tuple[Axis, ...], at: int) -> NamedArray:
    """The array with the axis at one position grown or shrunk to its size there."""
    axes = (*axes[:at], Axis(axes[at].name, array.shape[at]), *axes[at + 1 :])
    return trusted(array, axes)


def tile(a: NamedArray, reps: Mapping[Any, int]) -> NamedArray:
    """Repeats the whole array along axes: `a b` becomes `a b a b`. New axes come in front."""
    counts = {axis_name(axis): count for axis, count in reps.items()}
    for axis in reps:
        if a.has_axis(axis_name(axis)):
            axis_positions("tile", a.axes, axis)
    new = tuple(Axis(name, count) for name, count in counts.items() if not a.has_axis(name))
    axes = tuple(Axis(axis.name, axis.size * counts.get(axis.name, 1)) for axis in a.axes)
    factors = [*(axis.size for axis in new), *(counts.get(axis.name, 1) for axis in a.axes)]
    return trusted(jnp.tile(a.array, factors), (*new, *axes))


def roll(array: NamedArray, shift: Any, axis: AxisSelection) -> NamedArray:
    """Moves elements along axes, those off the end to the start; `shift` may be traced."""
    positions = axis_positions("roll", array.axes, axis)
    if isinstance(shift, NamedArray):
        if shift.ndim:
            raise TypeError(
                "roll: shift must be a number or an array without axes, got axes "
                f"{describe(shift.axes)}. Use `hax.vmap` over those axes."
            )
        shift = shift.array
    shifts = shift if isinstance(shift, (tuple, list)) else [shift] * len(positions)
    rolled = honest("roll", array)
    for at, amount in zip(positions, shifts, strict=True):
        rolled = jnp.roll(rolled, amount, at)
    return trusted(rolled, array.axes)


def pad(
    array: NamedArray,
    padding: Mapping[Any, tuple[int, int]],
    *,
    mode: str = "constant",
    constant_values: Any = 0,
    **kwargs: Any,
) -> NamedArray:
    """Grows axes at their ends: `pad(x, {"pos": (1, 0)})`; modes as in `jnp.pad`."""
    widths = [(0, 0)] * array.ndim
    axes = list(array.axes)
    for axis, (left, right) in padding.items():
        at = single_position("pad", array.axes, axis)
        if left < 0 or right < 0:
            raise ValueError(
                f"pad: axis '{axis_name(axis)}' of {describe(array.axes)} would be padded by "
                f"{(left, right)}. Widths are >= 0; use `slice` to shorten an axis."
            )
        widths[at] = (left, right)
        axes[at] = axes[at].resize(axes[at].size + left + right)
    if mode == "constant":
        kwargs["constant_values"] = getattr(constant_values, "array", constant_values)
    return trusted(jnp.pad(honest("pad", array), widths, mode=mode, **kwargs), tuple(axes))


def pad_left(array: NamedArray, axis: AxisSelector, new_axis: Axis, value: Any = 0) -> NamedArray:
    """Grows an axis to `new_axis` by values in front."""
    at = single_position("pad_left", array.axes, axis)
    amount = new_axis.size - array.axes[at].size
    if amount < 0:
        raise ValueError(
            f"pad_left: {new_axis} is smaller than {array.axes[at]} of {describe(array.axes)}. "
            "Padding only grows an axis; use `slice` to shorten it."
        )
    padded = pad(array, {array.axes[at]: (amount, 0)}, constant_values=value)
    axes = (*array.axes[:at], new_axis, *array.axes[at + 1 :])
    check_unique("pad_left", axes)
    return trusted(padded.array, axes)
