"""`Linear`: a matrix between any axes and any others.

`In` and `Out` may each be several axes: an attention projection is `Linear.init(Embed, (Heads,
HeadSize))` and needs no reshape.
"""

import math
from typing import Any

import equinox as eqx

from haliax import random
from haliax.axis import Axis, AxisSpec, axis_names, axis_size, axis_spec_to_tuple, concat_axes
from haliax.contraction import dot
from haliax.core import NamedArray
from haliax.creation import zeros
from haliax.dot_general import DotGeneralOp, default_dot_general
from haliax.errors import describe, suggestion
from haliax.jax_utils import named_call
from haliax.partitioning import auto_sharded
from haliax.shapes import flatten_axes, unflatten_axis
from haliax.state_dict import ModuleWithStateDictSerialization


class Linear(ModuleWithStateDictSerialization):
    """`inputs @ weight + bias`, from the axes `In` to `Out`; all others are carried along."""

    weight: NamedArray
    bias: NamedArray | None
    In: AxisSpec = eqx.field(static=True)
    Out: AxisSpec = eqx.field(static=True)
    dot_general: Any = eqx.field(default_factory=default_dot_general)

    @staticmethod
    def init(
        In: AxisSpec,
        Out: AxisSpec,
        *,
        key: Any,
        use_bias: bool = True,
        out_first: bool = True,
        dot_general: DotGeneralOp | None = None,
        init_scale: float = 1.0,
    ) -> "Linear":
        """Truncated normal weights of variance about `init_scale**2 / size of In`, zero bias.

        `out_first` puts the output axes first in memory, as PyTorch has it.
        """
        inputs, outputs = axis_spec_to_tuple(In), axis_spec_to_tuple(Out)
        both = set(axis_names(inputs)) & set(axis_names(outputs))
        if both:
            raise ValueError(
                f"Linear: {sorted(both)} is in both In {describe(inputs)} and Out "
                f"{describe(outputs)}. Give the output another name, for example `In.alias('new')`."
            )
        axes = concat_axes(outputs, inputs) if out_first else concat_axes(inputs, outputs)
        scale = init_scale / math.sqrt(max(1, axis_size(inputs)))
        weight = random.truncated_normal(key, axes, -3, 3) * scale
        bias = zeros(outputs) if use_bias else None
        return Linear(weight, bias, In, Out, dot_general or default_dot_general())

    @named_call
    def __call__(self, inputs: NamedArray, *, key: Any = None) -> NamedArray:
        """Maps the axes `In` of the inputs to `Out`."""
        del key
        self._check(inputs)
        out = dot(inputs, self.weight, axis=axis_names(self.In), dot_general=self.dot_general)
        return out if self.bias is None else auto_sharded(out + self.bias)

    def _check(self, inputs: NamedArray) -> None:
        inputs_axes = axis_spec_to_tuple(self.In)
        if all(axis in inputs.axes for axis in inputs_axes):
            return
        bad = next(axis for axis in inputs_axes if axis not in inputs.axes)
        raise ValueError(
            f"Linear: the input axis {bad} is not in {describe(inputs.axes)}; this layer maps "
            f"{describe(inputs_axes)} to {describe(self.Out)}. Rename the input's axis, or use the "
            f"other layer.{suggestion(bad.name, inputs.shape)}"
        )

    @property
    def out_first(self) -> bool:
        """Whether the output axes come first in memory."""
        outputs, axes = axis_spec_to_tuple(self.Out), self.weight.axes
        if not outputs or len(outputs) == len(axes):
            return True
        own = [axis for axis in axes if axis in (*outputs, *axis_spec_to_tuple(self.In))]
        return tuple(own[: len(outputs)]) == outputs

    def flatten_for_export(self) -> "Linear":
        """One input axis, `__IN__`, and one output axis, `__OUT__`; absent ones become size 1."""
        inputs, outputs = axis_spec_to_tuple(self.In), axis_spec_to_tuple(self.Out)
        weight, bias, out_first = self.weight, self.bias, self.out_first
        weight = flatten_axes(weight, outputs, "__OUT__")
        weight = flatten_axes(weight, inputs, "__IN__")
        if bias is not None:
            bias = flatten_axes(bias, outputs, "__OUT__")
        order = ("__OUT__", "__IN__") if out_first else ("__IN__", "__OUT__")
        weight = weight.rearrange((..., *order))
        if bias is not None:
            bias = bias.rearrange((..., "__OUT__"))
        new_in, new_out = Axis("__IN__", axis_size(inputs)), Axis("__OUT__", axis_size(outputs))
        return Linear(weight, bias, new_in, new_out, self.dot_general)

    def unflatten_from_export(self, template: Any) -> "Linear":
        """The inverse; the template has the axes."""
        if (self.In, self.Out) == (template.In, template.Out):
            return self
        weight = unflatten_axis(self.weight, "__OUT__", axis_spec_to_tuple(template.Out))
        weight = unflatten_axis(weight, "__IN__", axis_spec_to_tuple(template.In))
        bias = self.bias
        if bias is not None:
            bias = unflatten_axis(bias, "__OUT__", axis_spec_to_tuple(template.Out))
            if template.bias is not None:
                bias = bias.rearrange(template.bias.axes)
        weight = weight.rearrange(template.weight.axes)
        return Linear(weight, bias, template.In, template.Out, template.dot_general)
