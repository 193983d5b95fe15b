"""Every schedule at every step, against a table made in double precision."""

import math

import jax
import numpy as np
import pytest

from modeling.experiment import ExperimentConfig, validate
from modeling.optim.schedules import learning_rate

PEAK = 3e-3


def schedule(num_steps, **fields):
    """The schedule of a run as a file would give it, through JSON."""
    trainer = {"num_train_steps": num_steps, "train_batch_size": 1}
    raw = {"dataset": "d", "sequence_length": 8, "trainer": trainer}
    return validate(ExperimentConfig, raw | {"optimizer": {"schedule": fields}}, "x").optimizer


def rates(num_steps, **fields):
    at = jax.jit(learning_rate(PEAK, schedule(num_steps, **fields).schedule, num_steps))
    return [float(at(made)) for made in range(num_steps)]


def warmed(warmup, after):
    """n / warmup while it lasts; `after` says the rest."""
    return lambda n: n / warmup if n <= warmup else after(n)


def between(low, high, share):
    return low + (high - low) * share


def cosine(p):
    return (1 + math.cos(math.pi * p)) / 2


def in_cycles(ends, warmups, peaks, floor, shape):
    def at(n):
        number = next(i for i, end in enumerate(ends) if n <= end)
        begin = ends[number - 1] if number else 0
        warmup, peak = warmups[number], peaks[number]
        if n - begin <= warmup:
            return between(floor if number else 0.0, peak, (n - begin) / warmup)
        return between(floor, peak, shape((n - begin - warmup) / (ends[number] - begin - warmup)))

    return at


CASES = [
    ("constant", 9, {"type": "constant", "warmup": 4}, warmed(4, lambda n: 1.0)),
    ("constant at once", 3, {"type": "constant", "warmup": 0}, lambda n: 1.0),
    ("linear", 11, {"type": "linear", "warmup": 3, "min_lr_ratio": 0.1},
     warmed(3, lambda n: between(0.1, 1.0, (11 - n) / 8))),
    ("linear to nothing", 6, {"type": "linear", "warmup": 0.5, "min_lr_ratio": 0.0},
     warmed(3, lambda n: (6 - n) / 3)),
    ("cosine", 10, {"warmup": 3, "min_lr_ratio": 0.1},
     warmed(3, lambda n: between(0.1, 1.0, cosine((n - 3) / 7)))),
    ("cosine without warmup", 7, {"type": "cosine", "warmup": 0, "min_lr_ratio": 0.2},
     lambda n: between(0.2, 1.0, cosine(n / 7))),
    ("all warmup", 10, {"type": "cosine", "warmup": 10}, lambda n: n / 10),
    ("all warmup by share", 5, {"type": "cosine", "warmup": 1.0}, lambda n: n / 5),
    ("a single update", 1, {"type": "cosine", "warmup": 1}, lambda n: 1.0),
    ("inverse square root", 40, {"type": "inverse_sqrt", "warmup": 8},
     warmed(8, lambda n: math.sqrt(8 / n))),
    ("inverse square root over a timescale", 30,
     {"type": "inverse_sqrt", "warmup": 0, "timescale": 0.1, "min_lr_ratio": 0.4},
     lambda n: max(0.4, 1 / math.sqrt(1 + n / 3))),
    ("wsd", 20, {"type": "wsd", "warmup": 4, "decay": 5},
     warmed(4, lambda n: 1.0 if n <= 15 else 1 - math.sqrt((n - 15) / 5))),
    ("wsd, linear", 20, {"type": "wsd", "warmup": 0.1, "decay": 0.25, "shape": "linear",
                         "min_lr_ratio": 0.2},
     warmed(2, lambda n: 1.0 if n <= 15 else between(0.2, 1.0, (20 - n) / 5))),
    ("wsd, cosine", 12, {"type": "wsd", "warmup": 0, "decay": 12, "shape": "cosine"},
     lambda n: cosine(n / 12)),
    ("wsd, exponential", 12, {"type": "wsd", "warmup": 2, "decay": 6, "shape": "exponential",
                              "min_lr_ratio": 0.01},
     warmed(2, lambda n: 1.0 if n <= 6 else 0.01 ** ((n - 6) / 6))),
    ("wsd that never decays", 6, {"type": "wsd", "warmup": 2, "decay": 0}, warmed(2, lambda n: 1)),
    ("three equal cycles", 25, {"type": "cycles", "cycles": 3, "warmup": 4, "rewarmup": 2},
     in_cycles([8, 17, 25], [4, 2, 2], [1, 1, 1], 0.1, cosine)),
    ("cycles of given lengths with lower peaks", 20,
     {"type": "cycles", "cycles": [5, 0.25, 10], "warmup": 0, "rewarmup": 0.05,
      "shape": "linear", "peak_ratio": 0.5, "min_lr_ratio": 0.0},
     in_cycles([5, 10, 20], [0, 1, 1], [1, 0.5, 0.25], 0.0, lambda p: 1 - p)),
    ("a cycle that is one re-warmup", 6, {"type": "cycles", "cycles": [3, 3], "warmup": 0,
                                          "rewarmup": 3, "min_lr_ratio": 0.5},
     in_cycles([3, 6], [0, 3], [1, 1], 0.5, cosine)),
    ("peaks never below the floor", 6, {"type": "cycles", "cycles": 3, "warmup": 0, "rewarmup": 0,
                                        "peak_ratio": 0.1, "min_lr_ratio": 0.5},
     in_cycles([2, 4, 6], [0, 0, 0], [1, 0.5, 0.5], 0.5, cosine)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("num_steps", "fields", "relative"), [case[1:] for case in CASES], ids=[c[0] for c in CASES]
)
def test_the_rate_is_exact_at_every_step(num_steps, fields, relative):
    expected = [PEAK * relative(n) for n in range(1, num_steps + 1)]
    found = rates(num_steps, **fields)
    np.testing.assert_allclose(found, expected, rtol=3e-6, atol=1e-9)
    assert found[0] > 0 or num_steps == 1, "the first update must move"


def test_the_table_knows_every_schedule():
    from modeling.optim.schedules import _SHAPES

    assert {case[2].get("type", "cosine") for case in CASES} == {
        "constant", "linear", "cosine", "inverse_sqrt", "wsd", "cycles"
    }  # fmt: skip
    shapes = {case[2].get("shape", "sqrt") for case in CASES if case[2].get("type") == "wsd"}
    assert shapes == {*_SHAPES, "exponential"}


@pytest.mark.parametrize(
    "fields",
    [
        {"type": "constant", "warmup": None},
        {"type": "linear", "warmup": None},
        {"type": "cosine", "warmup": None},
        {"type": "inverse_sqrt", "warmup": None},
        {"type": "wsd", "warmup": None, "decay": 0},
        {"type": "cycles", "cycles": 1, "warmup": None},
    ],
    ids=lambda fields: fields["type"],
)
def test_one_is_a_step_and_one_point_nought_the_whole_run(fields):
    assert rates(8, **(fields | {"warmup": 1}))[0] == pytest.approx(PEAK)
    assert rates(8, **(fields | {"warmup": 1.0})) == pytest.approx(
        [PEAK * n / 8 for n in range(1, 9)]
    )


def test_shares_of_other_phases_are_told_from_steps_too():
    one = rates(8, type="wsd", warmup=0, decay=1, shape="linear")
    whole = rates(8, type="wsd", warmup=0, decay=1.0, shape="linear")
    assert one == pytest.approx([PEAK] * 7 + [0.0])
    assert whole == pytest.approx([PEAK * (8 - n) / 8 for n in range(1, 9)])
    assert rates(8, type="cycles", cycles=1) == rates(8, type="cycles", cycles=[1.0])
    assert rates(2, type="cycles", cycles=[1, 1]) == rates(2, type="cycles", cycles=[0.5, 0.5])
    assert rates(9, type="inverse_sqrt", timescale=9) == rates(
        9, type="inverse_sqrt", timescale=1.0
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"warmup": 11}, r"schedule\.warmup: 11 steps.*num_train_steps is 10"),
        ({"type": "wsd", "decay": 11}, r"schedule\.decay: 11 steps.*is 10"),
        ({"type": "wsd", "warmup": 0.5, "decay": 6}, r"5 steps of warmup and 6 of decay .* 10"),
        ({"type": "wsd", "shape": "exponential"}, r"min_lr_ratio: an exponential decay never"),
        ({"type": "inverse_sqrt", "warmup": 0}, r"schedule\.timescale: .* both are 0 steps"),
        ({"type": "inverse_sqrt", "timescale": 12}, r"schedule\.timescale: 12 steps"),
        ({"type": "cycles", "cycles": [4, 5]}, r"\[4, 5\] are 9 steps.*is 10; together"),
        ({"type": "cycles", "cycles": [0.5, 0.4]}, r"\[0\.5, 0\.4\] are 9 steps"),
        ({"type": "cycles", "cycles": 11}, r"cycle 1 has [01] steps, of which 0 are warmup|cycle"),
        ({"type": "cycles", "cycles": [8, 2], "rewarmup": 3}, r"cycle 2 has 2 steps, of which 3"),
    ],
)
def test_phases_that_do_not_fit_the_run_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        rates(10, **fields)
