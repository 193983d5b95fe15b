"""What multiplies matrices inside a layer: `lax.dot_general`, or a module in its place.

A `DotGeneralOp` has the signature of `lax.dot_general`; being a module, it may hold arrays, such as
the scales of a quantized product (`haliax.quantization`). The default holds none.
"""

from typing import Any, Protocol, runtime_checkable

import equinox as eqx
import jax
from jax import lax


@runtime_checkable
class DotGeneralOp(Protocol):
    """Multiplies two raw arrays as `lax.dot_general` does."""

    def __call__(
        self,
        lhs: Any,
        rhs: Any,
        dimension_numbers: Any,
        precision: Any = None,
        preferred_element_type: Any = None,
        **kwargs: Any,
    ) -> jax.Array:
        """The product."""
        ...


class DefaultDotGeneralOp(eqx.Module):
    """`lax.dot_general`, as a module without leaves."""

    def __call__(
        self,
        lhs: Any,
        rhs: Any,
        dimension_numbers: Any,
        precision: Any = None,
        preferred_element_type: Any = None,
        **kwargs: Any,
    ) -> jax.Array:
        """The product."""
        return lax.dot_general(
            lhs,
            rhs,
            dimension_numbers,
            precision=precision,
            preferred_element_type=preferred_element_type,
            **kwargs,
        )

    @staticmethod
    def init() -> "DefaultDotGeneralOp":
        """The one there is."""
        return DefaultDotGeneralOp()


def default_dot_general() -> DefaultDotGeneralOp:
    """The op of layers that were not told otherwise."""
    return DefaultDotGeneralOp()
