"""`einsum`: contraction by a string, ordered, by name, or by the result alone.

- ordered, `"h w d, d o -> h w o"`: letters stand for positions; one letter is one axis name;
- unordered, `"{D O} -> O"`: axes named on the left but not on the right are summed, all others
  kept; `{...} -> H` sums everything but H;
- result alone, `"-> H O"`: everything else is summed.
"""

from typing import Any

from jax import lax

from haliax.axis import Axis, pairs, rearrange_for_partial_order
from haliax.contraction import DotGeneral, contract, matched_axes
from haliax.core import NamedArray, honest
from haliax.errors import describe, suggestion
from haliax.partitioning import auto_sharded
from haliax.patterns import Item, Pattern, Side, parse


def einsum(
    equation: str,
    *arrays: NamedArray,
    precision: Any = None,
    preferred_element_type: Any = None,
    dot_general: DotGeneral = lax.dot_general,
    **axis_aliases: Any,
) -> NamedArray:
    """Multiplies arrays and sums over axes, as the equation says; see `haliax.einsums`.

    `axis_aliases` bind letters, or names in braces, to an `Axis` or a name.
    """
    pattern = parse(equation)
    for array in arrays:
        if not isinstance(array, NamedArray):
            raise TypeError(
                f"einsum: every operand must be a NamedArray, got {type(array).__name__}."
            )
        honest("einsum", array)
    axes = matched_axes("einsum", [a.axes for a in arrays])
    aliases = {letter: pairs(alias)[0] for letter, alias in axis_aliases.items()}
    unused = set(aliases) - {
        n for side in (*pattern.operands, pattern.result) for n in side.names()
    }
    if unused:
        raise ValueError(f"einsum: the aliases {sorted(unused)} are not used in '{equation}'.")
    if not pattern.operands:
        out = _result(pattern, _by_name(axes, aliases), (), axes)
    elif not pattern.operands[0].ordered:
        out = _unordered(pattern, axes, aliases)
    else:
        out = _ordered(pattern, arrays, axes, aliases)
    options = {"precision": precision, "preferred_element_type": preferred_element_type}
    return auto_sharded(contract(arrays, out, dot_general, **options))


Letters = dict[str, Axis]


def _by_name(axes: tuple[Axis, ...], aliases: dict[str, Any]) -> Letters:
    letters = {axis.name: axis for axis in axes}
    for letter, (name, size) in aliases.items():
        found = next((a for a in axes if a.name == name and size in (None, a.size)), None)
        if found is None:
            raise ValueError(
                f"einsum: '{letter}' is bound to '{name}' of size {size or '?'}, which is not in "
                f"{describe(axes)}.{suggestion(name, [a.name for a in axes])}"
            )
        letters[letter] = found
    return letters


def _result(
    pattern: Pattern, letters: Letters, rest: tuple[Axis, ...], axes: tuple[Axis, ...]
) -> tuple[Axis, ...]:
    """The right side as axes; `rest` goes to its `...`, or in front if it has none."""
    order: list[Any] = [] if pattern.result.has_dots or not rest else [...]
    order += [
        ... if item.is_dots else _lookup(pattern, item, letters, axes)
        for item in pattern.result.items
    ]
    named = {axis for axis in order if axis is not ...}
    rest = tuple(axis for axis in rest if axis not in named)
    if not rest:
        return tuple(axis for axis in order if axis is not ...)
    kept = tuple(axis for axis in axes if axis in named or axis in rest)
    return rearrange_for_partial_order(order, kept, "einsum")


def _lookup(pattern: Pattern, item: Item, letters: Letters, axes: tuple[Axis, ...]) -> Axis:
    if item.parts is not None:
        pattern.fail("einsum cannot merge axes; use `rearrange`.", item.start, item.end)
    assert item.name is not None
    if item.name not in letters:
        hint = suggestion(item.name, letters)
        message = f"einsum: '{item.name}' is not an axis of the operands, {describe(axes)}.{hint}"
        pattern.fail(message, item.start, item.end)
    return letters[item.name]


def _unordered(
    pattern: Pattern, axes: tuple[Axis, ...], aliases: dict[str, Any]
) -> tuple[Axis, ...]:
    side, *others = pattern.operands
    if others:
        pattern.fail("One pair of braces holds the axes of all operands.", 0)
    letters = _by_name(axes, aliases)
    mentioned = {_lookup(pattern, item, letters, axes) for item in side.items if not item.is_dots}
    is_rest_kept = pattern.result.has_dots or not side.has_dots
    rest = tuple(axis for axis in axes if axis not in mentioned) if is_rest_kept else ()
    return _result(pattern, letters, rest, axes)


def _ordered(
    pattern: Pattern,
    arrays: tuple[NamedArray, ...],
    axes: tuple[Axis, ...],
    aliases: dict[str, Any],
) -> tuple[Axis, ...]:
    if len(pattern.operands) != len(arrays):
        pattern.fail(
            f"einsum: the left side has {len(pattern.operands)} operands, but {len(arrays)} "
            "arrays were passed.",
            0,
        )
    letters: Letters = {}
    rest: tuple[Axis, ...] = ()
    for side, array in zip(pattern.operands, arrays, strict=True):
        rest += _bind_operand(pattern, side, array, letters, aliases)
    return _result(
        pattern, letters, tuple(dict.fromkeys(rest)) if pattern.result.has_dots else (), axes
    )


def _bind_operand(
    pattern: Pattern, side: Side, array: NamedArray, letters: Letters, aliases: dict[str, Any]
) -> tuple[Axis, ...]:
    """Binds the letters of one operand by position; returns what its `...` covers."""
    if not side.ordered:
        pattern.fail("Ordered and unordered operands cannot be mixed.", side.items[0].start)
    items = list(side.items)
    dots = [i for i, item in enumerate(items) if item.is_dots]
    spare = len(array.axes) - (len(items) - len(dots))
    if spare < 0 or (spare and not dots) or len(dots) > 1:
        pattern.fail(
            f"einsum: {len(items) - len(dots)} letters for an array with axes "
            f"{describe(array.axes)}.",
            items[0].start if items else 0,
            items[-1].end if items else 1,
        )
    covered = array.axes[dots[0] : dots[0] + spare] if dots else ()
    if dots:
        items[dots[0] : dots[0] + 1] = [items[dots[0]]] * spare
    for item, axis in zip(items, array.axes, strict=True):
        if not item.is_dots:
            _bind_letter(pattern, item, axis, letters, aliases)
    return covered


def _bind_letter(
    pattern: Pattern, item: Item, axis: Axis, letters: Letters, aliases: dict[str, Any]
) -> None:
    if item.name is None or item.parts is not None:
        pattern.fail("einsum cannot split axes; use `rearrange`.", item.start, item.end)
    name, size = aliases.get(item.name, (axis.name, None))
    if name != axis.name or size not in (None, axis.size):
        message = (
            f"einsum: '{item.name}' is bound to '{name}', but at its position there is {axis}."
        )
        pattern.fail(message, item.start, item.end)
    if letters.setdefault(item.name, axis) != axis:
        pattern.fail(
            f"einsum: '{item.name}' stands for {letters[item.name]} and for {axis}; one letter is "
            f"one axis name. Rename one of them: `x.rename({{'{axis.name}': "
            f"'{letters[item.name].name}'}})`.",
            item.start,
            item.end,
        )
    other = next((k for k, v in letters.items() if v.name == axis.name and k != item.name), None)
    if other is not None:
        pattern.fail(
            f"einsum: '{other}' and '{item.name}' both stand for the axis '{axis.name}'. Use one "
            "letter, or rename the axis of one operand.",
            item.start,
            item.end,
        )
