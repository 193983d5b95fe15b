"""One update of an elastic run: several programs instead of one, see `elastic` for why.

weights --gather--> sums of each logical shard --add, exchange--> gradients --norms--> update

update of an optimizer that treats each number by itself: on the parts that devices hold
update of any other: gather the state, the same whole update on every device, cut it again
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from haliax import Axis
from modeling.data.rows import Columns, Rows
from modeling.optim.config import SophiaConfig
from modeling.training import curvature, elastic
from modeling.training.config import TrainerConfig
from modeling.training.elastic import (
    SHARD_NUMBER,
    Alone,
    Exchanged,
    Sums,
    as_parts,
    rows_of_shard,
)
from modeling.training.examples import example_of, row_shapes
from modeling.training.feasibility import elastic_estimate_rows, require_elastic
from modeling.training.leaves import leaf_shardings
from modeling.training.memory import StateMemory
from modeling.training.mesh import Layout
from modeling.training.precision import Policy
from modeling.training.program import Memory, memory_of, product_flops
from modeling.training.rule import Metrics, Norms, Rule, norms_of
from modeling.training.state import Blueprint, trainable

KeyOf = Callable[[Any, Array], Any]
"""From the state's key and step to what is drawn from."""
Updated = tuple[list[Any], Metrics]


class ElasticUpdate:
    """From a state and a batch to the next state and what there is to tell; consumes the state."""

    def __init__(
        self,
        blueprint: Blueprint,
        rule: Rule,
        trainer: TrainerConfig,
        layout: Layout,
        *,
        Batch: Axis,
        Pos: Axis,
        columns: Columns,
    ) -> None:
        """Compiles the update of states like `blueprint` by batches of `Batch` rows of `Pos`."""
        require_elastic(trainer)
        config, num_shards = rule.curvature, trainer.elastic_shards
        num_rows = 0 if config is None else elastic_estimate_rows(config, Batch.size, num_shards)
        self._blueprint, self._rule, self._layout = blueprint, rule, layout
        self._Batch, self._Pos, self._num_shards = Batch, Pos, num_shards
        self._policy = Policy.parse(trainer.mp)
        params, self._rest = trainable(blueprint.template.model)
        self._params, self._tree = jax.tree_util.tree_flatten(params)
        split = [s for _, s in leaf_shardings(params, layout.mesh, layout.parameters)]
        self._specs = [sharding.spec for sharding in split]
        self._where_key, self._where_step = map(blueprint.index_of, ("key", "step"))
        state, parts = blueprint.arrays, list(blueprint.shardings.values())
        self.batch_sharding = whole = NamedSharding(layout.mesh, PartitionSpec())
        weights = jax.eval_shape(self._weights_of, state)
        key, step = state[self._where_key], state[self._where_step]
        self._shard_operands = weights, row_shapes(Batch, Pos, columns), key, step, SHARD_NUMBER

        self._weights = jax.jit(self._weights_of, in_shardings=(parts,), out_shardings=whole)
        self._losses = self._alone_of(curvature.loss_gradient, jax.random.fold_in, Batch.size)
        self._exchange = jax.jit(self._exchanged, donate_argnums=0)
        scalar = jax.ShapeDtypeStruct((), jnp.float32)
        norms = jax.eval_shape(norms_of, self._params, scalar)
        given = state, scalar, scalar, self._params, norms
        self._may_skip, self._next_whole = trainer.skip_step is not None, None
        self._norms = Alone(norms_of, self._params, scalar, layout=layout)
        if rule.is_elementwise:
            self._next = jax.jit(
                self._applied,
                in_shardings=(parts, whole, whole, split, whole),
                out_shardings=(parts, whole),
                donate_argnums=0,
            )
        else:
            self._next_whole = Alone(self._applied, *given, layout=layout)
            self._gather = jax.jit(_same, in_shardings=(parts,), out_shardings=whole)
            self._cut = jax.jit(_same, in_shardings=(whole,), out_shardings=parts)
        if config is not None:
            measure = curvature.measure_of(config)
            self._estimates = self._alone_of(measure, curvature.estimate_key, num_rows)
            if self._may_skip:
                renewing = *given, scalar, self._params
                self._next_renewed = Alone(self._applied, *renewing, layout=layout)
            else:
                self._renew = jax.jit(
                    partial(self._renewed, config),
                    in_shardings=(parts, whole, split),
                    out_shardings=parts,
                    donate_argnums=0,
                )
            self._after, self._updates_made = None, 0

    def __call__(self, arrays: list[Any], rows: Rows) -> Updated:
        """Returns the arrays of the next state, and metrics."""
        config, apply, estimate = self._rule.curvature, self._next_whole, ()
        if config is not None and config.is_due(self._number(arrays[self._where_step])):
            _, weight, gradients, whole = self._summed(self._estimates, arrays, rows)
            if self._may_skip:
                # An update that is left out leaves the curvature as it was, too.
                apply, estimate = self._next_renewed, (weight, whole)
            else:
                arrays = self._renew(arrays, weight, gradients)
        total, weight, gradients, whole = self._summed(self._losses, arrays, rows)
        norms = self._norms(whole, weight)
        if self._rule.is_elementwise:
            arrays, metrics = self._next(arrays, total, weight, gradients, norms)
        else:
            gathered = self._gather(arrays)
            for array in arrays:
                array.delete()
            assert apply is not None
            new, metrics = apply(gathered, total, weight, whole, norms, *estimate)
            arrays = self._cut(new)
        if config is not None:
            self._after, self._updates_made = arrays[self._where_step], self._updates_made + 1
        return arrays, metrics

    @property
    def product_flops(self) -> int | None:
        """Of the products of an update, one with an estimate if any has, on all devices."""
        shards, everywhere = self._programs
        found = []
        for times, programs in ((self._num_shards, shards), (self._layout.mesh.size, everywhere)):
            for text in (program.compiled.as_text() for program in programs):
                if not text:
                    return None
                found.append(times * product_flops(text))
        return sum(found)

    @property
    def memory(self) -> Memory | None:
        """What a device needs at most, of what is made one after another, if XLA tells.

        That is a logical shard beside the sums of those before it; or the update, where it takes
        the whole state.
        """
        shards, everywhere = ([memory_of(p.compiled) for p in some] for some in self._programs)
        if None in (*shards, *everywhere):
            return None
        state = StateMemory.of(self._blueprint).total
        partial_sums = int(math.log2(self._num_shards // self._layout.mesh.size)) + 1
        needs = [
            state + m.arguments + m.results * partial_sums + m.temporaries for m in shards if m
        ]
        needs += [m.total for m in everywhere if m]
        return Memory(arguments=state, results=0, temporaries=max(needs) - state)

    @property
    def _programs(self) -> tuple[list[Alone], list[Alone]]:
        """Those that run once for each logical shard, and those with products on each device."""
        estimates = self._rule.curvature is not None
        shards = [self._losses, self._estimates] if estimates else [self._losses]
        update = self._next_renewed if estimates and self._may_skip else self._next_whole
        return shards, [] if update is None else [update]

    def _number(self, step: Array) -> int:
        """Returns how many updates were made; asking the device each time would wait for it."""
        if step is not self._after:
            self._updates_made = int(step)
        return self._updates_made

    def _alone_of(self, measure: curvature.Measure, key_of: KeyOf, num_rows: int) -> Alone:
        """Compiles the sums of a logical shard over its share of `num_rows` rows of the batch."""
        Here, every = self._Batch.resize(num_rows // self._num_shards), self._Batch.size // num_rows

        def sums_of_shard(
            weights: list[Array], rows: Rows, key: Any, step: Array, shard: Array
        ) -> Sums:
            mine = rows_of_shard(rows, shard, self._num_shards)
            mine = jax.tree_util.tree_map(lambda column: column[::every], mine)
            example = example_of(mine, Here, self._Pos)
            own_key = jax.random.fold_in(key_of(key, step), shard)
            total, weight, sums = measure(self._as_model, weights, example, own_key)
            # Sums of 16-bit gradients would stop growing long before the last shard.
            wide = [g.astype(jnp.promote_types(g.dtype, jnp.float32)) for g in sums]
            return as_parts((total, weight, wide))

        return Alone(sums_of_shard, *self._shard_operands, layout=self._layout)

    def _summed(self, program: Alone, arrays: list[Any], rows: Rows) -> Exchanged:
        """Returns the sums over the batch, gradients once as they are split and once whole."""
        sums = program.summed_over_shards(
            self._weights(arrays), rows, arrays[self._where_key], arrays[self._where_step],
            num_shards=self._num_shards,
        )  # fmt: skip
        total, weight, parts, whole = self._exchange(sums)
        return total, weight, parts, whole or parts

    def _weights_of(self, arrays: Sequence[Any]) -> list[Array]:
        params = trainable(self._blueprint.unflatten(arrays).model)[0]
        return jax.tree_util.tree_leaves(self._policy.cast_to_compute(params))

    def _as_model(self, weights: list[Array]) -> Any:
        params = jax.tree_util.tree_unflatten(self._tree, weights)
        return eqx.combine(params, self._policy.cast_to_compute(self._rest))

    def _exchanged(self, sums: Sums) -> Exchanged:
        total, weight, parts, whole = elastic.exchanged(sums, self._specs, layout=self._layout)
        return total, weight, self._narrowed(parts), self._narrowed(whole) if whole else []

    def _narrowed(self, sums: list[Array]) -> list[Array]:
        return [g.astype(p.dtype) for g, p in zip(sums, self._params, strict=True)]

    def _applied(
        self,
        arrays: Sequence[Any],
        total: Array,
        weight: Array,
        sums: list[Array],
        norms: Norms,
        *estimate_sums: Any,
    ) -> Updated:
        """The update; with an estimate of curvature, if its weight and sums are given."""
        in_tree = jax.tree_util.tree_unflatten(self._tree, sums)
        estimate = None
        if estimate_sums:
            of_weight, of_sums = estimate_sums
            estimated = jax.tree_util.tree_unflatten(self._tree, of_sums)
            estimate = partial(curvature.estimate_of, sums=estimated, weight=of_weight)
        state = self._blueprint.unflatten(arrays)
        return self._rule.apply(state, total, weight, in_tree, norms, estimate)

    def _renewed(
        self, config: SophiaConfig, arrays: Sequence[Any], weight: Array, sums: list[Array]
    ) -> list[Any]:
        in_tree = jax.tree_util.tree_unflatten(self._tree, sums)
        estimate = curvature.estimate_of(config, in_tree, weight)
        return self._rule.with_curvature(self._blueprint.unflatten(arrays), estimate)


def _same(arrays: list[Any]) -> list[Any]:
    return arrays
