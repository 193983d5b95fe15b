"""Tree functions that take a `NamedArray` as one leaf, names and all."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax

from haliax.axis import AxisSelector, axis_name
from haliax.core import NamedArray
from haliax.creation import zeros
from haliax.hof import vmap
from haliax.jax_utils import maybe_rng_split
from haliax.nn.scan import Stacked
from haliax.random import normal
from haliax.shapes import concatenate
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


def scan_aware_tree_map(
    fn: Callable[..., Any], tree: Any, *rest: Any, is_leaf: Callable[[Any], bool] | None = None
) -> Any:
    """`tree_map` that goes into a `Stacked` layer by layer: `fn` sees leaves without its axis."""

    def is_unit(x: Any) -> bool:
        return isinstance(x, Stacked) or (is_leaf is not None and bool(is_leaf(x)))

    def apply(node: Any, *others: Any) -> Any:
        if not isinstance(node, Stacked):
            return fn(node, *others)
        inner = functools.partial(scan_aware_tree_map, fn, is_leaf=is_leaf)
        stacked = vmap(inner, node.Block)(node.stacked, *(other.stacked for other in others))
        return dataclasses.replace(node, stacked=stacked)

    return tree_map(apply, tree, *rest, is_leaf=is_unit)


def resize_axis(tree: Any, old_axis: AxisSelector, new_size: int, key: Any = None) -> Any:
    """Every named array of a tree with an axis cut or grown to a size.

    New elements are zero; with a key, normal with the mean and deviation of the old ones.
    """
    name = axis_name(old_axis)
    leaves, treedef = tree_flatten(tree)
    keys = maybe_rng_split(key, max(1, len(leaves)))
    resized = [
        _resized(leaf, name, new_size, leaf_key)
        for leaf, leaf_key in zip(leaves, keys, strict=False)
    ]
    return tree_unflatten(treedef, resized)


def _resized(leaf: Any, name: str, new_size: int, key: Any) -> Any:
    if not isinstance(leaf, NamedArray) or not leaf.has_axis(name):
        return leaf
    old = leaf.resolve_axis(name)
    if new_size <= old.size:
        return leaf[name, 0:new_size]
    Extra = old.resize(new_size - old.size)
    axes = tuple(Extra if axis == old else axis for axis in leaf.axes)
    if key is None:
        extra = zeros(axes, leaf.dtype)
    else:
        extra = normal(key, axes).astype(leaf.dtype) * leaf.std() + leaf.mean()
    return concatenate(name, [leaf, extra])
