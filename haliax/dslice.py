"""`dslice` (`ds`): a slice with a start that may be traced and a size that is static."""

from typing import Any

import equinox as eqx
import jax

from haliax.axis import Axis


class dslice(eqx.Module):
    """`size` elements from `start` on.

    Reading past the end gives zeros and writing there does nothing, so that ragged last blocks need
    no special case.
    """

    start: Any
    size: int = eqx.field(static=True)

    def __init__(self, start: Any, length: int | Axis | None = None) -> None:
        if length is None:
            start, length = 0, start
        self.start = start
        self.size = length.size if isinstance(length, Axis) else int(length)  # pyright: ignore

    @staticmethod
    def block(idx: Any, size: int) -> "dslice":
        """The `idx`-th block of `size` elements."""
        return dslice(idx * size, size)

    def to_slice(self) -> slice:
        """A Python slice; the start must be a Python integer."""
        return slice(self.start, self.start + self.size)

    def positions(self) -> jax.Array:
        """The integer positions it covers."""
        start = getattr(self.start, "array", self.start)
        return start + jax.lax.iota("int32", self.size)


ds = dslice


def dblock(idx: Any, size: int) -> dslice:
    """`dslice.block`."""
    return dslice.block(idx, size)
