"""`jax.random` with named shapes: the same bits as `jax.random` on the raw shape.

Parameters may be named arrays; they broadcast to the shape by name. Results follow the axis mapping
in force.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import random as jrandom

from haliax.axis import (
    Axis,
    AxisSelector,
    AxisSpec,
    axis_spec_to_tuple,
    single_position,
    to_jax_shape,
)
from haliax.broadcasting import aligned, contains
from haliax.core import NamedArray, trusted
from haliax.errors import describe
from haliax.partitioning import auto_sharded


def _made(array: Any, axes: tuple[Axis, ...]) -> NamedArray:
    return auto_sharded(trusted(array, axes))


def _parameter(name: str, value: Any, axes: tuple[Axis, ...]) -> Any:
    """A parameter as a raw array of the full rank, so that `jax.random` broadcasts it by name."""
    if not isinstance(value, NamedArray):
        if getattr(value, "ndim", 0) > 0:
            raise ValueError(
                f"random.{name}: an unnamed parameter of shape {value.shape} could mean any axes "
                f"of {describe(axes)}. Name it with `hax.named(array, axes)`."
            )
        return value
    if not contains(axes, value.axes):
        raise ValueError(
            f"random.{name}: a parameter with axes {describe(value.axes)} does not broadcast to "
            f"the shape {describe(axes)}. Its axes must be among those."
        )
    return aligned(value.array, value.axes, axes)


def uniform(
    key: Any, shape: AxisSpec, dtype: Any = float, minval: Any = 0.0, maxval: Any = 1.0
) -> NamedArray:
    """Uniform on `[minval, maxval)`."""
    axes = axis_spec_to_tuple(shape)
    low, high = (_parameter("uniform", v, axes) for v in (minval, maxval))
    return _made(jrandom.uniform(key, to_jax_shape(axes), dtype, low, high), axes)


def normal(key: Any, shape: AxisSpec, dtype: Any = float) -> NamedArray:
    """Standard normal."""
    axes = axis_spec_to_tuple(shape)
    return _made(jrandom.normal(key, to_jax_shape(axes), dtype), axes)


def truncated_normal(
    key: Any, shape: AxisSpec, lower: Any, upper: Any, dtype: Any = float
) -> NamedArray:
    """Standard normal, restricted to `(lower, upper)`."""
    axes = axis_spec_to_tuple(shape)
    low, high = (_parameter("truncated_normal", v, axes) for v in (lower, upper))
    return _made(jrandom.truncated_normal(key, low, high, to_jax_shape(axes), dtype), axes)


def bernoulli(key: Any, shape: AxisSpec, p: Any = 0.5) -> NamedArray:
    """`True` with probability `p`."""
    axes = axis_spec_to_tuple(shape)
    return _made(jrandom.bernoulli(key, _parameter("bernoulli", p, axes), to_jax_shape(axes)), axes)


def randint(key: Any, shape: AxisSpec, minval: Any, maxval: Any, dtype: Any = int) -> NamedArray:
    """Integers on `[minval, maxval)`."""
    axes = axis_spec_to_tuple(shape)
    low, high = (_parameter("randint", v, axes) for v in (minval, maxval))
    return _made(jrandom.randint(key, to_jax_shape(axes), low, high, dtype), axes)


def rademacher(key: Any, shape: AxisSpec, dtype: Any = int) -> NamedArray:
    """1 or -1, with equal probability."""
    axes = axis_spec_to_tuple(shape)
    return _made(jrandom.rademacher(key, to_jax_shape(axes), dtype), axes)


def _without_parameters(name: str) -> Callable[..., NamedArray]:
    fn = getattr(jrandom, name)

    def sample(key: Any, shape: AxisSpec, dtype: Any = float) -> NamedArray:
        axes = axis_spec_to_tuple(shape)
        return _made(fn(key, to_jax_shape(axes), dtype), axes)

    sample.__name__ = sample.__qualname__ = name
    sample.__doc__ = f"`jax.random.{name}` in a named shape."
    return sample


def _with_parameters(name: str, *parameters: str) -> Callable[..., NamedArray]:
    """Samplers of `(key, *parameters, shape, dtype)`; here the shape comes second."""
    fn = getattr(jrandom, name)

    def sample(
        key: Any, shape: AxisSpec, *args: Any, dtype: Any = float, **kwargs: Any
    ) -> NamedArray:
        axes = axis_spec_to_tuple(shape)
        if len(args) == len(parameters) + 1:
            args, dtype = args[:-1], args[-1]
        given = {**dict(zip(parameters, args, strict=False)), **kwargs}
        if len(args) > len(parameters) or set(given) != set(parameters):
            raise TypeError(
                f"random.{name} takes (key, shape, {', '.join(parameters)}), got {given}."
            )
        values = [_parameter(name, given[p], axes) for p in parameters]
        return _made(fn(key, *values, shape=to_jax_shape(axes), dtype=dtype), axes)

    sample.__name__ = sample.__qualname__ = name
    sample.__doc__ = f"`jax.random.{name}` in a named shape, with parameters broadcast by name."
    return sample


exponential = _without_parameters("exponential")
laplace = _without_parameters("laplace")
cauchy = _without_parameters("cauchy")
logistic = _without_parameters("logistic")
gumbel = _without_parameters("gumbel")
beta = _with_parameters("beta", "a", "b")
gamma = _with_parameters("gamma", "a")
loggamma = _with_parameters("loggamma", "a")
pareto = _with_parameters("pareto", "b")
t = _with_parameters("t", "df")
weibull_min = _with_parameters("weibull_min", "scale", "concentration")


def poisson(key: Any, shape: AxisSpec, lam: Any, dtype: Any = int) -> NamedArray:
    """Poisson counts of mean `lam`."""
    axes = axis_spec_to_tuple(shape)
    rate = _parameter("poisson", lam, axes)
    return _made(jrandom.poisson(key, rate, to_jax_shape(axes), dtype), axes)


def ball(key: Any, shape: AxisSpec, D: Axis, p: float = 2.0, dtype: Any = float) -> NamedArray:
    """Points in the unit p-norm ball of `D` dimensions; the result has `shape`, then `D`."""
    axes = axis_spec_to_tuple(shape)
    return _made(jrandom.ball(key, D.size, p, to_jax_shape(axes), dtype), (*axes, D))


def choice(
    key: Any,
    shape: AxisSpec,
    a: NamedArray,
    axis: AxisSelector,
    replace: bool = True,
    p: NamedArray | None = None,
) -> NamedArray:
    """Random elements of `a` along an axis: `shape`, then the other axes of `a`."""
    axes = axis_spec_to_tuple(shape)
    at = single_position("random.choice", a.axes, axis)
    rest = (*a.axes[:at], *a.axes[at + 1 :])
    weights = None
    if p is not None:
        if p.axes != (a.axes[at],):
            raise ValueError(
                f"random.choice: the probabilities must have the one axis {a.axes[at]}, got "
                f"{describe(p.axes)}."
            )
        weights = p.array
    rows = jnp.moveaxis(a.array, at, 0)
    return _made(jrandom.choice(key, rows, to_jax_shape(axes), replace, weights), (*axes, *rest))


def categorical(
    key: Any, logits: NamedArray, axis: AxisSelector, shape: AxisSpec | None = None
) -> NamedArray:
    """Positions along an axis drawn with probability `softmax(logits)`.

    The result has the other axes of `logits`, or `shape`, which must contain them.
    """
    at = single_position("random.categorical", logits.axes, axis)
    rest = (*logits.axes[:at], *logits.axes[at + 1 :])
    axes = rest if shape is None else axis_spec_to_tuple(shape)
    if not contains(axes, rest):
        raise ValueError(
            f"random.categorical: the shape {describe(axes)} must contain the other axes "
            f"{describe(rest)} of the logits."
        )
    full = aligned(logits.array, logits.axes, (*axes, logits.axes[at]))
    return _made(jrandom.categorical(key, full, axis=-1, shape=to_jax_shape(axes)), axes)


def permutation(
    key: Any, x: NamedArray, axis: AxisSelector, independent: bool = False
) -> NamedArray:
    """`x` shuffled along an axis; with `independent`, each row in its own way."""
    at = single_position("random.permutation", x.axes, axis)
    return _made(jrandom.permutation(key, x.array, at, independent=independent), x.axes)
