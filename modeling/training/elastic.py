"""Gradients whose bits do not depend on how many devices there are.

The batch is cut into V = `elastic_shards` logical shards, whatever the number of devices D, a power
of two up to V. Each shard's sums and gradient come from a program of its own, of the same shapes
everywhere, and are added over one fixed binary tree, never by an all-reduce of unspecified order:

    V = 8         ((s0 + s1) + (s2 + s3)) + ((s4 + s5) + (s6 + s7))
    D = 2         [      device 0       ]   [      device 1       ]   then one sum across

A device adds its aligned subtree like a binary counter, holding log2 V + 1 partial sums; what is
left of the tree is added, in order, from an exchange of the devices' subtrees. What else the bits
hang on is held fixed too:

- the local shards are summed by a program for one device, compiled without the partitioner, and
  with a trip count unknown to the compiler: a loop known to run once would be compiled otherwise;
- dropout keys are folded with the number of the logical shard;
- norms are taken of whole gradients, and the optimizer runs, in programs of their own (`step`): a
  reduction sums in another order, and quotients are rewritten, when fused with other neighbours;
- the thread pool has the same size everywhere (`numerics`).

The price is memory: weights are gathered whole on every device for the step, and gradients are
whole until they are exchanged. State at rest is split as in any other run.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from haliax import NamedArray
from modeling.data.rows import Rows
from modeling.training.mesh import Layout

Sums = tuple[Array, Array, list[Array]]
"""Of losses, of weights, and the gradient of the former by parameter."""
ShardSums = Callable[[list[Array], Rows, Any], Sums]
"""Takes whole parameters, the rows of one logical shard, and a key."""


def check(layout: Layout, num_shards: int, batch_size: int, num_microbatches: int) -> None:
    """Raises `ValueError` unless the layout can be one of those that give the same bits."""
    axis = _data_axis(layout)
    ways = layout.mesh.shape[axis]
    others = {name: n for name, n in layout.mesh.shape.items() if name != axis and n > 1}
    if others:
        raise ValueError(
            f"trainer.elastic_shards: the mesh has {others} besides `{axis}`; elastic bits hold "
            f"for data parallelism alone. Take a mesh like {{{axis}: {ways}}}."
        )
    if num_shards & (num_shards - 1) or num_shards % ways:
        raise ValueError(
            f"trainer.elastic_shards: {num_shards} must be a power of two and a multiple of the "
            f"{ways} devices along `{axis}`."
        )
    if batch_size % num_shards or num_microbatches != 1:
        raise ValueError(
            f"trainer.elastic_shards: {num_shards} logical shards must divide "
            f"trainer.train_batch_size {batch_size}, and take the place of "
            f"trainer.num_microbatches, which is {num_microbatches} and must be 1."
        )


def local_sums(
    shard_sums: ShardSums,
    params: Sequence[Array],
    rows: Rows,
    key: Any,
    first: Array,
    num_local: Array,
    *,
    num_shards: int,
) -> list[Sums]:
    """Returns the sums of `num_local` logical shards from `first` on, as a binary counter.

    An axis of size 1, for the device, stands in front of each.

    For one device, and the same program whatever their number: every operand is whole, and the
    numbers that tell devices apart are unknown to the compiler.
    """

    def of_shard(column: NamedArray, shard: Array) -> NamedArray:
        Here = column.axes[0].resize(column.axes[0].size // num_shards)
        part = jax.lax.dynamic_slice_in_dim(column.array, shard * Here.size, Here.size)
        return NamedArray(part, (Here, *column.axes[1:]))

    def turn(index: Array, carry: tuple[list[Sums], Sums]) -> tuple[list[Sums], Sums]:
        counter, before = carry
        added = _count(counter, before, index - 1)
        counter = jax.tree_util.tree_map(
            lambda old, new: jnp.where(index > 0, new, old), counter, added
        )
        shard = first + index
        here = jax.tree_util.tree_map(partial(of_shard, shard=shard), rows, is_leaf=_is_named)
        return counter, shard_sums(list(params), here, jax.random.fold_in(key, shard))

    zero = (jnp.zeros(()), jnp.zeros(()), [jnp.zeros_like(p) for p in params])
    counter = [zero] * num_shards.bit_length()
    # A sum is added one turn after it was made: fused with the product that makes it, the
    # addition would be a multiply-add and round once instead of twice.
    counter, last = jax.lax.fori_loop(0, num_local, turn, (counter, zero))
    counter = _count(counter, last, num_local - 1)
    return jax.tree_util.tree_map(lambda x: x[None], counter)


def on_each_device(
    program: Callable[..., list[Sums]], *operands: Any, layout: Layout, num_shards: int
) -> Sums:
    """Runs `program(*operands, first, num_local)` on each device; stacks the sums it is left with.

    Each device compiles the program for itself: compiled for all of them at once it would go
    through the partitioner, which rewrites it otherwise than for one.
    """
    devices = layout.mesh.devices.flatten().tolist()
    num_local = num_shards // len(devices)
    found = []
    for number, device in enumerate(devices):
        here = jax.tree_util.tree_map(partial(_copy_on, device), list(operands))
        bounds = jax.device_put((np.int32(number * num_local), np.int32(num_local)), device)
        found.append(program(*here, *bounds)[num_local.bit_length() - 1])
    sharding = NamedSharding(layout.mesh, PartitionSpec(_data_axis(layout)))

    def stacked(*parts: Array) -> Array:
        shape = (len(devices), *parts[0].shape[1:])
        return jax.make_array_from_single_device_arrays(shape, sharding, list(parts))

    return jax.tree_util.tree_map(stacked, *found)


def _is_named(node: Any) -> bool:
    return isinstance(node, NamedArray)


def _copy_on(device: Any, x: Array) -> Array:
    return next(shard.data for shard in x.addressable_shards if shard.device == device)


def exchanged(
    sums: Sums, specs: Sequence[PartitionSpec], *, layout: Layout
) -> tuple[Array, Array, list[Array], list[Array]]:
    """Returns the sums over all devices, gradients once split as `specs` and once whole."""
    axis = _data_axis(layout)
    ways = layout.mesh.shape[axis]
    dims = [_split_dimension(spec, axis) for spec in specs]

    def on_device(sums: Sums) -> tuple[Array, Array, list[Array], list[Array]]:
        total, weight, gradients = jax.tree_util.tree_map(lambda x: x[0], sums)
        total, weight = (_across(x, axis, ways, None) for x in (total, weight))
        gradients = [_across(g, axis, ways, dim) for g, dim in zip(gradients, dims, strict=True)]
        together = [_gathered(g, axis, dim) for g, dim in zip(gradients, dims, strict=True)]
        return total, weight, gradients, together

    everywhere = PartitionSpec()
    return jax.shard_map(
        on_device,
        mesh=layout.mesh,
        in_specs=(PartitionSpec(axis),),
        out_specs=(everywhere, everywhere, list(specs), everywhere),
        check_vma=False,
    )(sums)


def _data_axis(layout: Layout) -> str:
    axis = layout.compute.get("batch")
    if axis is None:
        raise ValueError(
            "trainer.elastic_shards: trainer.axis_resources must map `batch` to a mesh axis."
        )
    return axis


def _split_dimension(spec: PartitionSpec, axis: str) -> int | None:
    return next((dim for dim, physical in enumerate(spec) if physical == axis), None)


def _gathered(x: Array, axis: str, dim: int | None) -> Array:
    return x if dim is None else jax.lax.all_gather(x, axis, axis=dim, tiled=True)


def _count(counter: list[Sums], sums: Sums, index: Array) -> list[Sums]:
    """Adds one to a binary counter whose digit l, if set, holds the sum of 2^l neighbours."""
    carrying = jnp.asarray(True)
    result = []
    for level, digit in enumerate(counter):
        is_set = ((index >> level) & 1) == 1
        stays = carrying & ~is_set
        result.append(
            jax.tree_util.tree_map(lambda d, s, put=stays: jnp.where(put, s, d), digit, sums)
        )
        carries = carrying & is_set
        sums = jax.tree_util.tree_map(lambda d, s, go=carries: jnp.where(go, d + s, s), digit, sums)
        carrying = carries
    return result


def _across(x: Array, axis: str, ways: int, dim: int | None) -> Array:
    """The sum over devices along the tree; of a split array, the part that stays here."""
    if dim is None:
        parts = jax.lax.all_gather(x, axis)
    else:
        size = x.shape[dim] // ways
        blocks = x.reshape(*x.shape[:dim], ways, size, *x.shape[dim + 1 :])
        blocks = jnp.moveaxis(blocks, dim, 0)
        parts = jax.lax.all_to_all(blocks, axis, split_axis=0, concat_axis=0, tiled=True)
    level = [parts[i] for i in range(ways)]
    for _ in range(int(math.log2(ways))):
        level = [a + b for a, b in zip(level[::2], level[1::2], strict=True)]
    return level[0]
