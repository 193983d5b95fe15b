"""Bringing arrays to common axes by name.

Two arrays fit when the axes of one contain those of the other, name and size; the order of axes
does not matter. The containing array gives the result its axes and their order; with equal sets,
the left one does. Arrays that merely overlap do not fit: broadcast one of them on purpose first.

Alignment inserts size-1 dimensions and leaves the stretching to `jnp`, which fuses it.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from haliax.axis import Axis, AxisSelection, AxisSpec, axis_spec_to_tuple, pairs
from haliax.core import NamedArray, trusted
from haliax.errors import axis_not_found, describe, size_mismatch, suggestion
from haliax.jax_utils import is_jax_array_like


def contains(axes: tuple[Axis, ...], others: tuple[Axis, ...]) -> bool:
    """Whether every axis of `others`, name and size, is in `axes`."""
    return all(axis in axes for axis in others)


def permuted(array: Any, axes: tuple[Axis, ...], order: tuple[Axis, ...]) -> Any:
    """The raw array with its dimensions in another order of the same axes."""
    if axes == order:
        return array
    return lax.transpose(_as_array(array), [axes.index(axis) for axis in order])


def _as_array(array: Any) -> Any:
    return jnp.asarray(array) if isinstance(array, np.ndarray) else array


def aligned(array: Any, axes: tuple[Axis, ...], to: tuple[Axis, ...]) -> Any:
    """The raw array with one dimension per axis of `to`: size 1 where it lacks the axis."""
    if axes == to or not axes:
        return array
    array = permuted(array, axes, tuple(axis for axis in to if axis in axes))
    missing = [i for i, axis in enumerate(to) if axis not in axes]
    return lax.expand_dims(_as_array(array), missing) if missing else array


def common_axes(operation: str, a: tuple[Axis, ...], b: tuple[Axis, ...]) -> tuple[Axis, ...]:
    """The axes that two operands broadcast to, or an error that says why they do not."""
    if a == b or contains(a, b):
        return a
    if contains(b, a):
        return b
    raise cannot_broadcast(operation, a, b)


def cannot_broadcast(operation: str, a: tuple[Axis, ...], b: tuple[Axis, ...]) -> ValueError:
    """Why two sets of axes do not broadcast, and what to do."""
    sizes = {axis.name: axis.size for axis in b}
    sides = f"{operation}: cannot broadcast {describe(a)} with {describe(b)}: "
    for axis in a:
        if sizes.get(axis.name, axis.size) != axis.size:
            return ValueError(
                f"{sides}axis '{axis.name}' has size {axis.size} on one side and "
                f"{sizes[axis.name]} on the other. Slice one of them, or rename it if it is "
                "another axis."
            )
    only_a = [axis.name for axis in a if axis not in b]
    only_b = [axis.name for axis in b if axis not in a]
    typo = next((s for name in only_b if (s := suggestion(name, only_a))), "")
    return ValueError(
        f"{sides}only the first has {only_a} and only the second has {only_b}, so there is no "
        "subset relationship. Rename an axis, or call `.broadcast_axis` on one side if an outer "
        f"product is meant.{typo}"
    )


def binary(fn: Callable[..., Any], operation: str, a: Any, b: Any) -> Any:
    """`fn` on two operands of which at least one is named, broadcast by name."""
    if not isinstance(b, NamedArray):
        return _with_raw(fn, operation, a, b)
    if not isinstance(a, NamedArray):
        return _with_raw(lambda x, y: fn(y, x), operation, b, a)
    if a.axes == b.axes:
        return trusted(fn(a.array, b.array), a.axes)
    axes = common_axes(operation, a.axes, b.axes)
    if _is_tail(a.axes, axes) and _is_tail(b.axes, axes):
        return trusted(_with_promotion(fn, a.array, b.array), axes)
    if _is_concrete(a.array) and _is_concrete(b.array):
        return trusted(_compiled(fn, a.axes, b.axes, axes)(a.array, b.array), axes)
    return trusted(fn(aligned(a.array, a.axes, axes), aligned(b.array, b.axes, axes)), axes)


def _is_tail(axes: tuple[Axis, ...], whole: tuple[Axis, ...]) -> bool:
    return whole[len(whole) - len(axes) :] == axes


def _with_promotion(fn: Callable[..., Any], x: Any, y: Any) -> Any:
    """`fn` where NumPy's rule for ranks, and `jnp`'s cached traces of it, do what the names say."""
    if jax.config.jax_numpy_rank_promotion == "allow":  # pyright: ignore[reportAttributeAccessIssue]
        return fn(x, y)
    with jax.numpy_rank_promotion("allow"):
        return fn(x, y)


def _is_concrete(array: Any) -> bool:
    return isinstance(array, jax.Array) and not isinstance(array, Tracer)


@functools.lru_cache(maxsize=4096)
def _compiled(
    fn: Callable[..., Any], a: tuple[Axis, ...], b: tuple[Axis, ...], to: tuple[Axis, ...]
) -> Callable[..., Any]:
    """Alignment and operation in one dispatch: outside `jit`, a reshape costs as much as `fn`."""
    return jax.jit(lambda x, y: fn(aligned(x, a, to), aligned(y, b, to)))


def _with_raw(fn: Callable[..., Any], operation: str, a: NamedArray, raw: Any) -> Any:
    """A named and an unnamed operand: scalars broadcast, and 0-d named arrays act as scalars."""
    ndim = np.ndim(raw) if isinstance(raw, (list, tuple)) else getattr(raw, "ndim", 0)
    if ndim == 0:
        return trusted(fn(a.array, raw), a.axes)
    if not a.axes:
        return fn(a.array, raw)
    raise ValueError(
        f"{operation}: cannot broadcast {describe(a.axes)} with an unnamed array of shape "
        f"{np.shape(raw)}: its dimensions could mean any axis. Name them with `hax.named(array, "
        "axes)`."
    )


def broadcast_to(
    a: NamedArray | Any,
    axes: AxisSelection,
    ensure_order: bool = True,
    enforce_no_extra_axes: bool = True,
) -> NamedArray:
    """`a` with all of `axes`.

    The result is in the order of `axes`, followed by the extra ones of `a`, which
    `enforce_no_extra_axes` refuses. Without `ensure_order`, new axes go in front and the others
    stay where they are. Sizes may be left out for axes that `a` has.
    """
    if not isinstance(a, NamedArray):
        a = NamedArray(jnp.asarray(a), ())
    wanted = _sized("broadcast_to", a.axes, axes)
    extra = tuple(axis for axis in a.axes if axis not in wanted)
    if enforce_no_extra_axes and extra:
        raise ValueError(
            f"broadcast_to: {describe(a.axes)} has axes {[axis.name for axis in extra]} that are "
            f"not in {describe(wanted)}. Reduce them first, add them to the target, or use "
            "`broadcast_axis`."
        )
    new = tuple(axis for axis in wanted if axis not in a.axes)
    target = (*wanted, *extra) if ensure_order else (*new, *a.axes)
    if target == a.axes:
        return a
    array = aligned(a.array, a.axes, target)
    return trusted(jnp.broadcast_to(array, [axis.size for axis in target]), target)


def _sized(operation: str, own: tuple[Axis, ...], axes: AxisSelection) -> tuple[Axis, ...]:
    known = {axis.name: axis.size for axis in own}
    wanted = []
    for name, size in pairs(axes):
        if size is None and name not in known:
            raise axis_not_found(
                operation, name, own, fix=f" A new axis needs a size: pass `Axis('{name}', size)`."
            )
        if size is not None and known.get(name, size) != size:
            raise size_mismatch(operation, name, size, known[name], own)
        wanted.append(Axis(name, known[name] if size is None else size))
    return tuple(wanted)


def broadcast_axis(a: NamedArray, axis: AxisSpec) -> NamedArray:
    """`a` with the axes in front, in their order, and its other axes after them.

    One axis that `a` has already changes nothing.
    """
    if isinstance(axis, Axis) and axis in a.axes:
        return a
    return broadcast_to(a, axis_spec_to_tuple(axis), enforce_no_extra_axes=False)


def broadcast_arrays(
    *arrays: Any, require_subset: bool = True, ensure_order: bool = True
) -> tuple[Any, ...]:
    """All named arrays with the axes of the biggest; `None` and scalars pass through."""
    return broadcast_arrays_and_return_axes(
        *arrays, require_subset=require_subset, ensure_order=ensure_order
    )[0]


def broadcast_arrays_and_return_axes(
    *arrays: Any, require_subset: bool = True, ensure_order: bool = True
) -> tuple[tuple[Any, ...], tuple[Axis, ...]]:
    """`broadcast_arrays`, with the common axes.

    Without `require_subset` the arrays may merely overlap; the result has the union of their axes,
    those of the biggest last.
    """
    named_axes = [a.axes for a in arrays if isinstance(a, NamedArray)]
    axes = joint_axes("broadcast_arrays", named_axes, require_subset=require_subset)

    def stretch(a: Any) -> Any:
        if not isinstance(a, NamedArray):
            return a
        return broadcast_to(a, axes, ensure_order=ensure_order)

    return tuple(stretch(a) for a in arrays), axes


def joint_axes(
    operation: str, many: Sequence[tuple[Axis, ...]], *, require_subset: bool = True
) -> tuple[Axis, ...]:
    """The axes that several operands broadcast to: those of the biggest, first one on ties."""
    if not many:
        return ()
    biggest = max(many, key=lambda axes: (len(axes), _volume(axes)))
    joint = biggest
    for axes in many:
        if contains(joint, axes):
            continue
        sizes = {axis.name: axis.size for axis in joint}
        clash = any(sizes.get(axis.name, axis.size) != axis.size for axis in axes)
        if require_subset or clash:
            raise cannot_broadcast(operation, biggest, axes)
        joint = (*(axis for axis in axes if axis not in joint), *joint)
    return joint


def _volume(axes: tuple[Axis, ...]) -> int:
    volume = 1
    for axis in axes:
        volume *= axis.size
    return volume


def elementwise(fn: Callable[..., Any], operation: str, *operands: Any) -> Any:
    """`fn` on any number of operands broadcast by name; raw results if none of them is named."""
    named_axes = [x.axes for x in operands if isinstance(x, NamedArray)]
    if not named_axes:
        return fn(*operands)
    axes = joint_axes(operation, named_axes)
    for x in operands:
        if not isinstance(x, NamedArray) and is_jax_array_like(x) and x.ndim and axes:
            raise ValueError(
                f"{operation}: cannot broadcast {describe(axes)} with an unnamed array of shape "
                f"{x.shape}. Name its dimensions with `hax.named(array, axes)`."
            )
    raw = [aligned(x.array, x.axes, axes) if isinstance(x, NamedArray) else x for x in operands]
    return jax.tree_util.tree_map(lambda array: trusted(array, axes), fn(*raw))
