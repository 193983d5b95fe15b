"""`Conv` and `ConvTranspose` over any number of named spatial axes.

All axes but `In` and the spatial ones are batch axes. The result has the axes of the input in their
order, with `Out` in the place of `In` and spatial axes of their new sizes.
"""

import math
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jax import lax

from haliax import random
from haliax.axis import Axis, AxisSelection, axis_names
from haliax.broadcasting import permuted
from haliax.core import NamedArray, trusted
from haliax.errors import axis_not_found, describe, size_mismatch
from haliax.jax_utils import named_call
from haliax.state_dict import ModuleWithStateDictSerialization

Sizes = int | Sequence[int]
Padding = str | int | Sequence[int] | Sequence[tuple[int, int]]


class Conv(ModuleWithStateDictSerialization):
    """Cross-correlation, as deep learning calls convolution, over the axes `Spatial`."""

    weight: NamedArray
    bias: NamedArray | None
    Spatial: tuple[str, ...] = eqx.field(static=True)
    In: Axis = eqx.field(static=True)
    Out: Axis = eqx.field(static=True)
    kernel_size: tuple[int, ...] = eqx.field(static=True)
    stride: tuple[int, ...] = eqx.field(static=True)
    padding: Any = eqx.field(static=True)
    dilation: tuple[int, ...] = eqx.field(static=True)
    groups: int = eqx.field(static=True)

    @staticmethod
    def init(
        Spatial: AxisSelection,
        In: Axis,
        Out: Axis,
        kernel_size: Sizes,
        *,
        stride: Sizes = 1,
        padding: Padding = 0,
        dilation: Sizes = 1,
        groups: int = 1,
        use_bias: bool = True,
        key: Any,
    ) -> "Conv":
        """Sizes, strides and paddings are one for all spatial axes, or one each.

        Padding is also `"SAME"`, `"VALID"`, or a pair for each axis.
        """
        names = _spatial_names(Spatial, In, Out, groups)
        kernel = _each("kernel_size", kernel_size, len(names))
        weight, bias = _parameters(names, In, Out, kernel, groups, use_bias, key)
        return Conv(
            weight,
            bias,
            names,
            In,
            Out,
            kernel,
            _each("stride", stride, len(names)),
            _paddings(padding, len(names)),
            _each("dilation", dilation, len(names)),
            groups,
        )

    @named_call
    def __call__(self, inputs: NamedArray, *, key: Any = None) -> NamedArray:
        """Convolves the spatial axes of the inputs, and maps `In` to `Out`."""
        del key
        return _convolve(self, inputs, strides=self.stride, padding=self.padding)


class ConvTranspose(ModuleWithStateDictSerialization):
    """The transpose of a `Conv`: strides enlarge the spatial axes (Dumoulin, arXiv:1603.07285)."""

    weight: NamedArray
    bias: NamedArray | None
    Spatial: tuple[str, ...] = eqx.field(static=True)
    In: Axis = eqx.field(static=True)
    Out: Axis = eqx.field(static=True)
    kernel_size: tuple[int, ...] = eqx.field(static=True)
    stride: tuple[int, ...] = eqx.field(static=True)
    padding: tuple[tuple[int, int], ...] = eqx.field(static=True)
    output_padding: tuple[int, ...] = eqx.field(static=True)
    dilation: tuple[int, ...] = eqx.field(static=True)
    groups: int = eqx.field(static=True)

    @staticmethod
    def init(
        Spatial: AxisSelection,
        In: Axis,
        Out: Axis,
        kernel_size: Sizes,
        *,
        stride: Sizes = 1,
        padding: Padding = 0,
        output_padding: Sizes = 0,
        dilation: Sizes = 1,
        groups: int = 1,
        use_bias: bool = True,
        key: Any,
    ) -> "ConvTranspose":
        """`padding` is the transposed convolution's; `output_padding` adds rows at the end."""
        names = _spatial_names(Spatial, In, Out, groups)
        count = len(names)
        kernel = _each("kernel_size", kernel_size, count)
        pads = _paddings(padding, count)
        if isinstance(pads, str):
            raise ValueError(
                "ConvTranspose: padding is a number or pairs; 'SAME' is ambiguous here."
            )
        weight, bias = _parameters(names, In, Out, kernel, groups, use_bias, key)
        return ConvTranspose(
            weight,
            bias,
            names,
            In,
            Out,
            kernel,
            _each("stride", stride, count),
            pads,
            _each("output_padding", output_padding, count),
            _each("dilation", dilation, count),
            groups,
        )

    @named_call
    def __call__(self, inputs: NamedArray, *, key: Any = None) -> NamedArray:
        """Enlarges the spatial axes of the inputs, and maps `In` to `Out`."""
        del key
        reach = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
        padding = [
            (r - low, r - high + extra)
            for r, (low, high), extra in zip(reach, self.padding, self.output_padding, strict=True)
        ]
        ones = (1,) * len(self.Spatial)
        return _convolve(self, inputs, strides=ones, padding=padding, lhs_dilation=self.stride)


def _spatial_names(spatial: AxisSelection, In: Axis, Out: Axis, groups: int) -> tuple[str, ...]:
    names = axis_names(spatial)
    for channel in (In, Out):
        if channel.name in names:
            raise ValueError(f"Conv: the axis {channel} cannot be spatial as well, as in {names}.")
        if channel.size % groups:
            raise ValueError(f"Conv: {groups} groups do not divide the axis {channel} evenly.")
    return names


def _each(what: str, value: Sizes, count: int) -> tuple[int, ...]:
    if isinstance(value, int):
        return (value,) * count
    if len(value) != count:
        raise ValueError(
            f"Conv: {what}={value} must be one number or {count}, one per spatial axis."
        )
    return tuple(value)


def _paddings(padding: Padding, count: int) -> Any:
    if isinstance(padding, str):
        if padding.upper() not in ("SAME", "VALID"):
            raise ValueError(f"Conv: padding is 'SAME', 'VALID' or numbers, not '{padding}'.")
        return padding.upper()
    each = (padding,) * count if isinstance(padding, int) else tuple(padding)
    if len(each) != count:
        raise ValueError(f"Conv: padding={padding} must be one or {count}, one per spatial axis.")
    return tuple((p, p) if isinstance(p, int) else tuple(p) for p in each)


def _parameters(
    names: tuple[str, ...],
    In: Axis,
    Out: Axis,
    kernel: tuple[int, ...],
    groups: int,
    use_bias: bool,
    key: Any,
) -> tuple[NamedArray, NamedArray | None]:
    """Uniform in `1 / sqrt(fan in)`; an In named like Out becomes `..._in` in the weight."""
    Inner = In.resize(In.size // groups)
    if Inner.name == Out.name:
        Inner = Inner.alias(f"{In.name}_in")
    kernels = tuple(Axis(f"kernel_{n}", k) for n, k in zip(names, kernel, strict=True))
    limit = 1 / math.sqrt(max(1, Inner.size * math.prod(kernel)))
    weight_key, bias_key = random.jrandom.split(key)
    weight = random.uniform(weight_key, (Out, Inner, *kernels), minval=-limit, maxval=limit)
    bias = random.uniform(bias_key, Out, minval=-limit, maxval=limit) if use_bias else None
    return weight, bias


def _convolve(layer: Any, inputs: NamedArray, **options: Any) -> NamedArray:
    sizes = {axis.name: axis for axis in inputs.axes}
    for name in (*layer.Spatial, layer.In.name):
        if name not in sizes:
            raise axis_not_found(type(layer).__name__, name, inputs.axes)
    if sizes[layer.In.name] != layer.In:
        found = sizes[layer.In.name].size
        raise size_mismatch(type(layer).__name__, layer.In.name, layer.In.size, found, inputs.axes)
    spatial = tuple(sizes[name] for name in layer.Spatial)
    batch = tuple(axis for axis in inputs.axes if axis not in (*spatial, layer.In))
    if layer.Out.name in {axis.name for axis in batch}:
        raise ValueError(
            f"{type(layer).__name__}: the output axis {layer.Out} is a batch axis of "
            f"{describe(inputs.axes)}. Rename one of them."
        )
    raw = permuted(inputs.array, inputs.axes, (*batch, layer.In, *spatial))
    raw = jnp.reshape(raw, (-1, *raw.shape[len(batch) :]))
    out = lax.conv_general_dilated(
        raw,
        layer.weight.array,
        window_strides=options.pop("strides"),
        rhs_dilation=layer.dilation,
        feature_group_count=layer.groups,
        **options,
    )
    grown = {axis.name: axis.resize(n) for axis, n in zip(spatial, out.shape[2:], strict=True)}
    axes = (*batch, layer.Out, *grown.values())
    result = trusted(jnp.reshape(out, [axis.size for axis in axes]), axes)
    if layer.bias is not None:
        result = result + layer.bias
    order = [layer.Out if a == layer.In else grown.get(a.name, a) for a in inputs.axes]
    return result.rearrange(order)
