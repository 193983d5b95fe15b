"""Fourier transforms and polynomials by name, against jnp."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import haliax as hax

H, W, D = hax.make_axes(H=4, W=6, D=3)


def _normal(*axes, seed=0):
    return hax.random.normal(jax.random.PRNGKey(seed), axes)


def _close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["fft", "ifft", "rfft", "irfft", "hfft", "ihfft"])
def test_transforms_resize_their_axis(name):
    x, raw_fn = _normal(H, W, D), getattr(jnp.fft, name)
    found = getattr(hax.fft, name)(x, "W")
    expected = raw_fn(x.array, axis=1)
    assert found.axes == (H, W.resize(expected.shape[1]), D)
    _close(found.array, expected)
    _close(getattr(hax.fft, name)(x).array, raw_fn(x.array, axis=-1))
    _close(getattr(hax.fft, name)(x, W.resize(5)).array, raw_fn(x.array, n=5, axis=1))
    _close(getattr(hax.fft, name)(x, "W", "ortho").array, raw_fn(x.array, axis=1, norm="ortho"))


@pytest.mark.parametrize("name", ["fft", "ifft", "rfft", "irfft"])
def test_transforms_over_several_axes(name):
    x, raw_fn = _normal(H, W, D), getattr(jnp.fft, f"{name}n")
    found = getattr(hax.fft, name)(x, ("W", "H"))
    _close(found.array, raw_fn(x.array, axes=(1, 0)))
    sized = getattr(hax.fft, name)(x, {"W": 5, "H": None})
    expected = raw_fn(x.array, s=(5, 4), axes=(1, 0))
    assert tuple(sized.shape.values()) == expected.shape
    _close(sized.array, expected)


def test_one_axis_transforms_refuse_several():
    with pytest.raises(ValueError, match="hfft works along one axis"):
        hax.hfft(_normal(H, W), ("H", "W"))


def test_shifts_and_frequencies():
    x = _normal(H, W)
    _close(hax.fftshift(x, "W").array, jnp.fft.fftshift(x.array, 1))
    _close(hax.ifftshift(x).array, jnp.fft.ifftshift(x.array))
    assert hax.fftfreq(W, 0.5).axes == (W,)
    _close(hax.fftfreq(W, 0.5).array, jnp.fft.fftfreq(6, 0.5))
    assert hax.rfftfreq(W).axes == (W.resize(4),)
    _close(hax.rfftfreq(W).array, jnp.fft.rfftfreq(6))


P, Q = hax.named([1.0, -3.0, 2.0], "power"), hax.named([1.0, -1.0], "q")


@pytest.mark.parametrize("name", ["polyadd", "polysub", "polymul"])
def test_polynomials_combine(name):
    found = getattr(hax, name)(P, Q)
    expected = getattr(jnp, name)(P.array, Q.array)
    assert found.axes == (hax.Axis("power", expected.shape[0]),)
    _close(found.array, expected)
    assert getattr(hax, name)(jnp.ones(3), jnp.ones(2)).axes[0].name == "degree"


def test_polynomials_divide():
    quotient, remainder = hax.polydiv(P, Q)
    _close(quotient.array, [1.0, -2.0])
    _close(remainder.array, jnp.polydiv(P.array, Q.array)[1])
    assert quotient.axes == (hax.Axis("power", 2),)


def test_polynomials_evaluate_differentiate_and_integrate():
    x = _normal(H, W)
    assert hax.polyval(P, x).axes == (H, W)
    _close(hax.polyval(P, x).array, jnp.polyval(P.array, x.array))
    assert hax.polyder(P).shape == {"power": 2}
    _close(hax.polyder(P).array, [2.0, -3.0])
    _close(hax.polyint(P, k=hax.named([5.0], "k")).array, [1 / 3, -1.5, 2.0, 5.0])


def test_roots_and_back():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        found = hax.roots(P)
        assert found.shape == {"power": 2}
        _close(np.sort(found.array.real), [1, 2])
        _close(hax.poly.poly(hax.named([1.0, 2.0], "power")).array, P.array)


def test_fits():
    x = hax.linspace(hax.Axis("sample", 8), start=-1.0, stop=1.0)
    y = hax.polyval(P, x)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        found = hax.polyfit(x, y, 2)
        assert found.shape == {"sample": 3}
        np.testing.assert_allclose(found.array, P.array, rtol=1e-3, atol=1e-4)
        _, covariance = hax.polyfit(x, y, 2, cov=True)
        assert covariance.shape == {"sample": 3, "sample_cov": 3}
        weighted, *_ = hax.polyfit(x, y, 2, w=hax.ones_like(x), full=True)
        np.testing.assert_allclose(weighted.array, P.array, rtol=1e-3, atol=1e-4)
