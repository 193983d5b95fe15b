"""Gradients of a batch, and estimates of the diagonal of its curvature, as sums over its rows.

With the loss l_t of prediction t of a batch of W predictions that count:

    Gauss-Newton-Bartlett (arXiv 2305.14342, algorithm 2): labels y_t drawn from the model itself,
        g = sum over t of the gradient of l_t(y_t)        estimate = W (g / W)^2 = g^2 / W
    Hutchinson (algorithm 1): a probe u of independent standard normals,
        estimate = u * (H u) / W                          H of the sum of the l_t, true labels

Their expectations are the diagonals of the mean Gauss-Newton matrix and of the mean Hessian: labels
that are drawn independently make the cross terms of the square vanish. Dropout is off. As each is
made of a sum over rows, it can be taken a microbatch at a time; Hutchinson's probe is then another
one for each.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from modeling.models.lm import LmExample, next_token_loss, own_label_loss
from modeling.optim.config import SophiaConfig, SophiaHConfig

AsModel = Callable[[Any], Any]
"""From parameters to a model in the dtype of compute."""
Sums = tuple[Array, Array, Any]
"""Of losses, of weights, and of what is asked for, in the tree of parameters."""
Measure = Callable[[AsModel, Any, LmExample, Any], Sums]
"""Takes a model's parameters, rows and a key."""


def loss_gradient(as_model: AsModel, params: Any, example: LmExample, key: Any) -> Sums:
    """Returns the gradient of the summed loss, with dropout."""
    return _gradient(next_token_loss, as_model, params, example, key)


def own_label_gradient(as_model: AsModel, params: Any, example: LmExample, key: Any) -> Sums:
    """Returns the gradient of the summed loss towards labels that the model draws itself."""
    return _gradient(own_label_loss, as_model, params, example, key)


def _gradient(
    loss: Callable[..., tuple[Array, Array]],
    as_model: AsModel,
    params: Any,
    example: LmExample,
    key: Any,
) -> Sums:
    def sums(params: Any) -> tuple[Array, Array]:
        return loss(as_model(params), example, key=key)

    (total, weight), gradient = jax.value_and_grad(sums, has_aux=True)(params)
    return total, weight, gradient


def probed_hessian(as_model: AsModel, params: Any, example: LmExample, key: Any) -> Sums:
    """Returns `u * (H u)` for a random probe u, H being the Hessian of the summed loss."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    drawn = [jax.random.normal(k, p.shape, p.dtype) for k, p in zip(keys, leaves, strict=True)]
    probe = jax.tree.unflatten(tree, drawn)

    def slope(params: Any) -> tuple[Array, tuple[Array, Array]]:
        """The derivative along the probe: a reverse pass, as the loss has its own gradient."""
        total, weight, gradient = loss_gradient(as_model, params, example, None)
        parts = jax.tree.map(lambda g, u: jnp.sum(g * u, dtype=jnp.float32), gradient, probe)
        return jnp.sum(jnp.stack(jax.tree.leaves(parts))), (total, weight)

    products, (total, weight) = jax.grad(slope, has_aux=True)(params)
    return total, weight, jax.tree.map(jnp.multiply, probe, products)


def estimate_key(key: Any, step: Array) -> Any:
    """Returns what an estimate is drawn from, from the key of the run."""
    # No step has this number, so that no other key is the same.
    return jax.random.fold_in(jax.random.fold_in(key, 2**32 - 1), step)


def measure_of(config: SophiaConfig) -> Measure:
    """Returns what an estimate is the sum of."""
    return probed_hessian if isinstance(config, SophiaHConfig) else own_label_gradient


def estimate_of(config: SophiaConfig, sums: Any, weight: Array) -> Any:
    """Returns the estimate, in the tree of parameters, from its sums over all rows."""

    def finished(x: Array) -> Array:
        wide = x.astype(jnp.float32)
        return (wide if isinstance(config, SophiaHConfig) else wide * wide) / weight

    return jax.tree.map(finished, sums)
