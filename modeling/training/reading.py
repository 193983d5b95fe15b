"""Reads a checkpoint without its experiment: no model, no mesh, no JAX.

`read_manifest` tells what there is: `manifest.leaves` has the path, dtype, shape, axis names and
digest of every array. `read_leaf` gives one of them as NumPy, and `verify` looks at every byte. All
of them raise a `CheckpointError` that names the file rather than return what was not written.
"""

import contextlib
import hashlib
import io
import json
import math
import shutil
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from modeling.inventory import file_sha256
from modeling.training.manifest import (
    COMMIT,
    CRC_BYTES,
    FORMAT,
    MANIFEST,
    PIECE_BYTES,
    CheckpointError,
    ChunkRecord,
    DamagedCheckpointError,
    FileRecord,
    LeafRecord,
    Manifest,
    array_sha256,
    cells,
    from_json,
    pieces,
)
from modeling.training.pins import step_of

_ALIGNMENT = 64
WORKERS = 4
"""Threads that digest and write, or read: few, for the steps go on beside them."""
AHEAD_BYTES = 1 << 30
Item = TypeVar("Item")
Result = TypeVar("Result")


def in_threads(work: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """Returns the results in order; raises the first error once no thread works any more."""
    with ThreadPoolExecutor(WORKERS, thread_name_prefix="arrays") as pool:
        try:
            return list(pool.map(work, items))
        finally:
            pool.shutdown(cancel_futures=True)


def read_manifest(directory: Path) -> Manifest:
    """Returns the manifest of a committed checkpoint; its arrays are not looked at.

    Raises:
        CheckpointError: there is no commit, the manifest is not the one that was committed, or the
            directory has the name of another step.
    """
    commit, manifest = _own_file(directory, COMMIT), _own_file(directory, MANIFEST)
    return parse_manifest(manifest.read_bytes(), commit.read_bytes(), str(directory))


def parse_manifest(raw: bytes, promised: bytes, directory: str) -> Manifest:
    """Returns what the bytes of a manifest say, once they are those that were committed.

    Args:
        raw: the bytes.
        promised: those of `COMMIT`.
        directory: path or URL of the checkpoint.

    Raises:
        CheckpointError: as `read_manifest`.
    """
    found = hashlib.sha256(raw).hexdigest()
    if promised != f"{found}\n".encode():
        raise DamagedCheckpointError(
            f"{directory}/{MANIFEST} has the digest {found}, but {directory}/{COMMIT} promises "
            f"{promised!r}."
        )
    content = json.loads(raw)
    if content.get("format") != FORMAT:
        raise CheckpointError(
            f"{directory}/{MANIFEST}: format {content.get('format')!r}, expected {FORMAT!r}."
        )
    try:
        manifest = from_json(content)
    except ValueError as error:
        raise DamagedCheckpointError(f"{directory}/{MANIFEST}: {error}.") from None
    # A published one has another name, which says nothing of a step.
    if step_of(directory.rpartition("/")[2]) not in (None, manifest.step):
        raise DamagedCheckpointError(
            f"{directory}/{MANIFEST} is of step {manifest.step}: the directory was renamed, or "
            f"copied to the name of another step."
        )
    return manifest


def inspect(directory: Path) -> Manifest:
    """Returns the manifest of a checkpoint that is whole as far as can be told without its values.

    Every other byte is verified; the files of the arrays are there, with their sizes. Whoever then
    reads the arrays, by `read_leaf`, verifies the rest.

    Raises:
        CheckpointError: names the first file that is missing, changed or out of place.
    """
    manifest = read_manifest(directory)
    for record in manifest.files:
        _check_file(directory, record)
    for leaf in manifest.leaves:
        _check_file(directory, leaf.metadata)
        _require_covered(directory, leaf)
        for chunk in leaf.chunks:
            require_size(directory, chunk.file)
    return manifest


def verify(
    directory: Path, held: Mapping[tuple[str, tuple[int, ...]], np.ndarray] | None = None
) -> Manifest:
    """Reads back every byte of a checkpoint and returns its manifest if all is as written.

    Args:
        directory: of the checkpoint.
        held: chunks that are still in memory, by leaf and where they begin: to compare with them
            costs a third of a digest.

    Raises:
        CheckpointError: names the first file that is missing, changed or out of place.
    """
    manifest = inspect(directory)

    def look(where: tuple[LeafRecord, ChunkRecord]) -> None:
        leaf, chunk = where
        if not _is_on_disk(directory, chunk, (held or {}).get((leaf.path, chunk.start))):
            raise _changed(directory, chunk)

    in_threads(look, [(leaf, chunk) for leaf in manifest.leaves for chunk in leaf.chunks])
    return manifest


def copy_checkpoint(source: Path, target: Path) -> None:
    """Copies the files of a committed checkpoint, and nothing else that is in its directory."""
    for path in read_manifest(source).paths:
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / path, target / path)


def faults(directory: Path) -> Iterator[str]:
    """Yields what is wrong with a checkpoint, of every file; nothing if `verify` finds it sound."""
    try:
        manifest = read_manifest(directory)
    except DamagedCheckpointError as error:
        yield str(error)
        return
    checks: list[Callable[[], object]] = []
    checks += [partial(_check_file, directory, record) for record in manifest.files]
    checks += [partial(read_leaf, directory, leaf) for leaf in manifest.leaves]
    for check in checks:
        try:
            check()
        except DamagedCheckpointError as error:
            yield str(error)


def read_leaf(directory: Path, leaf: LeafRecord) -> np.ndarray:
    """Returns one array, whole, once it has the digest that was taken before it was written.

    Args:
        directory: of the checkpoint.
        leaf: from its manifest, by `manifest.leaf(path)` perhaps.

    Raises:
        CheckpointError: names the file that is missing, changed or out of place.
    """
    _check_file(directory, leaf.metadata)
    # Where chunks are whole rows their bytes follow one another: digested as they come.
    digest = hashlib.sha256() if leaf.chunk_shape[1:] == leaf.shape[1:] else None
    whole = read_chunks(directory, leaf, digest)
    if (array_sha256(whole) if digest is None else digest.hexdigest()) != leaf.sha256:
        require_chunks(directory, leaf, whole)
        raise DamagedCheckpointError(
            f"{directory / MANIFEST}: the digest of `{leaf.path}` is not its chunks'."
        )
    return whole


def read_leaves(directory: Path, leaves: Sequence[LeafRecord]) -> Generator[np.ndarray, None, None]:
    """Yields each array as `read_leaf` gives it, in order, while the next ones are being read.

    No more than `AHEAD_BYTES` are read before they are asked for, but one array always.
    """
    waiting, coming = deque(leaves), deque[tuple[int, Future[np.ndarray]]]()
    with ThreadPoolExecutor(WORKERS, thread_name_prefix="arrays") as pool:
        try:
            while waiting or coming:
                ahead = sum(size for size, _ in coming)
                while waiting and (not coming or ahead + _num_bytes(waiting[0]) <= AHEAD_BYTES):
                    leaf = waiting.popleft()
                    ahead += _num_bytes(leaf)
                    coming.append((_num_bytes(leaf), pool.submit(read_leaf, directory, leaf)))
                yield coming.popleft()[1].result()
        finally:
            pool.shutdown(cancel_futures=True)


def _num_bytes(leaf: LeafRecord) -> int:
    return sum(chunk.file.size for chunk in leaf.chunks)


def read_chunks(directory: Path, leaf: LeafRecord, digest: Any = None) -> np.ndarray:
    """Returns one array, whole, its digest unchecked; all its chunks are there.

    The files are read as what they are, bytes: TensorStore would need twice the CPU time, for a
    checksum that says less than the digest. They are not mapped, for then a disk that fails would
    end the process, where an error makes it fall back to an older checkpoint.

    Args:
        directory: of the checkpoint.
        leaf: from its manifest.
        digest: of `hashlib`; takes the bytes of the chunks in order.
    """
    import tensorstore

    _require_covered(directory, leaf)
    whole = _empty(leaf.shape, tensorstore.dtype(leaf.dtype).numpy_dtype)
    for chunk in leaf.chunks:
        part = whole[(*cells(chunk.start, leaf.chunk_shape), ...)]
        target = part if part.flags.c_contiguous else np.empty(part.shape, part.dtype)
        with _opened(directory, chunk) as file:
            for piece in pieces(target):
                _read_into(file, piece)
                if digest is not None:
                    digest.update(piece.data)
        if target is not part:
            part[...] = target
    return whole


def _empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Returns an array that begins where JAX wants it to, so that a CPU need not copy it."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


@contextlib.contextmanager
def _opened(directory: Path, chunk: ChunkRecord) -> Iterator[io.FileIO]:
    """Opens the file of a chunk, all of which must be read; then its checksum is compared."""
    require_size(directory, chunk.file)
    with (directory / chunk.file.path).open("rb", buffering=0) as file:
        yield file
        if file.read().hex() != chunk.crc32c:
            raise _changed(directory, chunk)


def _is_on_disk(directory: Path, chunk: ChunkRecord, in_memory: np.ndarray | None) -> bool:
    """Whether a chunk's file holds what is in memory, or else what its digest says."""
    size = chunk.file.size - CRC_BYTES
    buffer = np.empty(min(size, PIECE_BYTES), np.uint8)
    expected = None if in_memory is None else in_memory.reshape(-1).view(np.uint8)
    digest = hashlib.sha256()
    with _opened(directory, chunk) as file:
        for start in range(0, size, PIECE_BYTES):
            piece = buffer[: size - start]
            _read_into(file, piece)
            if expected is None:
                digest.update(piece.data)
            elif not np.array_equal(piece, expected[start : start + len(piece)]):
                return False
    return expected is not None or digest.hexdigest() == chunk.file.sha256


def _read_into(file: io.FileIO, piece: np.ndarray) -> None:
    if file.readinto(piece.data) != len(piece):
        raise DamagedCheckpointError(f"{file.name} became shorter while it was read.")


def _require_covered(directory: Path, leaf: LeafRecord) -> None:
    covered = len(leaf.chunks) * math.prod(leaf.chunk_shape)
    if covered != math.prod(leaf.shape):
        raise DamagedCheckpointError(
            f"{directory / MANIFEST}: the chunks of `{leaf.path}` hold {covered} elements, but its "
            f"shape is {leaf.shape}."
        )


def require_chunks(directory: Path, leaf: LeafRecord, whole: np.ndarray) -> None:
    """Raises `CheckpointError` unless the chunks of an array are, by their digests, as written."""
    for chunk in leaf.chunks:
        if array_sha256(whole[cells(chunk.start, leaf.chunk_shape)]) != chunk.file.sha256:
            raise _changed(directory, chunk)


def _changed(directory: Path, chunk: ChunkRecord) -> DamagedCheckpointError:
    return DamagedCheckpointError(
        f"{directory / chunk.file.path} holds other values than were written: the file was "
        f"changed or exchanged."
    )


def require_size(directory: Path, record: FileRecord) -> None:
    """Raises `CheckpointError` unless a file is there with the size that it was written with."""
    path = _own_file(directory, record.path)
    if path.stat().st_size != record.size:
        raise DamagedCheckpointError(
            f"{path} has {path.stat().st_size} bytes, but {record.size} were written."
        )


def _own_file(directory: Path, name: str) -> Path:
    """Returns the path of a file that a checkpoint holds itself."""
    path = directory
    for part in name.split("/"):
        path /= part
        if path.is_symlink():
            raise DamagedCheckpointError(
                f"{path} is a symbolic link: what it leads to was not written with this "
                f"checkpoint, and may change or go without it."
            )
    if not path.is_file():
        why = ": this checkpoint was never completed" if name in (COMMIT, MANIFEST) else ""
        raise DamagedCheckpointError(f"{path} is missing{why}.")
    return path


def _check_file(directory: Path, record: FileRecord) -> None:
    require_size(directory, record)
    path = directory / record.path
    if (found := file_sha256(path)) != record.sha256:
        raise DamagedCheckpointError(
            f"{path} has the digest {found[:12]}, but {record.sha256[:12]} was written: the file "
            f"was changed or exchanged."
        )
