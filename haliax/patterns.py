"""The little language of `rearrange` and `einsum` strings, after einops but with names.

    pattern  = [side] "->" side           side    = items | "{" items "}"
    item     = name | "..." | "(" [name ":"] name* ")"

A left side without braces is *ordered*: each item takes the dimension at its position, whatever its
name, and gives it a letter for the rest of the string. In braces it is *unordered*: items are names
of axes, the others need not be mentioned. Names may be quoted, and commas in braces are spaces.
Keyword arguments bind an item to an `Axis`, to a name, or, where an axis is split, to a size.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NoReturn

import jax.numpy as jnp

from haliax.axis import Axis, check_unique, pairs, rearrange_for_partial_order
from haliax.broadcasting import permuted
from haliax.core import NamedArray, honest, trusted
from haliax.errors import describe, suggestion

_TOKEN = re.compile(
    r"""\s+|(?P<arrow>->)|(?P<dots>\.\.\.)|(?P<mark>[(){}:,])"""
    r"""|(?P<name>[A-Za-z_][A-Za-z0-9_]*)|(?P<quoted>"[^"]*"|'[^']*')"""
)


@dataclass(frozen=True)
class Token:
    """A word of a pattern, and where it is in the text."""

    kind: str
    text: str
    start: int


@dataclass(frozen=True)
class Item:
    """A name (no `parts`), `...` (no name either), or a group of names, itself named or not."""

    name: str | None
    parts: tuple[str, ...] | None
    start: int
    end: int

    @property
    def is_dots(self) -> bool:
        """Whether it stands for all other axes."""
        return self.name is None and self.parts is None


@dataclass(frozen=True)
class Side:
    """One operand of the left side, or the right side."""

    items: tuple[Item, ...]
    ordered: bool

    @property
    def has_dots(self) -> bool:
        """Whether `...` is among the items."""
        return any(item.is_dots for item in self.items)

    def names(self) -> list[str]:
        """All names, inside groups too."""
        found = []
        for item in self.items:
            found += item.parts if item.parts is not None else [item.name] if item.name else []
        return found


@dataclass(frozen=True)
class Pattern:
    """A parsed string: operands, result, and the text for messages."""

    text: str
    operands: tuple[Side, ...]
    result: Side

    def fail(self, message: str, start: int, end: int | None = None) -> NoReturn:
        """Raises with the part of the text that is at fault underlined."""
        fail(self.text, message, start, end)


def fail(text: str, message: str, start: int, end: int | None = None) -> NoReturn:
    """Raises a ValueError that underlines a part of the text."""
    width = max(1, (start + 1 if end is None else end) - start)
    raise ValueError(f"Error while parsing:\n    {text}\n    {' ' * start}{'^' * width}\n{message}")


def parse(text: str) -> Pattern:
    """Reads a pattern, or says where it cannot be read."""
    tokens = _tokens(text)
    arrows = [i for i, token in enumerate(tokens) if token.kind == "arrow"]
    if len(arrows) != 1:
        at = tokens[arrows[1]].start if len(arrows) > 1 else max(0, len(text) - 1)
        fail(text, f"A pattern has one `->`, this one has {len(arrows)}.", at, at + 2)
    left, right = tokens[: arrows[0]], tokens[arrows[0] + 1 :]
    result = _side(text, right, len(text))
    if not result.ordered:
        fail(text, "The right side says an order, so it has no braces.", right[0].start)
    operands = tuple(_side(text, part, tokens[arrows[0]].start) for part in _operands(left))
    return Pattern(text, operands, result)


def _tokens(text: str) -> list[Token]:
    found, at = [], 0
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            fail(text, f"Unexpected character {text[at]!r}.", at)
        if match.lastgroup:
            word = match.group()
            kind = "name" if match.lastgroup == "quoted" else match.lastgroup
            found.append(Token(kind, word.strip("\"'") if kind == "name" else word, at))
        at = match.end()
    return found


def _operands(tokens: Sequence[Token]) -> list[list[Token]]:
    """The left side at its commas; inside braces a comma is a space."""
    if not tokens:
        return []
    parts: list[list[Token]] = [[]]
    depth = 0
    for token in tokens:
        depth += {"{": 1, "}": -1}.get(token.text, 0) if token.kind == "mark" else 0
        if token.text == "," and token.kind == "mark":
            if depth == 0:
                parts.append([])
        else:
            parts[-1].append(token)
    return parts


def _side(text: str, tokens: Sequence[Token], end: int) -> Side:
    ordered = True
    if tokens and tokens[0].text == "{":
        ordered = False
        if tokens[-1].text != "}":
            fail(text, "This brace is never closed.", tokens[0].start)
        tokens = tokens[1:-1]
    items, i = [], 0
    while i < len(tokens):
        item, i = _item(text, tokens, i, end)
        items.append(item)
    names = Side(tuple(items), ordered).names()
    for item in items:
        for name in item.parts if item.parts is not None else [item.name]:
            if name is not None and names.count(name) > 1:
                fail(text, f"'{name}' occurs twice on one side.", item.start, item.end)
    return Side(tuple(items), ordered)


def _item(text: str, tokens: Sequence[Token], i: int, end: int) -> tuple[Item, int]:
    token = tokens[i]
    stop = token.start + len(token.text)
    if token.kind == "dots":
        return Item(None, None, token.start, stop), i + 1
    if token.kind == "name":
        return Item(token.text, None, token.start, stop), i + 1
    if token.text != "(":
        fail(text, f"Unexpected '{token.text}'.", token.start)
    close = next((k for k in range(i, len(tokens)) if tokens[k].text == ")"), None)
    if close is None:
        fail(text, "This parenthesis is never closed.", token.start, end)
    inner = list(tokens[i + 1 : close])
    name = None
    if len(inner) > 1 and inner[1].text == ":":
        name, inner = inner[0].text, inner[2:]
    for part in inner:
        if part.kind != "name":
            fail(text, f"Only names can be in a group, not '{part.text}'.", part.start)
    parts = tuple(part.text for part in inner)
    return Item(name, parts, token.start, tokens[close].start + 1), close + 1


@dataclass
class _Rearrangement:
    """What a left side means for one array: each letter's axis, after splitting."""

    pattern: Pattern
    array: NamedArray
    bindings: dict[str, Any]

    def __post_init__(self) -> None:
        self.axis_of: dict[str, Axis] = {}
        self.split: list[Axis] = []
        self.used: set[str] = set()

    def bound(self, name: str) -> tuple[str, int | None]:
        """Name and size that a letter is bound to by a keyword; its own name without one."""
        value = self.bindings.get(name)
        if value is None:
            return name, None
        self.used.add(name)
        if isinstance(value, int):
            return name, value
        return pairs(value)[0]

    def match(self) -> None:
        """Gives every axis of the array its item, in the order of the array."""
        [side] = self.pattern.operands
        items = self._items_by_position(side) if side.ordered else self._items_by_name(side)
        for axis, item in zip(self.array.axes, items, strict=True):
            if item is None or item.is_dots:
                self.split.append(axis)
            elif item.parts is None:
                self._bind_whole(item, axis, side.ordered)
            else:
                self._bind_parts(item, axis)

    def _items_by_position(self, side: Side) -> list[Item | None]:
        axes, items = self.array.axes, list(side.items)
        dots = [i for i, item in enumerate(items) if item.is_dots]
        if len(dots) > 1:
            self.pattern.fail(
                "Only one `...` can be in an ordered left side.", items[dots[1]].start
            )
        if (not dots and len(items) != len(axes)) or len(items) - len(dots) > len(axes):
            first = items[0].start if items else 0
            self.pattern.fail(
                f"The left side has {len(items) - len(dots)} items for the {len(axes)} axes of "
                f"{describe(axes)}. Add `...`, or use braces to go by name.",
                first,
                items[-1].end if items else 1,
            )
        if dots:
            at = dots[0]
            items[at : at + 1] = [items[at]] * (len(axes) - len(items) + 1)
        return list(items)

    def _items_by_name(self, side: Side) -> list[Item | None]:
        known = {axis.name: axis for axis in self.array.axes}
        found: dict[str, Item] = {}
        for item in side.items:
            if item.is_dots:
                continue
            if item.name is None:
                self.pattern.fail(
                    "A group in braces needs the name of the axis it splits, as in `(H: a b)`.",
                    item.start,
                    item.end,
                )
            name, size = self.bound(item.name)
            if name not in known:
                hint = suggestion(name, known)
                message = (
                    f"rearrange: axis '{name}' not found in {describe(self.array.axes)}.{hint}"
                )
                self.pattern.fail(message, item.start, item.end)
            self._check_size(item, name, size, known[name])
            found[name] = item
        return [found.get(axis.name) for axis in self.array.axes]

    def _check_size(self, item: Item, name: str, size: int | None, axis: Axis) -> None:
        if size is not None and size != axis.size:
            self.pattern.fail(
                f"rearrange: '{name}' is bound to size {size}, but the axis is {axis} of "
                f"{describe(self.array.axes)}.",
                item.start,
                item.end,
            )

    def _bind_whole(self, item: Item, axis: Axis, ordered: bool) -> None:
        assert item.name is not None
        if ordered and item.name in self.bindings:
            name, size = self.bound(item.name)
            if not isinstance(self.bindings[item.name], int) and name != axis.name:
                self.pattern.fail(
                    f"rearrange: '{item.name}' is bound to the axis '{name}', but at its position "
                    f"{describe(self.array.axes)} has '{axis.name}'.",
                    item.start,
                    item.end,
                )
            self._check_size(item, axis.name, size, axis)
        self.axis_of[item.name] = axis
        self.split.append(axis)

    def _bind_parts(self, item: Item, axis: Axis) -> None:
        assert item.parts is not None
        parts = [self.bound(part) for part in item.parts]
        unknown = [name for name, size in parts if size is None]
        known = prod(size for _, size in parts if size is not None)
        fits = known != 0 and axis.size % known == 0 if len(unknown) == 1 else known == axis.size
        if len(unknown) > 1 or not fits:
            self.pattern.fail(
                f"rearrange: {axis} cannot be split into {dict(parts)}. Bind all sizes but one, "
                f"as in `{item.parts[0] if item.parts else 'a'}=2`, so that their product is "
                f"{axis.size}.",
                item.start,
                item.end,
            )
        for letter, (name, size) in zip(item.parts, parts, strict=True):
            part = Axis(name, axis.size // known if size is None else size)
            self.axis_of[letter] = part
            self.split.append(part)

    def order(self) -> tuple[list[Axis | Any], list[tuple[Item, tuple[Axis, ...]]]]:
        """The right side as a partial order of the split axes, and the groups to merge."""
        order: list[Any] = []
        groups = []
        for item in self.pattern.result.items:
            if item.is_dots:
                order.append(...)
                continue
            letters = item.parts if item.parts is not None else (str(item.name),)
            axes = tuple(self._lookup(letter, item) for letter in letters)
            order += axes
            if item.parts is not None:
                groups.append((item, axes))
        return order, groups

    def _lookup(self, letter: str, item: Item) -> Axis:
        rest = {axis.name: axis for axis in self.split}
        axis = self.axis_of.get(letter)
        if axis is None and not self.pattern.operands[0].ordered:
            axis = rest.get(self.bound(letter)[0])
        if axis is None:
            self.pattern.fail(
                f"rearrange: '{letter}' on the right is not on the left, nor in "
                f"{describe(self.split)}.{suggestion(letter, [*self.axis_of, *rest])}",
                item.start,
                item.end,
            )
        return axis

    def check_complete(self, order: list[Any]) -> None:
        """Every letter of the left is on the right, and every keyword was of use."""
        for letter, axis in self.axis_of.items():
            if axis not in order:
                items = self.pattern.operands[0].items
                item = next(i for i in items if letter in (i.name, *(i.parts or ())))
                self.pattern.fail(
                    f"rearrange: '{letter}' is on the left but not on the right; rearranging "
                    "keeps all axes. Index or reduce it first.",
                    item.start,
                    item.end,
                )
        unused = set(self.bindings) - self.used
        if unused:
            raise ValueError(
                f"rearrange: {sorted(unused)} are bound, but not used in '{self.pattern.text}'."
            )


def rearrange_by_pattern(array: NamedArray, text: str, **bindings: Any) -> NamedArray:
    """Splits, reorders and merges axes: `"b (h p) c -> b h (x: p c)"`, `"{H W} -> ... W H"`."""
    pattern = parse(text)
    if len(pattern.operands) != 1:
        fail(text, f"rearrange takes one array, but the left side has {len(pattern.operands)}.", 0)
    raw = honest("rearrange", array)
    plan = _Rearrangement(pattern, array, bindings)
    plan.match()
    order, groups = plan.order()
    merged = [_merged(plan, item, axes) for item, axes in groups]
    plan.check_complete(order)
    split = tuple(plan.split)
    check_unique("rearrange", split, fix="Bind one of the parts to another name by keyword.")
    full_order = rearrange_for_partial_order(order, split)
    raw = permuted(jnp.reshape(raw, [axis.size for axis in split]), split, full_order)
    axes = _with_groups(full_order, groups, merged)
    check_unique("rearrange", axes, fix="Give the merged axis another name.")
    return trusted(jnp.reshape(raw, [axis.size for axis in axes]), axes)


def _merged(plan: _Rearrangement, item: Item, axes: tuple[Axis, ...]) -> Axis:
    if item.name is None:
        plan.pattern.fail(
            "A merged axis needs a name, as in `(pixels: h w)`.", item.start, item.end
        )
    name, size = plan.bound(item.name)
    total = prod(axis.size for axis in axes)
    if size is not None and size != total:
        message = f"rearrange: '{name}' is bound to size {size}, but {describe(axes)} hold {total}."
        plan.pattern.fail(message, item.start, item.end)
    return Axis(name, total)


def _with_groups(
    order: tuple[Axis, ...], groups: list[tuple[Item, tuple[Axis, ...]]], merged: list[Axis]
) -> tuple[Axis, ...]:
    """The order with each run of axes that form a group replaced by the merged axis."""
    first = {axes[0]: (axes, new) for (_, axes), new in zip(groups, merged, strict=True) if axes}
    result: list[Axis] = []
    skip = 0
    for axis in order:
        if skip:
            skip -= 1
        elif axis in first:
            axes, new = first[axis]
            result.append(new)
            skip = len(axes) - 1
        else:
            result.append(axis)
    empty = [new for (_, axes), new in zip(groups, merged, strict=True) if not axes]
    return (*result, *empty)
