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
import math
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float32

from haliax import Axis, NamedArray
from haliax.partitioning import axis_mapping, shard, sharding_for_axis
from modeling.data.rows import TOKENS_ALONE, Columns, Rows
from modeling.models.lm import LmExample, next_token_loss
from modeling.optim.config import OptimizerConfig
from modeling.optim.sophia import SophiaConfig
from modeling.training import curvature, elastic
from modeling.training.config import TrainerConfig
from modeling.training.leaves import leaf_shardings
from modeling.training.mesh import Layout, mesh_axes
from modeling.training.precision import Policy
from modeling.training.rule import Metrics, Rule, mean_gradient
from modeling.training.state import Blueprint, TrainState, trainable


@dataclasses.dataclass(frozen=True)
class Step:
    """A compiled update: `(arrays, rows) -> (arrays, metrics)`; the arrays given are consumed."""

    run: Callable[[list[Any], Any], tuple[list[Any], Metrics]]
    compiled: jax.stages.Compiled | None
    """The program, if it is one."""
    batch_sharding: NamedSharding
    parameter_names: tuple[str, ...]
    """Of the items of `gradient_squares`."""


def compile_step(
    blueprint: Blueprint,
    optimizer: OptimizerConfig,
    trainer: TrainerConfig,
    layout: Layout,
    *,
    Batch: Axis,
    Pos: Axis,
    columns: Columns = TOKENS_ALONE,
) -> Step:
    """Compiles the update of states like `blueprint` by batches of `Batch` rows of `Pos`.

    Args:
        blueprint: what states are like.
        optimizer: the rule.
        trainer: precision, steps, microbatches.
        layout: the mesh and what is split over it.
        Batch: the rows of one update.
        Pos: the axis of a row.
        columns: what rows have besides tokens.
    """
    rule = Rule(blueprint, optimizer, trainer)
    with jax.set_mesh(layout.mesh):
        if trainer.reproducibility == "elastic":
            return _compile_elastic(blueprint, rule, trainer, layout, Batch, Pos)
        return _compile(blueprint, rule, trainer, layout, Batch, Pos, columns)


def _compile(
    blueprint: Blueprint,
    rule: Rule,
    trainer: TrainerConfig,
    layout: Layout,
    Batch: Axis,
    Pos: Axis,
    columns: Columns,
) -> Step:
    policy = Policy.parse(trainer.mp)
    replicated = NamedSharding(layout.mesh, PartitionSpec())
    batch_sharding = sharding_for_axis((Batch, Pos), layout.compute, layout.mesh)
    shardings = list(blueprint.shardings.values())

    def update(arrays: Sequence[Any], rows: Rows) -> tuple[list[Any], Metrics]:
        state = blueprint.unflatten(arrays)
        example = example_of(rows, Batch, Pos)
        key = jax.random.fold_in(state.key, state.step)
        with axis_mapping(layout.compute):
            total, weight, sums = summed(
                state.model, example, policy, layout, key,
                Batch=Batch, num_microbatches=trainer.num_microbatches,
            )  # fmt: skip
        means = [mean_gradient(g, weight) for g in jax.tree_util.tree_leaves(sums)]
        squares = _squared_norms(means)

        def estimate(config: SophiaConfig) -> Any:
            with axis_mapping(layout.compute):
                return _curvature(
                    config, state, example, policy, layout,
                    Batch=Batch, num_microbatches=trainer.num_microbatches,
                )  # fmt: skip

        return rule.apply(state, total, weight, sums, squares, estimate)

    compiled = (
        jax.jit(
            update,
            in_shardings=(shardings, batch_sharding),
            out_shardings=(shardings, replicated),
            donate_argnums=0,
        )
        .lower(blueprint.arrays, row_shapes(Batch, Pos, columns))
        .compile()
    )
    return Step(compiled, compiled, batch_sharding, blueprint.parameter_names)


def _compile_elastic(
    blueprint: Blueprint,
    rule: Rule,
    trainer: TrainerConfig,
    layout: Layout,
    Batch: Axis,
    Pos: Axis,
) -> Step:
    """Compiles several programs instead of one, lest the mesh decide what is fused with what."""
    elastic.check(layout, trainer, Batch.size)
    num_shards = trainer.elastic_shards
    rule.require_elementwise()
    policy = Policy.parse(trainer.mp)
    replicated = NamedSharding(layout.mesh, PartitionSpec())
    shardings = list(blueprint.shardings.values())
    params, rest = trainable(blueprint.template.model)
    tree = jax.tree_util.tree_structure(params)
    split = [sharding for _, sharding in leaf_shardings(params, layout.mesh, layout.parameters)]
    dtypes = [p.dtype for p in jax.tree_util.tree_leaves(params)]

    def gather(arrays: Sequence[Any]) -> list[Array]:
        params = trainable(blueprint.unflatten(arrays).model)[0]
        return jax.tree_util.tree_leaves(policy.cast_to_compute(params))

    def shard_sums(
        whole: list[Array], rows: Rows, key: Any, step: Array, shard: Array
    ) -> elastic.Sums:
        Here = Batch.resize(Batch.size // num_shards)
        here = _named(elastic.rows_of_shard(rows, shard, num_shards), Here, Pos)
        shard_key = jax.random.fold_in(jax.random.fold_in(key, step), shard)

        def sums(whole: list[Array]) -> tuple[Array, Array]:
            model = eqx.combine(jax.tree_util.tree_unflatten(tree, whole), cast_rest)
            return next_token_loss(model, _example(here, Pos), key=shard_key)

        cast_rest = policy.cast_to_compute(rest)
        (total, weight), gradient = jax.value_and_grad(sums, has_aux=True)(whole)
        # Sums of 16-bit gradients would stop growing long before the last shard.
        wide = [g.astype(jnp.promote_types(g.dtype, jnp.float32)) for g in gradient]
        return elastic.as_parts((total, weight, wide))

    def exchange(sums: elastic.Sums) -> Any:
        specs = [sharding.spec for sharding in split]
        total, weight, gradients, whole = elastic.exchanged(sums, specs, layout=layout)
        cast = [[g.astype(d) for g, d in zip(x, dtypes, strict=True)] for x in (gradients, whole)]
        return total, weight, *cast

    def norms(whole: list[Array], weight: Array) -> Array:
        return _squared_norms([mean_gradient(g, weight) for g in whole])

    def apply(
        arrays: Sequence[Any], total: Array, weight: Array, sums: list[Array], squares: Array
    ) -> tuple[list[Any], Metrics]:
        tree_of_sums = jax.tree_util.tree_unflatten(tree, sums)
        return rule.apply(blueprint.unflatten(arrays), total, weight, tree_of_sums, squares)

    whole_params = jax.jit(gather, in_shardings=(shardings,), out_shardings=replicated)
    next_state = jax.jit(
        apply,
        in_shardings=(shardings, replicated, replicated, split, replicated),
        out_shardings=(shardings, replicated),
        donate_argnums=0,
    )
    program = jax.jit(shard_sums)
    exchange_sums = jax.jit(exchange, donate_argnums=0)
    norms_of = jax.jit(norms, in_shardings=replicated, out_shardings=replicated)
    where_key, where_step = blueprint.index_of("key"), blueprint.index_of("step")

    def run(arrays: list[Any], rows: Rows) -> tuple[list[Any], Metrics]:
        sums = elastic.on_each_device(
            program, whole_params(arrays), rows, arrays[where_key], arrays[where_step],
            layout=layout, num_shards=num_shards,
        )  # fmt: skip
        total, weight, gradients, whole = exchange_sums(sums)
        return next_state(arrays, total, weight, gradients, norms_of(whole, weight))

    return Step(run, None, replicated, blueprint.parameter_names)


def summed(
    model: Any,
    example: LmExample,
    policy: Policy,
    layout: Layout,
    key: Any,
    *,
    Batch: Axis,
    num_microbatches: int,
    measure: curvature.Measure = curvature.loss_gradient,
) -> curvature.Sums:
    """Returns the sums of losses and of weights, and the gradient of the former.

    Args:
        model: in the dtypes that it is stored in.
        example: rows over `Batch`.
        policy: what to compute in.
        layout: how parameters are split.
        key: for what is drawn, such as dropout.
        Batch: the axis to cut.
        num_microbatches: into how many pieces.
        measure: what to sum up in the place of the gradient.
    """
    params, rest = trainable(model)

    def as_model(params: Any) -> Any:
        return policy.cast_to_compute(eqx.combine(params, rest))

    def sums_and_gradient(example: LmExample, key: Any) -> curvature.Sums:
        total, weight, gradient = measure(as_model, params, example, key)
        return total, weight, shard(gradient, layout.parameters)

    if num_microbatches == 1:
        return sums_and_gradient(example, key)

    def add(sums: Any, piece: Any) -> tuple[Any, None]:
        index, example = piece
        more = sums_and_gradient(example.named(), jax.random.fold_in(key, index))
        return jax.tree_util.tree_map(lambda s, m: s + m.astype(s.dtype), sums, more), None

    zero = jnp.zeros((), jnp.float32)
    # Sums of 16-bit gradients would stop growing long before the last microbatch.
    zeros = jax.tree_util.tree_map(
        lambda p: jnp.zeros_like(p, jnp.float32 if p.dtype.itemsize < 4 else p.dtype), params
    )
    start = (zero, zero, zeros)
    pieces = (jnp.arange(num_microbatches), _Pieces.cut(example, Batch, num_microbatches))
    total, weight, added = jax.lax.scan(add, start, pieces)[0]
    return total, weight, jax.tree_util.tree_map(lambda s, p: s.astype(p.dtype), added, params)


def _curvature(
    config: SophiaConfig,
    state: TrainState,
    example: LmExample,
    policy: Policy,
    layout: Layout,
    *,
    Batch: Axis,
    num_microbatches: int,
) -> Any:
    """Returns an estimate from part of the rows, spread evenly over the devices that have them."""
    num_rows = curvature.estimate_rows(config, Batch.size)
    ways = math.prod(layout.mesh.shape[axis] for axis in mesh_axes(layout.compute.get("batch")))
    pieces = curvature.estimate_microbatches(num_rows, Batch.size // num_microbatches, ways)
    part = _Pieces.cut(example, Batch, Batch.size // num_rows)
    first = dataclasses.replace(part, arrays=[array[0] for array in part.arrays]).named()
    # No step has this number, so that no other key is the same.
    key = jax.random.fold_in(jax.random.fold_in(state.key, 2**32 - 1), state.step)
    _, weight, sums = summed(
        state.model, first, policy, layout, key,
        Batch=Batch.resize(num_rows), num_microbatches=pieces,
        measure=curvature.measure_of(config),
    )  # fmt: skip
    return curvature.estimate_of(config, sums, weight)


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


def _named(rows: Rows, Batch: Axis, Pos: Axis) -> Any:
    """Returns the columns of rows as named arrays; those that are None stay so."""
    return jax.tree_util.tree_map(lambda column: NamedArray(column, (Batch, Pos)), rows)


def _example(rows: Any, Pos: Axis) -> LmExample:
    return LmExample.causal(rows.tokens, Pos, rows.segment_ids, rows.loss_mask)


def example_of(rows: Rows, Batch: Axis, Pos: Axis) -> LmExample:
    """Returns the example that raw rows are."""
    return _example(_named(rows, Batch, Pos), Pos)


def row_shapes(Batch: Axis, Pos: Axis, columns: Columns) -> Any:
    """Returns the shapes of a batch with these columns, to compile for."""
    ids: Any = jax.ShapeDtypeStruct((Batch.size, Pos.size), jnp.int32)
    mask: Any = jax.ShapeDtypeStruct((Batch.size, Pos.size), jnp.bool_)
    return Rows(ids, ids if columns.segment_ids else None, mask if columns.loss_mask else None)


def _is_named(node: Any) -> bool:
    return isinstance(node, NamedArray)


def _squared_norms(gradients: Sequence[Array]) -> Float32[Array, " leaves"]:
    return jnp.stack([jnp.sum(jnp.square(g.astype(jnp.float32))) for g in gradients])
