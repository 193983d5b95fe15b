"""Finds the files of a source and opens them, whatever holds them and however they are compressed.

A path is a file, a directory, or a pattern: `*`, `**`, `?`, `[...]` as in a glob, `{a,b}` and
`{00..17}` as in a shell; local, or a URL of any file system that fsspec knows. A file's *logical
path* is its path below what the configuration names: below the standard library, below a directory,
below the fixed part of a pattern. It identifies the file; where it lies does not.

Compression (gzip, zstd, bzip2, xz) is known by a file's first bytes; the suffix of its name is no
part of its documents' ids, so that compressing a source changes no document.
"""

import bz2
import gzip
import hashlib
import io
import itertools
import lzma
import os
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import fsspec
import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem

from modeling.data.config import FilesSource, PyStdlibSource, Source

_NOT_STDLIB = {"site-packages", "dist-packages", "__pycache__"}
_MAGIC = set("*?[")
_COMPRESSION_SUFFIX = re.compile(r"(?<=[^/])\.(gz|zst|zstd|bz2|xz)$")
_GZIP = b"\x1f\x8b\x08"
_ZSTD = b"\x28\xb5\x2f\xfd"
_XZ = b"\xfd7zXZ\x00"
_BZIP2 = re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)")  # no text begins like this by accident
_BRACES = re.compile(r"\{([^{}]*,[^{}]*|\d+\.\.\d+)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_MOST_ALTERNATIVES = 1_000_000
_PIECE_BYTES = 1024 * 1024


class SourceError(ValueError):
    """A source cannot be listed or read; the message names the file, and the line if it has one."""


class UndecodableError(SourceError):
    """A file whose declared or default encoding does not fit its bytes."""


@dataclass(frozen=True)
class FoundFile:
    """A file of a source: what it is called, and where it can be read."""

    logical_path: str
    location: str
    """Local path or URL; no part of any identity."""

    @property
    def document_path(self) -> str:
        """The logical path without the suffix of a compression: ids of documents begin so."""
        return _COMPRESSION_SUFFIX.sub("", self.logical_path)

    @property
    def shown(self) -> str:
        """The location without the secrets that a URL may carry."""
        return without_secrets(self.location)

    def open(self) -> Any:
        """Opens the stored bytes for reading at any place.

        Raises:
            SourceError: it cannot be opened.
        """
        try:
            fs, path = fsspec.url_to_fs(self.location)
            return fs.open(path, "rb")
        except OSError as error:
            reason = str(error).replace(self.location, self.shown)
            raise SourceError(f"{self.shown}: cannot be read: {reason}.") from error


class StoredFile(io.RawIOBase):
    """A file's stored bytes, local or remote, digested as they pass: reading is checking.

    Raises:
        SourceError: the file cannot be opened.
    """

    def __init__(self, file: FoundFile) -> None:
        """Opens `file`; close it, best in a `with` statement."""
        self._stored = file.open()
        self._wrappers: list[Any] = []
        self.sha256 = hashlib.sha256()
        self.num_bytes = 0

    def readable(self) -> bool:
        """Yes, as `io` asks."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fills `buffer`, as far as the file goes."""
        piece = self._stored.read(len(buffer))
        self.sha256.update(piece)
        self.num_bytes += len(piece)
        buffer[: len(piece)] = piece
        return len(piece)

    def content(self) -> io.BufferedIOBase:
        """Returns the file's bytes, decompressed if their beginning says that they need it."""
        buffered = io.BufferedReader(self)
        content = _decompressed(buffered, buffered.peek(16)[:16])
        self._wrappers += [buffered, content]  # a wrapper that goes away closes what it wraps
        return content

    def drain(self) -> None:
        """Reads to the end, so that the digest covers the whole file."""
        while self.read(_PIECE_BYTES):
            pass

    def close(self) -> None:
        """Closes the file beneath too."""
        if not self.closed:
            self._stored.close()
        super().close()


def find_files(source: Source) -> list[FoundFile]:
    """Returns the files of `source`, sorted by logical path.

    Raises:
        SourceError: a path or pattern matches nothing, or two files would give equal document ids.
    """
    match source:
        case PyStdlibSource():
            found = list(_stdlib_files(Path(sysconfig.get_path("stdlib"))))
        case FilesSource():
            found = [file for pattern in source.paths for file in _matching_files(pattern)]
    by_path: dict[str, FoundFile] = {}
    for file in found:
        other = by_path.setdefault(file.document_path, file)
        if other.location != file.location:
            raise SourceError(
                f"{other.shown} and {file.shown} would both be called {file.document_path!r}; take "
                f"one out of `source.paths`, or name the directory above both in one pattern."
            )
    return sorted(by_path.values(), key=lambda file: file.logical_path)


def without_secrets(location: str) -> str:
    """Returns a URL without user, password, query and fragment; a local path as it is."""
    if "://" not in location:
        return location
    parts = urlsplit(location)
    hidden = parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="")
    return urlunsplit(hidden)


def _stdlib_files(root: Path) -> Iterator[FoundFile]:
    for directory, subdirectories, names in os.walk(root):
        subdirectories[:] = [name for name in subdirectories if name not in _NOT_STDLIB]
        for name in names:
            if name.endswith(".py"):
                path = Path(directory) / name
                yield FoundFile(path.relative_to(root).as_posix(), str(path))


def _matching_files(pattern: str) -> Iterator[FoundFile]:
    """Yields what a path or pattern stands for, each of its alternatives matching something."""
    fixed = fsspec.url_to_fs(pattern)[1].split("{")[0].rpartition("/")[0]
    alternatives = _alternatives(pattern)
    for alternative in alternatives:
        fs, path = fsspec.url_to_fs(alternative)
        base, paths = _matches(fs, path, without_secrets(alternative))
        if len(alternatives) > 1 and len(fixed) < len(base):
            base = fixed
        for match in paths:
            is_local = isinstance(fs, LocalFileSystem)
            location = match if is_local else str(fs.unstrip_protocol(match))
            logical_path = match.removeprefix(base).lstrip("/")
            if _is_web(location):
                logical_path = re.split(r"[?#]", logical_path)[0]
            yield FoundFile(logical_path, location)


def _matches(fs: Any, path: str, shown: str) -> tuple[str, list[str]]:
    """Returns the directory that logical paths start from, and the files."""
    parts = path.split("/")
    magic = [index for index, part in enumerate(parts) if _MAGIC & set(part)]
    if magic and not _is_web(path):
        found = fs.glob(path, detail=True)
        paths = [match for match, info in found.items() if info["type"] != "directory"]
        base = "/".join(parts[: magic[0]])
    elif not _is_web(path) and fs.isdir(path):
        base = path
        paths = [match for match in fs.find(path) if not _is_hidden(match[len(path) :])]
    elif fs.exists(path):
        base, paths = path.split("?")[0].rpartition("/")[0], [path]
    else:
        raise SourceError(f"{shown}: no such file or directory; correct `source.paths`.")
    if not paths:
        raise SourceError(f"{shown}: matches no file; correct `source.paths`.")
    return base, paths


def _alternatives(pattern: str) -> list[str]:
    """Returns the paths that braces stand for, innermost braces first, in the order written."""
    if (braces := _BRACES.search(pattern)) is None:
        return [pattern]
    inside = braces.group(1)
    if span := _RANGE.fullmatch(inside):
        first, last = int(span[1]), int(span[2])
        padded = any(end.startswith("0") and len(end) > 1 for end in span.groups())
        width = max(map(len, span.groups())) if padded else 0
        step = 1 if first <= last else -1
        if abs(last - first) >= _MOST_ALTERNATIVES:
            raise SourceError(
                f"{without_secrets(pattern)}: {{{inside}}} stands for too many paths."
            )
        choices = [f"{number:0{width}d}" for number in range(first, last + step, step)]
    else:
        choices = inside.split(",")
    before, after = pattern[: braces.start()], pattern[braces.end() :]
    expanded = (_alternatives(before + choice + after) for choice in choices)
    return list(dict.fromkeys(itertools.chain.from_iterable(expanded)))


def _is_web(location: str) -> bool:
    """Whether this is HTTP, which lists nothing and whose `?` begins a query."""
    return location.startswith(("http://", "https://"))


def _is_hidden(relative_path: str) -> bool:
    return any(part.startswith(".") for part in relative_path.split("/"))


def _decompressed(stream: Any, head: bytes) -> io.BufferedIOBase:
    if head.startswith(_GZIP):
        return gzip.GzipFile(fileobj=stream)
    if head.startswith(_XZ):
        return lzma.LZMAFile(stream)
    if _BZIP2.match(head):
        return bz2.BZ2File(stream)
    if head.startswith(_ZSTD):
        inflated: Any = pa.CompressedInputStream(pa.PythonFile(stream, mode="r"), "zstd")
        return io.BufferedReader(inflated)
    return stream
