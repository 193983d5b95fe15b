"""`jnp`'s polynomials on named coefficients, highest power first.

A polynomial is an array of one axis; results reuse its name with their own size. Unnamed
coefficients get the axis `degree`.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from haliax.axis import Axis
from haliax.core import NamedArray, honest, trusted
from haliax.errors import describe

_DEFAULT_NAME = "degree"


def _coefficients(operation: str, p: Any) -> Any:
    if not isinstance(p, NamedArray):
        return jnp.atleast_1d(jnp.asarray(p))
    if p.ndim != 1:
        raise ValueError(
            f"{operation}: a polynomial has one axis of coefficients, got {describe(p.axes)}. Use "
            "`hax.vmap` over the others."
        )
    return honest(operation, p)


def _name(*polynomials: Any) -> str:
    """The name of the first named polynomial."""
    return next((p.axes[0].name for p in polynomials if isinstance(p, NamedArray)), _DEFAULT_NAME)


def _named(array: Any, name: str) -> NamedArray:
    return trusted(array, (Axis(name, array.shape[0]),))


def _combining(fn: Callable[..., Any]) -> Callable[..., Any]:
    def combine(a: Any, b: Any, **kwargs: Any) -> Any:
        result = fn(_coefficients(fn.__name__, a), _coefficients(fn.__name__, b), **kwargs)
        if isinstance(result, tuple):
            return tuple(_named(part, _name(a, b)) for part in result)
        return _named(result, _name(a, b))

    combine.__name__ = combine.__qualname__ = fn.__name__
    combine.__doc__ = f"`jnp.{fn.__name__}` of two polynomials."
    return combine


polyadd = _combining(jnp.polyadd)
polydiv = _combining(jnp.polydiv)
polymul = _combining(jnp.polymul)
polysub = _combining(jnp.polysub)


def polyder(p: Any, m: int = 1) -> NamedArray:
    """The `m`-th derivative."""
    return _named(jnp.polyder(_coefficients("polyder", p), m), _name(p))


def polyint(p: Any, m: int = 1, k: Any = None) -> NamedArray:
    """The `m`-th integral, with the constants `k`."""
    constants = k.array if isinstance(k, NamedArray) else k
    return _named(jnp.polyint(_coefficients("polyint", p), m, constants), _name(p))


def polyval(p: Any, x: Any, *, unroll: int = 16) -> Any:
    """The value at `x`, elementwise; the result has the axes of `x`."""
    coefficients = _coefficients("polyval", p)
    if isinstance(x, NamedArray):
        return trusted(jnp.polyval(coefficients, honest("polyval", x), unroll=unroll), x.axes)
    return jnp.polyval(coefficients, jnp.asarray(x), unroll=unroll)


def roots(p: Any, *, strip_zeros: bool = True) -> NamedArray:
    """The complex roots."""
    return _named(jnp.roots(_coefficients("roots", p), strip_zeros=strip_zeros), _name(p))


def poly(seq_of_zeros: Any) -> NamedArray:
    """The coefficients of the polynomial with the given roots."""
    return _named(jnp.poly(_coefficients("poly", seq_of_zeros)), _name(seq_of_zeros))


def polyfit(
    x: NamedArray,
    y: NamedArray,
    deg: int,
    rcond: float | None = None,
    full: bool = False,
    w: NamedArray | None = None,
    cov: bool = False,
) -> Any:
    """Least squares coefficients of degree `deg`, named like the samples.

    `cov` adds their covariance, whose second axis has `_cov` after its name; `full` adds the
    residuals, rank, singular values and condition limit of the fit, unnamed.
    """
    if x.axes != y.axes:
        raise ValueError(
            f"polyfit: x and y are samples over one axis, got {describe(x.axes)} and "
            f"{describe(y.axes)}."
        )
    name = _name(x)
    weights = None if w is None else _coefficients("polyfit", w)
    samples = _coefficients("polyfit", x), _coefficients("polyfit", y)
    result = jnp.polyfit(*samples, deg, rcond=rcond, full=full, w=weights, cov=cov)
    if full:
        return _named(result[0], name), *result[1:]
    if cov:
        size = result[1].shape[0]
        return _named(result[0], name), trusted(
            result[1], (Axis(name, size), Axis(f"{name}_cov", size))
        )
    return _named(result, name)
