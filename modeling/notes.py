"""Notes: small files of a store on any file system, seen whole or not at all.

`create` never overwrites: of several hosts one is first. Locally that is a hard link, on object
stores a conditional write. Where a store has none, the last of two that write in the same moment
wins; whoever must know reads back.

A note that others rely on is *sealed*: it holds the SHA-256 of all else that it says, under
`sha256`, and there is one way to write it, so that no byte of it can change unseen.
"""

import contextlib
import hashlib
import json
import os
import re
import uuid
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from fsspec.implementations.local import LocalFileSystem

_SEAL = "sha256"
_ATTEMPT = re.compile(r"\..+\.[0-9a-f]{12}")


class Note:
    """One file, at `path` within a file system of fsspec's."""

    def __init__(self, filesystem: Any, path: str) -> None:
        """Neither reads nor writes yet."""
        self.path = path
        self._filesystem = filesystem
        self._is_local = isinstance(filesystem, LocalFileSystem)

    def read(self) -> bytes | None:
        """Returns what it says; None if it is not there."""
        try:
            return self._filesystem.cat_file(self.path)
        except FileNotFoundError:
            return None

    def create(self, content: bytes) -> bool:
        """Writes it unless it is there; returns whether it says `content` now."""
        self._make_directory()
        try:
            if self._is_local:
                _create_whole(Path(self.path), content)
            else:
                self._filesystem.pipe_file(self.path, content, mode="create")
        except FileExistsError:
            pass
        return self.read() == content

    def replace(self, content: bytes) -> None:
        """Writes it, there or not."""
        self._make_directory()
        if self._is_local:
            write_whole(Path(self.path), content)
        else:
            self._filesystem.pipe_file(self.path, content)

    def _make_directory(self) -> None:
        parent = self.path.rpartition("/")[0]
        if self._is_local:
            make_directory(Path(parent))
        else:
            self._filesystem.makedirs(parent, exist_ok=True)

    def remove(self) -> None:
        """Removes it if it is there."""
        with contextlib.suppress(FileNotFoundError):
            self._filesystem.rm_file(self.path)


def json_bytes(value: Mapping[str, Any]) -> bytes:
    """Returns a JSON object as files of the store hold it: one way to write it, and no other."""
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return f"{text}\n".encode()


def sealed_bytes(value: Mapping[str, Any]) -> bytes:
    """Returns a JSON object with the digest of all that it says."""
    return json_bytes({**value, _SEAL: hashlib.sha256(json_bytes(value)).hexdigest()})


def unsealed(raw: bytes, *, fields: Collection[str]) -> dict[str, Any]:
    """Returns what a sealed note says, once it is as it was written.

    Args:
        raw: its bytes.
        fields: all that notes of its kind held before they were sealed; such ones are taken as
            they are, since no single fault makes one of a sealed one.

    Raises:
        ValueError: it is none, or has been changed.
    """
    value = json.loads(raw)
    if not isinstance(value, dict):
        raise ValueError("it is no JSON object")
    promised = value.pop(_SEAL, None)
    if promised is None and set(value) == set(fields):
        return value
    if promised is None or sealed_bytes(value) != raw:
        raise ValueError("it was changed: its own digest is another one")
    return value


def is_attempt(name: str) -> bool:
    """Whether a file's name is that of a note being written, or of one whose writer was killed."""
    return _ATTEMPT.fullmatch(name) is not None


def write_whole(path: Path, content: bytes) -> None:
    """Writes a local file so that a crash leaves the old one or the whole new one, on disk."""
    with _attempt(path, content) as attempt:
        attempt.replace(path)
    sync_directory(path.parent)


def _create_whole(path: Path, content: bytes) -> None:
    with _attempt(path, content) as attempt:
        try:
            path.hardlink_to(attempt)
        except FileExistsError:
            raise
        except OSError:  # a file system without hard links
            if path.exists():
                raise FileExistsError(path) from None
            attempt.replace(path)
    sync_directory(path.parent)


@contextlib.contextmanager
def _attempt(path: Path, content: bytes) -> Iterator[Path]:
    attempt = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")
    try:
        with attempt.open("wb") as handle:
            handle.write(content)
            handle.flush()
            os.fsync(handle.fileno())
        yield attempt
    finally:
        attempt.unlink(missing_ok=True)


def make_directory(path: Path) -> None:
    """Makes a directory unless it is there, with those above it, all of them durable."""
    missing = [one for one in (path, *path.parents) if not one.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for made in missing:
        sync_directory(made.parent)


def sync_directory(path: Path) -> None:
    """Makes the names in a directory durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(root: Path) -> None:
    """Makes all files below a directory durable, and their names."""
    for path in root.rglob("*"):
        if path.is_file():
            with path.open("rb") as handle:
                os.fsync(handle.fileno())
        else:
            sync_directory(path)
    sync_directory(root)
