"""`LayerNorm` and `RmsNorm` over any axes, and softmax by name."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp

from haliax.axis import AxisSpec, axis_names, axis_spec_to_tuple
from haliax.axiswise import log_softmax as log_softmax
from haliax.axiswise import logsumexp as logsumexp
from haliax.axiswise import softmax as softmax
from haliax.core import NamedArray
from haliax.creation import ones, zeros
from haliax.elementwise import rsqrt, square
from haliax.errors import describe, suggestion
from haliax.jax_utils import named_call
from haliax.reductions import mean
from haliax.state_dict import ModuleWithStateDictSerialization


class LayerNorm(ModuleWithStateDictSerialization):
    """`(x - mean) / sqrt(var + eps) * weight + bias` over `axis` (arXiv:1607.06450)."""

    axis: AxisSpec = eqx.field(static=True)
    weight: NamedArray | None
    bias: NamedArray | None
    eps: float = eqx.field(default=1e-5, static=True)
    dtype: Any = eqx.field(default=None, static=True)

    @staticmethod
    def init(
        axis: AxisSpec,
        eps: float = 1e-5,
        *,
        use_weight: bool = True,
        use_bias: bool = True,
        dtype: Any = None,
    ) -> "LayerNorm":
        """Unit weight and zero bias; statistics are computed in `dtype`, or in the input's."""
        weight, bias = _affine(axis, use_weight, use_bias)
        return LayerNorm(axis, weight, bias, eps, dtype)

    @named_call
    def __call__(self, x: NamedArray) -> NamedArray:
        """Normalizes over `axis`."""
        _check("LayerNorm", self.axis, x)
        wide = x if self.dtype is None else x.astype(self.dtype)
        names = axis_names(self.axis)
        centered = wide - mean(wide, names)
        normed = centered * rsqrt(mean(square(centered), names) + self.eps)
        return _scaled(normed.astype(x.dtype), self.weight, self.bias)


class RmsNorm(ModuleWithStateDictSerialization):
    """`x / sqrt(mean(x**2) + eps) * weight + bias` over `axis` (arXiv:1910.07467)."""

    axis: AxisSpec = eqx.field(static=True)
    weight: NamedArray | None
    bias: NamedArray | None
    eps: float = eqx.field(default=1e-5, static=True)
    dtype: Any = eqx.field(default=None, static=True)

    @staticmethod
    def init(
        axis: AxisSpec,
        eps: float = 1e-5,
        *,
        use_weight: bool = True,
        use_bias: bool = True,
        dtype: Any = None,
    ) -> "RmsNorm":
        """Unit weight and zero bias; the mean square is computed in `dtype`, or in float32."""
        weight, bias = _affine(axis, use_weight, use_bias)
        return RmsNorm(axis, weight, bias, eps, dtype)

    @named_call
    def __call__(self, x: NamedArray) -> NamedArray:
        """Normalizes over `axis`; the result has the dtype of `x`."""
        _check("RmsNorm", self.axis, x)
        wide = x.astype(self.dtype or jnp.float32)
        normed = wide * rsqrt(mean(square(wide), axis_names(self.axis)) + self.eps)
        return _scaled(normed.astype(x.dtype), self.weight, self.bias)


def _affine(
    axis: AxisSpec, use_weight: bool, use_bias: bool
) -> tuple[NamedArray | None, NamedArray | None]:
    return ones(axis) if use_weight else None, zeros(axis) if use_bias else None


def _scaled(x: NamedArray, weight: NamedArray | None, bias: NamedArray | None) -> NamedArray:
    if weight is not None:
        x = x * weight
    return x if bias is None else x + bias


def _check(layer: str, axis: AxisSpec, x: NamedArray) -> None:
    for own in axis_spec_to_tuple(axis):
        if own not in x.axes:
            raise ValueError(
                f"{layer}: the axis {own} to normalize over is not in {describe(x.axes)}. Rename "
                f"the input's axis, or use the other layer.{suggestion(own.name, x.shape)}"
            )


def standardize(
    x: NamedArray,
    axis: Any,
    *,
    mean: NamedArray | None = None,
    variance: NamedArray | None = None,
    epsilon: float = 1e-5,
    where: NamedArray | None = None,
) -> NamedArray:
    """`x` shifted to mean 0 and scaled to variance 1 over the axes; either moment may be given."""
    if mean is None:
        mean = x.mean(axis, where=where)
    if variance is None:
        variance = x.var(axis, where=where)
    return (x - mean) * rsqrt(variance + epsilon)
