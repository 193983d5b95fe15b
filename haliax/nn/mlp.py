"""`MLP`: linear layers with an activation between them."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax

from haliax.axis import Axis, AxisSpec
from haliax.core import NamedArray
from haliax.dot_general import DotGeneralOp
from haliax.jax_utils import maybe_rng_split
from haliax.nn.activations import relu
from haliax.nn.linear import Linear


class MLP(eqx.Module):
    """`depth` hidden layers; neighbouring hidden axes have different names, `mlp` and `mlp2`."""

    activation: Callable[..., Any] = eqx.field(static=True)
    layers: tuple[Linear, ...]

    @staticmethod
    def init(
        Input: AxisSpec,
        Output: AxisSpec,
        width: int | Axis,
        depth: int,
        activation: Callable[..., Any] = relu,
        *,
        out_first: bool = True,
        use_bias: bool = True,
        use_final_bias: bool = True,
        key: Any,
        dot_general: DotGeneralOp | None = None,
        init_scale: float = 1.0,
    ) -> "MLP":
        """Depth 0 is one linear layer. A width with a name gives the hidden axes that name."""
        if depth < 0:
            raise ValueError(f"MLP: depth is the number of hidden layers, so >= 0, not {depth}.")
        First = Axis("mlp", width) if isinstance(width, int) else width
        hidden: list[AxisSpec] = [
            First if i % 2 == 0 else First.alias(f"{First.name}2") for i in range(depth)
        ]
        ends = [Input, *hidden, Output]
        keys = jax.random.split(key, depth + 1)
        layers = tuple(
            Linear.init(
                ends[i],
                ends[i + 1],
                key=keys[i],
                use_bias=use_final_bias if i == depth else use_bias,
                out_first=out_first,
                dot_general=dot_general,
                init_scale=init_scale,
            )
            for i in range(depth + 1)
        )
        return MLP(activation, layers)

    def __call__(self, x: NamedArray, *, key: Any = None) -> NamedArray:
        """Maps `Input` to `Output`."""
        keys = maybe_rng_split(key, len(self.layers))
        for layer, layer_key in zip(self.layers[:-1], keys, strict=False):
            x = self.activation(layer(x, key=layer_key))
        return self.layers[-1](x, key=keys[-1])
