"""Finds the files of a source and opens them, whatever holds them and however they are compressed.

A path is a file, a directory, or a pattern: `*`, `**`, `?`, `[...]` as in a glob, `{a,b}` and
`{00..17}` as in a shell; local, or a URL of any file system that fsspec knows. A file's *logical
path* is its path below what the configuration names: below the standard library, below a directory,
below the fixed part of a pattern. It identifies the file; where it lies does not.

Compression (gzip, zstd, bzip2, xz) is known by a file's first bytes; the suffix of its name is no
part of its documents' ids, so that compressing a source changes no document.
"""

import bz2
import contextlib
import gzip
import hashlib
import importlib.util
import io
import itertools
import json
import lzma
import os
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import fsspec
import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem

from modeling.data.sources_config import (
    FilesSource,
    HuggingFaceSource,
    PackageSource,
    PyStdlibSource,
    SavedDatasetSource,
    Source,
)
from modeling.urls import public_url

_NOT_SOURCES = {"site-packages", "dist-packages", "__pycache__"}
_MAGIC = set("*?[")
_COMPRESSION_SUFFIX = re.compile(r"(?<=[^/])\.(gz|zst|zstd|bz2|xz)$")
_GZIP = b"\x1f\x8b\x08"
_ZSTD = b"\x28\xb5\x2f\xfd"
_XZ = b"\xfd7zXZ\x00"
_BZIP2 = re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)")  # no text begins like this by accident
_BRACES = re.compile(r"\{([^{}]*,[^{}]*|\d+\.\.\d+)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_MOST_ALTERNATIVES = 1_000_000
_HINTS = ("size", "generation", "ETag", "etag", "LastModified", "last_modified", "mtime", "created")
"""By which one or another store of files tells versions of a file apart."""
_PIECE_BYTES = 1024 * 1024
_SMALL_PIECE_BYTES = 64 * 1024  # making a larger buffer takes longer than reading a small file
_SMALL_CONTENT_BYTES = 1024 * 1024


class SourceError(ValueError):
    """A source cannot be listed or read; the message names the file, and the line if it has one."""


class StorageError(SourceError):
    """What stores a file does not give it: a missing object, a permission, a disk, a network.

    This says nothing of the content, so that `on_error: skip` does not leave it out.
    """


class BadContentError(SourceError):
    """What a file holds is not what it should; `on_error: skip` leaves it out."""

    def __init__(self, message: str, *, reason: str) -> None:
        """Takes the message for people, and in two or three words what is counted of it."""
        super().__init__(message)
        self.reason = reason


class UndecodableError(BadContentError):
    """A text whose declared or default encoding does not fit its bytes."""

    def __init__(self, message: str) -> None:
        """Takes the message for people."""
        super().__init__(message, reason="undecodable")


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
        return public_url(self.location)

    def stamp(self) -> str | None:
        """Returns what changes whenever the file does, or None where nothing is known to.

        Of a local file size, times and inode; of an object in Cloud Storage its generation.
        """
        if "://" not in self.location:
            try:
                found = Path(self.location).stat()
            except OSError:
                return None  # opening it will say why
            times = f"{found.st_mtime_ns}-{found.st_ctime_ns}"
            return f"{found.st_size}-{times}-{found.st_dev}-{found.st_ino}"
        with self.told_of():
            fs, path = fsspec.url_to_fs(self.location)
            generation = fs.info(path).get("generation") if "gs" in fs.protocol else None
        return generation and f"generation-{generation}"

    def hint(self) -> str:
        """Returns what is likely to change whenever the file does, with nothing of it read."""
        if "://" not in self.location:
            return str(self.stamp())
        fs, path = fsspec.url_to_fs(self.location)
        info = fs.info(path)
        return json.dumps([str(info.get(name)) for name in _HINTS])

    @contextlib.contextmanager
    def told_of(self) -> Iterator[None]:
        """Raises what goes wrong with the store as a `StorageError` that names this file."""
        try:
            yield
        except SourceError:
            raise
        except Exception as error:  # noqa: BLE001
            # Of whatever type: each kind of store has its own for not being reached.
            told = str(error).replace(self.location, self.shown).rstrip(".")
            # Of a URL the error itself, which may quote its secrets, is not shown.
            raise StorageError(
                f"{self.shown}: cannot be read: {type(error).__name__}: {told}."
            ) from (None if "://" in self.location else error)

    def open(self) -> "Stored":
        """Opens the stored bytes for reading at any place.

        Raises:
            StorageError: it cannot be opened.
        """
        with self.told_of():
            if "://" in self.location:
                fs, path = fsspec.url_to_fs(self.location)
                return Stored(self, fs.open(path, "rb"))
            path = Path(self.location)
            if not path.is_file() and path.exists():  # opening a pipe would wait for ever
                kind = "directory" if path.is_dir() else "pipe, socket or device"
                raise StorageError(
                    f"{self.shown}: is a {kind}, expected a file; take it out of `source.paths`, "
                    f"or name what it stands for."
                )
            return Stored(self, path.open("rb", buffering=0))


class Stored:
    """An open file, whose store's errors are told as those of a store, with the file's name."""

    def __init__(self, file: FoundFile, opened: Any) -> None:
        """Takes `file` as its store has opened it."""
        self._file = file
        self._opened = opened

    @property
    def closed(self) -> bool:
        """Whether it is."""
        return self._opened.closed

    def read(self, size: int = -1) -> bytes:
        """Returns the next bytes."""
        with self._file.told_of():
            return self._opened.read(size)

    def readinto(self, buffer: Any) -> int:
        """Fills `buffer` as far as there are bytes."""
        with self._file.told_of():
            return self._opened.readinto(buffer)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Goes to a place, which it returns."""
        with self._file.told_of():
            return self._opened.seek(offset, whence)

    def tell(self) -> int:
        """Returns the place."""
        return self._opened.tell()

    def close(self) -> None:
        """Closes it."""
        self._opened.close()

    def __enter__(self) -> "Stored":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True)
class SourceFile:
    """One file as it was when the source was scanned."""

    logical_path: str
    """With the source's name in front, if there are several."""
    size: int
    sha256: str
    split: str | None
    """None where the file holds many documents, each in a split of its own."""
    held_out: bool | None
    """What validation by files says of it; None: the ids of its documents decide."""
    location: str = field(compare=False)
    """Empty for what lies on the hub."""


class StoredFile(io.RawIOBase):
    """A file's stored bytes, local or remote, digested as they pass: reading is checking.

    Raises:
        SourceError: the file cannot be opened, or holds far more than its size lets expect.
    """

    def __init__(self, file: FoundFile, *, max_expansion: int) -> None:
        """Opens `file`; close it, best in a `with` statement.

        Args:
            file: where it is.
            max_expansion: how many times its stored bytes the content may have.
        """
        self._file = file
        self.max_expansion = max_expansion
        self._stored = file.open()
        self._wrappers: list[Any] = []
        self.sha256 = hashlib.sha256()
        self.num_bytes = 0

    def readable(self) -> bool:
        """Yes, as `io` asks."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fills `buffer`, as far as the file goes."""
        count = self._stored.readinto(buffer)
        self.sha256.update(memoryview(buffer)[:count])
        self.num_bytes += count
        return count

    def content(self) -> io.BufferedIOBase:
        """Returns the file's bytes, decompressed if their beginning says that they need it."""
        buffered = io.BufferedReader(self, _SMALL_PIECE_BYTES)
        content = _decompressed(buffered, buffered.peek(16)[:16])
        self._wrappers += [buffered, content]  # a wrapper that goes away closes what it wraps
        if content is buffered:
            return buffered
        bounded = io.BufferedReader(_Bounded(content, self.require_moderate), _PIECE_BYTES)
        self._wrappers.append(bounded)
        if not bounded.peek(1):
            raise BadContentError(
                f"{self._file.shown}: empty once decompressed; take it out of `source.paths`.",
                reason="empty file",
            )
        return bounded

    def require_moderate(self, num_bytes: int) -> None:
        """Raises a `BadContentError` if `num_bytes` are too many for what has been read so far."""
        require_moderate(self._file, self.num_bytes, num_bytes, self.max_expansion)

    def drain(self) -> None:
        """Reads to the end, so that the digest covers the whole file."""
        buffer = bytearray(_SMALL_PIECE_BYTES)
        while self.readinto(buffer):
            pass

    def close(self) -> None:
        """Closes the file beneath too."""
        if not self.closed:
            self._stored.close()
        super().close()


class _Bounded(io.RawIOBase):
    """A decompressed stream that stops a bomb: what takes over all memory or disk when opened."""

    def __init__(self, content: io.BufferedIOBase, require: Callable[[int], None]) -> None:
        self._content = content
        self._require = require
        self._num_bytes = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        # A piece at a time: a reader may offer room for all that it would take.
        count = self._content.readinto(memoryview(buffer)[:_PIECE_BYTES])
        self._num_bytes += count
        self._require(self._num_bytes)
        return count


class _Streams(io.RawIOBase):
    """What compressed streams, one after another, hold together.

    The files of `bz2` and `lzma` take a stream whose beginning is damaged for the end, without a
    word.
    """

    def __init__(self, stored: io.BufferedIOBase, new: Callable[[], Any]) -> None:
        self._stored = stored
        self._new = new
        self._decompressor = new()

    @classmethod
    def reader(cls, stored: io.BufferedIOBase, new: Callable[[], Any]) -> io.BufferedReader:
        return io.BufferedReader(cls(stored, new), _PIECE_BYTES)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            data = b""
            if self._decompressor.eof:
                data = self._decompressor.unused_data.lstrip(b"\0")  # padding
                while not data and (piece := self._stored.read(_SMALL_PIECE_BYTES)):
                    data = piece.lstrip(b"\0")
                if not data:
                    return 0
                self._decompressor = self._new()
            elif self._decompressor.needs_input:
                data = self._stored.read(_SMALL_PIECE_BYTES)
                if not data:
                    raise EOFError("it ends within a compressed stream")
            if content := self._decompressor.decompress(data, len(buffer)):
                buffer[: len(content)] = content
                return len(content)


def require_moderate(file: FoundFile, stored: int, content: int, max_expansion: int) -> None:
    """Checks that a file's content has not more than `max_expansion` times its stored bytes.

    Raises:
        BadContentError: it has, and is over a MiB.
    """
    if content > max(max_expansion * stored, _SMALL_CONTENT_BYTES):
        raise BadContentError(
            f"{file.shown}: {stored} stored bytes hold {content} bytes and more, over "
            f"{max_expansion} times as many. If that is right, raise `source.max_expansion`.",
            reason="expands too much",
        )


def find_files(source: Source) -> list[FoundFile]:
    """Returns the files of `source`, sorted by logical path; of a dataset on the hub, none.

    Raises:
        SourceError: a path or pattern matches nothing, or two files would give equal document ids.
    """
    match source:
        case PyStdlibSource():
            root = Path(sysconfig.get_path("stdlib"))
            return unique_files(_python_files(root, root))
        case PackageSource():
            return unique_files(_package_files(source.package))
        case FilesSource():
            return unique_files(matching_files(source.paths))
        case HuggingFaceSource():
            return unique_files(matching_files([source.path] if source.path is not None else []))
        case SavedDatasetSource():
            return unique_files(matching_files([source.path]))


def unique_files(found: Iterable[FoundFile]) -> list[FoundFile]:
    """Returns files sorted by logical path, one that was found twice once.

    Raises:
        SourceError: two files would give equal document ids.
    """
    by_path: dict[str, FoundFile] = {}
    for file in found:
        other = by_path.setdefault(file.document_path, file)
        if other.location != file.location:
            raise SourceError(
                f"{other.shown} and {file.shown} would both be called {file.document_path!r}; take "
                f"one out of `source.paths`, or name the directory above both in one pattern."
            )
    return sorted(by_path.values(), key=lambda file: file.logical_path)


def matching_files(patterns: Iterable[str]) -> Iterator[FoundFile]:
    """Yields the files that paths and patterns stand for.

    Raises:
        SourceError: one of them matches nothing.
    """
    for pattern in patterns:
        yield from _matching_files(pattern)


def _python_files(directory: Path, root: Path) -> Iterator[FoundFile]:
    for place, subdirectories, names in os.walk(directory, onerror=_raise_unlisted):
        subdirectories[:] = [name for name in subdirectories if name not in _NOT_SOURCES]
        for name in names:
            if name.endswith(".py"):
                path = Path(place) / name
                yield FoundFile(path.relative_to(root).as_posix(), str(path))


def _package_files(package: str) -> Iterator[FoundFile]:
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise SourceError(
            f"package {package!r} is not installed; install it, or correct `source.package`."
        )
    if spec.submodule_search_locations is None:
        raise SourceError(f"{package!r} is a module of one file or built in, not a package.")
    for directory in map(Path, spec.submodule_search_locations):
        yield from _python_files(directory, directory.parent)


def _matching_files(pattern: str) -> Iterator[FoundFile]:
    """Yields what a path or pattern stands for, each of its alternatives matching something."""
    fixed = _file_system(pattern)[1].split("{")[0].rpartition("/")[0]
    alternatives = _alternatives(pattern)
    for alternative in alternatives:
        fs, path = _file_system(alternative)
        base, paths = _matches(fs, path, public_url(alternative))
        if len(alternatives) > 1 and len(fixed) < len(base):
            base = fixed
        for match in paths:
            is_local = isinstance(fs, LocalFileSystem)
            location = match if is_local else str(fs.unstrip_protocol(match))
            logical_path = match.removeprefix(base).lstrip("/")
            if _is_web(location):
                logical_path = re.split(r"[?#]", logical_path)[0]
            _require_utf8(logical_path, location)
            yield FoundFile(logical_path, location)


def _file_system(pattern: str) -> tuple[Any, str]:
    """Returns what holds a path or pattern, and how it calls that."""
    try:
        return fsspec.url_to_fs(pattern)
    except (ValueError, ImportError) as error:
        raise SourceError(
            f"{public_url(pattern)}: no file system is known for it ({error}); correct "
            f"`source.paths`, or install what it needs."
        ) from error


def _require_utf8(logical_path: str, location: str) -> None:
    """Refuses a name that ids cannot begin with."""
    try:
        logical_path.encode()
    except UnicodeEncodeError as error:
        raise SourceError(
            f"{public_url(location)!a}: its name is not UTF-8; rename the file."
        ) from error


def _matches(fs: Any, path: str, shown: str) -> tuple[str, list[str]]:
    """Returns the directory that logical paths start from, and the files."""
    fs = _LoudLocalFileSystem() if isinstance(fs, LocalFileSystem) else fs
    parts = path.split("/")
    magic = [index for index, part in enumerate(parts) if _MAGIC & set(part)]
    if magic and not _is_web(path):
        found = fs.glob(path, detail=True)
        paths = [match for match, info in found.items() if info["type"] != "directory"]
        base = "/".join(parts[: magic[0]])
    elif (kind := _kind(fs, path, shown)) == "directory" and not _is_web(path):
        base = path
        paths = [match for match in fs.find(path) if not _is_hidden(match[len(path) :])]
    elif kind is not None:
        base, paths = path.split("?")[0].rpartition("/")[0], [path]
    else:
        raise SourceError(f"{shown}: no such file or directory; correct `source.paths`.")
    if not paths:
        raise SourceError(f"{shown}: matches no file; correct `source.paths`.")
    return base, paths


def _kind(fs: Any, path: str, shown: str) -> str | None:
    """Returns whether a path is a file or a directory; None if it is not there."""
    try:
        return fs.info(path)["type"]
    except FileNotFoundError:
        return None
    except Exception as error:  # noqa: BLE001
        # Of whatever type: each kind of store has its own for not being reached.
        told = str(error).replace(path, shown)
        raise StorageError(f"{shown}: cannot be listed: {type(error).__name__}: {told}") from None


class _LoudLocalFileSystem(LocalFileSystem):
    """A file system that does not take a directory that it cannot list for an empty one."""

    def ls(self, path: str, detail: bool = False, **kwargs: Any) -> Any:
        try:
            return super().ls(path, detail, **kwargs)
        except FileNotFoundError:
            raise
        except OSError as error:
            _raise_unlisted(error)


def _raise_unlisted(error: OSError) -> NoReturn:
    raise StorageError(
        f"{error.filename}: cannot be listed: {error.strerror}. Make it readable, or take it out "
        f"of `source.paths`."
    ) from error


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
            raise SourceError(f"{public_url(pattern)}: {{{inside}}} stands for too many paths.")
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
        return _Streams.reader(stream, lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ))
    if _BZIP2.match(head):
        return _Streams.reader(stream, bz2.BZ2Decompressor)
    if head.startswith(_ZSTD):
        inflated: Any = pa.CompressedInputStream(pa.PythonFile(stream, mode="r"), "zstd")
        return io.BufferedReader(inflated)
    return stream
