"""Estimates of curvature against exact diagonals, and how they enter an update."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import haliax as hax
from haliax import Axis, NamedArray
from modeling.models.lm import LmExample, next_token_loss
from modeling.models.loss import sampled_targets
from modeling.optim.config import SophiaGConfig, SophiaHConfig
from modeling.training import curvature, feasibility

Batch, Pos, Vocab, Embed = (
    Axis("batch", 2), Axis("position", 4), Axis("vocab", 5), Axis("embed", 3)
)  # fmt: skip
HUTCHINSON, BARTLETT = SophiaHConfig(type="sophia_h"), SophiaGConfig(type="sophia_g")
DRAWS = 3000


class Tiny(eqx.Module):
    """A language model of 24 parameters, curved in all of them."""

    table: NamedArray
    inner: NamedArray
    Vocab: Axis = eqx.field(static=True)
    Pos: Axis = eqx.field(static=True)

    @property
    def head(self):
        return self.table

    def activations(self, input_ids, *, segment_ids=None, key=None):
        x = self.table.take(Vocab, input_ids)
        return hax.tanh(hax.dot(x, self.inner, axis=Embed)).rename({"out": "embed"})

    def __call__(self, input_ids, *, segment_ids=None, key=None):
        return hax.dot(self.activations(input_ids), self.head, axis=Embed)


def tiny():
    draw = np.random.default_rng(0)
    Out = Embed.alias("out")
    return Tiny(
        NamedArray(jnp.asarray(draw.normal(size=(5, 3)), jnp.float32), (Vocab, Embed)),
        NamedArray(jnp.asarray(draw.normal(size=(3, 3)), jnp.float32), (Embed, Out)),
        Vocab,
        Pos,
    )


def example():
    """Two rows, one of them with predictions that do not count."""
    tokens = NamedArray(jnp.asarray([[0, 3, 1, 4], [2, 2, 0, 1]]), (Batch, Pos))
    mask = NamedArray(jnp.asarray([[1, 1, 1, 1], [1, 0, 1, 1]], bool), (Batch, Pos))
    return LmExample.causal(tokens, Pos, loss_mask=mask)


def flat(tree):
    return jnp.concatenate([leaf.reshape(-1) for leaf in jax.tree.leaves(tree)])


def exact_hessian():
    model = tiny()
    vector, back = jax.flatten_util.ravel_pytree(model)

    def mean_loss(vector):
        # In plain operations, so that no gradient of ours takes part in the oracle.
        logits = back(vector)(example().tokens).rearrange((Batch, Pos, Vocab)).array
        targets = jnp.roll(example().tokens.array, -1, axis=1)
        nats = (
            jax.nn.logsumexp(logits, -1)
            - jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
        )
        weights = example().loss_weight.array
        return jnp.sum(nats * weights) / jnp.sum(weights)

    return np.asarray(jax.hessian(mean_loss)(vector)).diagonal()


def exact_gauss_newton():
    """Diagonal of the mean of J' (diag p - p p') J over the predictions that count."""
    model = tiny()
    vector, back = jax.flatten_util.ravel_pytree(model)

    def logits(vector):
        return back(vector)(example().tokens).rearrange((Batch, Pos, Vocab)).array.reshape(8, 5)

    jacobian = np.asarray(jax.jacobian(logits)(vector), np.float64)
    p = np.asarray(jax.nn.softmax(logits(vector)), np.float64)
    weights = np.asarray(example().loss_weight.array, np.float64).reshape(8)
    middle = np.einsum("tv,vw->tvw", p, np.eye(5)) - np.einsum("tv,tw->tvw", p, p)
    diagonals = np.einsum("tvi,tvw,twi->ti", jacobian, middle, jacobian)
    return (weights[:, None] * diagonals).sum(0) / weights.sum()


def draws(config):
    """Many estimates, one a row."""

    @jax.jit
    @jax.vmap
    def one(key):
        measure = curvature.measure_of(config)
        _, weight, sums = measure(lambda model: model, tiny(), example(), key)
        return flat(curvature.estimate_of(config, sums, weight))

    return np.asarray(one(jax.random.split(jax.random.PRNGKey(3), DRAWS)), np.float64)


@pytest.mark.parametrize(
    ("config", "exact"), [(BARTLETT, exact_gauss_newton), (HUTCHINSON, exact_hessian)],
    ids=["gauss-newton-bartlett", "hutchinson"],
)  # fmt: skip
def test_estimates_are_unbiased(config, exact):
    """Within four and a half standard errors of the mean in every one of 24 coordinates."""
    found, expected = draws(config), exact()
    errors = found.std(0, ddof=1) / math.sqrt(DRAWS)
    assert np.all(np.abs(found.mean(0) - expected) < 4.5 * errors + 1e-7)
    # And that would notice: the errors are small beside what is estimated.
    assert np.median(errors / np.abs(expected)) < 0.1


def test_the_two_curvatures_differ_so_that_no_test_can_take_one_for_the_other():
    assert np.abs(exact_gauss_newton() - exact_hessian()).max() > 0.02
    assert exact_gauss_newton().min() >= 0


def test_labels_are_drawn_with_the_models_probabilities():
    head = tiny().head
    h = hax.named(jnp.asarray([[0.3, -1.0, 0.5]] * 4), (Pos, Embed))
    p = np.asarray(jax.nn.softmax(head.array @ h.array[0]))

    @jax.jit
    @jax.vmap
    def one(key):
        return sampled_targets(h, head, Vocab, Pos, key=key).array

    ids = np.asarray(one(jax.random.split(jax.random.PRNGKey(1), 2000)))
    assert ids.shape == (2000, 4)
    for position in range(4):
        found = np.bincount(ids[:, position], minlength=5) / 2000
        np.testing.assert_allclose(found, p, atol=4.5 * math.sqrt(0.25 / 2000))
    # Positions are drawn independently of one another.
    same = (ids[:, 0] == ids[:, 1]).mean()
    assert same == pytest.approx((p**2).sum(), abs=4.5 * math.sqrt(0.25 / 2000))


def test_the_gradient_of_the_loss_is_that_of_the_next_token():
    total, weight, gradient = curvature.loss_gradient(lambda m: m, tiny(), example(), None)
    expected = jax.grad(lambda m: next_token_loss(m, example())[0])(tiny())
    assert float(weight) == 5
    assert float(total) == pytest.approx(float(next_token_loss(tiny(), example())[0]))
    np.testing.assert_array_equal(flat(gradient), flat(expected))


@pytest.mark.parametrize(("given", "rows"), [(8, 8), (2, 2), (0.5, 4), (0.25, 2), (0.01, 1)])
def test_rows_of_an_estimate_are_a_number_or_a_share(given, rows):
    config = SophiaGConfig(type="sophia_g", estimate_rows=given)
    assert feasibility.estimate_rows(config, 8) == rows


@pytest.mark.parametrize("given", [3, 16, 0.7])
def test_rows_that_do_not_divide_the_batch_are_refused(given):
    config = SophiaGConfig(type="sophia_g", estimate_rows=given)
    with pytest.raises(ValueError, match=r"estimate_rows: .* divide the 8 of"):
        feasibility.estimate_rows(config, 8)


def test_an_estimate_never_takes_more_rows_at_a_time_than_a_microbatch():
    assert feasibility.estimate_microbatches(rows=8, largest=8, ways=2) == 1
    assert feasibility.estimate_microbatches(rows=8, largest=4, ways=2) == 2
    assert feasibility.estimate_microbatches(rows=6, largest=4, ways=2) == 3
    with pytest.raises(ValueError, match=r"3 rows cannot be cut .* 2 devices"):
        feasibility.estimate_microbatches(rows=3, largest=4, ways=2)
