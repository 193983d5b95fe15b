"""Optimizers and learning-rate schedules from their configurations.

AdamW (Loshchilov & Hutter 2019, algorithm 2), for update n = 1, 2, ..., with the gradient g clipped
to a global norm of at most `max_grad_norm`:

    m = b1 m + (1 - b1) g           v = b2 v + (1 - b2) g^2
    w = w - lr(n) (m / (1 - b1^n) / (sqrt(v / (1 - b2^n)) + eps) + weight_decay w)

Cosine schedule over N updates with W of warmup; the first update already moves, and the last one is
made at the minimum:

    lr(n) = peak n / W                                                    n <= W
    lr(n) = peak (r + (1 - r) (1 + cos(pi (n - W) / (N - W))) / 2)        n >= W, r = min_lr_ratio

Weight decay spares biases, normalizations and embeddings, told by their path in the model, such as
`transformer.blocks.stacked.ln_1.weight`; `decayed_parameters` lists what is left.
"""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from haliax.core import NamedArray
from modeling.optim.config import CosineScheduleConfig, OptimizerConfig

Schedule = Callable[[Any], Array]

_SPARED = re.compile(r"bias|(ln|norm|layer_?norm)(_.*)?|.*_(ln|norm)|.*embed(ding)?s?(_.*)?|w[tp]e")
"""A parameter is spared if any part of its path matches whole."""


def build_optimizer(
    config: OptimizerConfig, num_train_steps: int, *, clip: bool = True
) -> optax.GradientTransformationExtraArgs:
    """Returns the transformation from gradients to updates.

    Args:
        config: of AdamW and its schedule.
        num_train_steps: the length of the run.
        clip: False for a caller that clips by itself, having the norms at hand already.
    """
    for field in ("beta1", "beta2"):
        if getattr(config, field) == 1.0:
            raise ValueError(
                f"optimizer.{field}: 1.0 never takes in a gradient; give a number below 1."
            )
    return optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm) if clip else optax.identity(),
        optax.scale_by_adam(config.beta1, config.beta2, config.epsilon),
        optax.add_decayed_weights(config.weight_decay, mask=decay_mask),
        optax.scale_by_learning_rate(learning_rate(config, num_train_steps)),
    )


def learning_rate(config: OptimizerConfig, num_train_steps: int) -> Schedule:
    """Returns the learning rate as a function of the number of updates already made."""
    schedule = config.schedule
    warmup_steps = _warmup_steps(schedule, num_train_steps)
    peak, floor = config.learning_rate, schedule.min_lr_ratio
    decay_steps = max(num_train_steps - warmup_steps, 1)

    def at(updates_made: Any) -> Array:
        update = jnp.asarray(updates_made, jnp.float32) + 1.0
        progress = jnp.clip((update - warmup_steps) / decay_steps, 0.0, 1.0)
        cosine = floor + (1.0 - floor) * 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
        warmup = jnp.minimum(update / max(warmup_steps, 1), 1.0)
        return peak * jnp.where(update <= warmup_steps, warmup, cosine)

    return at


def decay_mask(params: Any) -> Any:
    """Returns the tree of `params` with a boolean for each parameter: whether weight decay acts."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: _decays(path), params, is_leaf=_is_parameter
    )


def decayed_parameters(params: Any) -> list[str]:
    """Returns the sorted paths of the parameters that weight decay acts on."""
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=_is_parameter)
    return sorted(
        jax.tree_util.keystr(p, simple=True, separator=".") for p, _ in leaves if _decays(p)
    )


def _decays(path: tuple[Any, ...]) -> bool:
    parts = jax.tree_util.keystr(path, simple=True, separator=".").split(".")
    return not any(_SPARED.fullmatch(part) for part in parts)


def _is_parameter(node: Any) -> bool:
    return isinstance(node, NamedArray)


def _warmup_steps(schedule: CosineScheduleConfig, num_train_steps: int) -> int:
    warmup = schedule.warmup
    steps = warmup if isinstance(warmup, int) else round(warmup * num_train_steps)
    if steps > num_train_steps:
        raise ValueError(
            f"optimizer.schedule.warmup: {steps} steps of warmup, but trainer.num_train_steps is "
            f"{num_train_steps}; shorten the warmup, or write it as a share of the run, e.g. 0.01."
        )
    return steps
