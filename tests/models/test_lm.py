"""The next-token loss: what is compared with what, how it is weighed, and in which precision."""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import haliax as hax
from haliax import Axis, NamedArray
from modeling.models.config import MODEL_PRESETS, Gpt2Config
from modeling.models.lm import (
    LanguageModel,
    LmExample,
    build_model,
    next_token_loss,
    token_losses,
)

Vocab, Pos, Batch, Embed = Axis("vocab", 5), Axis("position", 4), Axis("batch", 2), Axis("embed", 5)


class Table(eqx.Module):
    """A language model whose logits are a row of a table for each id: `logits = table[id]`."""

    table: NamedArray
    head: NamedArray
    Vocab: Axis = eqx.field(static=True)
    Pos: Axis = eqx.field(static=True)

    def activations(self, input_ids, *, segment_ids=None, key=None):
        return self.table["id", input_ids]

    def __call__(self, input_ids, *, segment_ids=None, key=None):
        return hax.dot(self.activations(input_ids), self.head, axis=Embed)


def table_model(table):
    named = hax.named(jnp.asarray(table), ("id", "embed"))
    head = hax.named(jnp.eye(5, dtype=named.dtype), (Vocab, Embed))
    return Table(named, head, Vocab, Pos)


TABLE = np.array(
    [
        [0.0, 1.0, 2.0, 3.0, 4.0],
        [1.0, 1.0, 1.0, 1.0, 1.0],
        [-3.0, 2.5, 0.5, -1.0, 2.0],
        [80.0, -80.0, 0.0, 1.0, 2.0],
        [0.1, 0.2, 0.3, 0.4, 0.5],
    ],
    np.float32,
)
TOKENS = np.array([[0, 4, 2, 1], [3, 1, 0, 3]])


@pytest.mark.parametrize("name", ["gpt2-nano", "llama-nano"])
def test_a_configuration_names_the_axes_of_its_model_and_of_rows(name):
    config = MODEL_PRESETS[name]
    model = eqx.filter_eval_shape(build_model, config, Vocab, Pos, key=jax.random.PRNGKey(0))
    arrays = jax.tree.leaves(model, is_leaf=lambda x: isinstance(x, NamedArray))
    found = {axis.name for x in arrays if isinstance(x, NamedArray) for axis in x.axes}
    assert found | {"batch", "position"} == config.axis_names


def nats(current, following):
    """-log softmax(TABLE[current])[following], in float64."""
    row = TABLE[current].astype(np.float64)
    return np.log(np.exp(row - row.max()).sum()) + row.max() - row[following]


def example(tokens=TOKENS):
    return LmExample.causal(hax.named(jnp.asarray(tokens, jnp.int32), (Batch, Pos)))


def test_a_table_is_a_language_model():
    assert isinstance(table_model(TABLE), LanguageModel)


def test_each_token_is_compared_with_the_prediction_before_it():
    losses = token_losses(table_model(TABLE), example().tokens)
    expected = [[nats(a, b) for a, b in itertools.pairwise(row)] for row in TOKENS]
    np.testing.assert_allclose(losses.rearrange((Batch, Pos)).array[:, :-1], expected, rtol=1e-6)


def test_the_last_position_counts_nothing():
    total, weight = next_token_loss(table_model(TABLE), example())
    expected = sum(nats(a, b) for row in TOKENS for a, b in itertools.pairwise(row))
    assert float(total) == pytest.approx(expected, rel=1e-6)
    assert float(weight) == 6.0


def test_weights_multiply_losses_and_are_summed():
    weights = np.array([[1.0, 0.0, 0.5, 0.0], [0.0, 2.0, 0.0, 0.0]], np.float32)
    weighted = LmExample(example().tokens, hax.named(jnp.asarray(weights), (Batch, Pos)))
    total, weight = next_token_loss(table_model(TABLE), weighted)
    expected = nats(0, 4) + 0.5 * nats(2, 1) + 2 * nats(1, 0)
    assert float(total) == pytest.approx(expected, rel=1e-6)
    assert float(weight) == 3.5


def test_sums_of_microbatches_add_up_to_the_batch():
    model = table_model(TABLE)
    whole = next_token_loss(model, example())
    rows = [LmExample.causal(hax.named(jnp.asarray(row, jnp.int32), Pos)) for row in TOKENS]
    parts = [next_token_loss(model, row) for row in rows]
    for total, summed in zip(whole, np.sum(parts, axis=0), strict=True):
        assert float(total) == pytest.approx(float(summed), rel=1e-6)


def test_gradient_of_the_logits_is_softmax_less_the_target():
    def total(table):
        return next_token_loss(table_model(table), example())[0]

    gradient = jax.grad(total)(jnp.asarray(TABLE))
    expected = np.zeros((5, 5))
    for row in TOKENS:
        for current, following in itertools.pairwise(row):
            logits = TABLE[current].astype(np.float64)
            p = np.exp(logits - logits.max())
            expected[current] += p / p.sum() - np.eye(5)[following]
    np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-6)


def test_losses_of_bfloat16_activations_are_made_in_float32():
    model = table_model(TABLE.astype(jnp.bfloat16))
    total, weight = next_token_loss(model, example())
    assert total.dtype == weight.dtype == jnp.float32
    table = np.asarray(TABLE.astype(jnp.bfloat16), np.float64)
    rows = [(table[a], b) for row in TOKENS for a, b in itertools.pairwise(row)]
    expected = sum(np.log(np.exp(r - r.max()).sum()) + r.max() - r[b] for r, b in rows)
    assert float(total) == pytest.approx(expected, rel=1e-6)


def test_a_new_model_knows_nothing():
    V = Axis("vocab", 500)
    config = Gpt2Config(hidden_dim=32, num_layers=2, num_heads=2)

    @jax.jit
    def first_loss():
        model = build_model(config, V, Pos, key=jax.random.key(0))
        tokens = hax.random.randint(jax.random.key(1), (Axis("batch", 16), Pos), 0, 500)
        return next_token_loss(model, LmExample.causal(tokens))

    total, weight = first_loss()
    assert float(total / weight) == pytest.approx(np.log(500), abs=0.05)


def test_the_example_weighs_rows_of_any_axes():
    tokens = hax.zeros((Pos, Batch), dtype=jnp.int32)
    weights = LmExample.causal(tokens).loss_weight
    assert weights.axes == tokens.axes
    np.testing.assert_array_equal(weights.array, [[1, 1], [1, 1], [1, 1], [0, 0]])
