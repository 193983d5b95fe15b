"""Indexing by name: `x["batch", 0, "pos", 1:3]`, `x[{"vocab": ids}]`, `x.at[...]`, `take`, `slice`.

The rules are NumPy's, with names in the place of positions:

- an integer removes its axis, a Python slice keeps it, a list of integers resizes it;
- a named array of integers is a gather, and its axes replace the indexed one. Several are broadcast
  together by name. An axis that the indexed array keeps as well is *paired* with it: with targets
  over (batch, pos), `logits["vocab", targets]` picks one logit for each batch and pos;
- the new axes go where the indexed ones were if those are next to each other, otherwise to the
  front;
- a `dslice` is a gather along its own axis that reads zeros and writes nothing past the end.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from haliax.axis import (
    Axis,
    AxisSelector,
    check_unique,
    pairs,
    single_position,
)
from haliax.broadcasting import aligned, broadcast_to, contains, joint_axes, permuted
from haliax.core import NamedArray, honest, trusted
from haliax.dslice import dslice
from haliax.errors import axis_not_found, describe, size_mismatch

_builtin_slice = slice


@dataclass(frozen=True)
class _Plan:
    """A translated index: one entry per dimension of the array, and the axes of the result."""

    entries: tuple[Any, ...]
    axes: tuple[Axis, ...]
    mode: str | None


def index(array: NamedArray, slices: Mapping[Any, Any]) -> NamedArray:
    """The part of `array` that `{axis: index}` selects."""
    plan = _plan("index", array, slices)
    _check_bounds("index", array, slices)
    if plan.mode is None:
        return trusted(array.array[plan.entries], plan.axes)
    # `dslice` reads past the end are zeros.
    taken = jnp.asarray(array.array).at[plan.entries].get(mode=plan.mode, fill_value=0)
    return trusted(taken, plan.axes)


def getitem(array: NamedArray, item: Any) -> NamedArray:
    """`x["H", 0, "D", 1:3]` and `x[{"H": 0}]`."""
    return index(array, _as_mapping("index", array, item))


def _as_mapping(operation: str, array: NamedArray, item: Any) -> dict[Any, Any]:
    if isinstance(item, Mapping):
        return dict(item)
    if item == () if isinstance(item, tuple) else False:
        return {}
    if not isinstance(item, tuple) or len(item) % 2 or not isinstance(item[0], (str, Axis)):
        raise ValueError(
            f"{operation}: name the axis of each index, as in `x['{_some(array)}', 0]` or "
            f"`x[{{'{_some(array)}': 0}}]`; got {item!r} for axes {describe(array.axes)}."
        )
    names = item[::2]
    found: dict[Any, Any] = {}
    for name, value in zip(names, item[1::2], strict=True):
        if name in found:
            raise ValueError(
                f"{operation}: axis '{name}' is indexed twice. Combine the two indices."
            )
        found[name] = value
    return found


def _some(array: NamedArray) -> str:
    return array.axes[0].name if array.axes else "axis"


def _plan(operation: str, array: NamedArray, slices: Mapping[Any, Any]) -> _Plan:
    honest(operation, array)
    by_position: dict[int, Any] = {}
    for axis, value in slices.items():
        at = _indexed_position(operation, array, axis)
        if at in by_position:
            name = array.axes[at].name
            raise ValueError(
                f"{operation}: axis '{name}' is indexed twice. Combine the two indices."
            )
        by_position[at] = _normalized(operation, array.axes[at], value)
    gathers = {i: v for i, v in by_position.items() if not isinstance(v, _builtin_slice)}
    if not any(isinstance(v, NamedArray) and v.axes for v in gathers.values()):
        return _basic_plan(array, by_position)
    return _gather_plan(operation, array, by_position, gathers)


def _indexed_position(operation: str, array: NamedArray, axis: Any) -> int:
    if not isinstance(axis, (str, Axis)):
        raise ValueError(
            f"{operation}: keys are axes or their names, not {axis!r}; the axes are "
            f"{describe(array.axes)}."
        )
    try:
        at = array.axis_indices(axis)
    except RuntimeError as error:
        raise RuntimeError(f"{operation}: {error}") from None
    if at is None:
        name = axis if isinstance(axis, str) else axis.name
        raise axis_not_found(operation, name, array.axes)
    return at


def _normalized(operation: str, axis: Axis, value: Any) -> Any:
    """An index as a Python slice, an integer, or a named array of integers (or a `dslice`)."""
    if isinstance(value, (_builtin_slice, dslice)):
        return value
    if isinstance(value, bool) or value is None:
        raise ValueError(
            f"{operation}: {value!r} cannot index axis '{axis.name}'; masks go to `hax.where`."
        )
    if isinstance(value, (int, np.integer)):
        return int(value)
    if isinstance(value, NamedArray):
        return _without_mask(operation, axis, value)
    if isinstance(value, (list, tuple)):
        value = np.asarray(value, dtype=np.int32 if not value else None)
    if hasattr(value, "dtype") and value.ndim <= 1 and jnp.issubdtype(value.dtype, jnp.integer):
        return NamedArray(value, () if value.ndim == 0 else (axis.resize(value.shape[0]),))
    if hasattr(value, "dtype") and value.ndim == 1 and value.dtype == bool:
        return _without_mask(operation, axis, NamedArray(value, (axis.resize(value.shape[0]),)))
    raise ValueError(
        f"{operation}: axis '{axis.name}' cannot be indexed by {_kind(value)}. Use an integer, a "
        "slice, a list of integers, a `hax.ds`, or a named array of integers: `hax.named(array, "
        "axes)`."
    )


def _kind(value: Any) -> str:
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"an unnamed {value.dtype} array of shape {tuple(value.shape)}"
    return f"{type(value).__name__} {value!r}"


def _check_bounds(operation: str, array: NamedArray, slices: Mapping[Any, Any]) -> None:
    """Raises for Python integers out of bounds, which JAX would move to the nearest element."""
    for name, value in slices.items():
        if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
            axis = array.axes[_indexed_position(operation, array, name)]
            if not -axis.size <= value < axis.size:
                raise IndexError(
                    f"{operation}: {value} is out of bounds for axis '{axis.name}' of size "
                    f"{axis.size} in {describe(array.axes)}."
                )


def _without_mask(operation: str, axis: Axis, value: NamedArray) -> NamedArray:
    """A boolean mask as the positions where it holds; not under `jit`: its size depends on data."""
    if value.dtype != bool:
        return value
    if isinstance(value.array, Tracer):
        raise ValueError(
            f"{operation}: a boolean mask over '{axis.name}' has no static size under `jit`. Use "
            "`hax.where(mask, x, fill)`."
        )
    if value.ndim != 1 or value.axes[0].size != axis.size:
        raise ValueError(
            f"{operation}: a mask over axis '{axis.name}' of size {axis.size} must have that one "
            f"axis, got {describe(value.axes)}. Use `hax.where(mask, x, fill)` for masks over "
            "several axes."
        )
    (kept,) = np.nonzero(np.asarray(value.array))
    return NamedArray(jnp.asarray(kept), (value.axes[0].resize(len(kept)),))


def _basic_plan(array: NamedArray, by_position: dict[int, Any]) -> _Plan:
    """Slices, integers and `dslice`s only; the last two share NumPy's rule for where axes go."""
    entries: list[Any] = []
    kept: list[Axis] = []
    blocks: list[tuple[int, Axis, dslice]] = []
    slots: list[Any] = []
    for i, axis in enumerate(array.axes):
        value = by_position.get(i, _builtin_slice(None))
        if isinstance(value, _builtin_slice):
            entries.append(_python_slice(value))
            kept.append(axis.resize(len(range(*entries[-1].indices(axis.size)))))
            slots.append(kept[-1])
        elif isinstance(value, dslice):
            blocks.append((i, axis.resize(value.size), value))
            entries.append(value)
            slots.append(None)
        else:
            entries.append(value.array if isinstance(value, NamedArray) else value)
            slots.append(None)
    if not blocks:
        return _Plan(tuple(entries), tuple(kept), None)
    for rank, (i, _, block) in enumerate(blocks):
        shape = [1] * len(blocks)
        shape[rank] = block.size
        entries[i] = block.positions().reshape(shape)
    entries = [jnp.asarray(e) if isinstance(e, int) else e for e in entries]
    axes = _spliced(slots, tuple(axis for _, axis, _ in blocks))
    return _Plan(tuple(_same_rank(entries, len(blocks))), axes, "fill")


def _python_slice(value: slice) -> slice:
    def plain(bound: Any) -> Any:
        return bound.array if isinstance(bound, NamedArray) else bound

    bounds = [plain(value.start), plain(value.stop), plain(value.step)]
    if any(isinstance(bound, Tracer) for bound in bounds):
        raise ValueError(
            "index: a slice with traced bounds has no static size. Use `hax.ds(start, length)`, or "
            "`hax.slice(x, axis, start=..., length=...)`."
        )
    return _builtin_slice(*(None if b is None else int(b) for b in bounds))


def _same_rank(entries: Sequence[Any], rank: int) -> list[Any]:
    """Gathers with size-1 dimensions in front, since ranks are not promoted silently."""
    return [
        e
        if isinstance(e, _builtin_slice)
        else jnp.reshape(e, (1,) * (rank - jnp.ndim(e)) + jnp.shape(e))
        for e in entries
    ]


def _spliced(slots: Sequence[Axis | None], new: tuple[Axis, ...]) -> tuple[Axis, ...]:
    """Result axes: `None` slots were gathered; neighbours are replaced in place."""
    gathered = [i for i, slot in enumerate(slots) if slot is None]
    kept = [slot for slot in slots if slot is not None]
    first, last = gathered[0], gathered[-1]
    at = first if last - first + 1 == len(gathered) else 0
    axes = (*kept[:at], *new, *kept[at:])
    check_unique("index", axes, fix="Rename the axis of the index, or of the array.")
    return axes


def _gather_plan(
    operation: str, array: NamedArray, by_position: dict[int, Any], gathers: dict[int, Any]
) -> _Plan:
    """Named arrays of integers are broadcast by name; shared axes are paired."""
    blocks = {
        i: NamedArray(v.positions(), (array.axes[i].resize(v.size),))
        if isinstance(v, dslice)
        else v
        for i, v in gathers.items()
    }
    indices = {
        i: v if isinstance(v, NamedArray) else NamedArray(jnp.asarray(v), ())
        for i, v in blocks.items()
    }
    new = _index_axes(operation, array, indices, by_position)
    new_sizes = {axis.name: axis.size for axis in new}
    slots: list[Axis | None] = []
    entries: list[Any] = []
    for i, axis in enumerate(array.axes):
        value = by_position.get(i)
        if i in indices:
            slots.append(None)
            entries.append(_stretched(indices[i], new))
        elif axis.name in new_sizes:
            slots.append(None)
            entries.append(_paired(operation, axis, value, new))
        else:
            entries.append(_python_slice(value) if value is not None else _builtin_slice(None))
            slots.append(axis.resize(len(range(*entries[-1].indices(axis.size)))))
    filled = any(isinstance(v, dslice) for v in gathers.values())
    return _Plan(tuple(entries), _spliced(slots, new), "fill" if filled else None)


def _index_axes(
    operation: str, array: NamedArray, indices: dict[int, NamedArray], by_position: dict[int, Any]
) -> tuple[Axis, ...]:
    """The union of the axes of all indices; in the array's order if the array has them all."""
    new = joint_axes(operation, [v.axes for v in indices.values()], require_subset=False)
    paired = [a for i, a in enumerate(array.axes) if i not in indices]
    order = {axis.name: i for i, axis in enumerate(paired)}
    if len(order) and all(axis.name in order for axis in new):
        return tuple(sorted(new, key=lambda axis: order[axis.name]))
    return new


def _stretched(value: NamedArray, new: tuple[Axis, ...]) -> Any:
    return (
        aligned(value.array, value.axes, new)
        if value.axes
        else jnp.reshape(value.array, (1,) * len(new))
    )


def _paired(operation: str, axis: Axis, value: Any, new: tuple[Axis, ...]) -> Any:
    """Positions along an axis that both the array and an index have: element i meets element i."""
    own = next(a for a in new if a.name == axis.name)
    positions = np.arange(axis.size, dtype=np.int32)[
        value if value is not None else _builtin_slice(None)
    ]
    if own.size != len(positions):
        raise ValueError(
            f"{operation}: axis '{axis.name}' has size {len(positions)} in the array and "
            f"{own.size} in the index; shared axes are matched element by element. Slice or rename "
            "one of them."
        )
    return aligned(jnp.asarray(positions), (own,), new)


def take(array: NamedArray, axis: AxisSelector, index: Any) -> NamedArray:
    """Elements of an axis by number; the axes of `index` take its place.

    Axes that `index` shares with the array are paired, element by element. The index may have the
    name of the axis that it replaces.
    """
    at = _indexed_position("take", array, axis)
    if not isinstance(index, NamedArray):
        index = _normalized("take", array.axes[at], index)
        if isinstance(index, int):
            _check_bounds("take", array, {axis: index})
            return trusted(
                lax.index_in_dim(array.array, index, at, keepdims=False), _without(array, at)
            )
    if isinstance(index, NamedArray) and not index.axes:
        taken = jnp.take(array.array, index.array, axis=at)
        return trusted(taken, _without(array, at))
    rest = _without(array, at)
    if isinstance(index, NamedArray) and any(a.name in {r.name for r in rest} for a in index.axes):
        return _take_paired(array, at, index)
    if not isinstance(index, NamedArray) or index.dtype == bool:
        return getitem(array, {array.axes[at].name: index})
    axes = (*array.axes[:at], *index.axes, *array.axes[at + 1 :])
    check_unique("take", axes, fix="Rename the axis of the index, or of the array.")
    return trusted(jnp.take(array.array, index.array, axis=at), axes)


def _without(array: NamedArray, at: int) -> tuple[Axis, ...]:
    return (*array.axes[:at], *array.axes[at + 1 :])


def _take_paired(array: NamedArray, at: int, picks: NamedArray) -> NamedArray:
    rest = _without(array, at)
    new = tuple(a for a in picks.axes if a.name not in {r.name for r in rest})
    order = (*array.axes[:at], *new, *array.axes[at + 1 :])
    found = index(array, {array.axes[at].name: picks})
    return trusted(permuted(found.array, found.axes, order), order)


def slice(
    array: NamedArray,
    axis: AxisSelector | Mapping[Any, Any],
    new_axis: AxisSelector | Mapping[Any, Any] | None = None,
    start: Any = 0,
    length: int | Axis | None = None,
) -> NamedArray:
    """A block with starts that may be traced: `slice(x, "pos", start=i, length=4)`.

    `new_axis` renames, and sizes, the axis. Several axes: `slice(x, {"pos": i}, {"pos": Block})`,
    where Python integers are checked against the bounds.
    """
    if isinstance(axis, Mapping):
        if not isinstance(new_axis, Mapping) and not isinstance(length, Mapping):
            raise ValueError(
                "slice: with several starts, give sizes likewise: `slice(x, {axis: start}, {axis: "
                "length})`."
            )
        return _sliced(array, axis, new_axis if new_axis is not None else length, checked=True)  # pyright: ignore
    if isinstance(new_axis, Axis) and length is None:
        length = new_axis.size
    if length is None:
        raise ValueError("slice: say how long: pass `length=`, or a `new_axis` with a size.")
    size = length.size if isinstance(length, Axis) else length
    name = pairs(axis)[0][0] if new_axis is None else pairs(new_axis)[0][0]  # pyright: ignore
    if isinstance(new_axis, Axis) and new_axis.size != size:
        raise size_mismatch("slice", name, size, new_axis.size)
    return _sliced(array, {axis: start}, {axis: Axis(name, size)}, checked=False)


def _sliced(
    array: NamedArray, starts: Mapping[Any, Any], lengths: Mapping[Any, Any], *, checked: bool
) -> NamedArray:
    first: list[Any] = [0] * array.ndim
    axes = list(array.axes)
    by_name = {pairs(axis)[0][0]: length for axis, length in lengths.items()}
    for axis, start in starts.items():
        at = _indexed_position("slice", array, axis)
        old = array.axes[at]
        if old.name not in by_name:
            raise axis_not_found(
                "slice", old.name, list(by_name), fix=" Give a length for each start."
            )
        length = by_name[old.name]
        axes[at] = length if isinstance(length, Axis) else old.resize(int(length))
        start = start.scalar() if isinstance(start, NamedArray) else start
        first[at] = start
        outside = isinstance(start, int) and (start < 0 or start + axes[at].size > old.size)
        if axes[at].size > old.size or (checked and outside):
            raise ValueError(
                f"slice: {axes[at].size} elements from {start} do not fit axis {old} of "
                f"{describe(array.axes)}."
            )
    for name in by_name:
        if not any(pairs(axis)[0][0] == name for axis in starts):
            raise axis_not_found("slice", name, [pairs(axis)[0][0] for axis in starts])
    check_unique("slice", axes)
    return trusted(lax.dynamic_slice(array.array, first, [axis.size for axis in axes]), tuple(axes))


def updated_slice(array: NamedArray, start: Mapping[Any, Any], update: NamedArray) -> NamedArray:
    """`array` with a block replaced; a start may be traced, or a named array of starts.

    Axes of a named start are matched with those of the array and the update.
    """
    starts = {
        array.axes[_indexed_position("updated_slice", array, a)].name: s for a, s in start.items()
    }
    for axis in update.axes:
        own = next((a for a in array.axes if a.name == axis.name), None)
        if own is None:
            raise ValueError(
                "updated_slice: the update has axes that are not in the original array with shape "
                f"{array.shape}: '{axis.name}' of {describe(update.axes)}. Rename or index it "
                "first."
            )
        begin = starts.get(axis.name, 0)
        if axis.size > own.size or (isinstance(begin, int) and begin + axis.size > own.size):
            raise ValueError(
                f"updated_slice: {axis.size} elements from {begin} do not fit axis {own} of "
                f"{describe(array.axes)}."
            )
    return _updated(array, starts, update)


def _updated(array: NamedArray, starts: dict[str, Any], update: NamedArray) -> NamedArray:
    mapped = next(
        (axis for s in starts.values() if isinstance(s, NamedArray) for axis in s.axes), None
    )
    if mapped is None:
        sizes = {axis.name: axis for axis in update.axes}
        block = tuple(sizes.get(a.name, a.resize(1) if a.name in starts else a) for a in array.axes)
        first = [starts.get(axis.name, 0) for axis in array.axes]
        first = [s.array if isinstance(s, NamedArray) else s for s in first]
        values = broadcast_to(update, block).array.astype(array.dtype)
        return trusted(lax.dynamic_update_slice(array.array, values, first), array.axes)
    at = single_position("updated_slice", array.axes, mapped)
    has_axis = update.has_axis(mapped.name)
    moving = {n: s for n, s in starts.items() if isinstance(s, NamedArray) and s.has_axis(mapped)}
    axes = {n: tuple(a for a in s.axes if a != mapped) for n, s in moving.items()}
    update_axes = tuple(a for a in update.axes if a.name != mapped.name)

    def one(row: Any, new: Any, begins: dict[str, Any]) -> Any:
        now = {**starts, **{n: trusted(b, axes[n]) for n, b in begins.items()}}
        return _updated(trusted(row, _without(array, at)), now, trusted(new, update_axes)).array

    raw = {n: jnp.moveaxis(s.array, s.axes.index(mapped), 0) for n, s in moving.items()}
    new_at = [a.name for a in update.axes].index(mapped.name) if has_axis else None
    done = jax.vmap(one, in_axes=(at, new_at, 0), out_axes=at)(array.array, update.array, raw)
    return trusted(done, array.axes)


class IndexUpdates:
    """`x.at`: `x.at["pos", 3].set(v)` and the other updates of `jnp.ndarray.at`."""

    def __init__(self, array: NamedArray) -> None:
        self._array = array

    def __getitem__(self, item: Any) -> "IndexUpdate":
        return IndexUpdate(self._array, _as_mapping("at", self._array, item))


class IndexUpdate:
    """`x.at[...]`: reads and writes the elements that an index selects.

    Updates broadcast by name to the selected part; the result has the axes of `x`.
    """

    def __init__(self, array: NamedArray, slices: Mapping[Any, Any]) -> None:
        self._array = array
        self._slices = slices
        self._plan = _plan("at", array, slices)

    def get(self, *, fill_value: Any = None, mode: str | None = None, **options: Any) -> NamedArray:
        """The selected elements."""
        if mode is None:
            _check_bounds("at", self._array, self._slices)
            mode = self._plan.mode
        if fill_value is None and self._plan.mode == "fill" and mode == "fill":
            fill_value = 0
        at = jnp.asarray(self._array.array).at[self._plan.entries]
        return trusted(at.get(fill_value=fill_value, mode=mode, **options), self._plan.axes)

    def set(self, update: Any, **options: Any) -> NamedArray:
        """Replaces the selected elements."""
        return self._write("set", update, options)

    def add(self, update: Any, **options: Any) -> NamedArray:
        """Adds to the selected elements; repeated indices add up."""
        return self._write("add", update, options)

    def subtract(self, update: Any, **options: Any) -> NamedArray:
        """Subtracts from the selected elements."""
        return self._write("subtract", update, options)

    def multiply(self, update: Any, **options: Any) -> NamedArray:
        """Multiplies the selected elements."""
        return self._write("multiply", update, options)

    mul = multiply

    def divide(self, update: Any, **options: Any) -> NamedArray:
        """Divides the selected elements."""
        return self._write("divide", update, options)

    def power(self, update: Any, **options: Any) -> NamedArray:
        """Raises the selected elements to a power."""
        return self._write("power", update, options)

    def min(self, update: Any, **options: Any) -> NamedArray:
        """The smaller of the selected elements and the update."""
        return self._write("min", update, options)

    def max(self, update: Any, **options: Any) -> NamedArray:
        """The larger of the selected elements and the update."""
        return self._write("max", update, options)

    def apply(self, func: Any, **options: Any) -> NamedArray:
        """A function of the selected elements."""
        at = jnp.asarray(self._array.array).at[self._plan.entries]
        return trusted(at.apply(func, **self._with_mode(options)), self._array.axes)

    def _with_mode(self, options: dict[str, Any]) -> dict[str, Any]:
        if options.get("mode") is not None:
            return options  # the caller says what happens out of bounds
        _check_bounds("at", self._array, self._slices)
        return {**options, "mode": "drop"} if self._plan.mode == "fill" else options

    def _write(self, kind: str, update: Any, options: dict[str, Any]) -> NamedArray:
        if isinstance(update, NamedArray):
            axes = self._plan.axes
            if not contains(axes, update.axes):
                raise ValueError(
                    f"at[...].{kind}: the update has axes {describe(update.axes)}, but the "
                    f"selected part has {describe(axes)}. Its axes must be among those."
                )
            update = aligned(update.array, update.axes, axes)
        elif getattr(update, "ndim", 0) > 0:
            raise ValueError(
                f"at[...].{kind}: an unnamed update of shape {update.shape} could mean any axes of "
                f"{describe(self._plan.axes)}. Name it with `hax.named(array, axes)`."
            )
        at = jnp.asarray(self._array.array).at[self._plan.entries]
        return trusted(getattr(at, kind)(update, **self._with_mode(options)), self._array.axes)
