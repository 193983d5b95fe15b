"""`jnp.fft` by name.

The axis may be a name, an `Axis` (its size is the length of the transform), several
names, or `{name: length}`; `None` is the last axis.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from haliax.axis import Axis, AxisSelection, axis_size, pairs
from haliax.core import NamedArray, honest, named, trusted
from haliax.errors import axis_not_found


def _transform(one: Callable[..., Any], many: Callable[..., Any] | None) -> Callable[..., Any]:
    name = one.__name__

    def transform(
        a: NamedArray, axis: AxisSelection | None = None, norm: str | None = None
    ) -> NamedArray:
        raw = honest(name, a)
        selected = [(a.axes[-1].name, None)] if axis is None else pairs(axis)
        positions = [_position(name, a, axis_name) for axis_name, _ in selected]
        sizes = [size for _, size in selected]
        if len(positions) == 1:
            result = one(raw, n=sizes[0], axis=positions[0], norm=norm)
        elif many is None:
            raise ValueError(f"{name} works along one axis, not {[n for n, _ in selected]}.")
        else:
            lengths = [
                a.axes[p].size if s is None else s for p, s in zip(positions, sizes, strict=True)
            ]
            is_default = all(size is None for size in sizes)
            result = many(raw, s=None if is_default else lengths, axes=positions, norm=norm)
        axes = tuple(x.resize(n) for x, n in zip(a.axes, result.shape, strict=True))
        return trusted(result, axes)

    transform.__name__ = transform.__qualname__ = name
    transform.__doc__ = f"`jnp.fft.{name}` by name; transformed axes get the size of the result."
    return transform


def _position(operation: str, a: NamedArray, name: str) -> int:
    for i, axis in enumerate(a.axes):
        if axis.name == name:
            return i
    raise axis_not_found(operation, name, a.axes)


fft = _transform(jnp.fft.fft, jnp.fft.fftn)
ifft = _transform(jnp.fft.ifft, jnp.fft.ifftn)
rfft = _transform(jnp.fft.rfft, jnp.fft.rfftn)
irfft = _transform(jnp.fft.irfft, jnp.fft.irfftn)
hfft = _transform(jnp.fft.hfft, None)
ihfft = _transform(jnp.fft.ihfft, None)


def _shift(fn: Callable[..., Any]) -> Callable[..., NamedArray]:
    def shift(a: NamedArray, axis: AxisSelection | None = None) -> NamedArray:
        names = [x.name for x in a.axes] if axis is None else [name for name, _ in pairs(axis)]
        positions = [_position(fn.__name__, a, name) for name in names]
        return trusted(fn(honest(fn.__name__, a), axes=positions), a.axes)

    shift.__name__ = shift.__qualname__ = fn.__name__
    shift.__doc__ = f"`jnp.fft.{fn.__name__}` by name; `None` shifts every axis."
    return shift


fftshift = _shift(jnp.fft.fftshift)
ifftshift = _shift(jnp.fft.ifftshift)


def fftfreq(axis: Axis, d: float = 1.0) -> NamedArray:
    """Sample frequencies of `fft` along the axis, for samples `d` apart."""
    return named(jnp.fft.fftfreq(axis_size(axis), d), axis)


def rfftfreq(axis: Axis, d: float = 1.0) -> NamedArray:
    """Sample frequencies of `rfft` along the axis; the result has the transform's size."""
    freq = jnp.fft.rfftfreq(axis.size, d)
    return trusted(freq, (axis.resize(freq.shape[0]),))
