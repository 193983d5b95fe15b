"""Blockwise cross-entropy against float64 NumPy, and its promise to keep no logits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import haliax as hax
from haliax import Axis
from modeling.models.loss import summed_cross_entropy, token_cross_entropy

Batch, Embed, Vocab = Axis("batch", 4), Axis("embed", 6), Axis("vocab", 10)


def inputs(Pos, seed=0):
    draw = np.random.default_rng(seed)
    h = draw.normal(size=(4, Pos.size, 6))
    head = draw.normal(size=(10, 6))
    y = draw.integers(0, 10, (4, Pos.size))
    w = draw.choice([0.0, 0.5, 1.0], (4, Pos.size))
    return h, head, y, w


def named(Pos, h, head, y, w, dtype=jnp.float32):
    return (
        hax.named(jnp.asarray(h, dtype), (Batch, Pos, Embed)),
        hax.named(jnp.asarray(head, dtype), (Vocab, Embed)),
        hax.named(jnp.asarray(y, jnp.int32), (Batch, Pos)),
        hax.named(jnp.asarray(w, jnp.float32), (Batch, Pos)),
    )


def in_float64(h, head, y, w):
    """Losses, total, and its gradients by activations, head and weights."""
    z = h @ head.T
    p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    nats = -np.log(np.take_along_axis(p, y[..., None], -1)[..., 0])
    excess = (p - np.eye(10)[y]) * w[..., None]
    return nats, (nats * w).sum(), excess @ head, np.einsum("btv,bte->ve", excess, h), nats


@functools.partial(jax.jit, static_argnums=(4, 5))
def value_and_gradients(h, head, y, w, scale, Pos):
    def scaled(h, head, w):
        return scale * summed_cross_entropy(h, head, y, w, Vocab, Pos)

    return jax.value_and_grad(scaled, argnums=(0, 1, 2))(h, head, w)


@pytest.mark.parametrize("length", [1, 7, 11, 16, 24])
def test_total_and_gradients_equal_float64(length):
    Pos = Axis("position", length)
    raw = inputs(Pos)
    nats, total, d_h, d_head, d_w = in_float64(*raw)
    arguments = named(Pos, *raw)
    losses = token_cross_entropy(*arguments[:3], Vocab, Pos)
    # A logit is a sum of six products, which processors round in an order of their own; a loss is
    # the difference of two of them, and a few roundings more.
    most = (np.abs(raw[0]) @ np.abs(raw[1]).T).max(-1)
    assert (np.abs(losses.array - nats) <= 16 * 2.0**-24 * most).all()
    forward_only = summed_cross_entropy(*arguments, Vocab, Pos)
    assert float(forward_only) == pytest.approx(total, rel=1e-6)
    value, gradients = value_and_gradients(*arguments, 3.0, Pos)
    assert float(value) == pytest.approx(3 * total, rel=1e-6)
    for found, expected, like in zip(
        gradients, (d_h, d_head, d_w), (arguments[0], arguments[1], arguments[3]), strict=True
    ):
        assert found.axes == like.axes
        assert found.dtype == like.dtype
        np.testing.assert_allclose(found.array, 3 * expected, rtol=0, atol=2e-5)


def test_axes_may_stand_in_any_order():
    Pos = Axis("position", 8)
    arguments = named(Pos, *inputs(Pos))
    h, head, y, w = arguments
    turned = h.rearrange((Embed, Pos, Batch)), head.rearrange((Embed, Vocab)), y, w
    value, gradients = value_and_gradients(*arguments, 1.0, Pos)
    other_value, other = value_and_gradients(*turned, 1.0, Pos)
    assert float(value) == pytest.approx(float(other_value), rel=1e-6)
    for one, two in zip(gradients, other, strict=True):
        np.testing.assert_allclose(one.array, two.rearrange(one.axes).array, rtol=0, atol=1e-6)
    assert other[0].axes == (Embed, Pos, Batch)


def test_huge_logits_stay_finite():
    Pos = Axis("position", 4)
    h, head, y, w = inputs(Pos)
    value, gradients = value_and_gradients(*named(Pos, 1e4 * h, head, y, w), 1.0, Pos)
    z = 1e4 * h @ head.T
    log_sum = z.max(-1) + np.log(np.exp(z - z.max(-1, keepdims=True)).sum(-1))
    expected = ((log_sum - np.take_along_axis(z, y[..., None], -1)[..., 0]) * w).sum()
    assert float(value) == pytest.approx(expected, rel=1e-5)
    assert all(np.isfinite(np.asarray(g.array)).all() for g in gradients)


def test_gradients_have_the_dtype_of_what_they_are_of():
    Pos = Axis("position", 8)
    raw = inputs(Pos)
    rounded = [np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64) for x in raw[:2]]
    _, total, d_h, d_head, _ = in_float64(*rounded, *raw[2:])
    value, gradients = value_and_gradients(*named(Pos, *raw, dtype=jnp.bfloat16), 1.0, Pos)
    assert [g.dtype for g in gradients] == [jnp.bfloat16, jnp.bfloat16, jnp.float32]
    assert value.dtype == jnp.float32
    assert float(value) == pytest.approx(total, rel=1e-6)
    for found, expected in zip(gradients, (d_h, d_head), strict=False):
        error = np.asarray(found.array, np.float64) - expected
        assert np.abs(error).max() < 0.01 * np.abs(expected).max()  # bfloat16 has 8 bits


@pytest.mark.parametrize("differentiated", [False, True])
def test_no_logits_of_the_whole_batch_are_kept(differentiated):
    Pos, Wide = Axis("position", 64), Axis("vocab", 5000)
    h = hax.zeros((Batch, Pos, Embed))
    head, y = hax.zeros((Wide, Embed)), hax.zeros((Batch, Pos), dtype=jnp.int32)
    w = hax.ones((Batch, Pos))

    def loss(h, head):
        return summed_cross_entropy(h, head, y, w, Wide, Pos)

    program = jax.value_and_grad(loss, argnums=(0, 1)) if differentiated else loss
    compiled = jax.jit(program).lower(h, head).compile()
    logits_bytes = Batch.size * Pos.size * Wide.size * 4
    assert compiled.memory_analysis().temp_size_in_bytes < logits_bytes


@pytest.mark.parametrize(
    "mapping", [{"batch": "data"}, {"batch": "data", "vocab": "model"}, {"embed": "model"}]
)
def test_layouts_over_devices_give_the_same(mapping):
    Pos = Axis("position", 8)
    arguments = named(Pos, *inputs(Pos))
    value, gradients = value_and_gradients(*arguments, 1.0, Pos)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        placed = hax.shard(arguments, mapping)
        split_value, split = value_and_gradients(*placed, 1.0, Pos)
    assert float(split_value) == pytest.approx(float(value), rel=1e-6)
    for one, other in zip(gradients, split, strict=True):
        np.testing.assert_allclose(other.array, one.array, rtol=0, atol=1e-5)
