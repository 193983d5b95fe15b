"""Indexing by name against NumPy's rules, where each name is an explicit position."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import haliax as hax

H, W, D = hax.make_axes(H=4, W=5, D=6)
X = np.arange(120, dtype=np.float32).reshape(4, 5, 6)


def _x():
    return hax.named(X, (H, W, D))


def _is(found, axes, expected):
    assert " ".join(f"{a.name}{a.size}" for a in found.axes) == axes
    np.testing.assert_array_equal(found.array, expected)


def test_integers_remove_and_slices_keep():
    x = _x()
    _is(x["H", 0], "W5 D6", X[0])
    _is(x["H", -1, "D", 1:3], "W5 D2", X[-1, :, 1:3])
    _is(x[{"W": slice(None, None, 2), D: np.int32(3)}], "H4 W3", X[:, ::2, 3])
    _is(x[{}], "H4 W5 D6", X)
    _is(x["H", 1, "W", 2, "D", 3], "", X[1, 2, 3])
    _is(x["W", ::-1], "H4 W5 D6", X[:, ::-1])


def test_indices_may_be_traced_or_zero_axis_arrays():
    x = _x()
    _is(jax.jit(lambda i: x["W", i])(2), "H4 D6", X[:, 2])
    _is(x["W", hax.named(jnp.array(2), ())], "H4 D6", X[:, 2])
    _is(x["W", jnp.array(2)], "H4 D6", X[:, 2])


def test_lists_resize_their_axis():
    x = _x()
    _is(x["W", [0, 2, 2]], "H4 W3 D6", X[:, [0, 2, 2]])
    _is(x["W", jnp.array([3, 1])], "H4 W2 D6", X[:, [3, 1]])
    _is(x["W", np.array([3, 1])], "H4 W2 D6", X[:, [3, 1]])
    _is(x["W", []], "H4 W0 D6", X[:, []])


def test_a_named_index_replaces_its_axis():
    i = hax.named([[0, 1, 2], [3, 4, 0]], ("a", "b"))
    _is(_x()["W", i], "H4 a2 b3 D6", X[:, np.asarray(i.array)])


def test_several_named_indices_broadcast_by_name():
    i, j = hax.named([0, 1, 2], "a"), hax.named([5, 4], "b")
    _is(_x()["W", i, "D", j], "H4 b2 a3", X[:, [[0], [1], [2]], [[5, 4]]].swapaxes(1, 2))
    k = hax.named([5, 4, 3], "a")
    _is(_x()["W", i, "D", k], "H4 a3", X[:, [0, 1, 2], [5, 4, 3]])
    # Not next to each other: new axes come first, as in NumPy.
    _is(_x()["H", i, "D", k], "a3 W5", X[[0, 1, 2], :, [5, 4, 3]])


def test_integers_count_as_advanced():
    i = hax.named([0, 1, 2], "a")
    _is(_x()["H", i, "D", 5], "a3 W5", X[[0, 1, 2], :, 5])
    _is(_x()["W", i, "D", 5], "H4 a3", X[:, [0, 1, 2], 5])


def test_shared_axes_are_paired():
    B, S, V = hax.make_axes(B=2, S=3, V=5)
    logits = np.arange(30.0, dtype=np.float32).reshape(2, 3, 5)
    ids = np.array([[0, 4, 2], [1, 1, 3]])
    x, i = hax.named(logits, (B, S, V)), hax.named(ids, (B, S))
    expected = np.take_along_axis(logits, ids[..., None], -1)[..., 0]
    _is(x["V", i], "B2 S3", expected)
    _is(x["V", i.rearrange(("S", "B"))], "B2 S3", expected)
    _is(x["B", 0:1, "V", i["B", 0:1]], "B1 S3", expected[:1])


def test_paired_and_new_axes_mix():
    B, V = hax.make_axes(B=2, V=5)
    table = np.arange(10.0, dtype=np.float32).reshape(2, 5)
    ids = np.array([[0, 4, 2], [1, 1, 3]])
    found = hax.named(table, (B, V))["V", hax.named(ids, ("B", "k"))]
    _is(found, "B2 k3", np.take_along_axis(table, ids, 1))


def test_an_index_may_be_named_like_the_axis_it_replaces():
    _is(_x()["W", hax.named([4, 0], "W")], "H4 W2 D6", X[:, [4, 0]])


def test_masks_work_outside_jit():
    mask = hax.named(np.array([True, False, True, False, True]), W)
    _is(_x()["W", mask], "H4 W3 D6", X[:, [0, 2, 4]])
    with pytest.raises(ValueError, match="under `jit`"):
        jax.jit(lambda m: _x()["W", m])(mask)


def test_dslice_reads_zeros_past_the_end():
    _is(_x()["W", hax.ds(1, 3)], "H4 W3 D6", X[:, 1:4])
    expected = np.concatenate([X[:, 3:], np.zeros((4, 1, 6), np.float32)], 1)
    _is(_x()["W", hax.ds(3, 3)], "H4 W3 D6", expected)
    _is(jax.jit(lambda s: _x()["W", hax.ds(s, 2)])(2), "H4 W2 D6", X[:, 2:4])
    _is(_x()["W", hax.ds.block(1, 2)], "H4 W2 D6", X[:, 2:4])
    assert hax.ds(1, H).to_slice() == slice(1, 5)


def test_dslices_follow_the_rule_for_advanced_indices():
    _is(_x()["H", hax.ds(1, 2), "W", hax.ds(0, 2)], "H2 W2 D6", X[1:3, :2])
    _is(_x()["H", hax.ds(1, 2), "D", hax.ds(0, 2)], "H2 D2 W5", X[1:3, :, :2].transpose(0, 2, 1))
    _is(_x()["H", hax.ds(1, 2), "W", 3], "H2 D6", X[1:3, 3])
    i = hax.named([0, 2], "a")
    _is(_x()["W", hax.ds(1, 2), "D", i], "H4 a2 W2", X[:, 1:3][:, :, [0, 2]].swapaxes(1, 2))


@pytest.mark.parametrize(
    "name", ["set", "add", "multiply", "divide", "min", "max", "power", "subtract"]
)
def test_updates_are_those_of_jnp(name):
    x = _x() + 1.0
    update = hax.named(np.array([2.0, 3.0], np.float32), hax.Axis("D", 2))
    found = getattr(x.at["W", 1, "D", 2:4], name)(update)
    raw = jnp.asarray(X + 1).at[:, 1, 2:4]
    _is(found, "H4 W5 D6", getattr(raw, name)(jnp.broadcast_to(update.array, (4, 2))))


def test_updates_through_gathers_and_names():
    x = _x()
    i = hax.named([0, 2, 2], "a")
    _is(x.at["W", i].add(1.0), "H4 W5 D6", jnp.asarray(X).at[:, np.array([0, 2, 2])].add(1.0))
    rows = hax.named(np.arange(3, dtype=np.float32), "a")
    expected = (
        jnp.asarray(X)
        .at[:, np.array([0, 2, 4])]
        .set(jnp.arange(3.0)[None, :, None] * jnp.ones((4, 1, 6)))
    )
    _is(x.at["W", hax.named([0, 2, 4], "a")].set(rows), "H4 W5 D6", expected)
    _is(x.at["H", 0].apply(jnp.negative), "H4 W5 D6", jnp.asarray(X).at[0].apply(jnp.negative))
    _is(x.at["H", 0].get(), "W5 D6", X[0])
    _is(x.at[{"W": hax.ds(4, 3)}].set(0.0), "H4 W5 D6", jnp.asarray(X).at[:, 4:].set(0.0))


def test_at_leaves_out_of_bounds_to_an_explicit_mode():
    x = _x()
    with pytest.raises(IndexError, match="at: 9 is out of bounds for axis 'W' of size 5"):
        x.at["W", 9].set(0.0)
    _is(x.at["W", 9].set(0.0, mode="drop"), "H4 W5 D6", X)
    _is(x.at["W", 9].get(mode="clip"), "H4 D6", X[:, 4])
    _is(x.at["W", 9].get(mode="fill", fill_value=7.0), "H4 D6", np.full((4, 6), 7.0))


def test_take_splices_the_axes_of_the_index():
    i = hax.named([[0, 1, 2], [3, 4, 0]], ("a", "b"))
    _is(hax.take(_x(), "W", i), "H4 a2 b3 D6", X[:, np.asarray(i.array)])
    _is(_x().take("W", 2), "H4 D6", X[:, 2])
    _is(_x().take(W, np.int64(2)), "H4 D6", X[:, 2])
    _is(_x().take("W", jnp.array(2)), "H4 D6", X[:, 2])
    _is(_x().take("W", hax.named([1, 0], "W")), "H4 W2 D6", X[:, [1, 0]])


def test_take_pairs_shared_axes_in_the_order_of_the_array():
    ids = np.array([0, 5, 2, 3])
    found = hax.take(_x(), "D", hax.named(ids, "H"))
    _is(found, "H4 W5", np.take_along_axis(X, ids[:, None, None], 2)[..., 0])
    ids = np.array([[0, 5], [1, 2], [3, 3], [4, 0]])
    found = hax.take(_x(), "W", hax.named(ids % 5, ("H", "k")))
    _is(found, "H4 k2 D6", np.take_along_axis(X, (ids % 5)[:, :, None], 1))


def test_slice_starts_may_be_traced():
    _is(hax.slice(_x(), "W", start=1, length=2), "H4 W2 D6", X[:, 1:3])
    _is(hax.slice(_x(), "W", "V", start=1, length=2), "H4 V2 D6", X[:, 1:3])
    _is(hax.slice(_x(), "W", hax.Axis("V", 2), start=3), "H4 V2 D6", X[:, 3:5])
    _is(jax.jit(lambda s: _x().slice("W", start=s, length=2))(2), "H4 W2 D6", X[:, 2:4])
    # A start too far is clamped, as `lax.dynamic_slice` does.
    _is(hax.slice(_x(), "W", start=4, length=2), "H4 W2 D6", X[:, 3:5])


def test_slice_along_several_axes_checks_bounds():
    found = hax.slice(_x(), {"H": 1, "W": 2}, {"H": 2, "W": hax.Axis("V", 3)})
    _is(found, "H2 V3 D6", X[1:3, 2:5])
    with pytest.raises(ValueError, match="do not fit"):
        hax.slice(_x(), {"W": 4}, {"W": 2})


def test_updated_slice():
    zeros = hax.zeros((W.resize(2), D))
    expected = X.copy()
    expected[:, 1:3] = 0
    _is(hax.updated_slice(_x(), {"W": 1}, zeros), "H4 W5 D6", expected)
    _is(jax.jit(lambda s: _x().updated_slice({"W": s}, zeros))(1), "H4 W5 D6", expected)
    expected = X.copy()
    expected[2, 1:3, :] = 0
    _is(hax.updated_slice(_x(), {"H": 2, "W": 1}, zeros), "H4 W5 D6", expected)


def test_updated_slice_takes_a_start_for_each_row():
    starts = hax.named([0, 1, 2, 3], "H")
    update = hax.ones((H, W.resize(2))) * -1
    expected = X.copy()
    for row in range(4):
        expected[row, row : row + 2] = -1
    _is(hax.updated_slice(_x(), {"W": starts}, update), "H4 W5 D6", expected)
    shared = hax.ones(W.resize(2)) * -1
    _is(hax.updated_slice(_x(), {"W": starts}, shared), "H4 W5 D6", expected)


def test_gradients_flow_through_gathers():
    i = hax.named([0, 2, 2], "a")
    gradient = jax.grad(lambda x: (x["W", i] * 2.0).sum().scalar())(_x())
    expected = np.zeros_like(X)
    expected[:, 0], expected[:, 2] = 2, 4
    _is(gradient, "H4 W5 D6", expected)
