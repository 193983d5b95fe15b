"""One checkpoint: a directory that either verifies to the last byte or does not count.

    step-000123.<random>/             a new directory per attempt; the state after 123 updates
      arrays/<leaf path>/zarr.json    one zarr v3 array a leaf, as TensorStore reads and writes it:
      arrays/<leaf path>/c.0.1        little-endian bytes ++ crc32c, uncompressed, chunk = shard
      losses.json, ...                other files that belong to the state
      manifest.json                   every leaf: path, dtype, shape, axis names, SHA-256 of its
                                      row-major bytes, and every file with its size, SHA-256 and,
                                      if a chunk's, crc32c
      COMMIT                          the manifest's own SHA-256; written last

Digests are taken from the arrays in memory, never from what was written, since storage lies in
known ways: a missing chunk reads as zeros, and a file with a valid checksum may belong elsewhere.
Reading back (`reading`, `restoring`) compares each file with the manifest, and the manifest with
`COMMIT`, so every error names a file.

Processes that share a mesh write together, each the chunks that it holds. They meet in the
directory, which all must see: each says in `parts/` what it wrote, with digests from memory. An
array whose chunks are of several processes is then read back whole by one of them, chunk by chunk
compared with those digests, for the digest of the whole; so no array travels between processes, and
each holds one at a time. The first process writes manifest and `COMMIT` when all have done so.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from modeling import faults
from modeling.notes import json_bytes, sync_directory, write_whole
from modeling.training.leaves import HostLeaf
from modeling.training.manifest import (
    ARRAYS,
    COMMIT,
    MANIFEST,
    PARTS,
    CheckpointError,
    ChunkRecord,
    FileRecord,
    LeafRecord,
    Manifest,
    array_sha256,
    chunk_from_json,
    to_json,
)
from modeling.training.reading import in_threads, read_chunks, read_manifest, require_chunks
from modeling.training.writing import (
    leaf_sha256,
    metadata_record,
    write_chunk,
    write_metadata,
)


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
    # Half of the arrays go first to give faults a middle.
    half = len(leaves) // 2
    chunks = _write_arrays(directory, leaves[:half], writers)
    faults.reach("during-write", step)
    chunks |= _write_arrays(directory, leaves[half:], writers)
    records = _leaf_records(directory, leaves, chunks, writers)
    if writers.index:
        writers.wait_for(directory / COMMIT)
        return read_manifest(directory)
    manifest = Manifest(
        step, dict(cursor), dict(config), tuple(records),
        tuple(_written(directory, name, json_bytes(files[name])) for name in sorted(files)),
    )  # fmt: skip
    promised = _written(directory, MANIFEST, json_bytes(to_json(manifest))).sha256
    if writers.count > 1:
        shutil.rmtree(directory / PARTS)
    _sync_directories(directory)
    faults.reach("before-commit", step)
    _commit(directory, promised)
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
        self._say(directory, stage, mine)
        return self._heard(directory, stage)

    def gathered(self, directory: Path, stage: str, mine: Any) -> list[Any]:
        """Returns to the first process what each says; to the others, at once, nothing.

        The first may remove `PARTS` after it: nobody reads there any more.
        """
        if self.count == 1:
            return [mine]
        self._say(directory, stage, mine)
        return [] if self.index else self._heard(directory, stage)

    def _say(self, directory: Path, stage: str, mine: Any) -> None:
        parts = directory / PARTS
        parts.mkdir(exist_ok=True)
        attempt = parts / f".{stage}-{self.index}.json"
        attempt.write_text(json.dumps({"said": mine}))
        # Of no use after a crash, so not synced: with the last word `PARTS` itself may be gone.
        attempt.replace(parts / f"{stage}-{self.index}.json")

    def _heard(self, directory: Path, stage: str) -> list[Any]:
        paths = [directory / PARTS / f"{stage}-{index}.json" for index in range(self.count)]
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


def _written(directory: Path, name: str, content: bytes) -> FileRecord:
    """Writes a file; returns the record of what was meant, whatever the disk makes of it."""
    write_whole(directory / name, content)
    return FileRecord(name, len(content), hashlib.sha256(content).hexdigest())


def _commit(directory: Path, promised: str) -> None:
    attempt = directory / f".{COMMIT}"
    with attempt.open("w") as handle:
        handle.write(f"{promised}\n")
        handle.flush()
        os.fsync(handle.fileno())
    attempt.replace(directory / COMMIT)
    sync_directory(directory)
    sync_directory(directory.parent)


_Chunks = dict[str, list[ChunkRecord]]


def _write_arrays(directory: Path, leaves: Sequence[HostLeaf], writers: Writers) -> _Chunks:
    """Writes this process's chunks and returns their records, by leaf."""
    for leaf in leaves:
        # Several processes may hold chunks of one array.
        (directory / ARRAYS / leaf.path).mkdir(parents=True, exist_ok=True)
    if not writers.index:
        in_threads(partial(write_metadata, directory), leaves)
    own = [(leaf, start) for leaf in leaves for start, chunk in leaf.chunks.items() if chunk.size]
    written = in_threads(lambda one: write_chunk(directory, *one), own)
    chunks: _Chunks = {leaf.path: [] for leaf in leaves}
    for (leaf, _), record in zip(own, written, strict=True):
        chunks[leaf.path].append(record)
    return chunks


def _leaf_records(
    directory: Path, leaves: Sequence[HostLeaf], mine: _Chunks, writers: Writers
) -> list[LeafRecord]:
    """Returns to the first process the records of whole arrays, whoever holds their chunks."""
    told = {path: [dataclasses.asdict(chunk) for chunk in chunks] for path, chunks in mine.items()}
    parts = writers.exchanged(directory, "chunks", told)
    records: list[LeafRecord] = []
    own: list[tuple[HostLeaf, LeafRecord]] = []
    whole: dict[str, str] = {}
    for number, leaf in enumerate(leaves):
        holders = [index for index, part in enumerate(parts) if part[leaf.path]] or [0]
        chunks = [chunk_from_json(chunk) for index in holders for chunk in parts[index][leaf.path]]
        chunks.sort(key=lambda chunk: chunk.start)
        record = LeafRecord(
            leaf.path, leaf.dtype.name, leaf.shape, leaf.axes, "", leaf.chunk_shape,
            metadata_record(leaf), tuple(chunks),
        )  # fmt: skip
        records.append(record)
        if holders == [writers.index]:
            own.append((leaf, record))
        elif len(holders) > 1 and number % writers.count == writers.index:
            whole[leaf.path] = _digest_read_back(directory, record)
    in_memory = in_threads(lambda one: _digest_in_memory(*one), own)
    whole |= {record.path: found for (_, record), found in zip(own, in_memory, strict=True)}
    told_digests = writers.gathered(directory, "digests", whole)
    if writers.index:
        return []
    digests = {path: digest for part in told_digests for path, digest in part.items()}
    return [dataclasses.replace(record, sha256=digests[record.path]) for record in records]


def _digest_in_memory(leaf: HostLeaf, record: LeafRecord) -> str:
    return record.chunks[0].file.sha256 if len(record.chunks) == 1 else leaf_sha256(leaf)


def _digest_read_back(directory: Path, record: LeafRecord) -> str:
    """Returns the digest of an array whose chunks are, by their digests, what processes held."""
    whole = read_chunks(directory, record)
    require_chunks(directory, record, whole)
    return array_sha256(whole)


def _sync_directories(root: Path) -> None:
    """Makes the names durable; the files were synced as they were written."""
    for parent, _, _ in os.walk(root):
        sync_directory(Path(parent))
