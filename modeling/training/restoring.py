"""Brings the arrays of a checkpoint back into a tree: onto any mesh, all of them or some.

A *template* says what is wanted: a tree of arrays or of `ShapeDtypeStruct`s, in whose places the
checkpoint's arrays are put. Every process reads whole arrays, a few at a time, and keeps its part,
so neither the mesh nor the number of processes need be those of the writer.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from haliax.core import NamedArray
from haliax.partitioning import ResourceMapping
from modeling.training.leaves import is_array, is_named, leaf_name, leaf_shardings, named_leaves
from modeling.training.manifest import (
    AVERAGES_PREFIX,
    MODEL_PREFIX,
    CheckpointError,
    LeafRecord,
    likeness,
)
from modeling.training.reading import read_leaves, read_manifest

Tree = TypeVar("Tree")


def restore(
    directory: Path,
    template: Tree,
    *,
    mesh: Mesh | None = None,
    mapping: ResourceMapping | None = None,
    only: Sequence[str] | None = None,
) -> Tree:
    """Returns `template` with its arrays replaced by the checkpoint's, each verified.

    Args:
        directory: a committed checkpoint.
        template: a tree of arrays or `ShapeDtypeStruct`s; other leaves are kept.
        mesh: where to place the arrays, split by `mapping`; any mesh, whatever one they were
            written from. The default device if left out.
        mapping: from axis names to mesh axes.
        only: paths of arrays, `model.head`, or of all within, `model`; the others are kept as they
            are in `template`, whatever the checkpoint has. All arrays if left out: then template
            and checkpoint must have the same ones.

    Raises:
        CheckpointError: naming a damaged file, arrays that are not as expected, or a path of `only`
            that is of none.
    """
    return _restore(directory, template, "", mesh, mapping or {}, only)


def restore_parameters(
    directory: Path,
    template: Tree,
    *,
    mesh: Mesh | None = None,
    mapping: ResourceMapping | None = None,
    weights: str = "last",
) -> Tree:
    """Returns the model `template` with the weights of a checkpoint; see `restore`.

    Args:
        directory: as of `restore`.
        template: as of `restore`.
        mesh: as of `restore`.
        mapping: as of `restore`.
        weights: `last`, or an average that the run has kept, in float32.
    """
    prefix = MODEL_PREFIX if weights == "last" else f"{AVERAGES_PREFIX}{weights}."
    return _restore(directory, template, prefix, mesh, mapping or {}, None)


def _restore(
    directory: Path,
    template: Tree,
    prefix: str,
    mesh: Mesh | None,
    mapping: ResourceMapping,
    only: Sequence[str] | None,
) -> Tree:
    saved = {
        leaf.path.removeprefix(prefix): leaf
        for leaf in read_manifest(directory).leaves
        if leaf.path.startswith(prefix)
    }
    wanted = {path: (array, axes) for path, array, axes in named_leaves(template)}
    if only is not None:
        is_chosen = _choice(directory, only, {*saved, *wanted})
        saved = {path: leaf for path, leaf in saved.items() if is_chosen(path)}
        wanted = {path: leaf for path, leaf in wanted.items() if is_chosen(path)}
    _require_same(directory, saved, wanted)
    shardings = {} if mesh is None else dict(leaf_shardings(template, mesh, mapping))

    def read(path: tuple[Any, ...], leaf: Any) -> Any:
        if isinstance(leaf, NamedArray):
            return NamedArray(read(path, leaf.array), leaf.axes)
        name = leaf_name(path)
        if not is_array(leaf) or name not in saved:
            return leaf
        whole = next(arrays)
        if mesh is None:
            return jnp.asarray(whole)
        return jax.make_array_from_callback(leaf.shape, shardings[name], lambda index: whole[index])

    in_order = [saved[path] for path, _, _ in named_leaves(template) if path in saved]
    with contextlib.closing(read_leaves(directory, in_order)) as arrays:
        return jax.tree_util.tree_map_with_path(read, template, is_leaf=is_named)


def _choice(directory: Path, only: Sequence[str], known: set[str]) -> Callable[[str], bool]:
    """Returns whether a path is chosen by a list of arrays and of what they are within."""

    def is_within(path: str, chosen: str) -> bool:
        return path == chosen or path.startswith(f"{chosen}.")

    for chosen in only:
        if not any(is_within(path, chosen) for path in known):
            raise CheckpointError(
                f"only: `{chosen}` is no array of {directory}, nor are any within it"
                f"{likeness(chosen, known)}. Name paths of its manifest."
            )
    return lambda path: any(is_within(path, chosen) for chosen in only)


def _require_same(
    directory: Path,
    saved: Mapping[str, LeafRecord],
    wanted: Mapping[str, tuple[Any, tuple[str, ...] | None]],
) -> None:
    faults_found = []
    for path in sorted({*saved, *wanted}):
        if path not in saved:
            faults_found.append(f"`{path}` is not in the checkpoint")
        elif path not in wanted:
            faults_found.append(f"`{path}` is in the checkpoint but not expected")
        else:
            array, axes = wanted[path]
            has = (saved[path].dtype, saved[path].shape, saved[path].axes)
            expects = (np.dtype(array.dtype).name, tuple(array.shape), axes)
            if has != expects:
                faults_found.append(f"`{path}` is {has}, expected {expects}")
    if faults_found:
        shown = "; ".join(faults_found[:8]) + ("; ..." if len(faults_found) > 8 else "")
        raise CheckpointError(
            f"{directory} holds another state ({len(faults_found)} leaves differ): {shown}. "
            f"Restore with the model and optimizer of its manifest, or `only` what they share."
        )
