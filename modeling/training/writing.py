"""Writes the chunks of arrays: each a file, digested piece by piece on its way from memory to disk.

A chunk's file is what zarr v3 makes of it with the codecs `bytes` and `crc32c`: its row-major
little-endian bytes and their checksum. TensorStore writes and reads the same, but copies each chunk
for its checksum, and digests would be a second pass over memory. `metadata` is TensorStore's own
word on an array, so that what it could not read is not written.
"""

import contextlib
import functools
import hashlib
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from modeling.training.leaves import HostLeaf
from modeling.training.manifest import (
    ARRAYS,
    CRC_BYTES,
    PIECE_BYTES,
    ChunkRecord,
    FileRecord,
    cells,
    pieces,
)


def write_metadata(directory: Path, leaf: HostLeaf) -> None:
    """Writes what zarr needs to know of an array, durably; its directory is there."""
    with _written(directory / _metadata_path(leaf)) as write:
        write(metadata(leaf))


def metadata_record(leaf: HostLeaf) -> FileRecord:
    """Returns the record of what `write_metadata` writes."""
    content = metadata(leaf)
    digest = hashlib.sha256(content).hexdigest()
    return FileRecord(_metadata_path(leaf), len(content), digest)


def _metadata_path(leaf: HostLeaf) -> str:
    return f"{ARRAYS}/{leaf.path}/zarr.json"


def metadata(leaf: HostLeaf) -> bytes:
    """Returns the `zarr.json` of an array, as TensorStore writes it."""
    return _metadata(tuple(leaf.shape), tuple(leaf.chunk_shape), leaf.dtype.name)


# Written and recorded, and the same at every save of a run: TensorStore is asked once.
@functools.lru_cache(maxsize=4096)
def _metadata(shape: tuple[int, ...], chunk_shape: tuple[int, ...], data_type: str) -> bytes:
    import tensorstore

    context = tensorstore.Context()
    spec = _spec(shape, chunk_shape, data_type)
    tensorstore.open(spec, create=True, context=context).result()
    made = tensorstore.KvStore.open(_MEMORY, context=context).result()
    return made.read("zarr.json").result().value


_MEMORY = {"driver": "memory", "path": "array/"}


def _spec(shape: tuple[int, ...], chunk_shape: tuple[int, ...], data_type: str) -> dict[str, Any]:
    return {
        "driver": "zarr3",
        "kvstore": _MEMORY,
        "metadata": {
            "shape": list(shape),
            "data_type": data_type,
            "chunk_grid": {
                "name": "regular",
                # A chunk must have a size even where the array has none.
                "configuration": {"chunk_shape": [max(n, 1) for n in chunk_shape]},
            },
            # Files side by side: each further directory would cost a sync of its own.
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
            "codecs": [
                {"name": "bytes", "configuration": {"endian": "little"}},
                {"name": "crc32c"},
            ],
        },
    }


def write_chunk(directory: Path, leaf: HostLeaf, start: tuple[int, ...]) -> ChunkRecord:
    """Writes the chunk that begins at `start`, durably, and returns its record."""
    chunk = leaf.chunks[start]
    numbers = (a // n for a, n in zip(start, leaf.chunk_shape, strict=True))
    path = f"{ARRAYS}/{leaf.path}/" + ".".join(["c", *map(str, numbers)])
    digest, checksum = hashlib.sha256(), 0
    with _written(directory / path) as write:
        # A piece stays in the processor's cache for all that is done with it.
        for piece in pieces(chunk):
            digest.update(piece.data)
            checksum = google_crc32c.extend(checksum, piece)
            write(piece.data)
        trailer = checksum.to_bytes(CRC_BYTES, "little")
        write(trailer)
    record = FileRecord(path, chunk.nbytes + CRC_BYTES, digest.hexdigest())
    return ChunkRecord(record, start, trailer.hex())


@contextlib.contextmanager
def _written(path: Path) -> Iterator[Callable[[bytes | memoryview], None]]:
    """Yields what writes to a new file, whole; it is on disk at the end. Errors name the file."""
    try:
        with path.open("xb", buffering=0) as file:

            def write(content: bytes | memoryview) -> None:
                view = memoryview(content)
                while view:  # a disk may take a part of it
                    view = view[file.write(view) :]

            yield write
            os.fsync(file.fileno())
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def leaf_sha256(leaf: HostLeaf) -> str:
    """Returns the digest of an array all of whose chunks are here; no second array is made."""
    digest = hashlib.sha256()
    for rows in _rows(leaf):
        for piece in pieces(rows):
            digest.update(piece.data)
    return digest.hexdigest()


def _rows(leaf: HostLeaf) -> Iterator[np.ndarray]:
    """Yields an array in order, as many rows of its first axis at a time as are a piece."""
    row_bytes = math.prod(leaf.shape[1:]) * leaf.dtype.itemsize
    count = max(PIECE_BYTES // max(row_bytes, 1), 1)
    for first in range(0, leaf.shape[0], count):
        rows = np.empty((min(count, leaf.shape[0] - first), *leaf.shape[1:]), leaf.dtype)
        for start, chunk in leaf.chunks.items():
            begin, end = start[0], start[0] + chunk.shape[0]
            low, high = max(first, begin), min(first + len(rows), end)
            if low < high:
                where = slice(low - first, high - first), *cells(start[1:], chunk.shape[1:])
                rows[where] = chunk[low - begin : high - begin]
        yield rows
