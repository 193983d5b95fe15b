"""Everything that training changes, as one tree: steps, weights, optimizer, key, averages.

A step's randomness comes from `fold_in(key, step)`, so the key itself never changes and a resumed
run needs no history of keys.

Between steps the state is a flat list of arrays: a `Blueprint` knows the tree they belong to and
how each one is split over the mesh. Taking a tree of modules apart and putting it together twice a
step would cost more Python than the step's whole dispatch.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, Int32, UInt32

from modeling.training.averages import Averages, initial_averages
from modeling.training.config import TrainerConfig
from modeling.training.leaves import leaf_shardings, named_leaves
from modeling.training.mesh import Layout
from modeling.training.precision import Policy
from modeling.training.processes import placed
from modeling.training.spikes import SpikeHistory

_QUICK = {"xla_backend_optimization_level": 1}
"""For a program that runs once: LLVM's third level spends seconds on each parameter's random bits,
2.5 times as much as its first, whose code runs as fast and gives the same bits."""
BuildModel = Callable[[Any], Any]
"""Takes a key and returns a model with random weights."""
InitOptimizer = Callable[[Any], Any]
"""Takes parameters and returns the state of their optimizer."""


class TrainState(eqx.Module):
    """The state after `step` updates."""

    step: Int32[Array, ""]
    model: Any
    opt_state: Any
    key: UInt32[Array, "2"]
    averages: Averages
    """Of the weights, by the field of the trainer that asks for them."""
    spikes: SpikeHistory | None
    """If updates may be skipped."""


def initial_state(
    build_model: BuildModel, init_optimizer: InitOptimizer, trainer: TrainerConfig, key: Any
) -> TrainState:
    """Returns the state before the first update."""
    model_key, training_key = jax.random.split(key)
    model = Policy.parse(trainer.mp).cast_to_param(build_model(model_key))
    params, _ = trainable(model)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        model=model,
        opt_state=init_optimizer(params),
        key=training_key,
        averages=initial_averages(trainer, params),
        spikes=None if trainer.skip_step is None else SpikeHistory.empty(trainer.skip_step),
    )


def trainable(model: Any) -> tuple[Any, Any]:
    """Returns the parameters, and the rest of the model for `eqx.combine`."""
    return eqx.partition(model, _is_parameter)


@dataclasses.dataclass(frozen=True)
class Blueprint:
    """The tree of a state, and where each of its arrays lies."""

    template: TrainState
    """`ShapeDtypeStruct`s for arrays; everything else as it is."""
    shardings: Mapping[str, NamedSharding]
    """By path, in the order of the flat list."""

    @staticmethod
    def of(make: Callable[[Any], TrainState], layout: Layout) -> "Blueprint":
        """Returns the blueprint of what `make` gives for a key, computing nothing."""
        template = eqx.filter_eval_shape(make, jax.random.PRNGKey(0))
        return Blueprint(template, dict(leaf_shardings(template, layout.mesh, layout.parameters)))

    def initialize(
        self, make: Callable[[Any], TrainState], key: Any, *, elastic: bool = False
    ) -> list[Any]:
        """Returns the arrays of `make(key)`, each made where it belongs.

        If `elastic`, they are made on one device and then spread: one program for all layouts.
        """
        shardings = list(self.shardings.values())
        key = np.asarray(key)  # Every process has it, and no device's alone.
        program = partial(
            jax.jit,
            lambda key: self.flatten(make(key)),
            compiler_options=_QUICK if jax.default_backend() == "cpu" else None,
        )
        if elastic:
            arrays = jax.device_get(program()(key))
            return [placed(a, s) for a, s in zip(arrays, shardings, strict=True)]
        return program(out_shardings=shardings)(key)

    @property
    def arrays(self) -> list[jax.ShapeDtypeStruct]:
        """The shape of each array of the flat list."""
        return self.flatten(self.template)

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """The paths of what the optimizer adjusts, within the model."""
        params, _ = trainable(self.template.model)
        return tuple(path for path, _, _ in named_leaves(params))

    def index_of(self, path: str) -> int:
        """Returns where in the flat list the array of this path is."""
        return list(self.shardings).index(path)

    def flatten(self, state: TrainState) -> list[Any]:
        """Returns the arrays of `state`."""
        return jax.tree_util.tree_leaves(eqx.filter(state, _is_array))

    def unflatten(self, arrays: Sequence[Any]) -> TrainState:
        """Returns the state whose arrays these are."""
        structs, rest = eqx.partition(self.template, _is_array)
        tree = jax.tree_util.tree_structure(structs)
        return eqx.combine(jax.tree_util.tree_unflatten(tree, list(arrays)), rest)


def _is_array(leaf: Any) -> bool:
    return eqx.is_array(leaf) or isinstance(leaf, jax.ShapeDtypeStruct)


def _is_parameter(leaf: Any) -> bool:
    return _is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.inexact)
