# ruff: noqa: E501 - tables read best with one row a line
"""Named random numbers are exactly those of jax.random on the raw shape."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random as jrandom

import haliax as hax

H, W, D = hax.make_axes(H=4, W=3, D=5)
KEY = jrandom.PRNGKey(7)
SHAPE = (4, 3)

SAMPLERS = {
    "uniform": lambda: (hax.random.uniform(KEY, (H, W), minval=-1.0, maxval=2.0), jrandom.uniform(KEY, SHAPE, minval=-1.0, maxval=2.0)),
    "normal": lambda: (hax.random.normal(KEY, (H, W)), jrandom.normal(KEY, SHAPE)),
    "truncated_normal": lambda: (hax.random.truncated_normal(KEY, (H, W), -1.0, 2.0), jrandom.truncated_normal(KEY, -1.0, 2.0, SHAPE)),
    "bernoulli": lambda: (hax.random.bernoulli(KEY, (H, W), 0.3), jrandom.bernoulli(KEY, 0.3, SHAPE)),
    "randint": lambda: (hax.random.randint(KEY, (H, W), 2, 9), jrandom.randint(KEY, SHAPE, 2, 9)),
    "poisson": lambda: (hax.random.poisson(KEY, (H, W), 3.0), jrandom.poisson(KEY, 3.0, SHAPE)),
    "exponential": lambda: (hax.random.exponential(KEY, (H, W)), jrandom.exponential(KEY, SHAPE)),
    "gamma": lambda: (hax.random.gamma(KEY, (H, W), 2.0), jrandom.gamma(KEY, 2.0, SHAPE)),
    "loggamma": lambda: (hax.random.loggamma(KEY, (H, W), 2.0), jrandom.loggamma(KEY, 2.0, SHAPE)),
    "beta": lambda: (hax.random.beta(KEY, (H, W), 2.0, 3.0), jrandom.beta(KEY, 2.0, 3.0, SHAPE)),
    "laplace": lambda: (hax.random.laplace(KEY, (H, W)), jrandom.laplace(KEY, SHAPE)),
    "cauchy": lambda: (hax.random.cauchy(KEY, (H, W)), jrandom.cauchy(KEY, SHAPE)),
    "logistic": lambda: (hax.random.logistic(KEY, (H, W)), jrandom.logistic(KEY, SHAPE)),
    "gumbel": lambda: (hax.random.gumbel(KEY, (H, W)), jrandom.gumbel(KEY, SHAPE)),
    "rademacher": lambda: (hax.random.rademacher(KEY, (H, W)), jrandom.rademacher(KEY, SHAPE)),
    "t": lambda: (hax.random.t(KEY, (H, W), df=3.0), jrandom.t(KEY, 3.0, SHAPE)),
    "pareto": lambda: (hax.random.pareto(KEY, (H, W), 2.0), jrandom.pareto(KEY, 2.0, SHAPE)),
    "weibull_min": lambda: (hax.random.weibull_min(KEY, (H, W), 1.5, 2.0), jrandom.weibull_min(KEY, 1.5, 2.0, SHAPE)),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_bits_are_those_of_jax(name):
    found, expected = SAMPLERS[name]()
    assert found.axes == (H, W)
    np.testing.assert_array_equal(found.array, expected)


def test_shapes_may_be_dicts():
    assert hax.random.normal(KEY, {"H": 4, "W": 3}).axes == (H, W)


def test_parameters_broadcast_by_name():
    low = hax.arange(W).astype(jnp.float32)
    found = hax.random.uniform(KEY, (H, W), minval=low, maxval=low + 1)
    raw = np.arange(3, dtype=np.float32)[None]
    np.testing.assert_array_equal(
        found.array, jrandom.uniform(KEY, SHAPE, minval=raw, maxval=raw + 1)
    )
    p = hax.linspace(H, start=0.0, stop=1.0)
    drawn = hax.random.bernoulli(KEY, (W, H), p)
    assert not bool(drawn["H", 0].any())
    assert bool(drawn["H", 3].all())
    assert hax.random.gamma(KEY, (W, H), p + 1.0).axes == (W, H)


def test_choice_and_permutation():
    x = hax.arange((H, W))
    found = hax.random.choice(KEY, D, x, "H")
    assert found.axes == (D, W)
    np.testing.assert_array_equal(found.array, jrandom.choice(KEY, x.array, (5,)))
    certain = hax.named(np.array([0.0, 1.0, 0.0], np.float32), W)
    assert hax.random.choice(KEY, D, x, "W", p=certain).rearrange((H, D)).array.tolist() == [
        [3 * i + 1] * 5 for i in range(4)
    ]
    shuffled = hax.random.permutation(KEY, x, "W")
    np.testing.assert_array_equal(shuffled.array, jrandom.permutation(KEY, x.array, 1))


def test_categorical():
    logits = hax.random.normal(KEY, (H, D, W))
    found = hax.random.categorical(KEY, logits, "D")
    assert found.axes == (H, W)
    np.testing.assert_array_equal(
        found.array, jrandom.categorical(KEY, jnp.moveaxis(logits.array, 1, -1))
    )
    many = hax.random.categorical(KEY, hax.named([0.0, 50.0], "c"), "c", shape=(H,))
    assert many.tolist() == [1, 1, 1, 1]


def test_ball_is_inside_the_ball():
    points = hax.random.ball(KEY, H, D)
    assert points.axes == (H, D)
    assert float(hax.sum(points * points, D).max()) <= 1
    np.testing.assert_array_equal(points.array, jrandom.ball(KEY, 5, shape=(4,)))


def test_keys_may_be_absent_or_shaped():
    assert hax.jax_utils.maybe_rng_split(None, 3) == [None, None, None]
    assert hax.jax_utils.maybe_rng_split(KEY, 3).shape[0] == 3
    assert hax.jax_utils.shaped_rng_split(jax.random.key(0), (2, 3)).shape == (2, 3)
