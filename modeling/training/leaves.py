"""The arrays of a tree by name: where each lies, and copies of them in host memory.

A leaf's name is its path in the tree, `model.blocks.attn.q.weight`; that of a file, too.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from haliax.core import NamedArray
from haliax.partitioning import ResourceMapping, sharding_for_axis
from modeling.training.manifest import CheckpointError, cells

_LEAF_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


@dataclasses.dataclass(frozen=True)
class HostLeaf:
    """A copy of one array in host memory: the chunks that this process holds."""

    path: str
    dtype: np.dtype
    shape: tuple[int, ...]
    axes: tuple[str, ...] | None
    chunk_shape: tuple[int, ...]
    chunks: Mapping[tuple[int, ...], np.ndarray]
    """Row-major chunks by the index where they begin."""

    def assemble(self) -> np.ndarray:
        """Returns the whole array."""
        if len(self.chunks) == 1:
            return next(iter(self.chunks.values()))
        whole = np.empty(self.shape, self.dtype)
        for start, chunk in self.chunks.items():
            whole[cells(start, chunk.shape)] = chunk
        return whole


def named_leaves(tree: Any) -> Iterator[tuple[str, Any, tuple[str, ...] | None]]:
    """Yields path, raw array and axis names of every array (or `ShapeDtypeStruct`) of a tree."""
    flat = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_named)
    for path, leaf in flat:
        axes = tuple(a.name for a in leaf.axes) if isinstance(leaf, NamedArray) else None
        array = leaf.array if isinstance(leaf, NamedArray) else leaf
        if is_array(array):
            yield leaf_name(path), array, axes


class HostMemory:
    """Memory for one copy of a state, used again by the next one."""

    def __init__(self) -> None:
        """Holds none yet."""
        self._buffers: dict[tuple[str, tuple[int, ...]], np.ndarray] = {}

    def copy(self, path: str, start: tuple[int, ...], chunk: np.ndarray) -> np.ndarray:
        """Returns a row-major copy of a chunk, which is good until the next one of its place."""
        buffer = self._buffers.get((path, start))
        if buffer is None or (buffer.shape, buffer.dtype) != (chunk.shape, chunk.dtype):
            buffer = self._buffers[path, start] = np.empty(chunk.shape, chunk.dtype)
        np.copyto(buffer, chunk)
        return buffer


def snapshot(tree: Any, memory: HostMemory | None = None) -> list[HostLeaf]:
    """Copies what this process holds of every array; the originals may be donated afterwards.

    Args:
        tree: of arrays.
        memory: of an earlier snapshot that is of no use any more; new if left out.
    """
    return _host_leaves(tree, (memory or HostMemory()).copy)


def fetched(tree: Any) -> list[HostLeaf]:
    """Returns what this process holds of every array of a tree that nobody will ever donate.

    Waits until they are computed; where host memory is the device's, nothing is copied.
    """
    return _host_leaves(tree, lambda path, start, chunk: np.asarray(chunk, order="C"))


_Keep = Callable[[str, tuple[int, ...], np.ndarray], np.ndarray]


def _host_leaves(tree: Any, keep: _Keep) -> list[HostLeaf]:
    for _, array, _ in named_leaves(tree):
        for shard in _own_shards(array):
            # Asked of the array as a whole, a device would copy it again for the shard.
            shard.data.copy_to_host_async()
    return [_host_leaf(*leaf, keep) for leaf in named_leaves(tree)]


def _host_leaf(path: str, array: jax.Array, axes: tuple[str, ...] | None, keep: _Keep) -> HostLeaf:
    if not _LEAF_NAME.fullmatch(path):
        raise CheckpointError(
            f"leaf {path!r} cannot be a file name; it must match {_LEAF_NAME.pattern}."
        )
    chunk_shape = array.sharding.shard_shape(array.shape)
    chunks = {}
    for shard in _own_shards(array):
        start = tuple(index.start or 0 for index in shard.index)
        chunks[start] = keep(path, start, np.asarray(shard.data))
    return HostLeaf(path, np.dtype(array.dtype), array.shape, axes, chunk_shape, chunks)


def _own_shards(array: jax.Array) -> list[Any]:
    """Returns the shards that this process writes: of equal ones, one process has the first."""
    return [shard for shard in array.addressable_shards if shard.replica_id == 0]


def leaf_name(path: tuple[Any, ...]) -> str:
    """Returns the name of the leaf at a path of JAX's."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def is_named(node: Any) -> bool:
    """Whether a node has axis names; its one array belongs to it."""
    return isinstance(node, NamedArray)


def is_array(leaf: Any) -> bool:
    """Whether a leaf is an array, or stands for one."""
    return eqx.is_array(leaf) or isinstance(leaf, jax.ShapeDtypeStruct)


def leaf_shardings(
    tree: Any, mesh: Mesh, mapping: ResourceMapping
) -> Iterator[tuple[str, NamedSharding]]:
    """Yields path and sharding of every array of a tree; arrays without names are replicated."""
    flat = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_named)
    for path, leaf in flat:
        name = leaf_name(path)
        if isinstance(leaf, NamedArray) and is_array(leaf.array):
            yield name, sharding_for_axis(leaf.axes, mapping, mesh)
        elif is_array(leaf):
            yield name, NamedSharding(mesh, PartitionSpec())
