"""Finding what is wrong with a module, and seeing where its arrays live."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import numpy as np

from haliax.core import NamedArray
from haliax.util import is_named_array


@dataclasses.dataclass(frozen=True)
class ModuleProblems:
    """What `diagnose_common_issues` found; false when it found nothing.

    Args:
        reused_arrays: arrays that are at several paths: each is trained as if it were several.
        static_arrays: paths of arrays in static fields: they are never trained, and break `jit`.
    """

    reused_arrays: list[tuple[Any, list[str]]] = dataclasses.field(default_factory=list)
    static_arrays: list[str] = dataclasses.field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.reused_arrays or self.static_arrays)

    def __str__(self) -> str:
        if not self:
            return "No problems found."
        lines = [
            f"{_kind(array)} is at {', '.join(paths)}: tie it on purpose with `eqx.nn.Shared`, or "
            "copy it."
            for array, paths in self.reused_arrays
        ]
        lines += [
            f"{path} is an array in a static field: make it a normal field."
            for path in self.static_arrays
        ]
        return "\n".join(lines)


def _kind(array: Any) -> str:
    return f"{array.dtype}{tuple(array.shape)}"


def diagnose_common_issues(module: Any) -> ModuleProblems:
    """Looks for arrays that occur twice and for arrays in static fields."""
    paths: dict[int, tuple[Any, list[str]]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(module):
        if isinstance(leaf, (jax.Array, np.ndarray)):
            name = jax.tree_util.keystr(path).removesuffix(".array") or "the root"
            paths.setdefault(id(leaf), (leaf, []))[1].append(name)
    reused = [(array, where) for array, where in paths.values() if len(where) > 1]
    return ModuleProblems(reused, _static_arrays(module, ""))


def _static_arrays(node: Any, path: str) -> list[str]:
    found: list[str] = []
    if isinstance(node, eqx.Module):
        for field in dataclasses.fields(node):
            value = getattr(node, field.name, None)
            here = f"{path}.{field.name}"
            if field.metadata.get("static", False):
                leaves = jax.tree_util.tree_leaves(value)
                if any(isinstance(leaf, (jax.Array, np.ndarray)) for leaf in leaves):
                    found.append(here)
            else:
                found += _static_arrays(value, here)
    elif isinstance(node, (list, tuple)):
        for i, item in enumerate(node):
            found += _static_arrays(item, f"{path}[{i}]")
    elif isinstance(node, dict):
        for key, item in node.items():
            found += _static_arrays(item, f"{path}[{key!r}]")
    return found


def visualize_shardings(tree: Any) -> str:
    """Prints, and returns, one line per array: path, axes, and how they are split over the mesh."""
    lines = []
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_named_array)
    for path, leaf in leaves:
        array = leaf.array if isinstance(leaf, NamedArray) else leaf
        if isinstance(array, jax.Array):
            shape = leaf.shape if isinstance(leaf, NamedArray) else tuple(array.shape)
            lines.append(
                f"{jax.tree_util.keystr(path)}: {array.dtype}{shape} {_placement(leaf, array)}"
            )
    text = "\n".join(lines)
    print(text)  # noqa: T201
    return text


def _placement(leaf: Any, array: jax.Array) -> str:
    sharding = array.sharding
    if not isinstance(sharding, jax.sharding.NamedSharding):
        return f"on {len(sharding.device_set)} device(s)"
    names = [axis.name for axis in leaf.axes] if isinstance(leaf, NamedArray) else range(array.ndim)
    spec = [*sharding.spec, *[None] * (array.ndim - len(sharding.spec))]
    split = [
        f"{name} over {'+'.join(_mesh_axes(m))}" for name, m in zip(names, spec, strict=True) if m
    ]
    shard = sharding.shard_shape(array.shape)
    return (", ".join(split) or "replicated") + f", {shard} per device"


def _mesh_axes(entry: Any) -> tuple[str, ...]:
    return (entry,) if isinstance(entry, str) else tuple(entry)
