"""Sophia (Liu et al. 2023, arXiv 2305.14342, algorithm 3), without how curvature is estimated.

For update t = 1, 2, ..., with the gradient g and, at t = 1, k + 1, 2 k + 1, ..., an estimate e of
the diagonal of the Hessian:

    m = b1 m + (1 - b1) g
    h = b2 h + (1 - b2) e                                                 at those t
    w = w - lr (clip(m / max(gamma h, eps), -1, 1) + weight_decay w)

Optax's moves with the curvature of the estimate before, which is zero in the first updates, and
corrects the bias of m, which the paper does not; and it makes its estimate from one function of the
parameters, where ours sums over microbatches on a mesh. The estimates are made by
`modeling.training.curvature`; their randomness comes from the state's key and step, so that a
resumed run draws the same.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float32

from modeling.optim.config import SophiaConfig


class SophiaState(NamedTuple):
    """Moving averages of gradients and of curvature."""

    mu: Any
    hessian: Any
    clipped_share: Float32[Array, ""]
    """Of all coordinates in the last update: those that moved by the whole learning rate."""


def scale_by_sophia(config: SophiaConfig) -> optax.GradientTransformation:
    """Returns the transformation from gradients to updates between -1 and 1."""

    def init(params: Any) -> Any:
        zeros = jax.tree.map(jnp.zeros_like, params)
        return SophiaState(zeros, jax.tree.map(jnp.zeros_like, params), jnp.zeros((), jnp.float32))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        mu = jax.tree.map(
            lambda m, g: config.beta1 * m + (1.0 - config.beta1) * g, state.mu, updates
        )
        ratios = jax.tree.map(
            lambda m, h: m / jnp.maximum(config.gamma * h, config.epsilon), mu, state.hessian
        )
        steps = jax.tree.map(lambda r: jnp.clip(r, -1.0, 1.0), ratios)
        return steps, SophiaState(mu, state.hessian, _clipped_share(ratios))

    return optax.GradientTransformation(init, update)


def renewed(
    state: SophiaState, config: SophiaConfig, updates_made: Array, estimate: Callable[[], Any]
) -> SophiaState:
    """Returns the state before an update, its curvature moved by an estimate if one is due.

    `estimate` is computed only then.
    """

    def moved() -> Any:
        return jax.tree.map(
            lambda h, e: config.beta2 * h + (1.0 - config.beta2) * e.astype(h.dtype),
            state.hessian,
            estimate(),
        )

    hessian = jax.lax.cond(config.is_due(updates_made), moved, lambda: state.hessian)
    return state._replace(hessian=hessian)


def _clipped_share(ratios: Any) -> Float32[Array, ""]:
    leaves = jax.tree.leaves(ratios)
    total = sum(leaf.size for leaf in leaves)
    counts = [_count(jnp.abs(leaf) >= 1.0) for leaf in leaves]
    return jnp.minimum(jnp.sum(jnp.concatenate(counts)) / total, 1.0)


def _count(is_clipped: Array) -> Float32[Array, " parts"]:
    """Counts by integers, which no order of summation rounds; by layer what would overflow."""
    is_large = is_clipped.size >= 2**32 and is_clipped.ndim > 1
    axes = tuple(range(1 if is_large else 0, is_clipped.ndim))
    counts = jnp.sum(is_clipped, axis=axes, dtype=jnp.uint32)
    return jnp.atleast_1d(counts).astype(jnp.float32)
