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
from jaxtyping import Array

from haliax import Axis, NamedArray
from haliax.partitioning import axis_mapping, shard, sharding_for_axis
from modeling.data.rows import TOKENS_ALONE, Columns, Rows
from modeling.models.lm import LmExample
from modeling.optim.config import OptimizerConfig, SophiaConfig
from modeling.training import curvature
from modeling.training.config import TrainerConfig
from modeling.training.elastic_update import ElasticUpdate
from modeling.training.examples import example_of, row_shapes
from modeling.training.feasibility import estimate_microbatches, estimate_rows, mesh_axes
from modeling.training.mesh import Layout
from modeling.training.precision import Policy
from modeling.training.program import Memory, memory_of, product_flops
from modeling.training.rule import Metrics, Rule, norms_of
from modeling.training.state import Blueprint, TrainState, trainable


@dataclasses.dataclass(frozen=True)
class Step:
    """A compiled update: `(arrays, rows) -> (arrays, metrics)`; the arrays given are consumed."""

    run: Callable[[list[Any], Any], tuple[list[Any], Metrics]]
    compiled: jax.stages.Compiled | None
    """The program, if it is one."""
    memory: Memory | None
    """Of one device, if XLA tells."""
    product_flops: int | None
    """Of the matrix products of one update on all devices together, if XLA tells."""
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
    if trainer.reproducibility == "elastic":
        update = ElasticUpdate(
            blueprint, rule, trainer, layout, Batch=Batch, Pos=Pos, columns=columns
        )
        return Step(
            update, None, update.memory, update.product_flops,
            update.batch_sharding, blueprint.parameter_names,
        )  # fmt: skip
    with jax.set_mesh(layout.mesh):
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
        norms = norms_of(jax.tree_util.tree_leaves(sums), weight)

        def estimate(config: SophiaConfig) -> Any:
            with axis_mapping(layout.compute):
                return _curvature(
                    config, state, example, policy, layout,
                    Batch=Batch, num_microbatches=trainer.num_microbatches,
                )  # fmt: skip

        return rule.apply(state, total, weight, sums, norms, estimate)

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
    text = compiled.as_text()
    return Step(
        compiled, compiled, memory_of(compiled),
        product_flops(text) * layout.mesh.size if text else None,
        batch_sharding, blueprint.parameter_names,
    )  # fmt: skip


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
    num_rows = estimate_rows(config, Batch.size)
    ways = math.prod(layout.mesh.shape[axis] for axis in mesh_axes(layout.compute.get("batch")))
    pieces = estimate_microbatches(num_rows, Batch.size // num_microbatches, ways)
    part = _Pieces.cut(example, Batch, Batch.size // num_rows)
    first = dataclasses.replace(part, arrays=[array[0] for array in part.arrays]).named()
    key = curvature.estimate_key(state.key, state.step)
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


def _is_named(node: Any) -> bool:
    return isinstance(node, NamedArray)
