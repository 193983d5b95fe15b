"""The phases of a schedule in updates, and whether they fit the run. No JAX is imported here.

A *duration* is a number of updates if written as an integer, and a share of the run otherwise.
"""

from collections.abc import Sequence

from modeling.optim.config import (
    CyclesScheduleConfig,
    Duration,
    InverseSqrtScheduleConfig,
    ScheduleConfig,
    WsdScheduleConfig,
)


def require_fitting(schedule: ScheduleConfig, num_train_steps: int) -> None:
    """Raises `ValueError`, naming the field, if the schedule is none of a run of this length."""
    if isinstance(schedule, CyclesScheduleConfig):
        cycles(schedule, num_train_steps)
        return
    warmup(schedule, num_train_steps)
    if isinstance(schedule, WsdScheduleConfig):
        decay(schedule, num_train_steps)
    if isinstance(schedule, InverseSqrtScheduleConfig):
        timescale(schedule, num_train_steps)


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


def warmup(schedule: ScheduleConfig, num_train_steps: int) -> int:
    """Returns for how many updates the rate rises at first."""
    return duration_steps(schedule.warmup, num_train_steps, "optimizer.schedule.warmup")


def timescale(schedule: InverseSqrtScheduleConfig, num_train_steps: int) -> int:
    """Returns the timescale of an inverse square root."""
    field = "optimizer.schedule.timescale"
    if schedule.timescale is None:
        found = warmup(schedule, num_train_steps)
    else:
        found = duration_steps(schedule.timescale, num_train_steps, field)
    if found == 0:
        raise ValueError(
            f"{field}: the rate falls with the square root of the updates over "
            f"a timescale, which is the warmup when absent; both are 0 steps here. Give either."
        )
    return found


def decay(schedule: WsdScheduleConfig, num_train_steps: int) -> int:
    """Returns for how many updates at the end the rate falls."""
    rising = warmup(schedule, num_train_steps)
    falling = duration_steps(schedule.decay, num_train_steps, "optimizer.schedule.decay")
    if rising + falling > num_train_steps:
        raise ValueError(
            f"optimizer.schedule: {rising} steps of warmup and {falling} of decay are more than "
            f"trainer.num_train_steps, {num_train_steps}; shorten one."
        )
    if schedule.shape == "exponential" and schedule.min_lr_ratio == 0.0:
        raise ValueError(
            "optimizer.schedule.min_lr_ratio: an exponential decay never gets to 0.0; give a "
            "number above it, such as 0.01."
        )
    return falling


def cycles(schedule: CyclesScheduleConfig, num_train_steps: int) -> tuple[list[int], list[int]]:
    """Returns the last update of each cycle, and how many updates each one rises for."""
    ends = _cycle_ends(schedule.cycles, num_train_steps)
    fields = ["warmup", *["rewarmup"] * (len(ends) - 1)]
    warmups = [
        duration_steps(getattr(schedule, field), num_train_steps, f"optimizer.schedule.{field}")
        for field in fields
    ]
    for number, (begin, end, rising) in enumerate(
        zip([0, *ends[:-1]], ends, warmups, strict=True), 1
    ):
        if end - begin < max(rising, 1):
            raise ValueError(
                f"optimizer.schedule.cycles: cycle {number} has {end - begin} steps, of which "
                f"{rising} are warmup; make it longer or its warmup shorter."
            )
    return ends, warmups


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
