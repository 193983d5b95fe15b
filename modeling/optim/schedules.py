"""The learning rate of each update, relative to its peak.

For update n = 1, 2, ..., N of a run, with W of warmup and the floor r = `min_lr_ratio`; the first
update already moves, and the last one is made at the minimum:

    all             n / W                                                 n <= W
    constant        1                                                     n >= W, as below
    linear          r + (1 - r) (1 - p)                                   p = (n - W) / (N - W)
    cosine          r + (1 - r) (1 + cos(pi p)) / 2
    inverse_sqrt    max(r, 1 / sqrt(1 + (n - W) / T))                     T = `timescale`, or W
    wsd             1, and in the last D updates                          p = (n - N + D) / D
                    r + (1 - r) f(p), f = 1 - p | cosine | 1 - sqrt(p); or r^p
    cycles          in cycle c of updates n = 1 .. L, with the peak h = `peak_ratio`^c:
                    r + (h - r) n / W, from 0 in the first cycle          n <= W
                    r + (h - r) f(p)                                      p = (n - W) / (L - W)

Everything is computed in float32 from the number of the update, which is exact up to 2^24.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32

from modeling.optim import phases
from modeling.optim.config import (
    ConstantScheduleConfig,
    CosineScheduleConfig,
    CyclesScheduleConfig,
    InverseSqrtScheduleConfig,
    LinearScheduleConfig,
    ScheduleConfig,
    WsdScheduleConfig,
)

Schedule = Callable[[Any], Array]
"""From the number of updates already made."""

_SHAPES: dict[str, Callable[[Array], Array]] = {
    "linear": lambda p: 1.0 - p,
    "cosine": lambda p: 0.5 * (1.0 + jnp.cos(jnp.pi * p)),
    "sqrt": lambda p: 1.0 - jnp.sqrt(p),
}
"""From 1 to 0 as p goes from 0 to 1."""


def learning_rate(peak: float, schedule: ScheduleConfig, num_train_steps: int) -> Schedule:
    """Returns the learning rate as a function of the number of updates already made.

    Raises:
        ValueError: the phases of the schedule are longer than the run.
    """
    relative = _relative(schedule, num_train_steps)

    def at(updates_made: Any) -> Float32[Array, ""]:
        return peak * relative(jnp.asarray(updates_made, jnp.float32) + 1.0)

    return at


def _relative(schedule: ScheduleConfig, num_steps: int) -> Callable[[Array], Array]:
    if isinstance(schedule, CyclesScheduleConfig):
        return _cycles(schedule, num_steps)
    warmup = phases.warmup(schedule, num_steps)
    after = _after_warmup(schedule, warmup, num_steps)

    def at(update: Array) -> Array:
        rising = jnp.minimum(update / max(warmup, 1), 1.0)
        return jnp.where(update <= warmup, rising, after(update))

    return at


def _after_warmup(
    schedule: ScheduleConfig, warmup: int, num_steps: int
) -> Callable[[Array], Array]:
    match schedule:
        case ConstantScheduleConfig():
            return jnp.ones_like
        case LinearScheduleConfig() | CosineScheduleConfig():
            fall = _fall(schedule.type, schedule.min_lr_ratio)
            return lambda update: fall(_progress(update, warmup, num_steps))
        case InverseSqrtScheduleConfig():
            return _inverse_sqrt(schedule, warmup, num_steps)
        case WsdScheduleConfig():
            return _wsd(schedule, num_steps)
        case _:
            raise TypeError(f"optimizer.schedule: {type(schedule).__name__} is not a schedule.")


def _progress(update: Array, begin: int, end: int) -> Array:
    return jnp.clip((update - begin) / max(end - begin, 1), 0.0, 1.0)


def _fall(shape: str, floor: float) -> Callable[[Array], Array]:
    falling = _SHAPES[shape]
    return lambda progress: floor + (1.0 - floor) * falling(progress)


def _exponential(floor: float, progress: Array) -> Array:
    return jnp.exp(progress * math.log(floor))


def _inverse_sqrt(
    schedule: InverseSqrtScheduleConfig, warmup: int, num_steps: int
) -> Callable[[Array], Array]:
    timescale = phases.timescale(schedule, num_steps)

    def at(update: Array) -> Array:
        past = jnp.maximum(update - warmup, 0.0)
        return jnp.maximum(schedule.min_lr_ratio, 1.0 / jnp.sqrt(1.0 + past / timescale))

    return at


def _wsd(schedule: WsdScheduleConfig, num_steps: int) -> Callable[[Array], Array]:
    begin, floor = num_steps - phases.decay(schedule, num_steps), schedule.min_lr_ratio
    if schedule.shape == "exponential":
        fall = partial(_exponential, floor)
    else:
        fall = _fall(schedule.shape, floor)
    return lambda update: jnp.where(update <= begin, 1.0, fall(_progress(update, begin, num_steps)))


def _cycles(schedule: CyclesScheduleConfig, num_steps: int) -> Callable[[Array], Array]:
    ends, warmups = phases.cycles(schedule, num_steps)
    begins = [0, *ends[:-1]]
    floor, falling = schedule.min_lr_ratio, _SHAPES[schedule.shape]
    # Of each cycle: its first update less one, its length, its warmup, where it rises from and to.
    table = [
        jnp.asarray(column, jnp.float32)
        for column in (
            begins,
            np.diff([0, *ends]),
            warmups,
            [0.0] + [floor] * (len(ends) - 1),
            [max(schedule.peak_ratio**number, floor) for number in range(len(ends))],
        )
    ]

    def at(update: Array) -> Array:
        number = jnp.sum(update > jnp.asarray(ends[:-1], jnp.float32))
        begin, length, warmup, low, high = (column[number] for column in table)
        within = update - begin
        rising = low + (high - low) * jnp.minimum(within / jnp.maximum(warmup, 1.0), 1.0)
        progress = (within - warmup) / jnp.maximum(length - warmup, 1.0)
        fallen = floor + (high - floor) * falling(jnp.clip(progress, 0.0, 1.0))
        return jnp.where(within <= warmup, rising, fallen)

    return at
