"""Dropout: zeroes random elements while training, and scales up the rest to keep the mean."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp

from haliax import random
from haliax.axis import AxisSelection, without_axes
from haliax.core import NamedArray
from haliax.jax_utils import named_call
from haliax.ops import where


def dropout(
    x: NamedArray,
    pdrop: Any,
    broadcast_axes: AxisSelection | None = None,
    *,
    inference: bool = False,
    key: Any = None,
) -> NamedArray:
    """Zeroes each element with probability `pdrop`; slices along `broadcast_axes` together."""
    if inference or (isinstance(pdrop, (int, float)) and pdrop == 0):
        return x
    if key is None:
        raise RuntimeError(
            "dropout needs a `key` while training. Pass one, or set `inference=True` (for a whole "
            "model: `eqx.nn.inference_mode(model)`)."
        )
    shape = x.axes
    if broadcast_axes is not None:
        shape = without_axes(x.axes, x.resolve_axis(broadcast_axes))
    keep = 1 - pdrop
    if isinstance(keep, (int, float)) and keep == 0:
        return x * 0
    mask = random.bernoulli(key, shape, keep)
    return where(mask, x / jnp.asarray(keep, x.dtype), jnp.zeros((), x.dtype))


class Dropout(eqx.Module):
    """`dropout` as a layer; off when `inference` is set."""

    pdrop: float = eqx.field(static=True, default=0.5)
    broadcast_axes: Any = eqx.field(static=True, default=None)
    inference: bool = False

    def is_active(self) -> bool:
        """Whether calling it changes anything."""
        return not self.inference and self.pdrop > 0

    @named_call
    def __call__(
        self, x: NamedArray, *, inference: bool | None = None, key: Any = None
    ) -> NamedArray:
        """Drops elements, unless in inference."""
        off = self.inference if inference is None else inference
        return dropout(x, self.pdrop, self.broadcast_axes, inference=off, key=key)
