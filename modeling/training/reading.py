"""Reads a checkpoint without its experiment: no model, no mesh, no JAX.

`read_manifest` tells what there is: `manifest.leaves` has the path, dtype, shape, axis names and
digest of every array. `read_leaf` gives one of them as NumPy, and `verify` looks at every byte. All
of them raise a `CheckpointError` that names the file rather than return what was not written.
"""

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import tensorstore

from modeling.artifacts import file_sha256
from modeling.training.manifest import (
    ARRAYS,
    COMMIT,
    FORMAT,
    MANIFEST,
    CheckpointError,
    FileRecord,
    LeafRecord,
    Manifest,
    array_sha256,
    cells,
    from_json,
)


def read_manifest(directory: Path) -> Manifest:
    """Returns the manifest of a committed checkpoint; its arrays are not looked at.

    Raises:
        CheckpointError: there is no commit, or the manifest is not the one that was committed.
    """
    commit, manifest = directory / COMMIT, directory / MANIFEST
    for path in (commit, manifest):
        if not path.is_file():
            raise CheckpointError(f"{path} is missing: this checkpoint was never completed.")
    raw, promised = manifest.read_bytes(), commit.read_bytes()
    found = hashlib.sha256(raw).hexdigest()
    if promised != f"{found}\n".encode():
        raise CheckpointError(
            f"{manifest} has the digest {found}, but {commit} promises {promised!r}."
        )
    content = json.loads(raw)
    if content.get("format") != FORMAT:
        raise CheckpointError(f"{manifest}: format {content.get('format')!r}, expected {FORMAT!r}.")
    return from_json(content)


def verify(directory: Path) -> Manifest:
    """Reads back every byte of a checkpoint and returns its manifest if all is as written.

    Raises:
        CheckpointError: names the first file that is missing, changed or out of place.
    """
    manifest = read_manifest(directory)
    for record in manifest.files:
        _check_file(directory, record)
    for leaf in manifest.leaves:
        read_leaf(directory, leaf)
    return manifest


def read_leaf(directory: Path, leaf: LeafRecord) -> np.ndarray:
    """Returns one array, whole, once it has the digest that was taken before it was written.

    Args:
        directory: of the checkpoint.
        leaf: from its manifest, by `manifest.leaf(path)` perhaps.

    Raises:
        CheckpointError: names the file that is missing, changed or out of place.
    """
    _check_file(directory, leaf.metadata)
    whole = read_chunks(directory, leaf)
    if array_sha256(whole) != leaf.sha256:
        require_chunks(directory, leaf, whole)
        raise CheckpointError(
            f"{directory / MANIFEST}: the digest of `{leaf.path}` is not its chunks'."
        )
    return whole


def read_chunks(directory: Path, leaf: LeafRecord) -> np.ndarray:
    """Returns one array, whole, its digest unchecked; all its chunks are there, each undamaged."""
    for chunk in leaf.chunks:
        require_size(directory, chunk.file)
    covered = len(leaf.chunks) * math.prod(leaf.chunk_shape)
    if covered != math.prod(leaf.shape):
        raise CheckpointError(
            f"{directory / MANIFEST}: the chunks of `{leaf.path}` hold {covered} elements, but its "
            f"shape is {leaf.shape}."
        )
    kvstore = {"driver": "file", "path": f"{directory}/{ARRAYS}/{leaf.path}/"}
    try:
        store = tensorstore.open({"driver": "zarr3", "kvstore": kvstore}, open=True).result()
        return store.read().result()  # checks each chunk's checksum
    except ValueError as error:
        raise CheckpointError(f"{directory}: `{leaf.path}` cannot be read: {error}") from error


def require_chunks(directory: Path, leaf: LeafRecord, whole: np.ndarray) -> None:
    """Raises `CheckpointError` unless the chunks of an array are, by their digests, as written."""
    for chunk in leaf.chunks:
        if array_sha256(whole[cells(chunk.start, leaf.chunk_shape)]) != chunk.file.sha256:
            raise CheckpointError(
                f"{directory / chunk.file.path} holds other values than were written: the file was "
                f"changed or exchanged."
            )


def require_size(directory: Path, record: FileRecord) -> None:
    """Raises `CheckpointError` unless a file is there with the size that it was written with."""
    path = directory / record.path
    if not path.is_file():
        raise CheckpointError(f"{path} is missing.")
    if path.stat().st_size != record.size:
        raise CheckpointError(
            f"{path} has {path.stat().st_size} bytes, but {record.size} were written."
        )


def _check_file(directory: Path, record: FileRecord) -> None:
    require_size(directory, record)
    path = directory / record.path
    if (found := file_sha256(path)) != record.sha256:
        raise CheckpointError(
            f"{path} has the digest {found[:12]}, but {record.sha256[:12]} was written: the file "
            f"was changed or exchanged."
        )
