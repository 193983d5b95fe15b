"""Parameters by name: their paths, which patterns match them, and which of them are matrices.

A path is that of the model's tree, such as `transformer.blocks.stacked.ln_1.weight`. That a weight
is a matrix, and between which axes, is what its module says: a `Linear` has inputs and outputs, an
`Embedding` a vocabulary. Whatever other axes it has (layers, experts) count separate matrices, so
that nothing hangs on the order of axes or on how many there are.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array

from haliax.axis import axis_names, axis_spec_to_tuple
from haliax.core import NamedArray
from haliax.nn import Embedding, Linear, MoELinear, Stacked

Parameters = dict[str, Any]
"""Named (or bare) arrays by path."""


class Matrix(NamedTuple):
    """The names of the axes of a weight, told apart by what they are for."""

    batch: tuple[str, ...]
    """Count separate matrices."""
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    is_inner: bool
    """Neither an embedding nor a head: no vocabulary or position is among its axes."""


def by_path(params: Any) -> Parameters:
    """Returns the parameters of a tree by path."""
    flat = jax.tree_util.tree_leaves_with_path(params, is_leaf=_is_named)
    return {_name(path): leaf for path, leaf in flat}


def in_tree(params: Any, values: Mapping[str, Any]) -> Any:
    """Returns the tree of `params` with the values of their paths."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: values[_name(path)], params, is_leaf=_is_named
    )


def matches(path: str, patterns: Sequence[str]) -> bool:
    """Returns whether a pattern is the whole path, or the whole of any part between its dots."""
    candidates = (path, *path.split("."))
    return any(re.fullmatch(p, candidate) for p in patterns for candidate in candidates)


def decay_mask(params: Any, undecayed: Sequence[str]) -> Any:
    """Returns the tree of `params` with a boolean for each: whether weight decay acts."""
    return in_tree(params, {path: not matches(path, undecayed) for path in by_path(params)})


def matrices(params: Any) -> dict[str, Matrix]:
    """Returns the weights that are matrices, by path."""
    modules = list(_modules(params, ()))
    outer = {node.Vocab.name for _, node in modules if isinstance(node, Embedding)}
    found = {}
    for path, node in modules:
        if isinstance(node, Embedding):
            rows, columns = (node.Vocab.name,), _names(node.Embed)
        elif isinstance(node, Linear | MoELinear):
            rows, columns = _names(node.In), _names(node.Out)
        else:
            continue
        if isinstance(node.weight, NamedArray) and rows and columns:
            axes = {*rows, *columns}
            batch = tuple(axis.name for axis in node.weight.axes if axis.name not in axes)
            name = _name((*path, jax.tree_util.GetAttrKey("weight")))
            found[name] = Matrix(batch, rows, columns, not axes & outer)
    return found


def stacked_axes(params: Any) -> frozenset[str]:
    """Returns the names of the axes that count layers."""
    return frozenset(
        node.Block.name for _, node in _modules(params, ()) if isinstance(node, Stacked)
    )


def _modules(node: Any, path: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Yields every node of a tree above its parameters, with the path of each."""
    if _is_named(node) or isinstance(node, jax.Array | np.ndarray | jax.ShapeDtypeStruct):
        return
    yield path, node
    children = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda child: child is not node)
    for keys, child in children[0]:
        if keys:
            yield from _modules(child, (*path, *keys))


def _names(spec: Any) -> tuple[str, ...]:
    return tuple(axis_names(axis_spec_to_tuple(spec)))


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _is_named(node: Any) -> bool:
    return isinstance(node, NamedArray)


def bare(parameter: Any) -> Array:
    """Returns the array of a parameter, named or not."""
    return parameter.array if isinstance(parameter, NamedArray) else parameter
