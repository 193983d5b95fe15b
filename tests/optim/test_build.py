"""The schedule at every step and AdamW's updates, against NumPy in double precision."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import haliax.axis
from haliax.core import NamedArray
from modeling.optim.build import build_optimizer, decay_mask, decayed_parameters, learning_rate
from modeling.optim.config import AdamWConfig, CosineScheduleConfig

Embed = haliax.axis.Axis("embed", 3)
Mlp = haliax.axis.Axis("mlp", 4)


class Norm(eqx.Module):
    weight: NamedArray
    bias: NamedArray


class Linear(eqx.Module):
    weight: NamedArray
    bias: NamedArray


class Model(eqx.Module):
    token_embeddings: NamedArray
    ln_1: Norm
    up: Linear
    layers: int = eqx.field(static=True, default=2)


def random_model(seed: int, scale: float = 1.0) -> Model:
    rng = np.random.default_rng(seed)

    def array(*axes):
        values = rng.normal(size=tuple(axis.size for axis in axes)) * scale
        return NamedArray(jnp.asarray(values, jnp.float32), axes)

    return Model(
        array(Mlp, Embed), Norm(array(Embed), array(Embed)), Linear(array(Embed, Mlp), array(Mlp))
    )


def schedule_by_hand(config: AdamWConfig, num_steps: int, warmup: int) -> list[float]:
    """The equation of the module's docstring, in Python floats."""
    rates = []
    for n in range(1, num_steps + 1):
        if n <= warmup:
            rates.append(config.learning_rate * n / warmup)
            continue
        r, progress = config.schedule.min_lr_ratio, (n - warmup) / (num_steps - warmup)
        rates.append(config.learning_rate * (r + (1 - r) * (1 + math.cos(math.pi * progress)) / 2))
    return rates


@pytest.mark.parametrize(
    ("warmup", "num_steps", "steps_of_warmup"),
    [
        (0, 7, 0),
        (3, 10, 3),
        (10, 10, 10),
        (1, 1, 1),
        (0.25, 12, 3),
        (1.0, 5, 5),
        (1, 20, 1),
        (0.0, 4, 0),
    ],
)
def test_the_schedule_is_exact_at_every_step(warmup, num_steps, steps_of_warmup):
    config = AdamWConfig(schedule=CosineScheduleConfig(warmup=warmup, min_lr_ratio=0.1))
    at = jax.jit(learning_rate(config, num_steps))
    rates = [float(at(made)) for made in range(num_steps)]
    expected = schedule_by_hand(config, num_steps, steps_of_warmup)
    np.testing.assert_allclose(rates, expected, rtol=2e-6)
    assert rates[0] > 0, "the first update must move"


def test_a_whole_number_is_steps_and_a_decimal_a_share():
    one_step = AdamWConfig(schedule=CosineScheduleConfig(warmup=1))
    whole_run = AdamWConfig(schedule=CosineScheduleConfig(warmup=1.0))
    assert float(learning_rate(one_step, 100)(0)) == pytest.approx(6e-4)
    assert float(learning_rate(whole_run, 100)(0)) == pytest.approx(6e-6)


def test_a_warmup_longer_than_the_run_is_refused():
    config = AdamWConfig(schedule=CosineScheduleConfig(warmup=11))
    with pytest.raises(ValueError, match=r"optimizer\.schedule\.warmup: 11 steps.*is 10"):
        build_optimizer(config, 10)


def test_a_moment_that_takes_nothing_in_is_refused():
    with pytest.raises(ValueError, match=r"optimizer\.beta2: 1\.0"):
        build_optimizer(AdamWConfig(beta2=1.0), 10)


@pytest.mark.parametrize("gradient_scale", [0.01, 30.0], ids=["unclipped", "clipped"])
def test_adamw_equals_its_equation(gradient_scale):
    config = AdamWConfig(
        learning_rate=0.02, weight_decay=0.3, max_grad_norm=0.5,
        schedule=CosineScheduleConfig(warmup=2, min_lr_ratio=0.2),
    )  # fmt: skip
    num_steps = 5
    optimizer = build_optimizer(config, num_steps)
    model = random_model(0)
    state = optimizer.init(model)

    decayed = [False, False, False, True, False]  # embedding, norm, norm, up.weight, up.bias
    weights = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(model)]
    m = [np.zeros_like(w) for w in weights]
    v = [np.zeros_like(w) for w in weights]

    @jax.jit
    def update(model, state, gradients):
        updates, state = optimizer.update(gradients, state, model)
        return optax.apply_updates(model, updates), state

    for n, lr in enumerate(schedule_by_hand(config, num_steps, 2), start=1):
        gradients = random_model(n, gradient_scale)
        model, state = update(model, state, gradients)
        g = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(gradients)]
        norm = math.sqrt(sum(float((x**2).sum()) for x in g))
        assert (norm > 0.5) == (gradient_scale > 1), "the case must test what it is named for"
        g = [x * min(1.0, 0.5 / norm) for x in g]
        for i, x in enumerate(g):
            m[i] = 0.9 * m[i] + 0.1 * x
            v[i] = 0.95 * v[i] + 0.05 * x**2
            step = m[i] / (1 - 0.9**n) / (np.sqrt(v[i] / (1 - 0.95**n)) + 1e-8)
            weights[i] = weights[i] - lr * (step + 0.3 * decayed[i] * weights[i])
        for leaf, expected in zip(jax.tree.leaves(model), weights, strict=True):
            np.testing.assert_allclose(np.asarray(leaf), expected, rtol=2e-5, atol=2e-6)


def test_decay_spares_biases_norms_and_embeddings_and_says_what_it_acts_on():
    model = random_model(0)
    assert decayed_parameters(model) == ["up.weight"]
    assert jax.tree.leaves(decay_mask(model)) == [False, False, False, True, False]


@pytest.mark.parametrize(
    ("path", "decays"),
    [
        ("transformer.blocks.stacked.attn.c_attn.weight", True),
        ("transformer.blocks.stacked.attn.c_attn.bias", False),
        ("transformer.blocks.stacked.ln_1.weight", False),
        ("transformer.ln_f.weight", False),
        ("transformer.final_norm.weight", False),
        ("layer_norm.weight", False),
        ("embeddings.token_embeddings", False),
        ("wte", False),
        ("position_embeddings.weight", False),
        ("attn.normalizer.weight", True),
        ("lm_head.weight", True),
        ("biased_gate.weight", True),
    ],
)
def test_the_spared_paths(path, decays):
    tree = jnp.zeros((2, 2))
    for part in reversed(path.split(".")):
        tree = {part: tree}
    assert decayed_parameters(tree) == ([path] if decays else [])


def test_zero_decay_and_huge_clip_reduce_to_adam():
    config = AdamWConfig(weight_decay=0.0, max_grad_norm=1e9)
    ours, adam = build_optimizer(config, 10), optax.adam(learning_rate(config, 10), 0.9, 0.95)
    model, gradients = random_model(0), random_model(1)
    found, _ = ours.update(gradients, ours.init(model), model)
    expected, _ = adam.update(gradients, adam.init(model), model)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
