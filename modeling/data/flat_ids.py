"""Reads documents out of a flat array of ids, as other trainers write their corpora.

A file is an `.npy` of one dimension, or bare little-endian integers of `format.dtype`. Each
document ends with the separator, which is no part of it; what follows the last one is a document
too. The file is read a piece at a time.
"""

import io
from collections.abc import Iterator

import numpy as np
from jaxtyping import Integer

from modeling.data.formats_config import IdsFormat
from modeling.data.records import RecordError

_IDS_AT_ONCE = 1 << 20
_MAX_DOCUMENT_IDS = 1 << 27
_MAGIC = np.lib.format.MAGIC_PREFIX


def flat_documents(stream: io.BufferedIOBase, ids: IdsFormat) -> Iterator[Integer[np.ndarray, "_"]]:
    """Yields the ids of each document, without its separator.

    Raises:
        RecordError: the file is no flat array of ids, or none is the separator for too long.
    """
    if ids.separator_id is None:
        raise RecordError("set `format.separator_id` to the id that ends each document")
    dtype, rest, num_ids = _start(stream, ids)
    pending, first = np.empty(0, dtype), 0
    while piece := rest + stream.read(_IDS_AT_ONCE * dtype.itemsize - len(rest)):
        rest = b""
        if len(piece) % dtype.itemsize:
            raise RecordError(f"ends within an id of {dtype.itemsize} bytes")
        pending = np.concatenate([pending, np.frombuffer(piece, dtype)])
        *whole, pending = np.split(pending, np.flatnonzero(pending == ids.separator_id) + 1)
        for document in whole:
            yield document[:-1]
            first += len(document)
        if len(pending) > _MAX_DOCUMENT_IDS:
            raise RecordError(
                f"no id {ids.separator_id} among the {len(pending)} from id {first} on; is "
                f"`format.separator_id` right?"
            )
    if num_ids not in (None, first + len(pending)):
        raise RecordError(
            f"holds {first + len(pending)} ids, but its header says {num_ids}; it is cut short or "
            f"was written over"
        )
    if len(pending):
        yield pending


def _start(stream: io.BufferedIOBase, ids: IdsFormat) -> tuple[np.dtype, bytes, int | None]:
    """Returns the type of the ids, what of them was read to find it, and their number if known."""
    head = stream.read(len(_MAGIC))
    if head != _MAGIC:
        if ids.dtype is None:
            raise RecordError("has no `.npy` header; set `format.dtype`")
        return np.dtype(ids.dtype).newbyteorder("<"), head, None
    major = stream.read(2)[:1]
    read_header = {
        b"\1": np.lib.format.read_array_header_1_0,
        b"\2": np.lib.format.read_array_header_2_0,
    }.get(major)
    if read_header is None:
        raise RecordError(f"is an `.npy` of version {list(major)}, expected 1 or 2")
    try:
        shape, _, dtype = read_header(stream)
    except ValueError as error:
        raise RecordError(f"has a damaged `.npy` header: {error}") from error
    if dtype.kind not in "ui" or len(shape) != 1:
        raise RecordError(f"holds {dtype} of shape {shape}, expected integers in one dimension")
    return dtype, b"", shape[0]
