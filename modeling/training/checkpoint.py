"""One checkpoint: a directory that either verifies to the last byte or does not count.

    step-000123.<random>/             a new directory per attempt; the state after 123 updates
      arrays/<leaf path>/zarr.json    one zarr v3 array a leaf, written by TensorStore:
      arrays/<leaf path>/c.0.1        little-endian bytes ++ crc32c, uncompressed, chunk = shard
      losses.json, ...                other files that belong to the state
      manifest.json                   every leaf: path, dtype, shape, axis names, SHA-256 of its
                                      row-major bytes, and every file with its size and SHA-256
      COMMIT                          the manifest's own SHA-256; written last

Digests are taken from the arrays in memory, never from what was written, since storage lies in
known ways: a missing chunk reads as zeros, and a file with a valid checksum may belong elsewhere.
Reading back compares each file with the manifest, and the manifest with `COMMIT`, so every error
names a file.

Processes that share a mesh write together, each the chunks that it holds. They meet in the
directory, which all must see: each says in `parts/` what it wrote, with digests from memory. An
array whose chunks are of several processes is then read back whole by one of them, chunk by chunk
compared with those digests, for the digest of the whole; so no array travels between processes, and
each holds one at a time. The first process writes manifest and `COMMIT` when all have done so.
"""

import dataclasses
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import tensorstore
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from haliax.core import NamedArray
from haliax.partitioning import ResourceMapping, sharding_for_axis
from modeling import faults
from modeling.artifacts import file_sha256, write_durably
from modeling.training.manifest import (
    AVERAGES_PREFIX,
    FORMAT,
    MODEL_PREFIX,
    CheckpointError,
    ChunkRecord,
    FileRecord,
    LeafRecord,
    Manifest,
    chunk_from_json,
    from_json,
    to_json,
)

Tree = TypeVar("Tree")

MANIFEST, COMMIT, ARRAYS, PARTS = "manifest.json", "COMMIT", "arrays", "parts"

_CRC_BYTES = 4
_LEAF_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


@dataclasses.dataclass(frozen=True)
class HostLeaf:
    """A copy of one array in host memory: the chunks that this process holds."""

    path: str
    dtype: np.dtype
    shape: tuple[int, ...]
    axes: tuple[str, ...] | None
    chunk_shape: tuple[int, ...]
    chunks: Mapping[tuple[int, ...], np.ndarray]
    """Row-major chunks by the index where they begin."""

    def assemble(self) -> np.ndarray:
        """Returns the whole array."""
        if len(self.chunks) == 1:
            return next(iter(self.chunks.values()))
        whole = np.empty(self.shape, self.dtype)
        for start, chunk in self.chunks.items():
            whole[_cells(start, chunk.shape)] = chunk
        return whole


def named_leaves(tree: Any) -> Iterator[tuple[str, Any, tuple[str, ...] | None]]:
    """Yields path, raw array and axis names of every array (or `ShapeDtypeStruct`) of a tree."""
    flat = jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_named)
    for path, leaf in flat:
        axes = tuple(a.name for a in leaf.axes) if isinstance(leaf, NamedArray) else None
        array = leaf.array if isinstance(leaf, NamedArray) else leaf
        if _is_array(array):
            yield _leaf_name(path), array, axes


def snapshot(tree: Any) -> list[HostLeaf]:
    """Copies what this process holds of every array; the originals may be donated afterwards."""
    for _, array, _ in named_leaves(tree):
        array.copy_to_host_async()
    return [_host_leaf(*leaf) for leaf in named_leaves(tree)]


def _host_leaf(path: str, array: jax.Array, axes: tuple[str, ...] | None) -> HostLeaf:
    if not _LEAF_NAME.fullmatch(path):
        raise CheckpointError(
            f"leaf {path!r} cannot be a file name; it must match {_LEAF_NAME.pattern}."
        )
    chunk_shape = array.sharding.shard_shape(array.shape)
    chunks = {}
    for shard in array.addressable_shards:
        if shard.replica_id == 0:
            start = tuple(index.start or 0 for index in shard.index)
            chunks[start] = np.array(shard.data, order="C", copy=True)
    return HostLeaf(path, np.dtype(array.dtype), array.shape, axes, chunk_shape, chunks)


def _leaf_name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _is_named(node: Any) -> bool:
    return isinstance(node, NamedArray)


def _is_array(leaf: Any) -> bool:
    return eqx.is_array(leaf) or isinstance(leaf, jax.ShapeDtypeStruct)


def sha256(array: np.ndarray) -> str:
    """Returns the digest, in hex, of an array's row-major bytes."""
    # bfloat16 has no buffer format, so the bytes are viewed as such.
    return hashlib.sha256(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data).hexdigest()


def write(
    directory: Path,
    leaves: Sequence[HostLeaf],
    *,
    step: int,
    cursor: Mapping[str, int],
    config: Mapping[str, Any],
    files: Mapping[str, Mapping[str, Any]],
    writers: "Writers | None" = None,
) -> Manifest:
    """Writes a checkpoint, or this process's part of it, and returns once it is committed.

    Args:
        directory: of this attempt; new, and the same for all who write it.
        leaves: a snapshot of the state.
        step: the number of updates made.
        cursor: where the data stream stands.
        config: the resolved experiment.
        files: further JSON files of the state, by name.
        writers: the processes that write together; this one alone by default.
    """
    writers = writers or Writers()
    directory.mkdir(parents=True, exist_ok=writers.count > 1)
    faults.reach("before-write", step)
    # TensorStore takes the arrays by reference, so half of them go first to give faults a middle.
    half = len(leaves) // 2
    chunks = _write_arrays(directory, leaves[:half])
    faults.reach("during-write", step)
    chunks |= _write_arrays(directory, leaves[half:])
    records = _leaf_records(directory, leaves, chunks, writers)
    if writers.index:
        writers.wait_for(directory / COMMIT)
        return read_manifest(directory)
    for name, content in files.items():
        write_durably(directory / name, content)
    manifest = Manifest(
        step, dict(cursor), dict(config), tuple(records),
        tuple(_file_record(directory, name) for name in sorted(files)),
    )  # fmt: skip
    write_durably(directory / MANIFEST, to_json(manifest))
    if writers.count > 1:
        shutil.rmtree(directory / PARTS)
    _sync_directories(directory)
    faults.reach("before-commit", step)
    _commit(directory)
    faults.reach("after-commit", step)
    return manifest


@dataclasses.dataclass(frozen=True)
class Writers:
    """The processes that write one checkpoint together, and which of them this is."""

    index: int = 0
    count: int = 1
    patience_s: float = 3600.0

    def exchanged(self, directory: Path, stage: str, mine: Any) -> list[Any]:
        """Returns what each process says at a stage, JSON values, in order; waits for all."""
        if self.count == 1:
            return [mine]
        parts = directory / PARTS
        parts.mkdir(exist_ok=True)
        write_durably(parts / f"{stage}-{self.index}.json", {"said": mine})
        paths = [parts / f"{stage}-{index}.json" for index in range(self.count)]
        for path in paths:
            self.wait_for(path)
        return [json.loads(path.read_text())["said"] for path in paths]

    def wait_for(self, path: Path) -> None:
        """Waits until another process has written `path`."""
        deadline = time.monotonic() + self.patience_s
        while not path.exists():
            if time.monotonic() > deadline:
                raise CheckpointError(
                    f"{path}: the process that should write it did not within "
                    f"{self.patience_s:g} s; it died, or does not see this directory."
                )
            time.sleep(0.01)


def _commit(directory: Path) -> None:
    attempt = directory / f".{COMMIT}"
    with attempt.open("w") as handle:
        handle.write(file_sha256(directory / MANIFEST) + "\n")
        handle.flush()
        os.fsync(handle.fileno())
    attempt.replace(directory / COMMIT)
    _sync(directory)
    _sync(directory.parent)


_Chunks = dict[str, list[ChunkRecord]]


def _write_arrays(directory: Path, leaves: Sequence[HostLeaf]) -> _Chunks:
    """Writes this process's chunks and returns their records, by leaf."""
    # Several processes may make one array; whoever comes first does.
    stores = [tensorstore.open(_spec(directory, leaf), create=True, open=True) for leaf in leaves]
    writes = []
    for leaf, opening in zip(leaves, stores, strict=True):
        store = opening.result()
        for start, chunk in leaf.chunks.items():
            if chunk.size:
                part = store[_cells(start, chunk.shape)]
                writes.append(part.write(chunk, can_reference_source_data_indefinitely=True))
    records = {leaf.path: _chunk_records(leaf) for leaf in leaves}
    for pending in writes:
        pending.result()
    for chunk in itertools.chain.from_iterable(records.values()):
        _require_size(directory, chunk.file)
    return records


def _spec(directory: Path, leaf: HostLeaf) -> dict[str, Any]:
    return {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": f"{directory}/{ARRAYS}/{leaf.path}/"},
        "metadata": {
            "shape": list(leaf.shape),
            "data_type": leaf.dtype.name,
            "chunk_grid": {
                "name": "regular",
                # A chunk must have a size even where the array has none.
                "configuration": {"chunk_shape": [max(n, 1) for n in leaf.chunk_shape]},
            },
            # Files side by side: each further directory would cost a sync of its own.
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
            "codecs": [
                {"name": "bytes", "configuration": {"endian": "little"}},
                {"name": "crc32c"},
            ],
        },
        # Otherwise a chunk of zeros is stored by *removing* its file, just as a lost one looks.
        "store_data_equal_to_fill_value": True,
    }


def _chunk_records(leaf: HostLeaf) -> list[ChunkRecord]:
    chunks = []
    for start, chunk in sorted(leaf.chunks.items()):
        if chunk.size:
            cells = (a // n for a, n in zip(start, leaf.chunk_shape, strict=True))
            path = f"{ARRAYS}/{leaf.path}/" + ".".join(["c", *map(str, cells)])
            record = FileRecord(path, chunk.nbytes + _CRC_BYTES, sha256(chunk))
            chunks.append(ChunkRecord(record, start))
    return chunks


def _leaf_records(
    directory: Path, leaves: Sequence[HostLeaf], mine: _Chunks, writers: Writers
) -> list[LeafRecord]:
    """Returns the records of whole arrays, whoever holds their chunks."""
    told = {path: [dataclasses.asdict(chunk) for chunk in chunks] for path, chunks in mine.items()}
    parts = writers.exchanged(directory, "chunks", told)
    records, whole = [], {}
    for number, leaf in enumerate(leaves):
        holders = [index for index, part in enumerate(parts) if part[leaf.path]] or [0]
        chunks = [chunk_from_json(chunk) for index in holders for chunk in parts[index][leaf.path]]
        chunks.sort(key=lambda chunk: chunk.start)
        record = LeafRecord(
            leaf.path, leaf.dtype.name, leaf.shape, leaf.axes, "", leaf.chunk_shape,
            _file_record(directory, f"{ARRAYS}/{leaf.path}/zarr.json"), tuple(chunks),
        )  # fmt: skip
        records.append(record)
        if holders == [writers.index]:
            whole[leaf.path] = _digest_in_memory(leaf, record)
        elif len(holders) > 1 and number % writers.count == writers.index:
            whole[leaf.path] = _digest_read_back(directory, record)
    told_digests = writers.exchanged(directory, "digests", whole)
    digests = {path: digest for part in told_digests for path, digest in part.items()}
    return [dataclasses.replace(record, sha256=digests[record.path]) for record in records]


def _digest_in_memory(leaf: HostLeaf, record: LeafRecord) -> str:
    return record.chunks[0].file.sha256 if len(record.chunks) == 1 else sha256(leaf.assemble())


def _digest_read_back(directory: Path, record: LeafRecord) -> str:
    """Returns the digest of an array whose chunks are, by their digests, what processes held."""
    _require_covered(directory, record)
    whole = _read(directory, record)
    _require_chunks(directory, record, whole)
    return sha256(whole)


def _file_record(directory: Path, name: str) -> FileRecord:
    path = directory / name
    return FileRecord(name, path.stat().st_size, file_sha256(path))


def _require_size(directory: Path, record: FileRecord) -> None:
    path = directory / record.path
    if not path.is_file():
        raise CheckpointError(f"{path} is missing.")
    if path.stat().st_size != record.size:
        raise CheckpointError(
            f"{path} has {path.stat().st_size} bytes, but {record.size} were written."
        )


def _sync_directories(root: Path) -> None:
    """Makes the names durable; the files were synced as they were written."""
    for parent, _, _ in os.walk(root):
        _sync(Path(parent))


def _sync(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


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
        _verify_leaf(directory, leaf)
    return manifest


def _verify_leaf(directory: Path, leaf: LeafRecord) -> None:
    _check_file(directory, leaf.metadata)
    for chunk in leaf.chunks:
        _require_size(directory, chunk.file)
    _require_covered(directory, leaf)
    whole = _read(directory, leaf)
    if sha256(whole) == leaf.sha256:
        return
    _require_chunks(directory, leaf, whole)
    raise CheckpointError(
        f"{directory / MANIFEST}: the digest of `{leaf.path}` is not its chunks'."
    )


def _require_covered(directory: Path, leaf: LeafRecord) -> None:
    covered = len(leaf.chunks) * math.prod(leaf.chunk_shape)
    if covered != math.prod(leaf.shape):
        raise CheckpointError(
            f"{directory / MANIFEST}: the chunks of `{leaf.path}` hold {covered} elements, but its "
            f"shape is {leaf.shape}."
        )


def _require_chunks(directory: Path, leaf: LeafRecord, whole: np.ndarray) -> None:
    for chunk in leaf.chunks:
        if sha256(whole[_cells(chunk.start, leaf.chunk_shape)]) != chunk.file.sha256:
            raise CheckpointError(
                f"{directory / chunk.file.path} holds other values than were written: the file was "
                f"changed or exchanged."
            )


def _read(directory: Path, leaf: LeafRecord, index: Any = ...) -> np.ndarray:
    """Reads an array, or part of it; TensorStore checks each chunk's checksum."""
    kvstore = {"driver": "file", "path": f"{directory}/{ARRAYS}/{leaf.path}/"}
    try:
        store = tensorstore.open({"driver": "zarr3", "kvstore": kvstore}, open=True).result()
        return store[index].read().result()
    except ValueError as error:
        raise CheckpointError(f"{directory}: `{leaf.path}` cannot be read: {error}") from error


def _check_file(directory: Path, record: FileRecord) -> None:
    _require_size(directory, record)
    path = directory / record.path
    if (found := file_sha256(path)) != record.sha256:
        raise CheckpointError(
            f"{path} has the digest {found[:12]}, but {record.sha256[:12]} was written: the file "
            f"was changed or exchanged."
        )


def _cells(start: tuple[int, ...], shape: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))


def restore(
    directory: Path,
    template: Tree,
    *,
    mesh: Mesh | None = None,
    mapping: ResourceMapping | None = None,
) -> Tree:
    """Returns `template` with its arrays replaced by the checkpoint's, verified first.

    Args:
        directory: a committed checkpoint.
        template: a tree of arrays or `ShapeDtypeStruct`s; other leaves are kept.
        mesh: where to place the arrays, split by `mapping`; any mesh, whatever one they were
            written from. The default device if left out.
        mapping: from axis names to mesh axes.
    """
    return _restore(directory, template, "", mesh, mapping or {})


def restore_parameters(
    directory: Path,
    template: Tree,
    *,
    mesh: Mesh | None = None,
    mapping: ResourceMapping | None = None,
    weights: str = "last",
) -> Tree:
    """Returns the model `template` with the weights of a checkpoint; see `restore`.

    Args:
        directory: as of `restore`.
        template: as of `restore`.
        mesh: as of `restore`.
        mapping: as of `restore`.
        weights: `last`, or an average that the run has kept, in float32.
    """
    prefix = MODEL_PREFIX if weights == "last" else f"{AVERAGES_PREFIX}{weights}."
    return _restore(directory, template, prefix, mesh, mapping or {})


def _restore(
    directory: Path, template: Tree, prefix: str, mesh: Mesh | None, mapping: ResourceMapping
) -> Tree:
    manifest = read_manifest(directory)
    saved = {
        leaf.path.removeprefix(prefix): leaf
        for leaf in manifest.leaves
        if leaf.path.startswith(prefix)
    }
    _check_template(directory, saved, template)
    for leaf in saved.values():
        _verify_leaf(directory, leaf)
    shardings = {} if mesh is None else dict(leaf_shardings(template, mesh, mapping))

    def read(path: tuple[Any, ...], leaf: Any) -> Any:
        if isinstance(leaf, NamedArray):
            return NamedArray(read(path, leaf.array), leaf.axes)
        if not _is_array(leaf):
            return leaf
        name = _leaf_name(path)
        if mesh is None:
            return jnp.asarray(_read(directory, saved[name]))
        return jax.make_array_from_callback(
            leaf.shape, shardings[name], lambda index: _read(directory, saved[name], index)
        )

    return jax.tree_util.tree_map_with_path(read, template, is_leaf=_is_named)


def leaf_shardings(
    tree: Any, mesh: Mesh, mapping: ResourceMapping
) -> Iterator[tuple[str, NamedSharding]]:
    """Yields path and sharding of every array of a tree; arrays without names are replicated."""
    flat = jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_named)
    for path, leaf in flat:
        name = _leaf_name(path)
        if isinstance(leaf, NamedArray) and _is_array(leaf.array):
            yield name, sharding_for_axis(leaf.axes, mapping, mesh)
        elif _is_array(leaf):
            yield name, NamedSharding(mesh, PartitionSpec())


def _check_template(directory: Path, saved: Mapping[str, LeafRecord], template: Any) -> None:
    faults_found = []
    wanted = {path: (array, axes) for path, array, axes in named_leaves(template)}
    for path in sorted({*saved, *wanted}):
        if path not in saved:
            faults_found.append(f"`{path}` is not in the checkpoint")
        elif path not in wanted:
            faults_found.append(f"`{path}` is in the checkpoint but not expected")
        else:
            array, axes = wanted[path]
            has = (saved[path].dtype, saved[path].shape, saved[path].axes)
            expects = (np.dtype(array.dtype).name, tuple(array.shape), axes)
            if has != expects:
                faults_found.append(f"`{path}` is {has}, expected {expects}")
    if faults_found:
        shown = "; ".join(faults_found[:8]) + ("; ..." if len(faults_found) > 8 else "")
        raise CheckpointError(
            f"{directory} holds another state ({len(faults_found)} leaves differ): {shown}. "
            f"Restore with the model and optimizer of its manifest."
        )
