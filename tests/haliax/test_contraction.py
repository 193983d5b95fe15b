"""`dot` and `einsum` against jnp.einsum."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import haliax as hax

B, H, P, K, D = hax.make_axes(B=2, H=3, P=4, K=5, D=6)
LETTERS = {"B": "b", "H": "h", "P": "p", "K": "k", "D": "d"}


def _normal(*axes, seed=0):
    return hax.random.normal(jax.random.PRNGKey(seed), axes)


def _check(found, out, *arrays, rtol=1e-5):
    letters: dict[str, str] = {}

    def subscript(axes):
        return "".join(letters.setdefault(a, chr(ord("a") + len(letters))) for a in axes)

    terms = [subscript([a.name for a in x.axes]) for x in arrays]
    assert [a.name for a in found.axes] == out.split()
    expected = np.einsum(
        f"{','.join(terms)}->{subscript(out.split())}", *(np.asarray(x.array) for x in arrays)
    )
    np.testing.assert_allclose(found.array, expected, rtol=rtol, atol=1e-5)


def test_shared_axes_are_batched_and_order_is_of_first_occurrence():
    q, k = _normal(B, H, P, D), _normal(B, H, K, D, seed=1)
    _check(hax.dot(q, k, axis=D), "B H P K", q, k)
    _check(q.dot(k, axis="D"), "B H P K", q, k)
    _check(hax.dot(k, q, axis="D"), "B H K P", k, q)


def test_several_axes_all_axes_and_no_axes():
    x, y = _normal(B, H, D), _normal(D, H, K, seed=1)
    _check(hax.dot(x, y, axis=("H", "D")), "B K", x, y)
    _check(hax.dot(x, y, axis=None), "", x, y)
    _check(hax.dot(x, y, axis=()), "B H D K", x, y)


def test_an_axis_of_one_operand_is_summed():
    x, y = _normal(B, D), _normal(P, K, seed=1)
    _check(hax.dot(x, y, axis="D"), "B P K", x, y)
    _check(hax.dot(x, axis="D"), "B", x)
    _check(hax.dot(x, y, axis=("D", "K")), "B P", x, y)


def test_many_operands():
    x, y, z = _normal(B, D), _normal(D, K, seed=1), _normal(K, P, B, seed=2)
    _check(hax.dot(x, y, z, axis=("D", "K")), "B P", x, y, z)
    w = _normal(B, seed=3)
    _check(hax.dot(x, y, z, w, axis=("D", "K", "B")), "P", x, y, z, w)
    _check(hax.dot(x, x, x, axis=()), "B D", x, x, x)


def test_any_number_of_distinct_axes():
    many = hax.make_axes(**{f"a{i}": 1 + i % 2 for i in range(30)})
    x, y = _normal(*many[:20]), _normal(*many[10:], seed=1)
    found = hax.dot(x, y, axis=many[12:16])
    assert found.axes == (*many[:12], *many[16:])
    expected = (
        (x.array.reshape(x.array.shape + (1,) * 10)) * (y.array.reshape((1,) * 10 + y.array.shape))
    ).sum(tuple(range(12, 16)))
    np.testing.assert_allclose(found.array, expected, rtol=1e-5, atol=1e-6)


def test_out_axes_is_a_partial_order():
    q, k = _normal(B, H, P, D), _normal(B, H, K, D, seed=1)
    _check(hax.dot(q, k, axis=D, out_axes=("K", ..., "B")), "K H P B", q, k)
    _check(hax.dot(q, k, axis=D, out_axes=(..., "H", "P", "K")), "B H P K", q, k)


def test_integers_multiply_exactly():
    x = hax.arange((B, D))
    y = hax.arange((D, K))
    assert hax.dot(x, y, axis=D).dtype == jnp.int32
    _check(hax.dot(x, y, axis=D), "B K", x, y)


def test_element_type_and_precision_pass_through():
    x, y = _normal(B, D).astype(jnp.bfloat16), _normal(D, K).astype(jnp.bfloat16)
    found = hax.dot(x, y, axis=D, preferred_element_type=jnp.float32, precision="highest")
    assert found.dtype == jnp.float32
    assert hax.dot(x, y, axis=D).dtype == jnp.bfloat16


def test_a_custom_dot_general_is_called_with_raw_arrays():
    seen = []

    def spy(lhs, rhs, dimension_numbers, precision=None, preferred_element_type=None):
        seen.append(dimension_numbers)
        return jax.lax.dot_general(lhs, rhs, dimension_numbers)

    x, y = _normal(B, D), _normal(D, K, seed=1)
    _check(hax.dot(x, y, axis=D, dot_general=spy), "B K", x, y)
    assert seen == [(([1], [0]), ([], []))]


def test_operands_change_places_only_where_it_cannot_matter():
    """The result order asks for `w` first; a product that scales its operands must not swap."""
    x, w = _normal(B, D), _normal(K, D, seed=1)
    shapes = []

    def spy(lhs, rhs, dimension_numbers, precision=None, preferred_element_type=None):
        shapes.append((lhs.shape, rhs.shape))
        return jax.lax.dot_general(lhs, rhs, dimension_numbers)

    _check(hax.dot(x, w, axis=D, out_axes=(K, B), dot_general=spy), "K B", x, w)
    assert shapes == [(x.array.shape, w.array.shape)]
    swapped = jax.make_jaxpr(lambda x, w: hax.dot(x, w, axis=D, out_axes=(K, B)))(x, w)
    assert "transpose" not in str(swapped)


def test_the_old_argument_order_warns():
    x, y = _normal(B, D), _normal(D, K, seed=1)
    with pytest.warns(DeprecationWarning, match="axis=axis"):
        _check(hax.dot("D", x, y), "B K", x, y)
    with pytest.warns(DeprecationWarning, match="axis=axis"):
        _check(x.dot(D, y), "B K", x, y)


def test_gradients():
    x, y = _normal(B, D), _normal(D, K, seed=1)
    gx, gy = jax.grad(lambda x, y: (hax.dot(x, y, axis=D) ** 2).sum().scalar(), (0, 1))(x, y)
    out = 2 * x.array @ y.array
    assert (gx.axes, gy.axes) == (x.axes, y.axes)
    np.testing.assert_allclose(gx.array, out @ y.array.T, rtol=1e-4)
    np.testing.assert_allclose(gy.array, x.array.T @ out, rtol=1e-4)


@pytest.mark.parametrize(
    ("equation", "aliases", "out"),
    [
        ("b h p d, b h k d -> b h p k", {}, "B H P K"),
        ("b h p d, b h k d -> k p", {}, "K P"),
        ("b ... d, b ... d -> ... b", {}, "H P K B"),
        ("... d, ... d -> ...", {}, "B H P K"),
        ("b h p d, b h k d ->", {}, ""),
        ("{D} -> ", {}, "B H P K"),
        ("{D P} -> ... D", {}, "B H K D"),
        ("{H D} -> H", {}, "B P K H"),
        ("{...} -> H", {}, "H"),
        ("{} -> ...", {}, "B H P D K"),
        ("{x} -> ...", {"x": "D"}, "B H P K"),
        ("-> P B", {}, "P B"),
        ("-> x B", {"x": P}, "P B"),
    ],
)
def test_einsum(equation, aliases, out):
    q, k = _normal(B, H, P, D), _normal(B, H, K, D, seed=1)
    _check(hax.einsum(equation, q, k, **aliases), out, q, k)


def test_einsum_of_one_and_of_three():
    x, y, z = _normal(B, D), _normal(D, K, seed=1), _normal(K, P, seed=2)
    _check(hax.einsum("b d -> d", x), "D", x)
    _check(hax.einsum("b d, d k, k p -> p b", x, y, z), "P B", x, y, z)
