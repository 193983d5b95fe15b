"""`Axis`, a dimension with a name and a size, and arithmetic on collections of axes.

Functions here take any of the spellings of "some axes":

- `AxisSelector`: an `Axis`, or its name when the size does not matter;
- `AxisSpec`: axes whose sizes are known, as an `Axis`, a sequence of them, or `{name: size}`;
- `AxisSelection`: axes picked from an array, sizes optional: selectors or `{name: size or None}`.

Each answers in the spelling of its first argument: a dict for a dict, a tuple for the rest. One
axis alone counts as a sequence of one.
"""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from types import EllipsisType
from typing import Any, TypeAlias, TypeGuard, overload

from haliax.errors import axis_not_found, describe, repeated_axis, size_mismatch, suggestion


@dataclass(frozen=True, slots=True)
class Axis:
    """A named dimension: two axes are the same when both name and size are."""

    name: str
    size: int

    def __post_init__(self) -> None:
        if type(self.size) is not int:
            object.__setattr__(self, "size", operator.index(self.size))
        if self.size < 0:
            raise ValueError(f"Axis '{self.name}' has negative size {self.size}; sizes are >= 0.")

    def alias(self, new_name: str) -> "Axis":
        """The same size under another name."""
        return Axis(new_name, self.size)

    def resize(self, size: int) -> "Axis":
        """The same name with another size."""
        return Axis(self.name, size)

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if other.__class__ is not Axis:
            return NotImplemented
        return self.name == other.name and self.size == other.size  # pyright: ignore

    def __hash__(self) -> int:
        return hash((self.name, self.size))

    def __str__(self) -> str:
        return f"{self.name}({self.size})"


AxisSelector: TypeAlias = Axis | str
ShapeDict: TypeAlias = Mapping[str, int]
PartialShapeDict: TypeAlias = Mapping[str, int | None]
AxisSpec: TypeAlias = Axis | Sequence[Axis] | ShapeDict
AxisSelection: TypeAlias = AxisSelector | Sequence[AxisSelector] | PartialShapeDict
PartialAxisSpec: TypeAlias = Sequence[AxisSelector | EllipsisType]
AxesLike: TypeAlias = Axis | Sequence[Axis]


def make_axes(**sizes: int) -> tuple[Axis, ...]:
    """`make_axes(H=2, W=3)` is `(Axis("H", 2), Axis("W", 3))`."""
    return tuple(Axis(name, size) for name, size in sizes.items())


def is_axis_spec(axes: object) -> TypeGuard[Axis | Sequence[Axis] | ShapeDict]:
    """Whether every size is known."""
    if isinstance(axes, Axis):
        return True
    if isinstance(axes, Mapping):
        return all(size is not None for size in axes.values())
    return isinstance(axes, Sequence) and all(isinstance(axis, Axis) for axis in axes)


def pairs(axes: Any) -> list[tuple[str, int | None]]:
    """The common form of every spelling: names with sizes, `None` where a size is not said."""
    if isinstance(axes, Axis):
        return [(axes.name, axes.size)]
    if isinstance(axes, str):
        return [(axes, None)]
    if isinstance(axes, Mapping):
        return list(axes.items())
    found = []
    for axis in axes:
        if isinstance(axis, Axis):
            found.append((axis.name, axis.size))
        elif isinstance(axis, str):
            found.append((axis, None))
        else:
            raise TypeError(f"An axis is an `Axis` or its name, not {axis!r} in {axes!r}.")
    return found


def _answer(like: object, found: Sequence[tuple[str, int | None]]) -> Any:
    """`found` in the spelling of `like`."""
    if isinstance(like, Mapping):
        return dict(found)
    return tuple(name if size is None else Axis(name, size) for name, size in found)


@overload
def axis_name(ax: AxisSelector) -> str: ...
@overload
def axis_name(ax: Sequence[AxisSelector] | PartialShapeDict) -> tuple[str, ...]: ...
def axis_name(ax: AxisSelection) -> str | tuple[str, ...]:
    """The name of one axis, or a tuple of the names of several."""
    if isinstance(ax, Axis):
        return ax.name
    if isinstance(ax, str):
        return ax
    return axis_names(ax)


def axis_names(axes: AxisSelection) -> tuple[str, ...]:
    """The names, always as a tuple."""
    return tuple(name for name, _ in pairs(axes))


def axis_size(ax: AxisSpec) -> int:
    """The number of elements that the axes span: one size, or the product of several."""
    return prod(axis.size for axis in axis_spec_to_tuple(ax))


def axis_spec_to_tuple(axis_spec: AxisSpec) -> tuple[Axis, ...]:
    """Any spec as a tuple of axes; a bare name has no size and is refused."""
    if isinstance(axis_spec, Axis):
        return (axis_spec,)
    if isinstance(axis_spec, Mapping):
        return tuple(Axis(name, size) for name, size in axis_spec.items())
    axes = tuple(axis_spec) if isinstance(axis_spec, Sequence) else (axis_spec,)
    if isinstance(axis_spec, str) or not all(isinstance(axis, Axis) for axis in axes):
        raise ValueError(
            f"Sizes are needed here, but {axis_spec!r} has only names. Pass `Axis(name, size)`, a "
            "tuple of them, or `{name: size}`."
        )
    return axes


def axis_spec_to_shape_dict(axis_spec: AxisSelection) -> dict[str, int | None]:
    """Any spec or selection as `{name: size}`; sizes not said are `None`."""
    return dict(pairs(axis_spec))


def to_jax_shape(axes: AxisSpec) -> tuple[int, ...]:
    """The sizes, in order: what `jnp` calls a shape."""
    return tuple(axis.size for axis in axis_spec_to_tuple(axes))


def check_unique(operation: str, axes: Sequence[Axis], *, fix: str = "") -> None:
    """Raises if a name occurs twice."""
    seen: set[str] = set()
    for axis in axes:
        if axis.name in seen:
            raise repeated_axis(operation, axis.name, axes, fix=fix)
        seen.add(axis.name)


@overload
def concat_axes(a1: ShapeDict, a2: AxisSpec) -> dict[str, int]: ...
@overload
def concat_axes(a1: AxesLike, a2: AxisSpec) -> tuple[Axis, ...]: ...
@overload
def concat_axes(a1: AxisSelection, a2: AxisSelection) -> Any: ...
def concat_axes(a1: AxisSelection, a2: AxisSelection) -> Any:
    """The axes of `a1`, then those of `a2`; a name in both is an error."""
    first = dict(pairs(a1))
    for name, _ in pairs(a2):
        if name in first:
            raise repeated_axis("concat_axes", name, pairs_to_axes(a1, a2))
    return _answer(a1, [*pairs(a1), *pairs(a2)])


concat_axis_specs = concat_axes


def pairs_to_axes(*many: AxisSelection) -> tuple[AxisSelector, ...]:
    """Several selections in a row, for messages."""
    return tuple(n if s is None else Axis(n, s) for axes in many for n, s in pairs(axes))


@overload
def union_axes(a1: ShapeDict, a2: AxisSpec) -> dict[str, int]: ...
@overload
def union_axes(a1: AxesLike, a2: AxisSpec) -> tuple[Axis, ...]: ...
@overload
def union_axes(a1: AxisSelection, a2: AxisSelection) -> Any: ...
def union_axes(a1: AxisSelection, a2: AxisSelection) -> Any:
    """Axes in either, in order of first occurrence; one name with two sizes is an error."""
    union = dict(pairs(a1))
    for name, size in pairs(a2):
        known = union.get(name)
        if known is not None and size is not None and known != size:
            raise size_mismatch("union_axes", name, size, known, a1)
        union[name] = size if known is None else known
    return _answer(a1, list(union.items()))


@overload
def intersect_axes(ax1: ShapeDict, ax2: AxisSelection) -> dict[str, int]: ...
@overload
def intersect_axes(ax1: AxesLike, ax2: AxisSelection) -> tuple[Axis, ...]: ...
@overload
def intersect_axes(ax1: AxisSelection, ax2: AxisSelection) -> Any: ...
def intersect_axes(ax1: AxisSelection, ax2: AxisSelection) -> Any:
    """Axes in both, in the order of the first; one name with two sizes is an error."""
    other = dict(pairs(ax2))
    common = []
    for name, size in pairs(ax1):
        if name not in other:
            continue
        wanted = other[name]
        if size is not None and wanted is not None and size != wanted:
            raise size_mismatch("intersect_axes", name, wanted, size, ax1)
        common.append((name, wanted if size is None else size))
    return _answer(ax1, common)


@overload
def eliminate_axes(axis_spec: ShapeDict, to_remove: AxisSelection) -> dict[str, int]: ...
@overload
def eliminate_axes(axis_spec: AxesLike, to_remove: AxisSelection) -> tuple[Axis, ...]: ...
@overload
def eliminate_axes(axis_spec: AxisSelection, to_remove: AxisSelection) -> Any: ...
def eliminate_axes(axis_spec: AxisSelection, to_remove: AxisSelection) -> Any:
    """`axis_spec` without the axes to remove, each of which must be there."""
    present = dict(pairs(axis_spec))
    for name, _ in pairs(to_remove):
        if name not in present:
            raise axis_not_found("eliminate_axes", name, present)
    return _without(axis_spec, to_remove, "eliminate_axes", check_sizes=True)


@overload
def without_axes(
    axis_spec: ShapeDict, to_remove: AxisSelection, allow_mismatched_sizes: bool = False
) -> dict[str, int]: ...
@overload
def without_axes(
    axis_spec: AxesLike, to_remove: AxisSelection, allow_mismatched_sizes: bool = False
) -> tuple[Axis, ...]: ...
@overload
def without_axes(
    axis_spec: AxisSelection, to_remove: AxisSelection, allow_mismatched_sizes: bool = False
) -> Any: ...
def without_axes(
    axis_spec: AxisSelection, to_remove: AxisSelection, allow_mismatched_sizes: bool = False
) -> Any:
    """`axis_spec` without the axes to remove, whether they are there or not."""
    return _without(axis_spec, to_remove, "without_axes", check_sizes=not allow_mismatched_sizes)


def _without(
    axis_spec: AxisSelection, to_remove: AxisSelection, operation: str, *, check_sizes: bool
) -> Any:
    removed = dict(pairs(to_remove))
    kept = []
    for name, size in pairs(axis_spec):
        if name not in removed:
            kept.append((name, size))
            continue
        wanted = removed[name]
        if check_sizes and size is not None and wanted is not None and size != wanted:
            raise size_mismatch(operation, name, wanted, size, axis_spec)
    return _answer(axis_spec, kept)


@overload
def replace_axis(axis_spec: ShapeDict, old: AxisSelector, new: AxisSelection) -> dict[str, int]: ...
@overload
def replace_axis(axis_spec: AxesLike, old: AxisSelector, new: AxisSpec) -> tuple[Axis, ...]: ...
@overload
def replace_axis(axis_spec: AxisSelection, old: AxisSelector, new: AxisSelection) -> Any: ...
def replace_axis(axis_spec: AxisSelection, old: AxisSelector, new: AxisSelection) -> Any:
    """`axis_spec` with the axes `new` in the place of `old`."""
    [(old_name, old_size)] = pairs(old)
    present = dict(pairs(axis_spec))
    if old_name not in present:
        raise axis_not_found("replace_axis", old_name, present)
    found = present[old_name]
    if old_size is not None and found is not None and old_size != found:
        raise size_mismatch("replace_axis", old_name, old_size, found, axis_spec)
    replaced: list[tuple[str, int | None]] = []
    for name, size in pairs(axis_spec):
        replaced.extend(pairs(new) if name == old_name else [(name, size)])
    seen: set[str] = set()
    for name, _ in replaced:
        if name in seen:
            raise repeated_axis("replace_axis", name, [n for n, _ in replaced])
        seen.add(name)
    return _answer(axis_spec, replaced)


@overload
def resolve_axis(axis_spec: AxisSpec, axis_selection: AxisSelector) -> Axis: ...
@overload
def resolve_axis(axis_spec: AxisSpec, axis_selection: PartialShapeDict) -> dict[str, int]: ...
@overload
def resolve_axis(
    axis_spec: AxisSpec, axis_selection: Sequence[AxisSelector]
) -> tuple[Axis, ...]: ...
@overload
def resolve_axis(
    axis_spec: AxisSpec, axis_selection: AxisSelection
) -> Axis | tuple[Axis, ...] | dict[str, int]: ...
def resolve_axis(
    axis_spec: AxisSpec, axis_selection: AxisSelection
) -> Axis | tuple[Axis, ...] | dict[str, int]:
    """The axes of `axis_spec` that are selected, with their sizes."""
    axes = axis_spec_to_tuple(axis_spec)
    found = resolve_axes("resolve_axis", axes, axis_selection)
    if isinstance(axis_selection, (Axis, str)):
        return found[0]
    if isinstance(axis_selection, Mapping):
        return {axis.name: axis.size for axis in found}
    return found


def resolve_axes(
    operation: str, axes: tuple[Axis, ...], selection: AxisSelection
) -> tuple[Axis, ...]:
    """The selected axes as a tuple; `operation` is named when one is absent or of another size."""
    return tuple(axes[i] for i in axis_positions(operation, axes, selection))


def axis_positions(
    operation: str, axes: tuple[Axis, ...], selection: AxisSelection
) -> tuple[int, ...]:
    """Where the selected axes are among `axes`; absent or of another size is a ValueError."""
    if isinstance(selection, Axis):
        for i, axis in enumerate(axes):
            if axis is selection:
                return (i,)
    positions = []
    for name, size in pairs(selection):
        for i, axis in enumerate(axes):
            if axis.name == name:
                if size is not None and size != axis.size:
                    raise size_mismatch(operation, name, size, axis.size, axes)
                positions.append(i)
                break
        else:
            raise axis_not_found(operation, name, axes)
    if len(set(positions)) != len(positions):
        names = [name for name, _ in pairs(selection)]
        twice = next(name for name in names if names.count(name) > 1)
        raise repeated_axis(operation, twice, names, fix="Select each axis once.")
    return tuple(positions)


def single_position(operation: str, axes: tuple[Axis, ...], axis: AxisSelection) -> int:
    """Where the one selected axis is; several are an error."""
    found = axis_positions(operation, axes, axis)
    if len(found) != 1:
        raise ValueError(
            f"{operation} works along one axis, but {describe(axis)} selects {len(found)} of "
            f"{describe(axes)}. Merge them first with `flatten_axes`, or pick one."
        )
    return found[0]


def selects_axis(selector: AxisSelection, selected: AxisSelection) -> bool:
    """Whether all of `selected` is in `selector`; a size not said matches any size."""
    offered = dict(pairs(selector))
    for name, size in pairs(selected):
        if name not in offered:
            return False
        offer = offered[name]
        if offer is not None and size is not None and offer != size:
            return False
    return True


def unsize_axes(axis_spec: AxisSelection, to_unsize: AxisSelection | None = None) -> Any:
    """Forgets sizes: of all axes, or of those in `to_unsize`."""
    present = dict(pairs(axis_spec))
    names = set(present) if to_unsize is None else set(axis_names(to_unsize))
    for name in names - set(present):
        raise axis_not_found("unsize_axes", name, present)
    unsized = [(name, None if name in names else size) for name, size in present.items()]
    if isinstance(axis_spec, (Axis, str)):
        return _answer((), unsized)[0]
    return _answer(axis_spec, unsized)


def is_axis_compatible(ax1: AxisSelector, ax2: AxisSelector) -> bool:
    """Whether two axes have the same name."""
    return axis_name(ax1) == axis_name(ax2)


def without_selected(axes: tuple[Axis, ...], positions: Sequence[int]) -> tuple[Axis, ...]:
    """The axes at all other positions."""
    return tuple(axis for i, axis in enumerate(axes) if i not in positions)


def rearrange_for_partial_order(
    partial_order: PartialAxisSpec, axes: Sequence[Axis], operation: str = "rearrange"
) -> tuple[Axis, ...]:
    """`axes` in an order given in part, as in `("C", ..., "W")`.

    Named axes keep the given order. Each other axis goes to the first `...` after the named axes
    that come before it in `axes`, so that neighbours stay neighbours where they can. Without `...`,
    the order must name every axis.
    """
    axes = tuple(axes)
    by_name = {axis.name: axis for axis in axes}
    given: list[str | None] = []
    for item in partial_order:
        if item is Ellipsis:
            given.append(None)
            continue
        [(name, size)] = pairs(item)
        if name not in by_name:
            raise axis_not_found(operation, name, axes)
        if size is not None and size != by_name[name].size:
            raise size_mismatch(operation, name, size, by_name[name].size, axes)
        if name in given:
            raise repeated_axis(operation, name, axes, fix="Give each axis one place.")
        given.append(name)
    if None not in given and len(given) != len(axes):
        left = [axis.name for axis in axes if axis.name not in given]
        raise ValueError(
            f"{operation}: the order {given} does not say where {left} of {describe(axes)} go. "
            "Name every axis, or put `...` where the rest belongs."
        )
    return tuple(by_name[name] for name in _fill_ellipses(given, [a.name for a in axes]))


def _fill_ellipses(given: list[str | None], names: list[str]) -> list[str]:
    slots: list[list[str]] = [[] for _ in given]
    ellipses = [i for i, name in enumerate(given) if name is None]
    current = ellipses[0] if ellipses else 0
    for name in names:
        if name in given:
            # A named axis moves on to the `...` after it; never back, and not past the last.
            later = [i for i in ellipses if i > given.index(name)]
            current = max(current, later[0]) if later else current
        else:
            slots[current].append(name)
    for i, name in enumerate(given):
        if name is not None:
            slots[i] = [name]
    return [name for slot in slots for name in slot]


def renamed(operation: str, axes: tuple[Axis, ...], renames: Mapping[Any, Any]) -> tuple[Axis, ...]:
    """`axes` under new names; unknown names, size changes and collisions are errors."""
    new_by_old: dict[str, str] = {}
    known = {axis.name: axis.size for axis in axes}
    for old, new in renames.items():
        [(old_name, old_size)], [(new_name, new_size)] = pairs(old), pairs(new)
        if old_name not in known:
            raise ValueError(
                f"{operation}: axis '{old_name}' not found in {describe(axes)}, so it cannot "
                f"become '{new_name}'.{suggestion(old_name, known)}"
            )
        for size in (old_size, new_size):
            if size is not None and size != known[old_name]:
                raise size_mismatch(operation, old_name, size, known[old_name], axes)
        new_by_old[old_name] = new_name
    after = tuple(
        Axis(new_by_old[axis.name], axis.size) if axis.name in new_by_old else axis for axis in axes
    )
    check_unique(
        operation, after, fix="Rename the other one in the same call, or choose a new name."
    )
    return after
