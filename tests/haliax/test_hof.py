"""scan, fold, map, vmap, Stacked and BlockSeq loop over a name as a written-out loop does."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import haliax as hax
from haliax import ScanCheckpointPolicy
from haliax.nn import BlockSeq, Stacked

T, H, D = hax.make_axes(T=4, H=3, D=5)


def _normal(*axes, seed=0):
    return hax.random.normal(jax.random.PRNGKey(seed), axes)


def test_scan_slices_what_has_the_axis_wherever_it_is():
    x, w = _normal(H, T, D), _normal(D)

    def step(carry, xs, weights):
        assert xs.axes == (H, D)
        assert weights.axes == (D,)
        return carry + xs, (xs * weights).sum("D")

    last, ys = hax.scan(step, T)(hax.zeros((H, D)), x, w)
    np.testing.assert_allclose(last.array, x.array.sum(1), rtol=1e-5)
    assert ys.axes == (T, H)
    np.testing.assert_allclose(
        ys.array, (x.array * w.array[None, None]).sum(-1).T, rtol=1e-4, atol=1e-6
    )


def test_scan_of_plain_arrays_and_bystanders():
    def step(carry, xs, flag, scale, nothing):
        assert flag is True
        assert nothing is None
        return carry + scale * xs, carry

    last, ys = hax.scan(step, "T")(0.0, jnp.arange(4.0), True, 2.0, None)
    assert float(last) == 12
    np.testing.assert_array_equal(ys, [0, 0, 2, 6])


def test_scan_takes_keywords_reverse_and_unroll():
    step = lambda c, *, x: (c + x, c)
    for unroll in (1, 2):
        last, ys = hax.scan(step, T, reverse=True, unroll=unroll)(hax.named(0, ()), x=hax.arange(T))
        assert int(last) == 6
        assert ys.tolist() == [6, 5, 3, 0]


def test_scan_honours_is_scanned():
    bias = _normal(T)
    step = lambda c, x, b: (c + x + b.sum(), None)
    named_only = lambda leaf: hax.is_named_array(leaf) and leaf is not bias
    last, _ = hax.scan(step, T, is_scanned=named_only)(hax.named(0.0, ()), _normal(T, seed=1), bias)
    np.testing.assert_allclose(
        float(last), float(_normal(T, seed=1).sum() + 4 * bias.sum()), rtol=1e-5
    )


def test_a_carry_may_change_the_order_of_its_axes():
    last = hax.fold(lambda c, x: (c + x).rearrange(("D", "H")), T)(
        hax.zeros((H, D)), _normal(T, H, D)
    )
    assert last.axes == (H, D)
    np.testing.assert_allclose(last.array, _normal(T, H, D).array.sum(0), rtol=1e-5)


def test_fold_and_map():
    x = _normal(T, H)
    total = hax.fold(lambda c, xs: c * 0.5 + xs, T)(hax.zeros(H), x)
    expected = functools.reduce(
        lambda c, xs: c * 0.5 + xs, np.asarray(x.array), np.zeros(3, np.float32)
    )
    np.testing.assert_allclose(total.array, expected, rtol=1e-5)
    doubled = hax.map(lambda xs: {"d": xs * 2, "k": "static"}, T)(x)
    assert doubled["d"].axes == (T, H)
    assert doubled["k"] == "static"
    np.testing.assert_allclose(doubled["d"].array, x.array * 2)


def test_mismatches_name_the_argument():
    with pytest.raises(ValueError, match="y has leading dimension 1"):
        hax.fold(lambda c, x, y: c, T)(0.0, _normal(T), jnp.ones(1))

    class Foo(eqx.Module):
        my_array: jax.Array

    with pytest.raises(ValueError, match=r"foo\.my_array has leading dimension 7"):
        hax.scan(lambda c, foo: (c, None), T)(0.0, Foo(jnp.ones(7)))
    with pytest.raises(ValueError, match=r"x has axes \{'T': 9\}"):
        hax.map(lambda x: x, T)(_normal(T.resize(9)))


def _reference(x):
    c = np.float32(0)
    for t in range(4):
        c = np.sin(c + x[t])
    return c


POLICIES = [
    False, True, "recompute", "full", "save_all", "nested",
    ScanCheckpointPolicy(save_carries=True, save_inputs=True),
    ScanCheckpointPolicy(save_block_internals=["inner"]),
    ScanCheckpointPolicy(nested=2), ScanCheckpointPolicy(simple=True, prevent_cse=True),
]  # fmt: skip


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_checkpointing_changes_no_number(policy):
    def run(x, remat):
        def step(c, xs):
            inner = hax.jax_utils.tree_checkpoint_name(c + xs, "inner")
            return hax.sin(inner), inner

        last, ys = hax.scan(step, T, remat=remat)(hax.zeros(H), x)
        return (last.sum() + ys.sum()).scalar()

    x = _normal(T, H)
    value, gradient = jax.value_and_grad(run)(x, policy)
    expected, expected_gradient = jax.value_and_grad(run)(x, False)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(gradient.array, expected_gradient.array, rtol=1e-5)


@pytest.mark.parametrize(
    "policy", ["offload", ScanCheckpointPolicy(offload_block_internals=["inner"])], ids=str
)
def test_offloading_moves_residuals_to_the_host(policy):
    def run(x, remat):
        def step(c, xs):
            return hax.sin(hax.jax_utils.tree_checkpoint_name(c + xs, "inner")), None

        return hax.scan(step, T, remat=remat)(hax.zeros(H), x)[0].sum().scalar()

    x = _normal(T, H)
    gradient = jax.jit(jax.grad(run), static_argnums=1)
    np.testing.assert_allclose(gradient(x, policy).array, gradient(x, False).array, rtol=1e-6)
    assert "Host" in str(jax.make_jaxpr(lambda x: jax.grad(run)(x, policy))(x))


def _residuals(policy):
    """Shapes saved for the backward pass of a scan with a wide intermediate."""
    Wide = hax.Axis("wide", 50)

    def loss(x, w):
        def step(c, xs):
            wide = hax.jax_utils.tree_checkpoint_name(hax.sin(c.broadcast_axis(Wide) * xs), "wide")
            return hax.cos(wide).sum("wide"), None

        return hax.scan(step, T, remat=policy)(w, x)[0].sum().scalar()

    _, pull = jax.vjp(loss, _normal(T, H), _normal(H))
    return sorted(tuple(leaf.shape) for leaf in jax.tree_util.tree_leaves(pull))


def test_the_policy_decides_what_is_kept():
    everything, carries = _residuals(False), _residuals(True)
    assert (4, 50, 3) in everything
    assert not any(50 in shape for shape in carries)
    assert any(
        50 in shape for shape in _residuals(ScanCheckpointPolicy(save_block_internals=["wide"]))
    )
    assert not any(50 in shape for shape in _residuals("nested"))


def test_nested_checkpoints_keep_one_carry_per_group():
    flat, nested = _residuals("recompute"), _residuals(ScanCheckpointPolicy(nested=2))
    assert (4, 3) in flat
    assert (2, 3) in nested


def test_policies_have_names():
    assert ScanCheckpointPolicy.from_bool_or_str("offload").save_carries == "offload"
    with pytest.raises(ValueError, match="recompute"):
        ScanCheckpointPolicy.from_bool_or_str("sometimes")


def test_vmap_maps_what_has_the_axis():
    x, w = _normal(H, T, D), _normal(D)

    def dot(x, w):
        assert x.axes == (H, D)
        return hax.dot(x, w, axis=D)

    found = hax.vmap(dot, T)(x, w)
    assert found.axes == (T, H)
    np.testing.assert_allclose(
        found.array, jnp.einsum("htd,d->th", x.array, w.array), rtol=1e-5, atol=1e-6
    )


def test_vmap_over_a_new_axis_and_over_plain_arrays():
    assert hax.vmap(lambda: hax.ones(H), T)().axes == (T, H)
    keys = jax.random.split(jax.random.PRNGKey(0), 4)
    found = hax.vmap(lambda key: hax.random.normal(key, D), "T")(keys)
    assert found.axes == (T, D)
    np.testing.assert_array_equal(found.array[2], jax.random.normal(keys[2], 5))


def test_vmap_defaults_and_overrides():
    a = jnp.arange(8.0).reshape(2, 4)
    f = lambda x, y: x + y.sum()
    np.testing.assert_array_equal(hax.vmap(f, T, args=(1, None))(a, jnp.ones(3)), a.T + 3)
    np.testing.assert_array_equal(hax.vmap(f, T, args=(1,), default=None)(a, jnp.ones(3)), a.T + 3)
    np.testing.assert_array_equal(
        hax.vmap(f, T, args=(1,), kwargs={"y": None})(a, y=jnp.ones(3)), a.T + 3
    )
    named = hax.vmap(lambda x: x.sum(), T, args=(None,))(_normal(T))
    assert named.axes == (T,)
    np.testing.assert_allclose(named.array, np.full(4, float(_normal(T).sum())), rtol=1e-6)


def test_vmap_over_several_axes_puts_the_first_outermost():
    found = hax.vmap(lambda x: x.sum(), (D, T))(_normal(H, T, D))
    assert found.axes == (D, T)
    np.testing.assert_allclose(found.array, _normal(H, T, D).array.sum(0).T, rtol=1e-5)


def test_vmap_passes_through_what_is_no_array():
    found = hax.vmap(lambda x: (x, "name", None, 3, True), T)(_normal(T))
    assert found[1:] == ("name", None, 3, True)


def test_raw_vmap_is_told():
    with pytest.raises(ValueError, match=r"hax\.vmap"):
        jax.vmap(lambda x: x.sum("H"))(_normal(T, H))


def test_transformations_compose():
    def loss(w, x):
        per = hax.vmap(
            lambda xs: hax.fold(lambda c, v: hax.tanh(c * w + v), T)(hax.zeros(D), xs), H
        )
        return per(x).sum().scalar()

    x, w = _normal(T, H, D), _normal(D, seed=1)

    def raw(w, x):
        c = jnp.zeros((3, 5))
        for t in range(4):
            c = jnp.tanh(c * w[None] + x[t])
        return c.sum()

    gradient = jax.jit(jax.grad(loss))(w, x)
    np.testing.assert_allclose(gradient.array, jax.grad(raw)(w.array, x.array), rtol=1e-4)


class Block(eqx.Module):
    w: hax.NamedArray
    scale: jax.Array
    name: str = eqx.field(static=True)

    @staticmethod
    def init(In, scale, name):
        return Block(hax.ones(In) * scale, scale, name)

    def __call__(self, x, y=0.0, *, shift=0.0):
        return x * self.w + y + self.scale + shift


def _blocks(kind, **options):
    return kind.init(T, Block, **options)(D, jnp.arange(4.0), "b")


@pytest.mark.parametrize("kind", [Stacked, BlockSeq])
@pytest.mark.parametrize("checkpointing", [False, True, "nested"], ids=str)
def test_stacks_fold_scan_and_vmap(kind, checkpointing):
    if kind is BlockSeq and checkpointing == "nested":
        pytest.skip("a Python loop has no nesting")
    blocks, x = _blocks(kind, gradient_checkpointing=checkpointing), _normal(D)
    per_layer = _normal(T, seed=2)
    expected = np.asarray(x.array)
    for i in range(4):
        expected = expected * i + np.asarray(per_layer.array)[i] + i + 1.5
    found = blocks.fold(x, per_layer, shift=1.5)
    np.testing.assert_allclose(found.array, expected, rtol=1e-5)

    last, trail = blocks.scan_via(lambda block, c: (block(c), c.sum()))(x)
    np.testing.assert_allclose(last.array, blocks.fold(x).array, rtol=1e-5)
    assert trail.axes == (T,)

    spread = blocks.vmap(x)
    assert spread.axes == (T, D)
    np.testing.assert_allclose(spread.array[2], np.asarray(x.array) * 2 + 2, rtol=1e-5)
    folded = blocks.fold_via(lambda block, c, s: block(c) * s)(x, 2.0)
    assert folded.axes == (D,)


@pytest.mark.parametrize("kind", [Stacked, BlockSeq])
def test_scan_wants_pairs(kind):
    with pytest.raises(ValueError, match="fold"):
        _blocks(kind).scan(_normal(D))


@pytest.mark.parametrize("kind", [Stacked, BlockSeq])
def test_unstacked_gives_the_blocks(kind):
    layers = _blocks(kind).unstacked()
    assert len(layers) == 4
    assert layers[3].w.axes == (D,)
    assert float(layers[3].scale) == 3
    assert layers[2].name == "b"


def test_both_stacks_share_a_state_dict():
    stacked, seq = _blocks(Stacked), _blocks(BlockSeq)
    one, other = (hax.state_dict.to_state_dict(b, "h") for b in (stacked, seq))
    assert (
        sorted(one)
        == sorted(other)
        == sorted(f"h.{i}.{n}" for i in range(4) for n in ("w", "scale"))
    )
    for key, array in one.items():
        np.testing.assert_array_equal(array, other[key])
    doubled = {key: array * 2 for key, array in one.items()}
    for kind in (stacked, seq):
        loaded = hax.state_dict.from_state_dict(kind, doubled, "h")
        np.testing.assert_array_equal(loaded.unstacked()[3].w.array, np.full(5, 6.0))
    with pytest.raises(KeyError, match=r"h\.0\.w"):
        hax.state_dict.from_state_dict(stacked, {}, "h")


def test_flags_in_stacked_blocks_stay_python():
    class Noisy(eqx.Module):
        w: hax.NamedArray
        dropout: hax.nn.Dropout
        temperature: float

        @staticmethod
        def init(key):
            return Noisy(hax.random.normal(key, D), hax.nn.Dropout(0.5), 2.0)

        def __call__(self, x, *, key=None):
            return self.dropout(x * self.w, key=key) / self.temperature

    keys = jax.random.split(jax.random.PRNGKey(0), 4)
    stack = Stacked.init(T, Noisy)(keys)
    assert stack.stacked.dropout.inference is False
    assert stack.stacked.temperature == 2.0
    dropped = stack.fold(hax.ones(D), key=keys)
    assert float((dropped == 0).sum()) > 0
    off = eqx.nn.inference_mode(stack)
    expected = np.prod(np.asarray(stack.stacked.w.array) / 2.0, axis=0)
    np.testing.assert_allclose(off.fold(hax.ones(D)).array, expected, rtol=1e-5)


def test_calling_a_stack_says_what_to_call():
    with pytest.raises(TypeError, match="fold"):
        _blocks(Stacked)(_normal(D))


def test_stacked_compiles_its_block_once():
    traces = []

    class Counting(eqx.Module):
        w: hax.NamedArray

        @staticmethod
        def init(key):
            return Counting(hax.random.normal(key, D))

        def __call__(self, x):
            traces.append(1)
            return x * self.w

    deep = hax.Axis("layers", 64)
    stack = Stacked.init(deep, Counting)(jax.random.split(jax.random.PRNGKey(0), 64))
    jax.jit(lambda x: stack.fold(x))(_normal(D))
    assert len(traces) <= 2
