"""Sentences for axis mistakes: which operation, both sides' axes with sizes, and the likely fix.

Every function returns the exception for its caller to raise, so that the traceback ends where the
mistake was found and the exception type stays visible there.
"""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any


def describe(axes: object) -> str:
    """Axes as a shape dict: `{'batch': 4, 'embed': 8}`; unknown sizes print as `?`."""
    if isinstance(axes, Mapping):
        pairs = axes.items()
    elif isinstance(axes, str) or hasattr(axes, "size"):
        pairs = [_pair(axes)]
    elif isinstance(axes, Iterable):
        pairs = [_pair(axis) for axis in axes]
    else:
        return repr(axes)
    return "{" + ", ".join(f"'{n}': {'?' if s is None else s}" for n, s in pairs) + "}"


def _pair(axis: Any) -> tuple[str, int | None]:
    if axis is Ellipsis:
        return "...", None
    return (axis, None) if isinstance(axis, str) else (axis.name, axis.size)


def suggestion(name: str, candidates: Iterable[str]) -> str:
    """` Did you mean ...?` with the closest of the candidates, or nothing."""
    by_folded = {candidate.lower(): candidate for candidate in candidates}
    close = difflib.get_close_matches(name.lower(), list(by_folded), n=1, cutoff=0.5)
    return f" Did you mean '{by_folded[close[0]]}'?" if close else ""


def _names(axes: Any) -> list[str]:
    if isinstance(axes, Mapping):
        return list(axes)
    return [_pair(axis)[0] for axis in axes]


def axis_not_found(operation: str, name: str, axes: Any, *, fix: str = "") -> ValueError:
    """The error for an axis name that the operand does not have."""
    hint = suggestion(name, _names(axes)) or fix or f" Its axes are {_names(axes)}."
    return ValueError(f"{operation}: axis '{name}' not found in {describe(axes)}.{hint}")


def size_mismatch(
    operation: str, name: str, wanted: int, found: int, axes: Any = None
) -> ValueError:
    """The error for one name with two sizes."""
    where = "" if axes is None else f" in {describe(axes)}"
    return ValueError(
        f"{operation}: axis '{name}' has size {found}{where}, but size {wanted} was asked for. "
        f"Pass the name alone ('{name}') to accept any size, or make the sizes agree."
    )


def repeated_axis(operation: str, name: str, axes: Any, *, fix: str = "") -> ValueError:
    """The error for a name that would occur twice."""
    remedy = fix or f"Rename one of them, for example with `.rename({{'{name}': '{name}2'}})`."
    return ValueError(
        f"{operation}: Axes must be unique, but '{name}' occurs more than once in "
        f"{describe(axes)}. {remedy}"
    )
