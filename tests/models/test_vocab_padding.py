"""Rows of the embedding that are no ids change nothing of what the others do.

Unless said otherwise the padding here is huge instead of zero: were it looked at, it would show.
"""

import dataclasses
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import haliax as hax
from haliax import Axis
from modeling.evaluation.generate import greedy
from modeling.models.config import Gpt2Config
from modeling.models.gpt2 import with_vocab_rows
from modeling.models.lm import LmExample, build_model, next_token_loss, token_losses
from modeling.models.loss import sampled_targets
from modeling.optim.build import build_optimizer
from modeling.optim.config import (
    AdafactorConfig,
    AdamWConfig,
    ConstantScheduleConfig,
    LionConfig,
    MuonConfig,
    SophiaGConfig,
    SophiaHConfig,
)
from modeling.training import curvature

NUM_IDS, NUM_ROWS = 29, 32
Vocab, Pos, Batch = Axis("vocab", NUM_IDS), Axis("position", 8), Axis("batch", 2)
PLAIN = Gpt2Config(hidden_dim=8, num_layers=1, num_heads=2)
PADDED = dataclasses.replace(PLAIN, vocab_pad_multiple=16)


@pytest.fixture(scope="module")
def plain():
    return build_model(PLAIN, Vocab, Pos, key=jax.random.key(0))


@pytest.fixture(scope="module")
def padded(plain):
    """The model with padding that would win every comparison."""
    return with_rows(with_vocab_rows(plain, NUM_ROWS), 1e4)


def with_rows(model, value):
    rows = table(model).at[NUM_IDS:].set(value)
    return eqx.tree_at(lambda m: m.embeddings.token_embeddings.weight.array, model, rows)


def table(model):
    return model.embeddings.token_embeddings.weight.array


def example():
    ids = np.random.default_rng(0).integers(0, NUM_IDS, (2, 8))
    return LmExample.causal(hax.named(jnp.asarray(ids, jnp.int32), (Batch, Pos)))


def test_the_ids_begin_with_the_same_bits_and_the_padding_with_zeros(plain):
    model = build_model(PADDED, Vocab, Pos, key=jax.random.key(0))
    assert model.Vocab == Vocab
    assert model.head.axes == model.embeddings.token_embeddings.weight.axes
    assert table(model).shape == (NUM_ROWS, 8)
    assert not np.any(table(model)[NUM_IDS:])
    cut = with_vocab_rows(model, NUM_IDS)
    for one, other in zip(jax.tree.leaves(cut), jax.tree.leaves(plain), strict=True):
        np.testing.assert_array_equal(one, other)


def test_logits_losses_and_gradients_are_those_without_padding(plain, padded):
    @eqx.filter_jit
    def everything(model):
        tokens = example().tokens
        (total, _), gradients = eqx.filter_value_and_grad(next_token_loss, has_aux=True)(
            model, example()
        )
        return model(tokens), token_losses(model, tokens), total, gradients

    logits, losses, total, gradients = everything(padded)
    expected = everything(plain)
    assert logits.axes == expected[0].axes == (Batch, Pos, Vocab)
    np.testing.assert_allclose(logits.array, expected[0].array, rtol=0, atol=1e-6)
    np.testing.assert_allclose(losses.array, expected[1].array, rtol=1e-6)
    np.testing.assert_allclose(total, expected[2], rtol=1e-6)
    assert not np.any(table(gradients)[NUM_IDS:])
    cut = with_vocab_rows(gradients, NUM_IDS)
    for one, other in zip(jax.tree.leaves(cut), jax.tree.leaves(expected[3]), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


def test_padding_is_neither_generated_nor_drawn(plain, padded):
    prompts = [[3, 1], [5]]
    assert greedy(padded, prompts, 5, end_id=0) == greedy(plain, prompts, 5, end_id=0)
    activations = hax.random.normal(jax.random.key(1), (Batch, Pos, Axis("embed", 8)))
    ids = sampled_targets(activations, padded.head, Vocab, Pos, key=jax.random.key(2))
    assert ids.axes == (Batch, Pos)
    assert np.max(ids.array) < NUM_IDS


SOPHIA_G, SOPHIA_H = SophiaGConfig(type="sophia_g"), SophiaHConfig(type="sophia_h")


@pytest.mark.parametrize("config", [SOPHIA_G, SOPHIA_H], ids=lambda c: c.type)
def test_padding_has_no_curvature(config, padded):
    measure = curvature.measure_of(config)
    _, weight, sums = jax.jit(
        lambda model: measure(lambda m: m, model, example(), jax.random.PRNGKey(4))
    )(padded)
    estimate = table(curvature.estimate_of(config, sums, weight))
    assert not np.any(estimate[NUM_IDS:])
    assert np.all(np.isfinite(estimate))
    assert np.any(estimate[:NUM_IDS])


@pytest.mark.parametrize(
    "config",
    [
        AdamWConfig(type="adamw"),
        LionConfig(type="lion"),
        AdafactorConfig(type="adafactor", smallest_factored=2),
        MuonConfig(type="muon"),
        SOPHIA_G,
        SOPHIA_H,
    ],
    ids=lambda c: c.type,
)
def test_every_optimizer_leaves_the_padding_at_zero(config, plain):
    """Whatever decays: here everything does."""
    constant = ConstantScheduleConfig(type="constant", warmup=0)
    config = dataclasses.replace(
        config, schedule=constant, weight_decay=0.1, undecayed=(), learning_rate=0.1
    )
    params = with_vocab_rows(plain, NUM_ROWS)
    gradients = with_rows(jax.tree.map(jnp.ones_like, params), 0.0)
    optimizer = build_optimizer(config, 4)
    state = optimizer.init(params)
    update = jax.jit(optimizer.apply)
    after, state = update(gradients, state, params, jnp.int32(0))
    after, state = update(gradients, state, after, jnp.int32(1))
    assert not np.any(table(after)[NUM_IDS:])
    assert np.all(table(after)[:NUM_IDS] != table(params)[:NUM_IDS])


def test_a_vocabulary_that_needs_none_is_computed_by_the_same_program():
    def program(multiple):
        config = dataclasses.replace(PLAIN, vocab_pad_multiple=multiple)
        model = eqx.filter_eval_shape(
            partial(build_model, config, Vocab, Pos), key=jax.random.key(0)
        )
        return str(jax.make_jaxpr(lambda m: next_token_loss(m, example()))(model))

    assert program(NUM_IDS) == program(1)
    assert program(2) != program(1)
