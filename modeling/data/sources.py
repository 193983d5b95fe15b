"""Finds the files of a source and reads documents out of them, one at a time.

A file's *logical path* is its path below what the configuration names: below the standard library,
below a directory, below the fixed part of a glob. It identifies the file; where it lies does not.
"""

import hashlib
import io
import itertools
import json
import os
import sysconfig
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from modeling.data.config import FilesSource, PyStdlibSource, Source

_NOT_STDLIB = {"site-packages", "dist-packages", "__pycache__"}
_MAGIC = set("*?[")
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


def find_files(source: Source) -> list[FoundFile]:
    """Returns the files of `source`, sorted by logical path.

    Raises:
        SourceError: a path or glob matches nothing, or two files get one logical path.
    """
    match source:
        case PyStdlibSource():
            found = list(_stdlib_files(Path(sysconfig.get_path("stdlib"))))
        case FilesSource():
            found = [file for pattern in source.paths for file in _matching_files(pattern)]
    by_path: dict[str, FoundFile] = {}
    for file in found:
        other = by_path.setdefault(file.logical_path, file)
        if other.location != file.location:
            raise SourceError(
                f"{other.location} and {file.location} would both be called "
                f"{file.logical_path!r}; name the directory above both in one glob."
            )
    return [by_path[path] for path in sorted(by_path)]


class StoredFile(io.RawIOBase):
    """A file's stored bytes, local or remote, digested as they pass: reading is checking.

    Raises:
        SourceError: the file cannot be opened.
    """

    def __init__(self, file: FoundFile) -> None:
        """Opens `file`; close it, best in a `with` statement."""
        try:
            fs, path = fsspec.url_to_fs(file.location)
            self._stored = fs.open(path, "rb")
        except OSError as error:
            raise SourceError(f"{file.location}: cannot be read: {error}.") from error
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

    def drain(self) -> None:
        """Reads to the end, so that the digest covers the whole file."""
        while self.read(_PIECE_BYTES):
            pass

    def close(self) -> None:
        """Closes the file beneath too."""
        if not self.closed:
            self._stored.close()
        super().close()


def read_documents(
    source: Source, file: FoundFile, stream: io.BufferedIOBase
) -> Iterator[tuple[str, str]]:
    """Yields (document id, text) of one file from its open stream, to the last byte.

    Raises:
        UndecodableError: the bytes are not text in the encoding they should have.
        SourceError: a line is not a JSON object that holds the text, naming the line.
    """
    match source:
        case PyStdlibSource():
            yield file.logical_path, _decode_python(stream.read(), file.location)
        case FilesSource(format="text"):
            yield file.logical_path, _decode_utf8(stream.read(), file.location)
        case FilesSource(format="paragraphs"):
            for number, paragraph in _paragraphs(stream):
                where = f"{file.location}:{number}"
                yield f"{file.logical_path}#{number}", _decode_utf8(paragraph, where)
        case FilesSource(format="jsonl", text_field=text_field):
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    where = f"{file.location}:{number}"
                    yield f"{file.logical_path}#{number}", _json_text(line, text_field, where)


def _paragraphs(lines: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    """Yields each run of lines that are not blank, with the number of its first line."""
    numbered = enumerate(lines, start=1)
    for is_blank, run in itertools.groupby(numbered, key=lambda item: not item[1].strip()):
        if not is_blank:
            (first, line), *rest = run
            yield first, line + b"".join(line for _, line in rest)


def _stdlib_files(root: Path) -> Iterator[FoundFile]:
    for directory, subdirectories, names in os.walk(root):
        subdirectories[:] = [name for name in subdirectories if name not in _NOT_STDLIB]
        for name in names:
            if name.endswith(".py"):
                path = Path(directory) / name
                yield FoundFile(path.relative_to(root).as_posix(), str(path))


def _matching_files(pattern: str) -> Iterator[FoundFile]:
    fs, path = fsspec.url_to_fs(pattern)
    parts = path.split("/")
    magic = [index for index, part in enumerate(parts) if _MAGIC & set(part)]
    if magic:
        base = "/".join(parts[: magic[0]])
        paths = [p for p, info in fs.glob(path, detail=True).items() if info["type"] != "directory"]
    elif fs.isdir(path):
        base = path
        paths = [p for p in fs.find(path) if not _is_hidden(p[len(path) :])]
    elif fs.exists(path):
        base = "/".join(parts[:-1])
        paths = [path]
    else:
        raise SourceError(f"{pattern}: no such file or directory; correct `source.paths`.")
    if not paths:
        raise SourceError(f"{pattern}: matches no file; correct `source.paths`.")
    is_local = isinstance(fs, LocalFileSystem)
    for match in paths:
        location = match if is_local else str(fs.unstrip_protocol(match))
        yield FoundFile(match[len(base) :].lstrip("/"), location)


def _is_hidden(relative_path: str) -> bool:
    return any(part.startswith(".") for part in relative_path.split("/"))


def _decode_python(data: bytes, location: str) -> str:
    """Decodes by the file's own coding line, as the interpreter does (PEP 263)."""
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
        text = data.decode(encoding)
        text.encode()
    except (SyntaxError, UnicodeError, LookupError) as error:
        raise UndecodableError(f"{location}: {error}") from error
    return text


def _decode_utf8(data: bytes, location: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise UndecodableError(
            f"{location}: not UTF-8 at byte {error.start} (0x{data[error.start]:02x}); "
            f"convert the file or take it out of `source.paths`."
        ) from error


def _json_text(line: bytes, text_field: str, where: str) -> str:
    text = _decode_utf8(line, where)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{where}: not JSON: {error}.") from error
    if not isinstance(value, dict) or text_field not in value:
        found = sorted(value) if isinstance(value, dict) else type(value).__name__
        raise SourceError(
            f"{where}: no field {text_field!r} (found {found}); set `source.text_field`."
        )
    document = value[text_field]
    if not isinstance(document, str):
        raise SourceError(
            f"{where}: field {text_field!r} is a {type(document).__name__}, expected a string."
        )
    try:
        document.encode()
    except UnicodeEncodeError as error:
        raise SourceError(
            f"{where}: field {text_field!r} holds half a surrogate pair at character "
            f"{error.start}, which UTF-8 cannot store; repair the line."
        ) from error
    return document
