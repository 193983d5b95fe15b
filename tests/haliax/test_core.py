"""The NamedArray class: construction, questions about axes, conversions, pytrees, typing."""

import dataclasses
from typing import get_args

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array

import haliax as hax
import haliax.haxtyping as ht
from haliax import NamedArray

H, W, D = hax.make_axes(H=2, W=3, D=4)


def _x(*axes):
    axes = axes or (H, W)
    return hax.arange(axes).astype(jnp.float32)


def test_axes_may_be_one_axis_a_sequence_or_a_dict():
    a = jnp.ones((2,))
    assert NamedArray(a, H).axes == NamedArray(a, [H]).axes == NamedArray(a, {"H": 2}).axes == (H,)


def test_named_takes_sizes_from_the_array():
    assert hax.named([[1, 2, 3], [4, 5, 6]], ("H", W)).axes == (H, W)
    assert hax.named(np.ones(2), "H W").axes == (hax.Axis("H W", 2),)
    assert hax.named(1.0, ()).axes == ()


def test_shape_checks_can_be_suspended():
    with hax.enable_shape_checks(False):
        lie = NamedArray(jnp.ones(3), (H, W))
    assert lie.axes == (H, W)
    with pytest.raises(ValueError, match="Shape mismatch"):
        NamedArray(jnp.ones(3), (H, W))


def test_payload_may_be_anything_that_equinox_puts_there():
    filtered = eqx.filter(_x(), eqx.is_inexact_array, inverse=True)
    assert filtered.array is None
    assert filtered.axes == (H, W)
    both = eqx.combine(*eqx.partition(_x(), eqx.is_array))
    np.testing.assert_array_equal(both.array, _x().array)


def test_it_is_immutable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        _x().array = jnp.ones((2, 3))


def test_questions_about_axes():
    x = _x()
    assert x.shape == {"H": 2, "W": 3}
    assert (x.ndim, x.size, x.nbytes, x.dtype) == (2, 6, 24, jnp.float32)
    assert x.axis_size("W") == 3
    assert x.axis_size(("W", H)) == (3, 2)
    assert x.resolve_axis("W") == W
    assert x.resolve_axis(("W", H)) == (W, H)
    assert x.axis_indices("W") == 1
    assert x.axis_indices(("W", "Q")) == (1, None)
    with pytest.raises(RuntimeError, match="size 3"):
        x.axis_indices(W.resize(9))


def test_has_axis_answers_for_each():
    x = _x()
    assert x.has_axis("H")
    assert x.has_axis(H)
    assert not x.has_axis(H.resize(5))
    assert x.has_axis(("H", W))
    assert not x.has_axis(("H", "Q"))


def test_scalars_convert_to_python():
    one = hax.named(jnp.array(2), ())
    assert (int(one), float(one), complex(one), bool(one)) == (2, 2.0, 2 + 0j, True)
    assert [10, 20, 30][one] == 30
    assert one.item() == 2
    assert one.scalar().shape == ()
    with pytest.raises(ValueError, match="scalar"):
        float(_x())


def test_contents_convert_to_lists_and_bytes():
    x = _x()
    assert x.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert x.tobytes() == np.arange(6, dtype=np.float32).tobytes()


def test_it_prints_dtype_and_names():
    x = hax.arange(H)
    assert str(x) == "NamedArray(int32{'H': 2}, [0 1])"
    assert eqx.tree_pformat(_x()) == "Named(float32{'H': 2, 'W': 3})"


def test_it_is_neither_hashable_nor_iterable_nor_an_ndarray():
    x = _x()
    with pytest.raises(TypeError, match="unhashable"):
        hash(x)
    with pytest.raises(TypeError, match="not iterable"):
        iter(x)
    with pytest.raises(TypeError):
        len(x)
    with pytest.raises(TypeError):
        jnp.sum(x)


def test_numpy_arrays_do_not_swallow_named_arrays():
    with pytest.raises(ValueError, match="unnamed array"):
        np.ones((2, 3), np.float32) + _x()
    assert isinstance(np.float32(1) + _x(), NamedArray)
    assert isinstance(jnp.float32(1) + _x(), NamedArray)


def test_it_is_a_pytree_with_axes_as_structure():
    x = _x()
    leaves, treedef = jax.tree_util.tree_flatten(x)
    assert len(leaves) == 1
    assert jax.tree_util.tree_unflatten(treedef, leaves).axes == x.axes
    assert treedef != jax.tree_util.tree_structure(x.rename({"H": "Q"}))
    [(path, _)] = jax.tree_util.tree_leaves_with_path({"w": x})
    assert jax.tree_util.keystr(path) == "['w'].array"


def test_unflatten_takes_any_leaf():
    shapes = jax.eval_shape(lambda: _x())
    assert shapes.array.shape == (2, 3)
    assert shapes.axes == (H, W)
    assert jax.tree_util.tree_map(lambda a: a.shape, _x()).array == (2, 3)


def test_dtype_conversions():
    x = hax.named(jnp.array([1 + 2j, 3 - 1j]), "H")
    np.testing.assert_array_equal(x.real.array, [1, 3])
    np.testing.assert_array_equal(x.imag.array, [2, -1])
    np.testing.assert_array_equal(x.conj().array, [1 - 2j, 3 + 1j])
    assert x.real.astype(jnp.bfloat16).dtype == jnp.bfloat16
    assert x.copy().axes == x.axes


@pytest.mark.parametrize(
    ("pattern", "matches"),
    [
        ("H W", True),
        ("W H", False),
        ("H ...", True),
        ("... W", True),
        ("H ... W", True),
        ("H ... D", False),
        ("...", True),
        ("H", False),
        (["H", "W"], True),
        ({"W", "H"}, True),
        ({"W"}, False),
        ({"W", ...}, True),
        ({"Q", ...}, False),
        ("{W ...}", True),
    ],
)
def test_annotations_match_names_and_order(pattern, matches):
    assert _x().matches_axes(NamedArray[pattern]) is matches


def test_annotations_carry_axes():
    base, axes = get_args(NamedArray["batch ... embed"])
    assert base is NamedArray
    assert (axes.before, axes.after, axes.ordered, axes.subset) == (
        ("batch",),
        ("embed",),
        True,
        True,
    )


@pytest.mark.parametrize(
    ("annotation", "matches"),
    [
        (ht.f32["H W"], True),
        (ht.i32["H W"], False),
        (ht.Float[NamedArray, "H W"], True),
        (ht.Int[NamedArray, "H W"], False),
        (ht.Float["W ..."], False),
        (ht.Named["H W"], True),
        (ht.bool_["H W"], False),
    ],
)
def test_haxtyping_checks_dtype_too(annotation, matches):
    assert _x().matches_axes(annotation) is matches


def test_haxtyping_of_plain_arrays_is_jaxtyping():
    assert isinstance(jnp.ones((2, 3)), ht.f32[Array, "b e"])
    assert isinstance(jnp.ones((2, 3), jnp.int32), ht.i32[jnp.ndarray, "b e"])
    assert not isinstance(jnp.ones((2, 3)), ht.i32[jnp.ndarray, "b e"])


def test_a_module_prints_names():
    layer = hax.nn.Linear.init(H, W, key=jax.random.PRNGKey(0))
    assert "weight=Named(float32{'W': 3, 'H': 2})" in eqx.tree_pformat(layer)


def test_field_names_axes_of_plain_arrays():
    class Module(eqx.Module):
        w: Array = hax.field(axis_names=("embed", "mlp"))

    specs = hax.pspec_for(Module(jnp.ones((4, 4))), {"mlp": "model"})
    assert specs.w == jax.sharding.PartitionSpec(None, "model")
    with pytest.raises(ValueError, match="static"):
        hax.field(axis_names=("embed",), static=True)
