"""One update, as one compiled program that takes over its state's memory.

    loss  = sum over rows of (sum of token losses) / sum over rows of (sum of weights)
    g     = gradient of the numerator, summed over microbatches, divided once at the end

Averaging the microbatches' means instead would weigh a token by how many others share its
microbatch. Microbatch j of M takes rows j, j + M, j + 2 M, ...: every device then has rows of every
microbatch, and nothing moves.

Weights stay split as `Layout.parameters` says; activations are split as `Layout.compute` says, and
the partitioner gathers each layer's weights where the scan over layers uses them.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float32

from haliax import Axis, NamedArray
from haliax.partitioning import axis_mapping, shard, sharding_for_axis
from modeling.models.lm import LmExample, next_token_loss
from modeling.training.checkpoint import named_leaves
from modeling.training.mesh import Layout
from modeling.training.precision import Policy
from modeling.training.state import Blueprint, TrainState, trainable


class Metrics(eqx.Module):
    """What one update tells; device arrays, so that nobody waits for them."""

    loss: Float32[Array, ""]
    """Mean over the batch, before the update."""
    weight: Float32[Array, ""]
    """How many predictions counted."""
    learning_rate: Float32[Array, ""]
    gradient_squares: Float32[Array, " leaves"]
    """Squared norm of the gradient of each parameter, before clipping."""


@dataclasses.dataclass(frozen=True)
class Step:
    """A compiled update: `(arrays, tokens) -> (arrays, metrics)`; the arrays given are consumed."""

    run: Callable[[list[Any], Any], tuple[list[Any], Metrics]]
    compiled: jax.stages.Compiled
    batch_sharding: NamedSharding
    parameter_names: tuple[str, ...]
    """Of the items of `gradient_squares`."""


def compile_step(
    blueprint: Blueprint,
    optimizer: optax.GradientTransformation,
    learning_rate: Callable[[Any], Array],
    policy: Policy,
    layout: Layout,
    *,
    Batch: Axis,
    Pos: Axis,
    num_microbatches: int,
) -> Step:
    """Compiles the update of states like `blueprint` by batches of `Batch` rows."""
    batch_sharding = sharding_for_axis((Batch, Pos), layout.compute, layout.mesh)
    replicated = NamedSharding(layout.mesh, PartitionSpec())
    shardings = list(blueprint.shardings.values())

    def update(arrays: Sequence[Any], tokens: Array) -> tuple[list[Any], Metrics]:
        state = blueprint.unflatten(arrays)
        example = LmExample.causal(NamedArray(tokens, (Batch, Pos)), Pos)
        key = jax.random.fold_in(state.key, state.step)
        with axis_mapping(layout.compute):
            total, weight, gradients = summed(
                state.model, example, policy, layout, key,
                Batch=Batch, num_microbatches=num_microbatches,
            )  # fmt: skip
        gradients = jax.tree_util.tree_map(lambda g: g / weight.astype(g.dtype), gradients)
        params, rest = trainable(state.model)
        updates, opt_state = optimizer.update(gradients, state.opt_state, params)
        model = eqx.combine(optax.apply_updates(params, updates), rest)
        metrics = Metrics(
            total / weight, weight, learning_rate(state.step), _squared_norms(gradients)
        )
        return blueprint.flatten(TrainState(state.step + 1, model, opt_state, state.key)), metrics

    tokens = jax.ShapeDtypeStruct((Batch.size, Pos.size), jnp.int32)
    with jax.set_mesh(layout.mesh):
        compiled = (
            jax.jit(
                update,
                in_shardings=(shardings, batch_sharding),
                out_shardings=(shardings, replicated),
                donate_argnums=0,
            )
            .lower(blueprint.arrays, tokens)
            .compile()
        )
    names = tuple(path for path, _, _ in named_leaves(trainable(blueprint.template.model)[0]))
    return Step(compiled, compiled, batch_sharding, names)


def summed(
    model: Any,
    example: LmExample,
    policy: Policy,
    layout: Layout,
    key: Any,
    *,
    Batch: Axis,
    num_microbatches: int,
) -> tuple[Array, Array, Any]:
    """Returns the sums of losses and of weights, and the gradient of the former."""
    params, rest = trainable(model)

    def sums(params: Any, example: LmExample, key: Any) -> tuple[Array, Array]:
        cast = policy.cast_to_compute(eqx.combine(params, rest))
        return next_token_loss(cast, example, key=key)

    def sums_and_gradient(example: LmExample, key: Any) -> tuple[Array, Array, Any]:
        (total, weight), gradient = jax.value_and_grad(sums, has_aux=True)(params, example, key)
        return total, weight, shard(gradient, layout.parameters)

    if num_microbatches == 1:
        return sums_and_gradient(example, key)

    def add(sums: Any, piece: Any) -> tuple[Any, None]:
        index, example = piece
        more = sums_and_gradient(example.named(), jax.random.fold_in(key, index))
        return jax.tree_util.tree_map(jnp.add, sums, more), None

    zero = jnp.zeros((), jnp.float32)
    start = (zero, zero, jax.tree_util.tree_map(jnp.zeros_like, params))
    pieces = (jnp.arange(num_microbatches), _Pieces.cut(example, Batch, num_microbatches))
    return jax.lax.scan(add, start, pieces)[0]


class _Pieces(eqx.Module):
    """The arrays of an example with the microbatches in front, bare, as `lax.scan` takes them."""

    arrays: list[Array]
    axes: tuple[tuple[Axis, ...], ...] = eqx.field(static=True)
    tree: Any = eqx.field(static=True)

    @staticmethod
    def cut(example: LmExample, Batch: Axis, num_microbatches: int) -> "_Pieces":
        leaves, tree = jax.tree_util.tree_flatten(example, is_leaf=_is_named)
        Micro = Axis("microbatch", num_microbatches)
        Rows = Batch.resize(Batch.size // num_microbatches)
        cut = [
            shard(x.unflatten_axis(Batch, (Rows, Micro)).rearrange((Micro, ...))) for x in leaves
        ]
        return _Pieces([x.array for x in cut], tuple(x.axes[1:] for x in cut), tree)

    def named(self) -> LmExample:
        leaves = map(NamedArray, self.arrays, self.axes)
        return jax.tree_util.tree_unflatten(self.tree, list(leaves))


def _is_named(node: Any) -> bool:
    return isinstance(node, NamedArray)


def _squared_norms(gradients: Any) -> Float32[Array, " leaves"]:
    leaves = jax.tree_util.tree_leaves(gradients)
    return jnp.stack([jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in leaves])
