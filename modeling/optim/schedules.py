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
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32

from modeling.optim.config import (
    ConstantScheduleConfig,
    CosineScheduleConfig,
    CyclesScheduleConfig,
    Duration,
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


def duration_steps(duration: Duration, num_train_steps: int, field: str) -> int:
    """Returns how many updates `duration` is, refusing more than there are."""
    is_steps = isinstance(duration, int)
    steps = duration if is_steps else round(duration * num_train_steps)
    if steps > num_train_steps:
        raise ValueError(
            f"{field}: {steps} steps, but trainer.num_train_steps is {num_train_steps}; write "
            f"fewer, or a share of the run with a decimal point, e.g. 0.01."
        )
    return steps


def _relative(schedule: ScheduleConfig, num_steps: int) -> Callable[[Array], Array]:
    if isinstance(schedule, CyclesScheduleConfig):
        return _cycles(schedule, num_steps)
    warmup = duration_steps(schedule.warmup, num_steps, "optimizer.schedule.warmup")
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
            return _wsd(schedule, warmup, num_steps)
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
    timescale = warmup
    if schedule.timescale is not None:
        field = "optimizer.schedule.timescale"
        timescale = duration_steps(schedule.timescale, num_steps, field)
    if timescale == 0:
        raise ValueError(
            "optimizer.schedule.timescale: the rate falls with the square root of the updates over "
            "a timescale, which is the warmup when absent; both are 0 steps here. Give either."
        )

    def at(update: Array) -> Array:
        past = jnp.maximum(update - warmup, 0.0)
        return jnp.maximum(schedule.min_lr_ratio, 1.0 / jnp.sqrt(1.0 + past / timescale))

    return at


def _wsd(schedule: WsdScheduleConfig, warmup: int, num_steps: int) -> Callable[[Array], Array]:
    decay = duration_steps(schedule.decay, num_steps, "optimizer.schedule.decay")
    if warmup + decay > num_steps:
        raise ValueError(
            f"optimizer.schedule: {warmup} steps of warmup and {decay} of decay are more than "
            f"trainer.num_train_steps, {num_steps}; shorten one."
        )
    floor = schedule.min_lr_ratio
    if schedule.shape != "exponential":
        fall = _fall(schedule.shape, floor)
    elif floor > 0.0:
        fall = partial(_exponential, floor)
    else:
        raise ValueError(
            "optimizer.schedule.min_lr_ratio: an exponential decay never gets to 0.0; give a "
            "number above it, such as 0.01."
        )
    begin = num_steps - decay
    return lambda update: jnp.where(update <= begin, 1.0, fall(_progress(update, begin, num_steps)))


def _cycles(schedule: CyclesScheduleConfig, num_steps: int) -> Callable[[Array], Array]:
    ends = _cycle_ends(schedule.cycles, num_steps)
    begins = [0, *ends[:-1]]
    warmups = [
        duration_steps(duration, num_steps, f"optimizer.schedule.{field}")
        for duration, field in [
            (schedule.warmup, "warmup"),
            *[(schedule.rewarmup, "rewarmup")] * (len(ends) - 1),
        ]
    ]
    for number, (begin, end, warmup) in enumerate(zip(begins, ends, warmups, strict=True), 1):
        if end - begin < max(warmup, 1):
            raise ValueError(
                f"optimizer.schedule.cycles: cycle {number} has {end - begin} steps, of which "
                f"{warmup} are warmup; make it longer or its warmup shorter."
            )
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


def _cycle_ends(cycles: int | Sequence[Duration], num_steps: int) -> list[int]:
    """Returns the last update of each cycle; shares are rounded where cycles end."""
    if isinstance(cycles, int):
        return [round(num_steps * number / cycles) for number in range(1, cycles + 1)]
    total, ends = 0.0, []
    for length in cycles:
        total += length if isinstance(length, int) else length * num_steps
        ends.append(round(total))
    if ends[-1] != num_steps:
        raise ValueError(
            f"optimizer.schedule.cycles: {list(cycles)} are {ends[-1]} steps, but "
            f"trainer.num_train_steps is {num_steps}; together they must be the whole run."
        )
    return ends
