"""`MoELinear`: one linear layer per expert, for tokens sorted by expert.

Tokens of one expert are neighbours along one axis and `group_sizes` says how many each expert has,
so that all experts are one ragged matrix product (Gale et al., MegaBlocks, arXiv:2211.15841).
"""

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax

from haliax import random
from haliax.axis import Axis, AxisSpec, axis_names, axis_size, axis_spec_to_tuple, concat_axes
from haliax.core import NamedArray, trusted
from haliax.creation import zeros
from haliax.errors import describe
from haliax.jax_utils import named_call
from haliax.partitioning import auto_sharded
from haliax.shapes import flatten_axes, unflatten_axis
from haliax.state_dict import ModuleWithStateDictSerialization


class MoELinear(ModuleWithStateDictSerialization):
    """From the axes `In` to the axes `Out`, with the weights of each token's expert."""

    weight: NamedArray
    bias: NamedArray | None
    Experts: Axis = eqx.field(static=True)
    In: AxisSpec = eqx.field(static=True)
    Out: AxisSpec = eqx.field(static=True)
    use_gmm: bool = eqx.field(static=True, default=False)

    @staticmethod
    def init(
        Experts: Axis,
        In: AxisSpec,
        Out: AxisSpec,
        *,
        key: Any,
        use_bias: bool = True,
        out_first: bool = False,
        init_scale: float = 1.0,
        use_gmm: bool = False,
    ) -> "MoELinear":
        """As `Linear.init`, once per expert; `use_gmm` uses a Pallas kernel for TPUs."""
        inputs, outputs = axis_spec_to_tuple(In), axis_spec_to_tuple(Out)
        inner = concat_axes(outputs, inputs) if out_first else concat_axes(inputs, outputs)
        scale = init_scale / math.sqrt(max(1, axis_size(inputs)))
        weight = random.truncated_normal(key, (Experts, *inner), -3, 3) * scale
        bias = zeros((Experts, *outputs)) if use_bias else None
        return MoELinear(weight, bias, Experts, In, Out, use_gmm)

    @named_call
    def __call__(
        self, inputs: NamedArray, group_sizes: NamedArray, *, key: Any = None
    ) -> NamedArray:
        """Maps tokens sorted by expert; `group_sizes` counts the tokens of each expert."""
        del key
        ins, outs = axis_spec_to_tuple(self.In), axis_spec_to_tuple(self.Out)
        tokens = tuple(axis for axis in inputs.axes if axis not in ins)
        if (
            len(tokens) != 1
            or len(inputs.axes) != len(ins) + 1
            or group_sizes.axes != (self.Experts,)
        ):
            raise ValueError(
                f"MoELinear: wants one axis of tokens and {describe(ins)}, and group sizes over "
                f"{self.Experts}; got inputs {describe(inputs.axes)} and group sizes "
                f"{describe(group_sizes.axes)}. Flatten the token axes first."
            )
        x = flatten_axes(inputs, axis_names(ins), "__IN__").rearrange((tokens[0], "__IN__"))
        weight = flatten_axes(flatten_axes(self.weight, ins, "__IN__"), outs, "__OUT__")
        weight = weight.rearrange((self.Experts, "__IN__", "__OUT__"))
        multiply = _grouped_matmul if self.use_gmm else lax.ragged_dot
        product = multiply(x.array, weight.array, group_sizes.array.astype(jnp.int32))
        flat = trusted(product, (tokens[0], weight.axes[-1]))
        out = unflatten_axis(flat, "__OUT__", outs)
        if self.bias is not None:
            rows = jnp.repeat(
                self.bias.array, group_sizes.array, axis=0, total_repeat_length=tokens[0].size
            )
            out = out + trusted(rows, (tokens[0], *outs))
        return auto_sharded(out)


def _grouped_matmul(lhs: Any, rhs: Any, group_sizes: Any) -> jax.Array:
    """The Pallas kernel of MegaBlocks, for blocks of 128 rows; interpreted off TPUs."""
    from jax.experimental.pallas.ops.tpu.megablox import gmm

    rows = -lhs.shape[0] % 128
    padded = jnp.pad(lhs, ((0, rows), (0, 0)))
    sizes = group_sizes.at[-1].add(rows)
    tiling = (128, min(128, lhs.shape[1]), min(128, rhs.shape[2]))
    is_interpreted = jax.default_backend() != "tpu"
    product = gmm(padded, rhs, sizes, lhs.dtype, tiling, interpret=is_interpreted)
    return product[: lhs.shape[0]]
