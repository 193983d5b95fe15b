"""Predicates and conversions that know what a named array is."""

from collections.abc import Sequence
from typing import Any

from haliax.core import NamedArray
from haliax.jax_utils import is_jax_array_like
from haliax.sharding import StringHolderEnum as StringHolderEnum


def is_named_array(x: object) -> bool:
    """Whether `x` is a `NamedArray`; handy as `is_leaf`."""
    return isinstance(x, NamedArray)


def is_jax_or_hax_array_like(x: object) -> bool:
    """Whether `x` is an array, named or not."""
    return isinstance(x, NamedArray) or is_jax_array_like(x)


def ensure_tuple(x: Any) -> tuple[Any, ...]:
    """A sequence as a tuple; anything else, strings too, as a tuple of one."""
    if isinstance(x, Sequence) and not isinstance(x, str):
        return tuple(x)
    return (x,)
