"""What is done with the mean gradient of a batch: clip it, update, average the weights, and tell.

    norm = sqrt(sum of squares of all gradients)
    g    = g min(1, max_grad_norm / norm)

Skipping an update leaves weights and optimizer state as they were, by selecting, so that the device
never waits for a decision of the host; the step counts all the same, and the data moves on.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from modeling.optim.config import (
    AbstractOptimizerConfig,
    AdamWConfig,
    LionConfig,
    SophiaConfig,
    SophiaGConfig,
    SophiaHConfig,
)
from modeling.training.averages import next_averages
from modeling.training.config import TrainerConfig
from modeling.training.state import Blueprint, TrainState, trainable

Estimate = Callable[[SophiaConfig], Any]
"""Returns an estimate of the diagonal of the curvature, in the tree of parameters."""
_ELEMENTWISE = (AdamWConfig, LionConfig, SophiaHConfig, SophiaGConfig)
"""Optimizers that treat each number by itself: no order of summation can change their bits."""


class Norms(NamedTuple):
    """Of the mean gradient."""

    squares: Float32[Array, " leaves"]
    """Of each parameter's, squared."""
    whole: Float32[Array, ""]


class Metrics(eqx.Module):
    """What one update tells; device arrays, so that nobody waits for them."""

    loss: Float32[Array, ""]
    """Mean over the batch, before the update."""
    weight: Float32[Array, ""]
    """How many predictions counted."""
    learning_rate: Float32[Array, ""]
    gradient_squares: Float32[Array, " leaves"]
    """Squared norm of the gradient of each parameter, before clipping."""
    figures: Mapping[str, Array] = eqx.field(default_factory=dict)
    """What else there is to tell, by name: `skipped_steps`, `clipped_share`."""


class Rule:
    """From a state and the sums of a batch to the next state."""

    def __init__(
        self, blueprint: Blueprint, config: AbstractOptimizerConfig, trainer: TrainerConfig
    ) -> None:
        """Takes states like `blueprint`."""
        from modeling.optim.build import build_optimizer  # Optax, which takes long to import

        self._blueprint = blueprint
        self._trainer = trainer
        self._max_norm = config.max_grad_norm
        self._optimizer = build_optimizer(config, trainer.num_train_steps)

    @property
    def is_elementwise(self) -> bool:
        """Whether the update takes no sum over numbers of a parameter or over updates."""
        return isinstance(self._optimizer.config, _ELEMENTWISE) and self._trainer.skip_step is None

    @property
    def curvature(self) -> SophiaConfig | None:
        """How curvature is to be estimated, by an optimizer that needs it."""
        return self._optimizer.curvature

    def with_curvature(self, state: TrainState, estimate: Any) -> list[Any]:
        """Returns the arrays of `state` with an estimate of the curvature taken in, if due."""
        opt_state = self._optimizer.with_curvature(state.opt_state, state.step, lambda: estimate)
        return self._blueprint.flatten(dataclasses.replace(state, opt_state=opt_state))

    def apply(
        self,
        state: TrainState,
        total: Array,
        weight: Array,
        sums: Any,
        norms: Norms,
        estimate: Estimate | None = None,
    ) -> tuple[list[Any], Metrics]:
        """Returns the arrays of the next state.

        Args:
            state: before the update.
            total: the sum of losses.
            weight: the sum of weights.
            sums: the gradient of `total`, in the tree of parameters.
            norms: of `sums / weight`.
            estimate: of the curvature's diagonal, computed if one is due; without it, what is due
                has been taken in already, by `with_curvature`.
        """
        norm = norms.whole
        factor = jnp.where(norm < self._max_norm, 1.0, self._max_norm / norm)
        gradients = jax.tree_util.tree_map(
            lambda g: mean_gradient(g, weight) * factor.astype(g.dtype), sums
        )
        params, rest = trainable(state.model)
        opt_state = state.opt_state
        curvature = self.curvature
        if curvature is not None and estimate is not None:
            opt_state = self._optimizer.with_curvature(
                opt_state, state.step, partial(estimate, curvature)
            )
        after = self._optimizer.apply(gradients, opt_state, params, state.step)
        figures = self._optimizer.figures(after[1])
        spikes = state.spikes
        if spikes is not None:
            assert self._trainer.skip_step is not None
            is_spike, spikes = spikes.judge(
                self._trainer.skip_step, state.step, total / weight, norm
            )
            before = params, state.opt_state
            after = jax.tree_util.tree_map(
                lambda old, new: jnp.where(is_spike, old, new), before, after
            )
            figures = figures | {"skipped_steps": spikes.skipped}
        params, opt_state = after
        averages = next_averages(self._trainer, state.averages, params, state.step + 1)
        model = eqx.combine(params, rest)
        next_state = TrainState(state.step + 1, model, opt_state, state.key, averages, spikes)
        rate = self._optimizer.learning_rate(state.step)
        metrics = Metrics(total / weight, weight, rate, norms.squares, figures)
        return self._blueprint.flatten(next_state), metrics


def norms_of(sums: Sequence[Array], weight: Array) -> Norms:
    """Returns the norms of `sums / weight`."""
    means = [mean_gradient(g, weight).astype(jnp.float32) for g in sums]
    squares = jnp.stack([jnp.sum(jnp.square(mean)) for mean in means])
    return Norms(squares, jnp.sqrt(jnp.sum(squares)))


def mean_gradient(gradient: Array, weight: Array) -> Array:
    """Returns the quotient, in the dtype of the gradient."""
    # In float32: as a 16-bit number, the weight of a large batch overflows or is rounded.
    return (gradient.astype(jnp.float32) / weight).astype(gradient.dtype)
