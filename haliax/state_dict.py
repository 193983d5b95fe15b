"""State dicts: flat `{"h.0.attn.weight": array}` views of module trees, as PyTorch has them.

Keys follow field names, list positions and dict keys, joined by dots; `_state_dict_key_map` renames
a field or, with `None`, leaves it out of the key. Named arrays become plain ones. `from_state_dict`
needs a template tree, which says where arrays go and what axes they have; fields that are `None`
there are not read. *Export* form (`flatten=True`) also merges the several input or output axes of
linear layers into one, as PyTorch wants its weights.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import equinox as eqx
import jax
import numpy as np

from haliax.core import NamedArray, trusted
from haliax.errors import suggestion
from haliax.jax_utils import is_jax_array_like

StateDict: TypeAlias = dict[str, Any]
Mod = TypeVar("Mod", bound=eqx.Module)
T = TypeVar("T")


class ModuleWithStateDictSerialization(eqx.Module):
    """An `eqx.Module` that can say how it is written to and read from a state dict."""

    def _state_dict_key_map(self) -> dict[str, str | None]:
        """Keys for fields that are not under their own name; `None` adds nothing to the key."""
        return {}

    def to_state_dict(self, prefix: str | None = None) -> StateDict:
        """The arrays below this module, by key."""
        return default_to_state_dict(self, prefix)

    def from_state_dict(self: Mod, state_dict: StateDict, prefix: str | None = None) -> Mod:
        """This module with its arrays replaced by those of the state dict."""
        return default_from_state_dict(self, state_dict, prefix)

    def flatten_for_export(self: Mod) -> Mod:
        """This module in the form that other software reads."""
        return self

    def unflatten_from_export(self: Mod, template: Any) -> Mod:
        """The inverse of `flatten_for_export`; the template has the axes."""
        return self


def with_prefix(prefix: str | None, leaf: str | None) -> str | None:
    """Joins two parts of a key, either of which may be absent."""
    if prefix is None or prefix == "":
        return leaf
    if leaf is None or leaf == "":
        return prefix
    return f"{prefix}.{leaf}"


def to_state_dict(tree: Any, prefix: str | None = None) -> StateDict:
    """The arrays of a tree, by key."""
    if isinstance(tree, ModuleWithStateDictSerialization):
        return tree.to_state_dict(prefix)
    if isinstance(tree, eqx.Module):
        return default_to_state_dict(tree, prefix)
    found: StateDict = {}
    if isinstance(tree, (list, tuple)):
        for i, item in enumerate(tree):
            _merge(found, to_state_dict(item, with_prefix(prefix, str(i))))
    elif isinstance(tree, Mapping):
        for key, item in tree.items():
            _merge(found, to_state_dict(item, with_prefix(prefix, str(key))))
    elif isinstance(tree, NamedArray):
        return to_state_dict(tree.array, prefix)
    elif is_jax_array_like(tree):
        if prefix is None:
            raise ValueError("to_state_dict: a bare array needs a key; pass `prefix=`.")
        found[prefix] = tree
    return found


def _merge(found: StateDict, more: StateDict) -> None:
    for key, value in more.items():
        if key in found:
            raise ValueError(
                f"to_state_dict: the key '{key}' occurs twice. Change `_state_dict_key_map` of one "
                "module."
            )
        found[key] = value


def _key_of(module: eqx.Module, field: str) -> str | None:
    if isinstance(module, ModuleWithStateDictSerialization):
        return module._state_dict_key_map().get(field, field)
    return field


def _stateful_fields(module: eqx.Module) -> list[str]:
    return [f.name for f in dataclasses.fields(module) if not f.metadata.get("static", False)]


def default_to_state_dict(module: eqx.Module, prefix: str | None = None) -> StateDict:
    """The arrays of all fields, by the keys of the fields."""
    found: StateDict = {}
    for name in _stateful_fields(module):
        key = with_prefix(prefix, _key_of(module, name))
        value = getattr(module, name)
        if key is None and is_jax_array_like(getattr(value, "array", value)):
            raise ValueError(
                f"to_state_dict: the array `{name}` has no key; give it one, or a prefix."
            )
        _merge(found, to_state_dict(value, key))
    return found


def from_state_dict(tree: T, state_dict: StateDict, prefix: str | None = None) -> T:
    """The template tree with its arrays replaced by those of the state dict."""
    result: Any = tree
    if isinstance(tree, ModuleWithStateDictSerialization):
        result = tree.from_state_dict(state_dict, prefix)
    elif isinstance(tree, eqx.Module):
        result = default_from_state_dict(tree, state_dict, prefix)
    elif isinstance(tree, (list, tuple)):
        items = [
            from_state_dict(item, state_dict, with_prefix(prefix, str(i)))
            for i, item in enumerate(tree)
        ]
        result = type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    elif isinstance(tree, dict):
        result = {
            key: from_state_dict(item, state_dict, with_prefix(prefix, str(key)))
            for key, item in tree.items()
        }
    elif isinstance(tree, NamedArray):
        if is_jax_array_like(tree.array):
            result = trusted(_read(tree.array, state_dict, prefix, tree.shape), tree.axes)
    elif is_jax_array_like(tree):
        result = _read(tree, state_dict, prefix, tuple(tree.shape))  # pyright: ignore
    return result


def _read(template: Any, state_dict: StateDict, key: str | None, shape: Any) -> Any:
    if key is None:
        raise ValueError("from_state_dict: a bare array needs a key; pass `prefix=`.")
    if key not in state_dict:
        raise KeyError(
            f"from_state_dict: the key '{key}' is not in the state "
            f"dict.{suggestion(key, state_dict)}"
        )
    array = state_dict[key]
    if tuple(array.shape) != tuple(template.shape):
        raise ValueError(
            f"from_state_dict: '{key}' has shape {tuple(array.shape)}, but the template wants "
            f"{shape}."
        )
    return array


def default_from_state_dict(module: Mod, state_dict: StateDict, prefix: str | None = None) -> Mod:
    """The module with every field replaced from the state dict."""
    read: dict[str, Any] = {}
    for name in _stateful_fields(module):
        old = getattr(module, name)
        if jax.tree_util.tree_leaves(old):
            new = from_state_dict(old, state_dict, with_prefix(prefix, _key_of(module, name)))
            if new is not old:
                read[name] = new
    if not read:
        return module
    names, values = list(read), list(read.values())
    return eqx.tree_at(
        lambda m: [getattr(m, n) for n in names], module, values, is_leaf=lambda x: x is None
    )


def _is_exportable(x: Any) -> bool:
    return isinstance(x, ModuleWithStateDictSerialization)


def flatten_modules_for_export(tree: T) -> T:
    """The tree with every module in export form, inner modules first."""

    def export(node: Any) -> Any:
        if not _is_exportable(node):
            return node
        return _map_children(flatten_modules_for_export, node).flatten_for_export()

    return jax.tree_util.tree_map(export, tree, is_leaf=_is_exportable)


def unflatten_modules_from_export(tree: T, template: T) -> T:
    """The inverse of `flatten_modules_for_export`; the template has the axes."""

    def restore(node: Any, like: Any) -> Any:
        if not _is_exportable(node):
            return node
        return _map_children(unflatten_modules_from_export, node.unflatten_from_export(like), like)

    return jax.tree_util.tree_map(restore, tree, template, is_leaf=_is_exportable)


def _map_children(fn: Callable[..., Any], module: Any, *others: Any) -> Any:
    """Applies `fn` to the fields of a module that hold modules."""
    changed = {}
    for name in _stateful_fields(module):
        value = getattr(module, name)
        if any(
            _is_exportable(leaf)
            for leaf in jax.tree_util.tree_leaves(value, is_leaf=_is_exportable)
        ):
            changed[name] = fn(value, *(getattr(other, name) for other in others))
    if not changed:
        return module
    return eqx.tree_at(lambda m: [getattr(m, n) for n in changed], module, list(changed.values()))


def to_torch_compatible_state_dict(
    t: Any,
    *,
    flatten: bool = True,
    prefix: str | None = None,
    filter: Callable[[Any], bool] = eqx.is_array,
) -> StateDict:
    """The arrays that `filter` accepts, by key, in export form unless told otherwise."""
    kept = eqx.filter(t, filter)
    return to_state_dict(flatten_modules_for_export(kept) if flatten else kept, prefix)


def from_torch_compatible_state_dict(
    t: T, state_dict: StateDict, *, unflatten: bool = True, prefix: str | None = None
) -> T:
    """The inverse of `to_torch_compatible_state_dict`; `t` is the template."""
    if not unflatten:
        return from_state_dict(t, state_dict, prefix)
    flat_template = eqx.filter_eval_shape(flatten_modules_for_export, t)
    read = from_state_dict(flat_template, state_dict, prefix)
    return unflatten_modules_from_export(read, t)


def to_numpy_state_dict(tree: Any, prefix: str | None = None) -> dict[str, np.ndarray]:
    """`to_state_dict` as NumPy arrays; sharded arrays are gathered, so call it in all processes."""

    def fetched(array: Any) -> np.ndarray:
        if isinstance(array, jax.Array) and not array.is_fully_addressable:
            from jax.experimental import multihost_utils

            return np.asarray(multihost_utils.process_allgather(array, tiled=True))
        return np.asarray(array)

    return {key: fetched(array) for key, array in to_state_dict(tree, prefix).items()}


def save_state_dict(state_dict: StateDict, path: str | Path) -> None:
    """Writes a safetensors file that PyTorch tools read."""
    from safetensors.numpy import save_file

    arrays = {key: np.ascontiguousarray(array) for key, array in state_dict.items()}
    if jax.process_index() == 0:
        save_file(arrays, str(path), metadata={"format": "pt"})


def load_state_dict(path: str | Path) -> dict[str, np.ndarray]:
    """Reads a safetensors file."""
    from safetensors.numpy import load_file

    return load_file(str(path))
