"""Looks into checkpoints without their experiment: what differs between two, the weights of one.

An export is one safetensors file: the length of the header as eight little-endian bytes, the header
as JSON, then each tensor's row-major bytes. It is written here, one tensor in memory at a time, the
widest numbers first so that all are aligned, then by path, and with the one metadata key that
loaders ask for: equal weights give equal bytes. https://github.com/huggingface/safetensors has the
format.
"""

import dataclasses
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from modeling.training.manifest import (
    AVERAGES_PREFIX,
    MODEL_PREFIX,
    CheckpointError,
    LeafRecord,
    Manifest,
    likeness,
)
from modeling.training.reading import read_leaf, read_manifest

_DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
}


@dataclasses.dataclass(frozen=True)
class LeafDifference:
    """One array that two checkpoints do not have in common."""

    path: str
    what: str
    """How it differs, in words."""
    max_abs: float | None = None
    """The largest |a - b| of those elements that are numbers in both."""


def differences(one: Path, other: Path) -> Iterator[LeafDifference]:
    """Yields the arrays that differ, in the order of paths; arrays of equal digests are not read.

    Raises:
        CheckpointError: one of the two is incomplete or damaged.
    """
    leaves = [{leaf.path: leaf for leaf in read_manifest(path).leaves} for path in (one, other)]
    for path in sorted({*leaves[0], *leaves[1]}):
        first, second = (known.get(path) for known in leaves)
        if first is None or second is None:
            has_it = "second" if first is None else "first"
            yield LeafDifference(path, f"is in the {has_it} alone")
        elif (before := described(first)) != (after := described(second)):
            yield LeafDifference(path, f"is {before} in the first and {after} in the second")
        elif first.sha256 != second.sha256:
            yield _difference(path, read_leaf(one, first), read_leaf(other, second))


def described(leaf: LeafRecord) -> str:
    """Returns dtype and named shape: `float32[embed=32, mlp=128]`."""
    names = leaf.axes or ("",) * len(leaf.shape)
    sizes = [f"{name}={n}" if name else str(n) for name, n in zip(names, leaf.shape, strict=True)]
    return f"{leaf.dtype}[{', '.join(sizes)}]"


def num_bytes(leaf: LeafRecord) -> int:
    """Returns the size of an array in memory."""
    return math.prod(leaf.shape) * _dtype(leaf).itemsize


def _difference(path: str, first: np.ndarray, second: np.ndarray) -> LeafDifference:
    width = first.dtype.itemsize
    bits = (a.reshape(-1).view(np.uint8).reshape(-1, width) for a in (first, second))
    num = int(np.count_nonzero((next(bits) != next(bits)).any(axis=1)))
    with np.errstate(invalid="ignore"):
        distance = np.abs(first.astype(np.float64) - second.astype(np.float64))
    known = distance[~np.isnan(distance)]
    max_abs = float(known.max()) if known.size else math.nan
    share = f"{num:,} of {first.size:,} elements differ"
    return LeafDifference(path, f"{share}, by at most {max_abs:.3g}", max_abs)


def export(directory: Path, target: Path, weights: str = "last") -> int:
    """Writes the weights of a checkpoint to one safetensors file; returns how many tensors.

    Args:
        directory: a committed checkpoint, of however many processes.
        target: the file; must not exist yet.
        weights: `last`, an average that the run has kept (`ema`, `tail_average`), or `state`: every
            array, that of the optimizer too.

    Raises:
        CheckpointError: the checkpoint is damaged, or has no such weights.
        FileExistsError: something is at `target`.
    """
    manifest = read_manifest(directory)
    prefix = {"last": MODEL_PREFIX, "state": ""}.get(weights, f"{AVERAGES_PREFIX}{weights}.")
    leaves = [leaf for leaf in manifest.leaves if leaf.path.startswith(prefix)]
    leaves.sort(key=lambda leaf: (-_dtype(leaf).itemsize, leaf.path))
    if not leaves:
        known = _kinds_of_weights(manifest)
        raise CheckpointError(
            f"{directory} has no weights `{weights}`{likeness(weights, known)}; it has {known}."
        )
    if target.exists():
        raise FileExistsError(f"{target} exists already; remove it, or give another name.")
    attempt = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with attempt.open("wb") as file:
            file.write(_header(leaves, prefix))
            for leaf in leaves:
                array = np.ascontiguousarray(read_leaf(directory, leaf))
                file.write(array.reshape(-1).view(np.uint8).data)
            file.flush()
            os.fsync(file.fileno())
        attempt.replace(target)
    finally:
        attempt.unlink(missing_ok=True)
    return len(leaves)


def _kinds_of_weights(manifest: Manifest) -> list[str]:
    averages = {x.path.split(".")[1] for x in manifest.leaves if x.path.startswith(AVERAGES_PREFIX)}
    return ["last", *sorted(averages), "state"]


def _header(leaves: list[LeafRecord], prefix: str) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for leaf in leaves:
        end = begin + num_bytes(leaf)
        header[leaf.path.removeprefix(prefix)] = {
            "dtype": _DTYPES[leaf.dtype],
            "shape": list(leaf.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


def _dtype(leaf: LeafRecord) -> np.dtype:
    return np.dtype(leaf.dtype)  # that of bfloat16 is known since TensorStore is loaded
