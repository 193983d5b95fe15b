"""Attention, masks and biases against plain jnp."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import haliax as hax
from haliax.nn import attention

B, H, QPos, KPos, Key = hax.make_axes(B=2, H=3, Q=4, K=5, D=6)


def _normal(*axes, seed=0):
    return hax.random.normal(jax.random.PRNGKey(seed), axes)


def _reference(q, k, v, mask=None, bias=None):
    scores = np.einsum("bhqd,bhkd->bhqk", q, k) / math.sqrt(6)
    scores = scores if bias is None else scores + bias
    scores = scores if mask is None else np.where(mask, scores, -1e9)
    return np.einsum("bhqk,bhkd->bhqd", jax.nn.softmax(jnp.asarray(scores), -1), v)


def test_dot_product_attention():
    q, k, v = (
        _normal(B, H, QPos, Key),
        _normal(B, H, KPos, Key, seed=1),
        _normal(B, H, KPos, Key, seed=2),
    )
    mask, bias = attention.causal_mask(QPos, KPos), _normal(H, QPos, KPos, seed=3)
    out = attention.dot_product_attention(KPos, Key, q, k, v, mask, bias)
    assert out.axes == (B, H, QPos, Key)
    expected = _reference(
        q.array, k.array, v.array, np.tri(4, 5, dtype=bool), np.asarray(bias.array)[None]
    )
    np.testing.assert_allclose(out.array, expected, rtol=1e-4, atol=1e-6)
    plain = hax.nn.dot_product_attention("K", "D", q, k, v)
    np.testing.assert_allclose(
        plain.array, _reference(q.array, k.array, v.array), rtol=1e-4, atol=1e-6
    )


def test_attention_in_another_dtype_returns_the_querys():
    q, k, v = _normal(QPos, Key), _normal(KPos, Key, seed=1), _normal(KPos, Key, seed=2)
    q, k, v = (x.astype(jnp.bfloat16) for x in (q, k, v))
    out = attention.dot_product_attention(KPos, Key, q, k, v, attention_dtype=jnp.float32)
    assert out.dtype == jnp.bfloat16
    weights = attention.dot_product_attention_weights(Key, KPos, q, k, scaling_factor=0.0)
    np.testing.assert_allclose(weights.array.astype(jnp.float32), 1 / 5, rtol=1e-2)


def test_grouped_queries_need_no_repeat():
    Groups = hax.Axis("G", 2)
    q = _normal(B, Groups, H, QPos, Key)
    k, v = _normal(B, Groups, KPos, Key, seed=1), _normal(B, Groups, KPos, Key, seed=2)
    out = attention.dot_product_attention(KPos, Key, q, k, v)
    assert out.axes == (B, Groups, H, QPos, Key)
    for g in range(2):
        full = [np.broadcast_to(np.asarray(x.array)[:, g, None], (2, 3, 5, 6)) for x in (k, v)]
        expected = _reference(q.array[:, g], *full)
        np.testing.assert_allclose(out.array[:, g], expected, rtol=1e-4, atol=1e-6)


def test_causal_mask_with_offsets():
    np.testing.assert_array_equal(attention.causal_mask(QPos, KPos).array, np.tri(4, 5, dtype=bool))
    shifted = attention.causal_mask(QPos, KPos, q_start=1)
    np.testing.assert_array_equal(shifted.array, np.tri(4, 5, 1, dtype=bool))
    np.testing.assert_array_equal(
        attention.causal_mask(QPos, KPos, 0, 1).array, np.tri(4, 5, -1, dtype=bool)
    )
    per_row = attention.causal_mask(QPos, KPos, q_start=hax.named([0, 1], B))
    assert set(per_row.axes) == {B, QPos, KPos}
    np.testing.assert_array_equal(per_row["B", 1].rearrange((QPos, KPos)).array, shifted.array)


def test_prefix_lm_mask():
    found = attention.prefix_lm_mask(QPos, KPos, 2)
    expected = np.tri(4, 5, dtype=bool) | (np.arange(5) < 2)
    np.testing.assert_array_equal(found.array, expected)
    each = attention.prefix_lm_mask(QPos, KPos, hax.named([2, 0], B))
    np.testing.assert_array_equal(each["B", 0].rearrange((QPos, KPos)).array, expected)


def test_masks_combine_over_the_axes_of_either():
    causal, segments = attention.causal_mask(QPos, KPos), _normal(B, KPos) > 0
    both = attention.combine_masks_and(causal, segments)
    either = attention.combine_masks_or(causal, segments)
    expected = np.asarray(segments.array)[:, None]
    np.testing.assert_array_equal(
        both.rearrange(("B", "Q", "K")).array, np.tri(4, 5, dtype=bool) & expected
    )
    np.testing.assert_array_equal(
        either.rearrange(("B", "Q", "K")).array, np.tri(4, 5, dtype=bool) | expected
    )
    assert attention.combine_masks_and(None, causal) is causal
    assert attention.combine_masks_or(None, None) is None


def test_forgetful_mask_keeps_the_first_key():
    Long = hax.Axis("K", 5000)
    mask = attention.forgetful_causal_mask(Long, 0.4, sample_prob=False, key=jax.random.PRNGKey(0))
    assert bool(mask["K", 0])
    assert float(mask.astype(jnp.float32).mean()) == pytest.approx(0.6, abs=0.03)
    assert bool(attention.forgetful_causal_mask(Long, 0.0, key=jax.random.PRNGKey(0)).all())
    sampled = attention.forgetful_causal_mask(Long, 1.0, key=jax.random.PRNGKey(1))
    assert 0 < float(sampled.astype(jnp.float32).mean()) < 1


@pytest.mark.parametrize("heads", [8, 12])
def test_alibi_slopes(heads):
    Heads = hax.Axis("H", heads)
    bias = attention.alibi_attention_bias(Heads, KPos)
    assert bias.axes == (Heads, KPos)
    slopes = [2.0 ** -(i + 1) for i in range(8)]
    if heads == 12:
        slopes += [2.0 ** (-0.5 * (i + 1)) for i in range(16)][0::2][:4]
    np.testing.assert_allclose(bias.array, np.outer(slopes, np.arange(5)), rtol=1e-6)


def test_mask_to_bias_takes_what_is_masked_out():
    assert attention.mask_to_bias(hax.named([True, False], "K"), -5.0).tolist() == [-5.0, 0.0]
