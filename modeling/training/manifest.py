"""The manifest of a checkpoint: every array and file that it consists of, and the ids they give.

`manifest.json` is this, as JSON, with the ids written out for people. The content id is over the
leaves' paths, dtypes, global shapes and digests, and the data cursor: it depends on neither the
mesh nor the chunks. `parameters` is the same over the model's leaves alone.
"""

import dataclasses
import difflib
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from modeling import canonical
from modeling.inventory import require_within

MANIFEST, COMMIT, ARRAYS, PARTS = "manifest.json", "COMMIT", "arrays", "parts"
"""Names within a checkpoint's directory."""
FORMAT = "levanter.checkpoint/2"
CRC_BYTES = 4
PIECE_BYTES = 1 << 20
"""What is digested, written or read at a time: it stays in a processor's cache."""
MODEL_PREFIX = "model."
AVERAGES_PREFIX = "averages."


class CheckpointError(RuntimeError):
    """A checkpoint is incomplete, damaged, or of another shape; the message names where."""


class DamagedCheckpointError(CheckpointError):
    """A file of a checkpoint is not as it was written, or is not there."""


@dataclasses.dataclass(frozen=True)
class FileRecord:
    """A file as it was written, checksum trailer not counted in the digest."""

    path: str
    size: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class ChunkRecord:
    """The file of one chunk of an array, and where in the array it begins."""

    file: FileRecord
    start: tuple[int, ...]
    crc32c: str
    """The last four bytes of the file, in hex."""


@dataclasses.dataclass(frozen=True)
class LeafRecord:
    """One array of the state, as a whole and as it lies on disk."""

    path: str
    dtype: str
    shape: tuple[int, ...]
    axes: tuple[str, ...] | None
    sha256: str
    chunk_shape: tuple[int, ...]
    metadata: FileRecord
    chunks: tuple[ChunkRecord, ...]


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds."""

    step: int
    cursor: Mapping[str, int]
    """Where the data stream stands: `{"rows": n}` rows were consumed."""
    config: Mapping[str, Any]
    """The resolved experiment, for people and for rebuilding the model."""
    leaves: tuple[LeafRecord, ...]
    files: tuple[FileRecord, ...]

    @property
    def content_id(self) -> str:
        """The id of the whole state."""
        return canonical.digest("checkpoint/1", [_identity(self.leaves), dict(self.cursor)])

    @property
    def parameters(self) -> str:
        """The id of the model's weights alone."""
        model = [leaf for leaf in self.leaves if leaf.path.startswith(MODEL_PREFIX)]
        return canonical.digest("parameters/1", _identity(model))

    @property
    def roots(self) -> dict[str, str]:
        """The ids of the weights and of each average that is kept of them."""
        found = {"parameters": self.parameters}
        for name in sorted({leaf.path.split(".")[1] for leaf in self.leaves
                            if leaf.path.startswith(AVERAGES_PREFIX)}):  # fmt: skip
            prefix = f"{AVERAGES_PREFIX}{name}."
            average = [leaf for leaf in self.leaves if leaf.path.startswith(prefix)]
            found[f"parameters.{name}"] = canonical.digest("parameters/1", _identity(average))
        return found

    @property
    def chunks(self) -> tuple[ChunkRecord, ...]:
        """The chunks of all leaves."""
        return tuple(chunk for leaf in self.leaves for chunk in leaf.chunks)

    @property
    def whole_files(self) -> tuple[FileRecord, ...]:
        """All files but chunks, `MANIFEST` and `COMMIT`."""
        return (*self.files, *(leaf.metadata for leaf in self.leaves))

    @property
    def paths(self) -> tuple[str, ...]:
        """All files of the checkpoint; whatever else lies in its directory is none of them."""
        records = (*self.whole_files, *(chunk.file for chunk in self.chunks))
        return (*(record.path for record in records), MANIFEST, COMMIT)

    def leaf(self, path: str) -> LeafRecord:
        """Returns the record of one array."""
        known = {leaf.path: leaf for leaf in self.leaves}
        if path not in known:
            raise CheckpointError(f"there is no leaf `{path}`{likeness(path, known)}.")
        return known[path]

    @property
    def digests(self) -> dict[str, str]:
        """The SHA-256 of each leaf, by path."""
        return {leaf.path: leaf.sha256 for leaf in self.leaves}


def _identity(leaves: Sequence[LeafRecord]) -> list[Any]:
    ordered = sorted(leaves, key=lambda leaf: leaf.path)
    return [[leaf.path, leaf.dtype, list(leaf.shape), leaf.sha256] for leaf in ordered]


def to_json(manifest: Manifest) -> dict[str, Any]:
    """Returns the manifest as it is written."""
    content = dataclasses.asdict(manifest)
    ids = {"content_id": manifest.content_id, "parameters": manifest.parameters}
    return {"format": FORMAT} | ids | content


def from_json(content: Mapping[str, Any]) -> Manifest:
    """Returns the manifest that `to_json` wrote.

    Raises:
        ValueError: it names a file outside the checkpoint's directory.
    """
    leaves = tuple(
        LeafRecord(
            path=leaf["path"],
            dtype=leaf["dtype"],
            shape=tuple(leaf["shape"]),
            axes=None if leaf["axes"] is None else tuple(leaf["axes"]),
            sha256=leaf["sha256"],
            chunk_shape=tuple(leaf["chunk_shape"]),
            metadata=_file_from_json(leaf["metadata"]),
            chunks=tuple(chunk_from_json(chunk) for chunk in leaf["chunks"]),
        )
        for leaf in content["leaves"]
    )
    files = tuple(map(_file_from_json, content["files"]))
    return Manifest(content["step"], content["cursor"], content["config"], leaves, files)


def chunk_from_json(content: Mapping[str, Any]) -> ChunkRecord:
    """Returns the record of one chunk."""
    file = _file_from_json(content["file"])
    return ChunkRecord(file, tuple(content["start"]), content["crc32c"])


def _file_from_json(content: Mapping[str, Any]) -> FileRecord:
    record = FileRecord(**content)
    require_within(record.path)
    return record


def likeness(path: str, known: Iterable[str]) -> str:
    """Returns what may have been meant by a path that is not known, as the end of a sentence."""
    close = difflib.get_close_matches(path, list(known), n=3)
    return f"; did you mean {' or '.join(f'`{name}`' for name in close)}?" if close else ""


def array_sha256(array: np.ndarray) -> str:
    """Returns the digest, in hex, of an array's row-major bytes."""
    # bfloat16 has no buffer format, so the bytes are viewed as such.
    return hashlib.sha256(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data).hexdigest()


def pieces(array: np.ndarray) -> Iterator[np.ndarray]:
    """Yields the bytes of a row-major array in order, `PIECE_BYTES` at a time."""
    whole = array.reshape(-1).view(np.uint8)
    for start in range(0, len(whole), PIECE_BYTES):
        yield whole[start : start + PIECE_BYTES]


def cells(start: Sequence[int], shape: Sequence[int]) -> tuple[slice, ...]:
    """Returns the index of the chunk of this shape that begins at `start`."""
    return tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))
