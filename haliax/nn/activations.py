"""`jax.nn`'s activations by name, and a few more that language models use."""

from typing import Any

import jax
import jax.numpy as jnp

from haliax.axis import Axis, AxisSelector, single_position
from haliax.core import NamedArray, trusted
from haliax.elementwise import tanh as tanh
from haliax.elementwise import unary

celu = unary(jax.nn.celu, "celu")
elu = unary(jax.nn.elu, "elu")
hard_sigmoid = unary(jax.nn.hard_sigmoid, "hard_sigmoid")
hard_silu = unary(jax.nn.hard_silu, "hard_silu")
hard_swish = unary(jax.nn.hard_swish, "hard_swish")
hard_tanh = unary(jax.nn.hard_tanh, "hard_tanh")
leaky_relu = unary(jax.nn.leaky_relu, "leaky_relu")
log_sigmoid = unary(jax.nn.log_sigmoid, "log_sigmoid")
mish = unary(jax.nn.mish, "mish")
relu = unary(jax.nn.relu, "relu")
relu6 = unary(jax.nn.relu6, "relu6")
selu = unary(jax.nn.selu, "selu")
sigmoid = unary(jax.nn.sigmoid, "sigmoid")
silu = unary(jax.nn.silu, "silu")
soft_sign = unary(jax.nn.soft_sign, "soft_sign")
softplus = unary(jax.nn.softplus, "softplus")
swish = unary(jax.nn.swish, "swish")


def gelu(a: Any, approximate: bool = True) -> Any:
    """The Gaussian error linear unit; by default its tanh approximation, as in GPT-2."""
    if isinstance(a, NamedArray):
        return trusted(jax.nn.gelu(a.array, approximate=approximate), a.axes)
    return jax.nn.gelu(a, approximate=approximate)


def quick_gelu(a: Any) -> Any:
    """`a * sigmoid(1.702 a)`, the cheap approximation of GELU that CLIP uses."""
    return a * sigmoid(1.702 * a)


def relu_squared(a: Any) -> Any:
    """`relu(a) ** 2` (So et al., arXiv:2109.08668)."""
    return relu(a) ** 2


def glu(a: NamedArray, axis: AxisSelector) -> NamedArray:
    """The first half of an axis times the sigmoid of the second half."""
    at = single_position("glu", a.axes, axis)
    own = a.axes[at]
    if own.size % 2:
        raise ValueError(f"glu: axis {own} of {a.shape} must have an even size to be halved.")
    axes = (*a.axes[:at], own.resize(own.size // 2), *a.axes[at + 1 :])
    return trusted(jax.nn.glu(a.array, axis=at), axes)


def one_hot(x: Any, class_axis: Axis, dtype: Any = None) -> NamedArray:
    """1 at the class of each element, 0 elsewhere; classes out of range are all 0.

    A Python integer out of range is an error. The result has the axes of `x`, then `class_axis`.
    """
    dtype = dtype or jnp.float32
    if isinstance(x, NamedArray):
        if class_axis.name in x.shape:
            raise ValueError(
                f"one_hot: the class axis {class_axis} is already in {x.shape}. Use another name."
            )
        raw = jax.nn.one_hot(x.array, class_axis.size, dtype=dtype)
        return trusted(raw, (*x.axes, class_axis))
    if not isinstance(x, int) or isinstance(x, bool):
        dtype_of_class = getattr(x, "dtype", jnp.float32)
        if getattr(x, "ndim", 1) or not jnp.issubdtype(dtype_of_class, jnp.integer):
            raise TypeError(f"one_hot: a class is an integer or a named array of them, not {x!r}.")
        return trusted(jax.nn.one_hot(x, class_axis.size, dtype=dtype), (class_axis,))
    if not 0 <= x < class_axis.size:
        raise AssertionError(f"one_hot: class {x} is out of range for {class_axis}.")
    return trusted(jnp.zeros(class_axis.size, dtype).at[x].set(1), (class_axis,))
