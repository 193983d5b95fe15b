"""Names cost nothing once compiled: a GPT-2 block compiles to what hand-written jnp compiles to."""

import collections
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import haliax as hax

Batch, Pos, KPos, Embed, Heads, HeadSize, Mlp = hax.make_axes(
    batch=2, position=8, key_position=8, embed=12, heads=3, head_size=4, mlp=48
)


class Block(eqx.Module):
    """A GPT-2 block: attention and a perceptron, each after a layer norm and added to its input."""

    ln_1: hax.nn.LayerNorm
    qkv: hax.nn.Linear
    proj: hax.nn.Linear
    ln_2: hax.nn.LayerNorm
    up: hax.nn.Linear
    down: hax.nn.Linear

    @staticmethod
    def init(key):
        keys = jax.random.split(key, 4)
        Qkv = hax.Axis("qkv", 3)
        return Block(
            hax.nn.LayerNorm.init(Embed),
            hax.nn.Linear.init(Embed, (Qkv, Heads, HeadSize), key=keys[0]),
            hax.nn.Linear.init((Heads, HeadSize), Embed, key=keys[1]),
            hax.nn.LayerNorm.init(Embed),
            hax.nn.Linear.init(Embed, Mlp, key=keys[2]),
            hax.nn.Linear.init(Mlp, Embed, key=keys[3]),
        )

    def __call__(self, x):
        q, k, v = self.qkv(self.ln_1(x)).unbind("qkv")
        k, v = (y.rename({"position": "key_position"}) for y in (k, v))
        mask = hax.nn.attention.causal_mask(Pos, KPos)
        attended = hax.nn.dot_product_attention("key_position", "head_size", q, k, v, mask)
        x = x + self.proj(attended)
        return x + self.down(hax.nn.gelu(self.up(self.ln_2(x))))


def _by_hand(p, x):
    def norm(x, weight, bias):
        centered = x - x.mean(-1, keepdims=True)
        scale = jax.lax.rsqrt((centered * centered).mean(-1, keepdims=True) + 1e-5)
        return centered * scale * weight[None, None] + bias[None, None]

    qkv = jnp.einsum("bpe,qhde->bpqhd", norm(x, *p["ln_1"]), p["qkv"][0]) + p["qkv"][1][None, None]
    q, k, v = (jnp.squeeze(part, 2) for part in jnp.split(qkv, 3, 2))
    scores = jnp.einsum("bphd,bkhd->bphk", q * (1 / np.sqrt(4).astype(np.float32)), k)
    mask = jnp.arange(8)[:, None] >= jnp.arange(8)[None]
    weights = jax.nn.softmax(jnp.where(mask[None, :, None], scores, jnp.float32(-1e9)), -1)
    attended = jnp.einsum("bphk,bkhd->bphd", weights, v)
    x = x + jnp.einsum("bphd,ehd->bpe", attended, p["proj"][0]) + p["proj"][1][None, None]
    hidden = jax.nn.gelu(
        jnp.einsum("bpe,me->bpm", norm(x, *p["ln_2"]), p["up"][0]) + p["up"][1][None, None]
    )
    return x + (jnp.einsum("bpm,em->bpe", hidden, p["down"][0]) + p["down"][1][None, None])


def _named_loss(block, x):
    return (block(x) ** 2).mean().scalar()


def _plain_loss(p, x):
    return (_by_hand(p, x) ** 2).mean()


@pytest.fixture(scope="module")
def both():
    block = Block.init(jax.random.PRNGKey(0))
    x = hax.random.normal(jax.random.PRNGKey(1), (Batch, Pos, Embed))
    parts = ("ln_1", "qkv", "proj", "ln_2", "up", "down")
    plain = {n: (getattr(block, n).weight.array, getattr(block, n).bias.array) for n in parts}
    named = jax.jit(jax.value_and_grad(_named_loss)).lower(block, x).compile()
    by_hand = jax.jit(jax.value_and_grad(_plain_loss)).lower(plain, x.array).compile()
    return (named, block, x), (by_hand, plain, x.array)


def _operations(compiled):
    """How often each operation occurs, inside fusions too."""
    found = re.findall(r"= \S+ ([a-z\-]+)\(", compiled.as_text())
    return collections.Counter(found)


def test_the_numbers_agree(both):
    (named, block, x), (by_hand, plain, raw) = both
    value, grad = named(block, x)
    expected, expected_grad = by_hand(plain, raw)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(grad.qkv.weight.array, expected_grad["qkv"][0], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    "operation", ["dot", "transpose", "copy", "gather", "reduce", "exponential"]
)
def test_no_extra_operations(both, operation):
    (named, *_), (by_hand, *_) = both
    counts, expected = _operations(named), _operations(by_hand)
    assert expected["dot"] > 0
    assert counts[operation] <= expected[operation]


def test_the_program_is_no_bigger(both):
    (named, *_), (by_hand, *_) = both
    assert sum(_operations(named).values()) <= 1.02 * sum(_operations(by_hand).values())
    assert named.cost_analysis()["flops"] <= 1.01 * by_hand.cost_analysis()["flops"]
