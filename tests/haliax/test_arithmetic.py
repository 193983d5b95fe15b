# ruff: noqa: E501 - tables read best with one row a line
"""Operators, elementwise functions, broadcasting, reductions and functions along an axis, against jnp."""

import inspect
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import haliax as hax
from haliax import NamedArray, elementwise, reductions

H, W, D = hax.make_axes(H=2, W=3, D=4)


def _normal(*axes, seed=0):
    return hax.random.normal(jax.random.PRNGKey(seed), axes)


X = np.array([[0.3, 0.7, 0.2], [0.9, 0.4, 0.6]], np.float32)


def _tabled(*parameters):
    """Names of the functions in the table that take these parameters first."""
    found = []
    for name, value in vars(elementwise).items():
        is_lifted = callable(value) and (value.__doc__ or "").startswith("`jnp.")
        if (
            is_lifted
            and tuple(inspect.signature(value).parameters)[: len(parameters)] == parameters
        ):
            found.append(name)
    return sorted(found)


UNARY, BINARY = _tabled("a"), _tabled("x1", "x2")
INTEGER = {
    "bitwise_and", "bitwise_count", "bitwise_invert", "bitwise_left_shift", "bitwise_not", "bitwise_or",
    "bitwise_right_shift", "bitwise_xor", "gcd", "invert", "lcm", "left_shift", "right_shift", "ldexp",
}  # fmt: skip


def _jnp(name):
    return {"fix": jnp.trunc, "rsqrt": jax.lax.rsqrt}.get(name) or getattr(jnp, name)


def test_the_tables_are_whole():
    assert len(UNARY) >= 60
    assert len(BINARY) >= 40


@pytest.mark.parametrize("name", UNARY)
def test_unary_functions_are_those_of_jnp(name):
    raw = jnp.asarray(X * 10, jnp.int32) if name in INTEGER else jnp.asarray(X)
    expected = _jnp(name)(raw)
    found = getattr(hax, name)(hax.named(raw, (H, W)))
    for part, wanted in zip(
        jax.tree_util.tree_leaves(found), jax.tree_util.tree_leaves(expected), strict=True
    ):
        np.testing.assert_array_equal(part, wanted)
    parts = found if isinstance(found, tuple) else (found,)
    assert all(part.axes == (H, W) for part in parts)
    assert not isinstance(getattr(hax, name)(raw), NamedArray)


@pytest.mark.parametrize("name", BINARY)
def test_binary_functions_broadcast_by_name(name):
    kind = jnp.int32 if name in INTEGER else jnp.float32
    big, small = jnp.asarray(X * 10, kind), jnp.asarray([2, 1], kind)
    if name == "ldexp":
        big = big.astype(jnp.float32)
    expected = _jnp(name)(big, jnp.broadcast_to(small[:, None], (2, 3)))
    found = getattr(hax, name)(hax.named(big, (H, W)), hax.named(small, H))
    for part, wanted in zip(
        jax.tree_util.tree_leaves(found), jax.tree_util.tree_leaves(expected), strict=True
    ):
        np.testing.assert_array_equal(part, wanted)
    parts = found if isinstance(found, tuple) else (found,)
    assert all(part.axes == (H, W) for part in parts)


OPERATORS = [
    operator.add, operator.sub, operator.mul, operator.truediv, operator.floordiv, operator.mod,
    operator.pow, operator.lt, operator.le, operator.gt, operator.ge, operator.eq, operator.ne, divmod,
]  # fmt: skip


@pytest.mark.parametrize("op", OPERATORS, ids=lambda op: op.__name__)
def test_operators_take_arrays_and_numbers_on_either_side(op):
    a, b = hax.named(X, (H, W)), hax.named(X.T.copy() + 1, (W, H))
    for left, right, raw_left, raw_right in (
        (a, b, jnp.asarray(X), jnp.asarray(X) + 1),
        (a, 2.0, jnp.asarray(X), 2.0),
        (2.0, a, 2.0, jnp.asarray(X)),
        (a, jnp.float32(2), jnp.asarray(X), jnp.float32(2)),
    ):
        found, expected = op(left, right), op(raw_left, raw_right)
        parts = found if isinstance(found, tuple) else (found,)
        wanted = expected if isinstance(expected, tuple) else (expected,)
        for part, want in zip(parts, wanted, strict=True):
            assert part.axes == (H, W)
            np.testing.assert_allclose(part.array, want, rtol=1e-6)


@pytest.mark.parametrize(
    "op", [operator.and_, operator.or_, operator.xor, operator.lshift, operator.rshift]
)
def test_bitwise_operators(op):
    a, b = hax.arange((H, W)), hax.arange(W) + 1
    np.testing.assert_array_equal(op(a, b).array, op(a.array, jnp.broadcast_to(b.array, (2, 3))))
    np.testing.assert_array_equal(op(a, 1).array, op(a.array, 1))
    np.testing.assert_array_equal((~a).array, ~a.array)


def test_matmul_asks_for_an_axis():
    with pytest.raises(ValueError, match=r"hax\.dot"):
        _normal(H, W) @ _normal(W, D)


@pytest.mark.parametrize("other", [None, "H", object()])
def test_equality_with_no_array_is_an_error(other):
    with pytest.raises(ValueError, match="elementwise"):
        _ = _normal(H) == other


def test_a_zero_axis_array_lends_its_value_to_plain_arrays():
    found = hax.named(jnp.array(2.0), ()) * jnp.ones(3)
    assert not isinstance(found, NamedArray)
    np.testing.assert_array_equal(found, 2 * np.ones(3))


def test_equal_sets_take_the_order_of_the_left():
    a, b = _normal(H, W), _normal(W, H, seed=1)
    assert (a + b).axes == (H, W)
    assert (b + a).axes == (W, H)
    np.testing.assert_allclose((a + b).array, a.array + b.array.T)


def test_subsets_take_the_order_of_the_container():
    a, b = _normal(D), _normal(H, D, W)
    assert (a * b).axes == (H, D, W)
    np.testing.assert_allclose((a * b).array, a.array[None, :, None] * b.array, rtol=1e-6)


def test_overlap_is_no_reason_to_broadcast():
    with pytest.raises(ValueError, match="no subset"):
        _normal(H, W) + _normal(W, D)


def test_broadcast_axis_adds_in_front():
    Q = hax.Axis("Q", 5)
    x = _normal(H, W)
    assert x.broadcast_axis(Q).axes == (Q, H, W)
    assert x.broadcast_axis((W, Q)).axes == (W, Q, H)
    assert x.broadcast_axis(H) is x
    np.testing.assert_array_equal(x.broadcast_axis(Q).array, np.broadcast_to(x.array, (5, 2, 3)))


def test_broadcast_to_orders_and_refuses_extras():
    x = _normal(H, W)
    assert x.broadcast_to((W, D, "H")).axes == (W, D, H)
    np.testing.assert_array_equal(
        x.broadcast_to((W, D, "H")).array,
        np.broadcast_to(np.asarray(x.array).T[:, None], (3, 4, 2)),
    )
    with pytest.raises(ValueError, match="not in"):
        x.broadcast_to((W, D))
    assert x.broadcast_to((W, D), enforce_no_extra_axes=False).axes == (W, D, H)
    assert x.broadcast_to((D, W), False, False).axes == (D, H, W)


def test_broadcast_arrays_fits_each_to_the_biggest():
    x, lo, hi = _normal(H, W, D), _normal(W, H), _normal(D)
    a, none, b, c = hax.broadcast_arrays(lo, None, x, hi)
    assert none is None
    assert a.axes == b.axes == c.axes == (H, W, D)
    with pytest.raises(ValueError, match="no subset"):
        hax.broadcast_arrays(_normal(H), _normal(W))
    first, second = hax.broadcast_arrays(_normal(H), _normal(W), require_subset=False)
    assert set(first.axes) == set(second.axes) == {H, W}


def test_clip_bounds_need_only_fit_the_biggest():
    x = _normal(H, W, D)
    lo, hi = -hax.ones((H, W)) * 0.5, hax.ones((W, D)) * 0.25
    np.testing.assert_array_equal(hax.clip(x, lo, hi).array, jnp.clip(x.array, -0.5, 0.25))
    np.testing.assert_array_equal(x.clip(0.0, None).array, jnp.clip(x.array, 0.0, None))


def test_where_broadcasts_all_three():
    c, x = hax.arange(H) > 0, _normal(H, W)
    found = hax.where(c, x, 0.0)
    assert found.axes == (H, W)
    np.testing.assert_array_equal(found.array, jnp.where(np.array([[False], [True]]), x.array, 0.0))
    assert hax.where(c, 1.0, 0.0).axes == (H,)
    np.testing.assert_array_equal(hax.where(True, x, 0.0).array, x.array)
    np.testing.assert_array_equal(jax.jit(lambda p: hax.where(p, x, -x))(False).array, -x.array)


def test_where_of_a_condition_alone_gives_positions():
    x = hax.named([[0, 1], [1, 0]], ("a", "b"))
    rows, columns = hax.where(x == 1, fill_value=-1, new_axis=hax.Axis("hits", 3))
    assert rows.tolist() == [0, 1, -1]
    assert columns.tolist() == [1, 0, -1]
    assert rows.axes == (hax.Axis("hits", 3),)


def test_comparisons_up_to_tolerance_ignore_order():
    x = _normal(H, W)
    y = x.rearrange(("W", "H"))
    assert bool(hax.array_equal(x, y))
    assert not bool(hax.array_equal(x, y + 1))
    assert not bool(hax.array_equal(x, x.rename({"H": "Q"})))
    assert bool(hax.allclose(x, y * (1 + 1e-7)))
    assert hax.isclose(x, y).axes == (H, W)
    assert bool(hax.array_equiv(hax.ones(H), hax.ones((H, W))))


REDUCTIONS = [
    "all", "any", "amax", "amin", "max", "mean", "min", "prod", "product", "sum", "std", "var", "ptp",
    "median", "nanmax", "nanmean", "nanmin", "nanprod", "nanstd", "nansum", "nanvar", "count_nonzero",
    "logsumexp",
]  # fmt: skip


@pytest.mark.parametrize("name", REDUCTIONS)
@pytest.mark.parametrize(
    ("selection", "positions", "left"),
    [
        ("W", 1, (H, D)),
        ((D, "H"), (0, 2), (W,)),
        ({"W": 3}, 1, (H, D)),
        (None, None, ()),
        ((), (), (H, W, D)),
    ],
    ids=["name", "several", "dict", "all", "none"],
)
def test_reductions(name, selection, positions, left):
    fn = {"product": jnp.prod, "logsumexp": jax.scipy.special.logsumexp}.get(name) or getattr(
        jnp, name
    )
    x = _normal(H, W, D)
    found = getattr(reductions, name)(x, selection)
    assert found.axes == left
    np.testing.assert_allclose(found.array, fn(x.array, axis=positions), rtol=1e-6)


@pytest.mark.parametrize("name", ["argmax", "argmin", "nanargmax", "nanargmin"])
def test_arg_reductions(name):
    x = _normal(H, W, D)
    found = getattr(hax, name)(x, "W")
    assert found.axes == (H, D)
    np.testing.assert_array_equal(found.array, getattr(jnp, name)(x.array, axis=1))
    assert int(getattr(hax, name)(x)) == int(getattr(jnp, name)(x.array))


def test_where_masks_reductions_by_name():
    x, mask = _normal(H, W, D), _normal(D, H, seed=1) > 0
    raw = jnp.broadcast_to(mask.array.T[:, None], (2, 3, 4))
    np.testing.assert_allclose(
        hax.sum(x, "D", where=mask).array, jnp.sum(x.array, 2, where=raw), rtol=1e-6
    )
    np.testing.assert_allclose(
        hax.max(x, where=mask, initial=-9.0).array, jnp.max(x.array, where=raw, initial=-9.0)
    )
    np.testing.assert_allclose(
        hax.mean(x, where=mask).array, jnp.mean(x.array, where=raw), rtol=1e-6
    )
    np.testing.assert_allclose(
        hax.logsumexp(x, W, where=mask).array,
        jax.scipy.special.logsumexp(x.array, 1, where=raw),
        rtol=1e-6,
    )


def test_reductions_of_trees_are_leafwise():
    tree = {"a": _normal(H, W), "b": (_normal(W, D), None)}
    found = hax.sum(tree, "W")
    assert found["a"].axes == (H,)
    assert found["b"][0].axes == (D,)
    masked = hax.sum(tree, where=hax.zeros(H, dtype=bool))
    assert float(masked["a"]) == 0
    assert float(masked["b"][0]) == pytest.approx(float(tree["b"][0].sum()), rel=1e-5)


def test_dtype_and_ddof_pass_through():
    x = hax.arange((H, W))
    assert hax.sum(x, dtype=jnp.float32).dtype == jnp.float32
    y = _normal(H, W)
    np.testing.assert_allclose(
        hax.var(y, "W", ddof=1).array, jnp.var(y.array, 1, ddof=1), rtol=1e-6
    )
    with pytest.raises(TypeError, match="unknown arguments"):
        hax.sum(x, ddof=1)


@pytest.mark.parametrize(
    "name", ["cumsum", "cumprod", "nancumsum", "nancumprod", "sort", "argsort"]
)
def test_functions_along_an_axis(name):
    x = _normal(H, W, D)
    found = getattr(hax, name)(x, "W")
    assert found.axes == (H, W, D)
    np.testing.assert_allclose(found.array, getattr(jnp, name)(x.array, axis=1), rtol=1e-6)


def test_argsort_of_everything_is_named():
    x = _normal(H, W)
    found = hax.argsort(x)
    assert found.axes == (hax.Axis("H_W", 6),)
    np.testing.assert_array_equal(found.array, jnp.argsort(x.array, axis=None))


@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_softmax_over_one_or_several_axes(name):
    x, fn = _normal(H, W, D), getattr(jax.nn, name)
    np.testing.assert_allclose(getattr(hax.nn, name)(x, "W").array, fn(x.array, 1), rtol=1e-6)
    np.testing.assert_allclose(
        getattr(hax.nn, name)(x, (W, H)).array, fn(x.array, (0, 1)), rtol=1e-6
    )
    np.testing.assert_allclose(getattr(hax.nn, name)(x).array, fn(x.array, (0, 1, 2)), rtol=1e-5)


def test_top_k():
    x = _normal(H, W, D)
    values, indices = hax.top_k(x, "W", 2, "best")
    assert values.axes == indices.axes == (H, hax.Axis("best", 2), D)
    expected, places = jax.lax.top_k(jnp.moveaxis(x.array, 1, -1), 2)
    np.testing.assert_array_equal(values.array, jnp.moveaxis(expected, -1, 1))
    np.testing.assert_array_equal(indices.array, jnp.moveaxis(places, -1, 1))
    assert x.top_k("W", 1)[0].shape == {"H": 2, "W": 1, "D": 4}


def test_creation():
    assert hax.zeros((H, W)).dtype == jnp.float32
    assert hax.ones({"H": 2}).axes == (H,)
    assert hax.full(H, 7, jnp.int8).tolist() == [7, 7]
    assert hax.arange((H, W)).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert hax.arange(W, start=2, step=3).tolist() == [2, 5, 8]
    assert hax.arange(W, start=0.5).dtype == jnp.float32
    assert jax.jit(lambda s: hax.arange(W, start=s))(4).tolist() == [4, 5, 6]
    assert hax.linspace(W, start=0.0, stop=1.0).tolist() == [0, 0.5, 1]
    assert hax.linspace("W", start=0.0, stop=1.0).axes == (hax.Axis("W", 50),)
    np.testing.assert_allclose(
        hax.geomspace(W, start=1.0, stop=100.0).array, [1, 10, 100], rtol=1e-5
    )
    np.testing.assert_allclose(hax.logspace(W, start=0.0, stop=2.0).array, [1, 10, 100], rtol=1e-5)
    for name in ("zeros_like", "ones_like"):
        assert getattr(hax, name)(hax.arange(H)).dtype == jnp.int32
    assert hax.full_like(hax.arange(H), 3).tolist() == [3, 3]


def test_triangles_and_traces_move_their_axes_last():
    x = _normal(H, W, D)
    raw = jnp.transpose(x.array, (1, 2, 0))
    for name in ("tril", "triu"):
        found = getattr(hax, name)(x, "D", "H", k=1)
        assert found.axes == (W, D, H)
        np.testing.assert_array_equal(found.array, getattr(jnp, name)(raw, 1))
    np.testing.assert_allclose(x.trace("D", "H").array, jnp.trace(raw, 0, 1, 2), rtol=1e-6)


def test_sets_and_counts():
    x = hax.named([3, 1, 3, 2], "n")
    U = hax.Axis("u", 4)
    values, index, inverse, counts = hax.unique_all(x, U, fill_value=-1)
    assert values.tolist() == [1, 2, 3, -1]
    assert inverse.tolist() == [2, 0, 2, 1]
    assert counts.tolist() == [1, 1, 2, 0]
    assert index.tolist()[:3] == [1, 3, 0]
    assert hax.unique_values(x, U, fill_value=-1).tolist() == [1, 2, 3, -1]
    assert hax.bincount(x, hax.Axis("c", 5)).tolist() == [0, 1, 1, 2, 0]
    assert hax.searchsorted(
        hax.named([1, 3, 5], "n"), hax.named([[0, 4]], ("a", "b"))
    ).tolist() == [[0, 2]]
    [places] = hax.nonzero(hax.named([0, 5, 0, 2], "n"), size=hax.Axis("k", 2))
    assert places.tolist() == [1, 3]


def test_bits_pack_and_unpack():
    bits = hax.named(np.array([1, 0, 1, 1, 0, 0, 0, 1], np.uint8), "bit")
    packed = hax.packbits(bits, "bit")
    assert packed.shape == {"bit": 1}
    assert hax.unpackbits(packed, "bit").tolist() == bits.tolist()
