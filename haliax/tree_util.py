"""Tree functions that take a `NamedArray` as one leaf, names and all."""

from collections.abc import Callable
from typing import Any

import jax

from haliax.core import NamedArray
from haliax.util import is_named_array


def _or_named(is_leaf: Callable[[Any], bool] | None) -> Callable[[Any], bool]:
    if is_leaf is None:
        return is_named_array
    return lambda x: isinstance(x, NamedArray) or bool(is_leaf(x))


def tree_map(
    fn: Callable[..., Any], tree: Any, *rest: Any, is_leaf: Callable[[Any], bool] | None = None
) -> Any:
    """`jax.tree_util.tree_map`, where named arrays are leaves."""
    return jax.tree_util.tree_map(fn, tree, *rest, is_leaf=_or_named(is_leaf))


def tree_flatten(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> tuple[list[Any], Any]:
    """`jax.tree_util.tree_flatten`, where named arrays are leaves."""
    return jax.tree_util.tree_flatten(tree, is_leaf=_or_named(is_leaf))


def tree_unflatten(treedef: Any, leaves: Any) -> Any:
    """The tree again."""
    return jax.tree_util.tree_unflatten(treedef, leaves)


def tree_leaves(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> list[Any]:
    """`jax.tree_util.tree_leaves`, where named arrays are leaves."""
    return jax.tree_util.tree_leaves(tree, is_leaf=_or_named(is_leaf))


def tree_structure(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> Any:
    """`jax.tree_util.tree_structure`, where named arrays are leaves."""
    return jax.tree_util.tree_structure(tree, is_leaf=_or_named(is_leaf))
