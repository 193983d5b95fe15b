"""What `NamedArray["batch embed ..."]` means: a pattern of axis names that a checker can match.

Patterns are a string or a sequence of names, in order, with at most one `...` for "any others
here", or a set of names, in any order: `{"batch", "embed"}` for exactly those and
`{"batch", "embed", ...}` for at least those.
"""

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class NamedArrayAxes:
    """Names wanted before and after `...`; `subset` means that other axes are welcome."""

    before: tuple[str, ...]
    after: tuple[str, ...] = ()
    ordered: bool = True
    subset: bool = False
    dtype: Any = None

    def with_dtype(self, dtype: Any) -> "NamedArrayAxes":
        """The same pattern that also demands a dtype."""
        return replace(self, dtype=dtype)

    def matches(self, names: Sequence[str]) -> bool:
        """Whether axis names, in order, fit the pattern."""
        wanted = (*self.before, *self.after)
        if not self.ordered:
            return set(wanted) <= set(names) if self.subset else set(wanted) == set(names)
        names = tuple(names)
        if not self.subset:
            return names == wanted
        if len(names) < len(wanted) or names[: len(self.before)] != self.before:
            return False
        return not self.after or names[-len(self.after) :] == self.after

    def __str__(self) -> str:
        dots = ["..."] if self.subset else []
        words = " ".join([*self.before, *dots, *self.after])
        return words if self.ordered else "{" + words + "}"


def parse_axes_pattern(pattern: Any) -> NamedArrayAxes:
    """Reads a pattern; says what is wrong with one that cannot be read."""
    if isinstance(pattern, NamedArrayAxes):
        return pattern
    if isinstance(pattern, str):
        pattern = pattern.strip()
        if pattern.startswith("{") and pattern.endswith("}"):
            return _unordered(pattern[1:-1].replace(",", " ").split())
        return _ordered(pattern.split())
    if isinstance(pattern, AbstractSet):
        return _unordered(list(pattern))
    if isinstance(pattern, Sequence):
        return _ordered(list(pattern))
    raise TypeError(
        f"An axes pattern is a string, a sequence or a set of axis names, not {pattern!r}. "
        'Write `NamedArray["batch embed ..."]` or `NamedArray[{"batch", "embed"}]`.'
    )


def _ordered(words: list[Any]) -> NamedArrayAxes:
    dots = [i for i, word in enumerate(words) if word in (Ellipsis, "...")]
    if len(dots) > 1:
        raise ValueError(
            f"Only one `...` can be in an ordered axes pattern; {words} has {len(dots)}."
        )
    names = _names([word for i, word in enumerate(words) if i not in dots])
    if not dots:
        return NamedArrayAxes(names)
    return NamedArrayAxes(names[: dots[0]], names[dots[0] :], subset=True)


def _unordered(words: list[Any]) -> NamedArrayAxes:
    names = _names([word for word in words if word not in (Ellipsis, "...")])
    return NamedArrayAxes(tuple(sorted(names)), ordered=False, subset=len(names) < len(words))


def _names(words: list[Any]) -> tuple[str, ...]:
    for word in words:
        if not isinstance(word, str):
            raise TypeError(f"Axis names in a pattern are strings, not {word!r}.")
    if len(set(words)) != len(words):
        raise ValueError(f"An axes pattern names each axis once; {words} repeats one.")
    return tuple(words)
