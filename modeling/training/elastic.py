"""Gradients whose bits do not depend on how many devices there are.

The batch is cut into V = `elastic_shards` logical shards, whatever the number of devices D, a power
of two up to V. Each shard's sums and gradient come from a program of its own, of the same shapes
everywhere, and are added over one fixed binary tree, never by an all-reduce of unspecified order:

    V = 8         ((s0 + s1) + (s2 + s3)) + ((s4 + s5) + (s6 + s7))
    D = 2         [      device 0       ]   [      device 1       ]   then one sum across

A device adds its aligned subtree as its shards come, holding at most log2 V + 1 partial sums; what
is left of the tree is added, in order, from an exchange of the devices' subtrees. What else the
bits hang on is held fixed too:

- a shard is computed by a program for one device, compiled without the partitioner, that is told by
  a number which rows are its own;
- sums are added by a program of additions alone: fused with the product that makes it, an addition
  would be a multiply-add and round once instead of twice;
- random keys are folded with the number of the logical shard;
- whatever else sums numbers of a parameter, be it norms or an optimizer that sees a weight as a
  matrix, is done by programs for one device too, on whole arrays, by every device alike; an
  optimizer that treats each number by itself runs on the parts that a device holds;
- the thread pool has the same size everywhere (`numerics`).

The price is memory: weights are gathered whole on every device for the step, in the dtype of the
computation, and gradients are whole until they are exchanged. An optimizer of matrices (Adafactor,
Muon) has the whole state on every device while it updates it, and each device computes the whole
update. State at rest is split as in any other run.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding
from jaxtyping import Array

from modeling.training.feasibility import mesh_axes
from modeling.training.mesh import Layout

Sums = tuple[Array, Array, list[Array]]
"""Of losses, of weights, and the gradient of the former by parameter."""
Exchanged = tuple[Array, Array, list[Array], list[Array]]
"""Sums of losses and of weights, and the gradient twice: split as weights are, and whole."""
SHARD_NUMBER = jax.ShapeDtypeStruct((), jnp.int32)


class Alone:
    """A function compiled for each of this process's devices as if there were no other.

    Compiled for all of them at once it would go through the partitioner, which rewrites it
    otherwise than for one.
    """

    def __init__(self, function: Callable[..., Any], *operands: Any, layout: Layout) -> None:
        """Compiles `function` for operands of these shapes."""
        self._layout = layout
        mine, traced = jax.process_index(), jax.jit(function)
        devices = layout.mesh.devices.flatten().tolist()
        self._programs = [
            (number, device, traced.lower(*_shapes_on(device, operands)).compile())
            for number, device in enumerate(devices)
            if device.process_index == mine
        ]

    @property
    def compiled(self) -> jax.stages.Compiled:
        """The program of one of the devices; those of all are alike."""
        return self._programs[0][2]

    def __call__(self, *operands: Any) -> Any:
        """Returns what every device makes of replicated operands: the same, so replicated too."""
        results = [program(*_copies_on(device, operands)) for _, device, program in self._programs]
        whole = NamedSharding(self._layout.mesh, PartitionSpec())
        return _joined(results, whole)

    def summed_over_shards(self, *operands: Any, num_shards: int) -> Sums:
        """Returns each device's sums over its logical shards as one part of a split array.

        The function takes the number of a shard after the operands, and gives `as_parts`.
        """
        mesh = self._layout.mesh
        split = NamedSharding(mesh, PartitionSpec(_data_axis(self._layout)))
        num_local, counter = num_shards // mesh.size, []
        copies = [_copies_on(device, operands) for _, device, _ in self._programs]
        for index in range(num_local):
            sums = [
                program(*mine, jax.device_put(np.int32(number * num_local + index), device))
                for (number, device, program), mine in zip(self._programs, copies, strict=True)
            ]
            _count(counter, _joined(sums, split), index)
        (total,) = counter
        return total


def rows_of_shard(batch: Any, shard: Array, num_shards: int) -> Any:
    """Returns the rows of one logical shard of the arrays of a whole batch, by a traced number."""

    def cut(array: Array) -> Array:
        size = array.shape[0] // num_shards
        return jax.lax.dynamic_slice_in_dim(array, shard * size, size)

    return jax.tree_util.tree_map(cut, batch)


def as_parts(sums: Sums) -> Sums:
    """Returns sums as one device's part of arrays that are split along their first dimension."""
    return jax.tree_util.tree_map(jnp.atleast_1d, sums)


def exchanged(sums: Sums, specs: Sequence[PartitionSpec], *, layout: Layout) -> Exchanged:
    """Returns the sums over all devices' parts, gradients once split as `specs` and once whole.

    On one device the former are whole, and the latter are left out: a copy of all gradients.
    """
    axis = _data_axis(layout)
    ways = layout.mesh.shape[axis]
    dims = [_split_dimension(spec, axis) for spec in specs]

    def on_device(sums: Sums) -> Exchanged:
        total, weight, gradients = sums
        total, weight = (_across(x[0], axis, ways, None) for x in (total, weight))
        gradients = [_across(g, axis, ways, dim) for g, dim in zip(gradients, dims, strict=True)]
        if ways == 1:
            return total, weight, gradients, []
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
    (axis,) = mesh_axes(layout.compute.get("batch"))
    return axis


def _shapes_on(device: Any, operands: Any) -> Any:
    here = SingleDeviceSharding(device)
    return jax.tree_util.tree_map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), operands
    )


def _copies_on(device: Any, operands: Any) -> Any:
    """The copies that a device holds of replicated arrays."""

    def copy(x: Array) -> Array:
        return next(shard.data for shard in x.addressable_shards if shard.device == device)

    return jax.tree_util.tree_map(copy, operands)


def _joined(results: Sequence[Any], sharding: NamedSharding) -> Any:
    """Returns arrays of the whole mesh from what this process's devices hold of them."""

    def joined(*parts: Array) -> Array:
        shape = parts[0].shape
        if sharding.spec:
            shape = (sharding.mesh.size * shape[0], *shape[1:])
        return jax.make_array_from_single_device_arrays(shape, sharding, list(parts))

    return jax.tree_util.tree_map(joined, *results)


def _split_dimension(spec: PartitionSpec, axis: str) -> int | None:
    return next((dim for dim, physical in enumerate(spec) if axis in mesh_axes(physical)), None)


def _gathered(x: Array, axis: str, dim: int | None) -> Array:
    return x if dim is None else jax.lax.all_gather(x, axis, axis=dim, tiled=True)


@partial(jax.jit, donate_argnums=0)
def _added(left: Sums, right: Sums) -> Sums:
    return jax.tree_util.tree_map(jnp.add, left, right)


def _count(counter: list[Sums], sums: Sums, index: int) -> None:
    """Adds item `index` to a binary counter whose digits are sums of 2^l neighbours."""
    while index & 1:
        sums, index = _added(counter.pop(), sums), index >> 1
    counter.append(sums)


def _across(x: Array, axis: str, ways: int, dim: int | None) -> Array:
    """The sum over devices along the tree; of a split array, the part that stays here."""
    if ways == 1:
        return x
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
