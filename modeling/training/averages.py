"""Averages of the weights over a run, kept in the state in float32 beside the weights.

After update n the average moves towards the weights w by a part of the way:

    average += a(n) (w - average)
    ema             a(n) = (1 - decay) / (1 - decay^n)
    tail_average    a(n) = 1 / (n - start) after `start` updates, 1 before

so that the first average is the first weights, and no trace of the initial ones is left: this is
the exponential average with its bias corrected, and the arithmetic mean. An update that is skipped
counts with the weights as they stayed.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from modeling.optim.phases import duration_steps
from modeling.training.config import TrainerConfig

Averages = dict[str, Any]
"""Trees of parameters by the field that asks for them."""


def initial_averages(trainer: TrainerConfig, params: Any) -> Averages:
    """Returns the averages before the first update."""
    return {name: _float32(params) for name in _parts(trainer)}


def next_averages(
    trainer: TrainerConfig, averages: Averages, params: Any, updates: Array
) -> Averages:
    """Returns the averages after `updates` updates, the last of which has led to `params`."""
    parts = _parts(trainer)
    return {
        name: _moved(average, _float32(params), parts[name](updates.astype(jnp.float32)))
        for name, average in averages.items()
    }


def _parts(trainer: TrainerConfig) -> Mapping[str, Any]:
    """Returns a(n) of each average that the run keeps."""
    parts: dict[str, Any] = {}
    if trainer.ema is not None:
        decay = trainer.ema.decay
        parts["ema"] = lambda n: (1.0 - decay) / -jnp.expm1(n * math.log(decay))
    if trainer.tail_average is not None:
        start = duration_steps(
            trainer.tail_average.start, trainer.num_train_steps, "trainer.tail_average.start"
        )
        parts["tail_average"] = lambda n: 1.0 / jnp.maximum(n - start, 1.0)
    return parts


def _moved(average: Any, params: Any, part: Float32[Array, ""]) -> Any:
    return jax.tree.map(lambda a, p: a + part * (p - a), average, params)


def _float32(params: Any) -> Any:
    return jax.tree.map(lambda p: p.astype(jnp.float32), params)
