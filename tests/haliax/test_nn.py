"""Layers, activations and losses, against plain jnp or Equinox."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import haliax as hax
from haliax import NamedArray

B, S, E, F, V = hax.make_axes(batch=2, seq=3, embed=4, mlp=6, vocab=7)
KEY = jax.random.PRNGKey(0)


def _normal(*axes, seed=0):
    return hax.random.normal(jax.random.PRNGKey(seed), axes)


def test_linear_maps_any_axes_to_any_others():
    Heads, Size = hax.make_axes(heads=2, size=3)
    layer = hax.nn.Linear.init((S, E), (Heads, Size), key=KEY)
    assert layer.weight.axes == (Heads, Size, S, E)
    x = _normal(B, S, E, seed=1)
    out = layer(x)
    assert out.axes == (B, Heads, Size)
    np.testing.assert_allclose(
        out.array, jnp.einsum("bse,hkse->bhk", x.array, layer.weight.array), rtol=1e-5, atol=1e-6
    )
    assert hax.nn.Linear.init(E, F, key=KEY, out_first=False).weight.axes == (E, F)
    assert hax.nn.Linear.init(E, (), key=KEY)(_normal(B, E)).axes == (B,)


def test_linear_initializes_by_fan_in():
    Wide = hax.Axis("wide", 4096)
    layer = hax.nn.Linear.init(Wide, E, key=KEY, init_scale=2.0)
    assert float(layer.weight.std()) == pytest.approx(2.0 * 0.9866 / math.sqrt(4096), rel=0.02)
    assert float(hax.abs(layer.bias).max()) == 0
    assert hax.nn.Linear.init(E, F, key=KEY, use_bias=False).bias is None


def test_linear_has_only_array_leaves():
    leaves = jax.tree_util.tree_leaves(hax.nn.Linear.init(E, F, key=KEY))
    assert len(leaves) == 2
    assert all(eqx.is_array(leaf) for leaf in leaves)


def test_linear_flattens_for_export_and_back():
    Heads, Size = hax.make_axes(heads=2, size=3)
    for out_first in (True, False):
        layer = hax.nn.Linear.init((S, E), (Heads, Size), key=KEY, out_first=out_first)
        flat = layer.flatten_for_export()
        names = ("__OUT__", "__IN__") if out_first else ("__IN__", "__OUT__")
        assert tuple(a.name for a in flat.weight.axes) == names
        back = flat.unflatten_from_export(layer)
        assert back.weight.axes == layer.weight.axes
        np.testing.assert_array_equal(back.weight.array, layer.weight.array)
    scalar = hax.nn.Linear.init(E, (), key=KEY).flatten_for_export()
    assert scalar.weight.shape == {"__OUT__": 1, "__IN__": 4}


def test_embedding_embeds_and_unembeds():
    layer = hax.nn.Embedding.init(V, E, key=KEY)
    ids = hax.named([[1, 6, 0], [2, 2, 5]], (B, S))
    np.testing.assert_array_equal(layer(ids).array, layer.weight.array[ids.array])
    assert layer(ids).axes == (B, S, E)
    logits = layer.unembed(_normal(B, S, E))
    assert logits.axes == (B, S, V)
    wide = hax.nn.Embedding.init(hax.Axis("v", 512), hax.Axis("e", 64), key=KEY)
    assert float(wide.weight.std()) == pytest.approx(0.9866 / 64, rel=0.02)


def test_embeddings_resize():
    layer = hax.nn.Embedding.init(V, E, key=KEY)
    np.testing.assert_array_equal(layer.resize_embeddings(3).weight.array, layer.weight.array[:3])
    grown = layer.resize_embeddings(9)
    assert grown.Vocab.size == 9
    np.testing.assert_array_equal(grown.weight.array[:7], layer.weight.array)
    np.testing.assert_allclose(grown.weight.array[8], layer.weight.array.mean(0), rtol=1e-5)
    random_rows = layer.resize_embeddings(9, key=KEY).weight.array[7:]
    assert not np.allclose(random_rows[0], random_rows[1])


def test_layer_norm():
    x = _normal(B, E, S)
    layer = hax.nn.LayerNorm.init(E)
    layer = eqx.tree_at(
        lambda m: (m.weight, m.bias), layer, (_normal(E, seed=1), _normal(E, seed=2))
    )
    raw = jnp.moveaxis(x.array, 1, 2)
    expected = (raw - raw.mean(-1, keepdims=True)) / jnp.sqrt(raw.var(-1, keepdims=True) + 1e-5)
    expected = expected * layer.weight.array[None, None] + layer.bias.array[None, None]
    assert layer(x).axes == (B, E, S)
    np.testing.assert_allclose(jnp.moveaxis(layer(x).array, 1, 2), expected, rtol=1e-4, atol=1e-6)
    both = hax.nn.LayerNorm.init((E, S), use_weight=False, use_bias=False)(x)
    np.testing.assert_allclose(both.array.mean((1, 2)), 0, atol=1e-6)


def test_rms_norm_computes_wide_and_casts_back():
    x = (_normal(B, E) * 100).astype(jnp.bfloat16)
    layer = hax.nn.RmsNorm.init(E, use_weight=False, use_bias=False, eps=1e-6)
    out = layer(x)
    assert out.dtype == jnp.bfloat16
    raw = x.array.astype(jnp.float32)
    expected = raw / np.sqrt((raw**2).mean(-1, keepdims=True) + 1e-6)
    np.testing.assert_array_equal(out.array, expected.astype(jnp.bfloat16))


def test_dropout_keeps_the_mean_and_needs_a_key():
    Wide = hax.Axis("wide", 20_000)
    x = hax.ones((B, Wide))
    dropped = hax.nn.Dropout(0.25)(x, key=KEY)
    kept = float((dropped != 0).mean())
    assert kept == pytest.approx(0.75, abs=0.01)
    np.testing.assert_allclose(np.unique(dropped.array), [0, 1 / 0.75], rtol=1e-6)
    together = hax.nn.dropout(x, 0.5, broadcast_axes=B, key=KEY)
    np.testing.assert_array_equal(together.array[0], together.array[1])
    with pytest.raises(RuntimeError, match="key"):
        hax.nn.Dropout(0.25)(x)
    assert hax.nn.Dropout(0.25, inference=True)(x) is x
    assert hax.nn.Dropout(0.0)(x) is x
    assert not eqx.nn.inference_mode(hax.nn.Dropout(0.5)).is_active()


ACTIVATIONS = [
    "celu",
    "elu",
    "gelu",
    "hard_sigmoid",
    "hard_silu",
    "hard_swish",
    "hard_tanh",
    "leaky_relu",
    "log_sigmoid",
    "mish",
    "relu",
    "relu6",
    "selu",
    "sigmoid",
    "silu",
    "soft_sign",
    "softplus",
    "swish",
]


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_those_of_jax(name):
    x = _normal(B, E)
    found = getattr(hax.nn, name)(x)
    assert found.axes == (B, E)
    np.testing.assert_array_equal(found.array, getattr(jax.nn, name)(x.array))
    assert not isinstance(getattr(hax.nn, name)(x.array), NamedArray)


def test_further_activations():
    x = _normal(B, E)
    np.testing.assert_allclose(
        hax.nn.quick_gelu(x).array, x.array * jax.nn.sigmoid(1.702 * x.array), rtol=1e-6
    )
    np.testing.assert_allclose(hax.nn.relu_squared(x).array, jax.nn.relu(x.array) ** 2)
    exact = hax.nn.gelu(x, approximate=False).array
    np.testing.assert_array_equal(exact, jax.nn.gelu(x.array, approximate=False))
    assert hax.nn.glu(x, "embed").shape == {"batch": 2, "embed": 2}
    np.testing.assert_array_equal(hax.nn.glu(x, "embed").array, jax.nn.glu(x.array, 1))


def test_one_hot():
    x = hax.named([[1, 6, 0], [2, 9, 5]], (B, S))
    found = hax.nn.one_hot(x, V)
    assert found.axes == (B, S, V)
    np.testing.assert_array_equal(found.array, jax.nn.one_hot(x.array, 7))
    assert float(found["batch", 1, "seq", 1].sum()) == 0
    assert hax.nn.one_hot(2, V, dtype=jnp.int32).tolist() == [0, 0, 1, 0, 0, 0, 0]
    with pytest.raises(AssertionError):
        hax.nn.one_hot(7, V)
    with pytest.raises(TypeError):
        hax.nn.one_hot(2.0, V)


def _nll(logits, ids):
    return -np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), ids[..., None], -1)[..., 0]


def test_cross_entropy_of_class_numbers_is_exact():
    logits, ids = _normal(B, V, S), hax.named([[1, 6, 0], [2, 2, 5]], (B, S))
    expected = _nll(np.moveaxis(np.asarray(logits.array), 1, 2), np.asarray(ids.array))
    each = hax.nn.cross_entropy_loss(logits, V, ids, reduction=None)
    assert each.axes == (B, S)
    np.testing.assert_allclose(each.array, expected, rtol=1e-5)
    assert float(hax.nn.cross_entropy_loss(logits, "vocab", ids)) == pytest.approx(
        expected.mean(), rel=1e-5
    )
    one_hot = hax.nn.one_hot(ids, V)
    np.testing.assert_allclose(
        hax.nn.cross_entropy_loss(logits, V, one_hot, reduction=None).array, expected, rtol=1e-5
    )
    np.testing.assert_allclose(
        hax.nn.cross_entropy_loss(logits, V, one_hot.astype(jnp.int32), reduction=None).array,
        expected,
        rtol=1e-5,
    )


def test_cross_entropy_gradient_is_softmax_minus_one_hot():
    logits, ids = _normal(S, V), hax.named([1, 6, 0], S)
    loss = lambda x: hax.nn.cross_entropy_loss(x, V, ids, reduction=hax.sum).scalar()
    expected = jax.nn.softmax(logits.array) - jax.nn.one_hot(ids.array, 7)
    np.testing.assert_allclose(jax.grad(loss)(logits).array, expected, rtol=1e-5, atol=1e-6)


def test_losses_reduce_over_what_counts():
    logits, ids = _normal(B, S, V), hax.named([[1, 6, 0], [2, -1, 5]], (B, S))
    mask = ids >= 0
    expected = _nll(np.asarray(logits.array), np.asarray(ids.array).clip(0))
    found = hax.nn.cross_entropy_loss(logits, V, ids, where=mask)
    assert float(found) == pytest.approx(expected[np.asarray(mask.array)].mean(), rel=1e-5)
    per_row = hax.nn.cross_entropy_loss(logits, V, ids, hax.sum, mask, reduction_axis=S)
    np.testing.assert_allclose(per_row.array, (expected * np.asarray(mask.array)).sum(1), rtol=1e-5)
    gradient = jax.grad(lambda x: hax.nn.cross_entropy_loss(x, V, ids, where=mask).scalar())(logits)
    assert bool(hax.isfinite(gradient).all())
    # Counted, a class that does not exist has no loss.
    assert math.isnan(float(hax.nn.cross_entropy_loss(logits, V, ids)))
    kept = hax.nn.cross_entropy_loss(logits, V, ids, reduction=None, where=mask)
    assert float(kept["batch", 1, "seq", 1]) == 0


def test_cross_entropy_gives_log_normalizers():
    logits = _normal(B, V)
    ids = hax.named([1, 2], B)
    _, log_z = hax.nn.cross_entropy_loss_and_log_normalizers(logits, V, ids)
    np.testing.assert_allclose(log_z.array, jax.nn.logsumexp(logits.array, -1), rtol=1e-6)


def test_binary_cross_entropy():
    logits, targets = _normal(B, S), hax.named([[1, 0, 1], [0, 0, 1]], (B, S))
    p = jax.nn.sigmoid(logits.array)
    expected = -np.where(targets.array == 1, np.log(p), np.log(1 - p))
    found = hax.nn.binary_cross_entropy_loss(logits, targets, reduction=None)
    np.testing.assert_allclose(found.array, expected, rtol=1e-5)
    assert float(hax.nn.binary_cross_entropy_loss(logits, targets)) == pytest.approx(
        expected.mean(), rel=1e-5
    )


def test_mlp():
    net = hax.nn.MLP.init(E, V, 8, 3, key=KEY, activation=hax.nn.gelu)
    assert [axis.Out.name for axis in net.layers] == ["mlp", "mlp2", "mlp", "vocab"]
    x = _normal(B, E)
    raw = x.array
    for i, layer in enumerate(net.layers):
        raw = raw @ layer.weight.array.T
        raw = jax.nn.gelu(raw) if i < 3 else raw
    assert net(x).axes == (B, V)
    np.testing.assert_allclose(net(x).array, raw, rtol=1e-4, atol=1e-6)
    assert len(hax.nn.MLP.init(E, F, 8, 0, key=KEY).layers) == 1
    wide = hax.nn.MLP.init(E, V, hax.Axis("hidden", 8), 2, key=KEY, use_final_bias=False)
    assert [layer.Out.name for layer in wide.layers] == ["hidden", "hidden2", "vocab"]
    assert wide.layers[-1].bias is None


@pytest.mark.parametrize("use_gmm", [False, True])
def test_moe_linear_uses_each_tokens_expert(use_gmm):
    Experts, Tokens = hax.make_axes(experts=3, tokens=5)
    layer = hax.nn.MoELinear.init(Experts, E, F, key=KEY, use_gmm=use_gmm)
    layer = eqx.tree_at(lambda m: m.bias, layer, _normal(Experts, F, seed=2))
    x = _normal(Tokens, E, seed=1)
    out = layer(x, hax.named(jnp.array([2, 0, 3]), Experts))
    expert = np.array([0, 0, 2, 2, 2])
    expected = np.einsum("te,tef->tf", x.array, np.asarray(layer.weight.array)[expert])
    assert out.axes == (Tokens, F)
    np.testing.assert_allclose(
        out.array, expected + np.asarray(layer.bias.array)[expert], rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    "options",
    [{}, {"stride": 2, "padding": 1}, {"padding": "SAME", "dilation": 2}, {"groups": 2}],
    ids=str,
)
def test_conv_is_that_of_equinox(options):
    Height, Width, In, Out = hax.make_axes(height=6, width=7, channel=4, out=8)
    x = _normal(B, Height, In, Width)
    layer = hax.nn.Conv.init(("height", "width"), In, Out, 3, key=KEY, **options)
    reference = eqx.nn.Conv2d(4, 8, 3, key=KEY, **options)
    reference = eqx.tree_at(
        lambda m: (m.weight, m.bias),
        reference,
        (layer.weight.array, layer.bias.array.reshape(8, 1, 1)),
    )
    expected = jax.vmap(reference)(jnp.moveaxis(x.array, 2, 1))
    out = layer(x)
    assert [a.name for a in out.axes] == ["batch", "height", "out", "width"]
    np.testing.assert_allclose(jnp.moveaxis(out.array, 2, 1), expected, rtol=1e-4, atol=1e-5)


def test_conv_transpose_is_that_of_equinox():
    Length, In = hax.make_axes(length=5, channel=4)
    x = _normal(In, Length)
    options = {"stride": 2, "padding": 1, "output_padding": 1}
    layer = hax.nn.ConvTranspose.init(Length, In, In, 3, key=KEY, **options)
    reference = eqx.nn.ConvTranspose1d(4, 4, 3, key=KEY, **options)
    reference = eqx.tree_at(
        lambda m: (m.weight, m.bias),
        reference,
        (layer.weight.array, layer.bias.array.reshape(4, 1)),
    )
    out = layer(x)
    assert [a.name for a in out.axes] == ["channel", "length"]
    np.testing.assert_allclose(out.array, reference(x.array), rtol=1e-4, atol=1e-5)


def test_pools():
    Height, Width = hax.make_axes(height=4, width=5)
    x = _normal(Height, B, Width)
    windows = np.asarray(x.array)[:, :, :4].reshape(2, 2, 2, 2, 2)
    pool = (Height.resize(2), Width.resize(2))
    for name, reduce in (("max_pool", np.max), ("min_pool", np.min), ("mean_pool", np.mean)):
        found = getattr(hax.nn, name)(pool, x, stride=2)
        assert found.shape == {"height": 2, "batch": 2, "width": 2}
        np.testing.assert_allclose(found.array, reduce(windows, axis=(1, 4)), rtol=1e-5)
        assert getattr(hax.nn, name)(pool, x, stride=2, use_ceil=True).shape["width"] == 3
        assert getattr(hax.nn, name)(pool, x, 1, "SAME").shape == x.shape
    edge = hax.nn.mean_pool(Width.resize(2), hax.ones(Width), 2, padding=1)
    np.testing.assert_allclose(edge.array, np.ones(3))
    padded = hax.nn.mean_pool(
        Width.resize(2), hax.ones(Width), 2, padding=1, count_include_pad=True
    )
    np.testing.assert_allclose(padded.array, [0.5, 1, 1])
    assert hax.nn.max_pool(Width.resize(2), hax.arange(Width)).tolist() == [1, 2, 3, 4]


def test_a_frequent_tokens_gradient_keeps_growing_in_bfloat16():
    Vocab, Embed, Pos = hax.make_axes(vocab=8, embed=4, position=4096)
    weight = hax.ones((Vocab, Embed), jnp.bfloat16)
    ids = hax.zeros(Pos, jnp.int32)

    @jax.jit
    def gradient(weight):
        def total(weight):
            return hax.sum(hax.nn.Embedding(weight, Vocab, Embed).embed(ids)).scalar()

        return jax.grad(lambda w: total(w).astype(jnp.float32))(weight)

    found = gradient(weight)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found["vocab", 0].array.astype(jnp.float32), 4096.0)
    np.testing.assert_array_equal(found["vocab", 1:].array.astype(jnp.float32), 0.0)
