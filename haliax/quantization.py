"""Matrix products in 8 bits, as drop-in `dot_general`s of linear layers.

*fp8* (Micikevicius et al., arXiv:2209.05433): operands are rounded to `float8_e4m3fn` and gradients
to `float8_e5m2`, each scaled by the largest magnitude of recent steps. Those histories are state
that the backward pass computes, so it comes back *as the gradient* of the op:
`partition_for_grad_overwrite` takes it out of the gradients before the optimizer sees them, and
`apply_updates` puts it in place.

*int8*: operands are scaled by the largest magnitude along the summed axes and rounded to `int8`;
products are exact in `int32`. The gradient is that of the product without rounding. There is no
state.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax

from haliax.core import NamedArray
from haliax.dot_general import DefaultDotGeneralOp as DefaultDotGeneralOp
from haliax.dot_general import DotGeneralOp as DotGeneralOp
from haliax.hof import vmap
from haliax.nn.linear import Linear
from haliax.nn.scan import Stacked
from haliax.util import is_named_array

T = TypeVar("T")


class OverwriteWithGradient(eqx.Module):
    """A module whose gradient is its next value, and not a direction to step in."""


def partition_for_grad_overwrite(grad: T) -> tuple[T, T]:
    """Splits gradients into values to overwrite with, and gradients proper; `None` elsewhere."""

    def is_overwriting(node: Any) -> bool:
        return isinstance(node, OverwriteWithGradient)

    def is_unit(node: Any) -> bool:
        return is_overwriting(node) or is_named_array(node)

    overwrites = jax.tree_util.tree_map(
        lambda node: node if is_overwriting(node) else None, grad, is_leaf=is_unit
    )
    proper = jax.tree_util.tree_map(
        lambda node: None if is_overwriting(node) else node, grad, is_leaf=is_unit
    )
    return overwrites, proper


def apply_updates(tree: T, updates: Any, overwrites: Any) -> T:
    """Adds the updates, and replaces what has an overwrite."""

    def is_unit(node: Any) -> bool:
        return node is None or isinstance(node, (OverwriteWithGradient, NamedArray))

    def apply(value: Any, update: Any, overwrite: Any) -> Any:
        if overwrite is not None:
            return overwrite
        return value if update is None else eqx.apply_updates(value, update)

    return jax.tree_util.tree_map(apply, tree, updates, overwrites, is_leaf=is_unit)


def _dequantized(x: jax.Array, dtype: Any, scale: jax.Array) -> jax.Array:
    """`x` rounded to an 8-bit float and back, which XLA turns around a product into fp8."""
    largest = jnp.finfo(dtype).max.astype(x.dtype)
    scale = scale.astype(x.dtype)
    return jnp.clip(x / scale, -largest, largest).astype(dtype).astype(x.dtype) * scale


def _next_scale(dtype: Any, scale: jax.Array, history: jax.Array) -> jax.Array:
    """The scale that maps the largest recent magnitude to the largest number of the dtype."""
    amax = jnp.max(history)
    wanted = amax / jnp.finfo(dtype).max.astype(jnp.float32)
    return jnp.where((amax > 0) & jnp.isfinite(amax), wanted, scale)


def _remember(x: jax.Array, history: jax.Array) -> jax.Array:
    """The history with the magnitude of `x` in the place of the oldest."""
    return jnp.roll(history, 1).at[0].set(jnp.max(jnp.abs(x)).astype(history.dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _quantize_operand(dtype: Any, x: jax.Array, scale: jax.Array, history: jax.Array) -> jax.Array:
    return _dequantized(x, dtype, _next_scale(dtype, scale, history))


def _quantize_operand_fwd(dtype: Any, x: Any, scale: Any, history: Any) -> Any:
    now = _next_scale(dtype, scale, history)
    return _dequantized(x, dtype, now), (now, _remember(x, history))


def _quantize_operand_bwd(dtype: Any, state: Any, g: Any) -> Any:
    del dtype
    return g, *state


_quantize_operand.defvjp(_quantize_operand_fwd, _quantize_operand_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _quantize_gradient(dtype: Any, y: jax.Array, scale: jax.Array, history: jax.Array) -> jax.Array:
    del dtype, scale, history
    return y


def _quantize_gradient_fwd(dtype: Any, y: Any, scale: Any, history: Any) -> Any:
    del dtype
    return y, (scale, history)


def _quantize_gradient_bwd(dtype: Any, state: Any, g: Any) -> Any:
    scale, history = state
    now = _next_scale(dtype, scale, history)
    return _dequantized(g, dtype, now), now, _remember(g, history)


_quantize_gradient.defvjp(_quantize_gradient_fwd, _quantize_gradient_bwd)


class Fp8DotGeneralOp(OverwriteWithGradient):
    """A product of fp8 operands, with delayed scaling."""

    input_scale: jax.Array
    kernel_scale: jax.Array
    output_grad_scale: jax.Array
    input_amax_history: jax.Array
    kernel_amax_history: jax.Array
    output_grad_amax_history: jax.Array
    compute_dtype: Any = eqx.field(static=True, default=None)

    @staticmethod
    def init(amax_history_length: int = 1024, compute_dtype: Any = None) -> "Fp8DotGeneralOp":
        """Unit scales and empty histories; the product is in `compute_dtype`, or the operands'."""

        def scale() -> jax.Array:
            return jnp.ones((), jnp.float32)

        def history() -> jax.Array:
            return jnp.zeros(amax_history_length, jnp.float32)

        return Fp8DotGeneralOp(
            scale(), scale(), scale(), history(), history(), history(), compute_dtype
        )

    def __call__(
        self,
        lhs: Any,
        rhs: Any,
        dimension_numbers: Any,
        precision: Any = None,
        preferred_element_type: Any = None,
        **kwargs: Any,
    ) -> jax.Array:
        """`lax.dot_general` on rounded operands."""
        dtype = self.compute_dtype or jnp.result_type(lhs, rhs)
        lhs, rhs = jnp.asarray(lhs, dtype), jnp.asarray(rhs, dtype)
        e4m3, e5m2 = jnp.float8_e4m3fn, jnp.float8_e5m2
        lhs = _quantize_operand(e4m3, lhs, self.input_scale, self.input_amax_history)
        rhs = _quantize_operand(e4m3, rhs, self.kernel_scale, self.kernel_amax_history)
        product = lax.dot_general(
            lhs,
            rhs,
            dimension_numbers,
            precision=lax.Precision.DEFAULT if precision is None else precision,
            preferred_element_type=preferred_element_type,
            **kwargs,
        )
        return _quantize_gradient(
            e5m2, product, self.output_grad_scale, self.output_grad_amax_history
        )


class Int8DotGeneralOp(eqx.Module):
    """A product of int8 operands, scaled by row and column."""

    @staticmethod
    def init() -> "Int8DotGeneralOp":
        """It has no state."""
        return Int8DotGeneralOp()

    def __call__(
        self,
        lhs: Any,
        rhs: Any,
        dimension_numbers: Any,
        precision: Any = None,
        preferred_element_type: Any = None,
        **kwargs: Any,
    ) -> jax.Array:
        """`lax.dot_general` on rounded operands."""
        del kwargs
        static = tuple(tuple(tuple(dims) for dims in pair) for pair in dimension_numbers)
        out: Any = _int8_product(static, precision, lhs, rhs)
        return out if preferred_element_type is None else out.astype(preferred_element_type)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _int8_product(numbers: Any, precision: Any, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    del precision
    (lhs_sum, rhs_sum), _ = numbers
    lhs_int, lhs_scale = _to_int8(lhs, lhs_sum)
    rhs_int, rhs_scale = _to_int8(rhs, rhs_sum)
    exact = lax.dot_general(lhs_int, rhs_int, numbers, preferred_element_type=jnp.int32)
    # The scales have size 1 along summed axes, so their own product has the shape of the result.
    scales = lax.dot_general(lhs_scale, rhs_scale, numbers)
    return (exact.astype(jnp.float32) * scales).astype(lhs.dtype)


def _to_int8(x: jax.Array, summed: Sequence[int]) -> tuple[jax.Array, jax.Array]:
    wide = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(wide), axis=tuple(summed), keepdims=True)
    scale = jnp.where(largest > 0, largest / 127.0, 1.0)
    return jnp.round(wide / scale).astype(jnp.int8), scale


def _int8_product_fwd(numbers: Any, precision: Any, lhs: Any, rhs: Any) -> Any:
    return _int8_product(numbers, precision, lhs, rhs), (lhs, rhs)


def _int8_product_bwd(numbers: Any, precision: Any, operands: Any, g: Any) -> Any:
    def product(lhs: Any, rhs: Any) -> Any:
        return lax.dot_general(lhs, rhs, numbers, precision=precision)

    return jax.vjp(product, *operands)[1](g)


_int8_product.defvjp(_int8_product_fwd, _int8_product_bwd)


@dataclasses.dataclass(frozen=True)
class QuantizationConfig:
    """Which linear layers to quantize, and how.

    Args:
        targets: `None` for all, names of fields, or a regular expression for the path of fields.
        amax_history_length: how many steps fp8 scales look back.
        compute_dtype: of fp8 products; `None` keeps the operands'.
        fp8: whether to use fp8.
        int8: whether to use int8.
    """

    targets: list[str] | str | None = None
    amax_history_length: int = 1024
    compute_dtype: Any = None
    fp8: bool = False
    int8: bool = False

    def __post_init__(self) -> None:
        if self.fp8 and self.int8:
            raise ValueError("QuantizationConfig: choose fp8 or int8, not both.")


def quantize_linear_layers(tree: T, config: QuantizationConfig) -> T:
    """The tree with a quantized `dot_general` in the linear layers that the config selects."""
    if config.fp8:
        make = functools.partial(
            Fp8DotGeneralOp.init, config.amax_history_length, config.compute_dtype
        )
        return _quantized(tree, config, make, ())
    if config.int8:
        return _quantized(tree, config, Int8DotGeneralOp.init, ())
    return tree


def _quantized(tree: Any, config: QuantizationConfig, make: Callable[[], Any], path: Any) -> Any:
    def is_unit(node: Any) -> bool:
        return isinstance(node, (Linear, Stacked)) or is_named_array(node)

    def quantize(inner: Any, node: Any) -> Any:
        here = (*path, *(_key(k) for k in inner))
        if isinstance(node, Stacked):
            # Every layer of a stack needs its own scales: `make` gets the stack's axis.
            stacked = _quantized(node.stacked, config, vmap(make, node.Block), (*here, "stacked"))
            return dataclasses.replace(node, stacked=stacked)
        if isinstance(node, Linear) and _is_target(here, config):
            return dataclasses.replace(node, dot_general=make())
        return node

    return jax.tree_util.tree_map_with_path(quantize, tree, is_leaf=is_unit)


def _key(key: Any) -> str:
    for attribute in ("name", "key", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def _is_target(path: tuple[str, ...], config: QuantizationConfig) -> bool:
    if config.targets is None:
        return True
    if isinstance(config.targets, str):
        return re.fullmatch(config.targets, ".".join(path)) is not None
    return bool(path) and path[-1] in config.targets
