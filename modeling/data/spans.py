"""Spans of a stream copied end to end by Arrow, since NumPy copies runs of many lengths by index.

Arrow's *binary views* name runs of bytes wherever they are, 16 bytes each (Arrow columnar format,
"Variable-size Binary View Layout"):

    int32 length, 4 bytes for comparisons, int32 buffer, int32 offset
    int32 length, the run itself                                        if it has 12 bytes or fewer

A cast to plain binary copies one run after another. Since offsets have 32 bits, a long array is cut
into blocks; each reaches over the next, so that a span lies in the one that it starts in.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from jaxtyping import Int32, Int64, Integer

BLOCK_BYTES = 1 << 30
NOWHERE = -1
"""Where filler starts."""
_INLINE_BYTES = 12
_MANY_BUFFERS = 256
Views = Int32[np.ndarray, "spans 4"]


class SpanTable:
    """Names spans of consecutive arrays, which are one stream, and copies them."""

    def __init__(
        self, parts: Sequence[Integer[np.ndarray, "_"]], dtype: np.dtype, filler: int, longest: int
    ) -> None:
        """Takes the arrays in order; they are not copied.

        Args:
            parts: all of `dtype`.
            dtype: of the tokens.
            filler: what spans consist of that start at `NOWHERE`.
            longest: most tokens of a span.
        """
        self._dtype = dtype
        step = BLOCK_BYTES // dtype.itemsize
        assert longest <= step
        self._starts = [NOWHERE]
        self._blocks = [np.full(max(longest, _INLINE_BYTES), filler, dtype)]
        end = 0
        for part in parts:
            for first in range(0, len(part), step):
                self._starts.append(end + first)
                self._blocks.append(part[first : first + 2 * step])
            end += len(part)
        self._buffers = list(map(pa.py_buffer, self._blocks))

    def views(
        self, starts: Int64[np.ndarray, " spans"], lengths: Int32[np.ndarray, " spans"]
    ) -> Views:
        """Returns the names of spans, each of which lies in one array."""
        block = np.searchsorted(self._starts, starts, side="right") - 1
        offsets = starts - np.array(self._starts)[block]
        views = np.zeros((len(starts), 4), np.int32)
        for column, values in ((0, lengths), (3, offsets)):
            np.multiply(values, self._dtype.itemsize, out=views[:, column], casting="same_kind")
        views[:, 2] = block
        (short,) = np.nonzero(views[:, 0] <= _INLINE_BYTES)
        ahead = np.arange(_INLINE_BYTES // self._dtype.itemsize)
        for index in np.unique(block[short]).tolist():
            here = short[block[short] == index]
            run = self._blocks[index].take(offsets[here, None] + ahead, mode="clip")
            views[here, 1:] = run.view(np.int32)
        return views

    def lengths(self, views: Views) -> Int32[np.ndarray, " spans"]:
        """Returns how many tokens spans have."""
        return views[:, 0] // np.int32(self._dtype.itemsize)

    def joined(self, views: Views) -> Integer[np.ndarray, "_"]:
        """Returns the tokens of spans end to end."""
        buffers = self._buffers
        if len(buffers) > _MANY_BUFFERS:
            views, buffers = self._with_few_buffers(views)
        runs = pa.Array.from_buffers(
            pa.binary_view(), len(views), [None, pa.py_buffer(views), *buffers]
        )
        *_, content = runs.cast(pa.large_binary()).buffers()
        return np.frombuffer(content, self._dtype)

    def _with_few_buffers(self, views: Views) -> tuple[Views, list[pa.Buffer]]:
        """Returns views of the buffers that are needed: handing over each costs time."""
        views = views.copy()
        (here,) = np.nonzero(views[:, 0] > _INLINE_BYTES)
        used, views[here, 2] = np.unique(views[here, 2], return_inverse=True)
        return views, [self._buffers[index] for index in used.tolist()]
