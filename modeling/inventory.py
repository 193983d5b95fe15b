"""What a stored object consists of, and whether its files are still what was published.

    INVENTORY.json                            kind, content_id and, for each file, path, size and
                                              SHA-256; canonical JSON, so that no byte of it is free
    verified/<host>/<kind>/<content_id>.json  what this machine has verified: of each file its size,
                                              times and inode, as they were just before

An object is verified whenever it is opened, but a file is digested only once, and again whenever
its size, one of its times or its inode is no longer as noted. That is sound as long as each later
change gives a file another time: so one is noted only if it was last changed *before* the tick of
the file system's clock in which it was looked at. A clock that goes back makes files be digested
again, as does a note that is lost, torn or not allowed to be written. What a disk changes by itself
changes no time: `levanter fsck` reads every byte, notes or not.
"""

import hashlib
import json
import logging
import os
import socket
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from modeling.notes import json_bytes

_LOG = logging.getLogger(__name__)
INVENTORY = "INVENTORY.json"
VERIFIED = "verified"
"""Where in a store machines note what they have verified."""
_PIECE_BYTES = 1 << 20

Stamp = tuple[int, int, int, int]
"""Size, time of the last change of content, of the last change of any kind, and inode."""
_UNSURE: Stamp = (-1, 0, 0, 0)


class DamagedArtifactError(RuntimeError):
    """A file of a stored artifact is missing or is not what its inventory says."""


class Verified:
    """What of a store's objects this machine has verified and need not read again."""

    def __init__(self, root: Path) -> None:
        """Keeps its notes under `root`, on the file system of the objects."""
        self._notes = root / VERIFIED / socket.gethostname()

    def faults(self, directory: Path, kind: str, content_id: str) -> list[str]:
        """Returns what is wrong with an object's files; what is wrong begins with a file's name."""
        path = self._notes / kind / f"{content_id}.json"
        noted = _read(path)
        if noted and noted == _stamps(directory):
            return []
        tick = _tick(path.parent)
        stamps = _stamps(directory)
        unchanged = {name for name, stamp in stamps.items() if noted.get(name) == stamp}
        if INVENTORY not in unchanged:
            unchanged = set()
        found = list(file_faults(directory, key=(kind, content_id), trusted=unchanged))
        if not found and tick is not None:
            # What may change unseen is noted as well, as no file ever is: it may also be lost.
            _write(path, {n: s if n in unchanged or max(s[1:3]) < tick else _UNSURE
                          for n, s in stamps.items()})  # fmt: skip
        return found


def _read(path: Path) -> dict[str, Stamp]:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        _LOG.info("%s is of no use (%s): the object is read again.", path, error)
        return {}
    return {name: tuple(stamp) for name, stamp in content.items()}


def _tick(directory: Path) -> int | None:
    """Returns the time by the clock of a file system; None where nothing may be written."""
    probe = directory / f".{uuid.uuid4().hex}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe.touch()
        tick = probe.stat().st_mtime_ns
        probe.unlink()
    except OSError as error:
        _LOG.info("What is verified cannot be noted, and is read again each time: %s", error)
        return None
    return tick


def _write(path: Path, stamps: Mapping[str, Stamp]) -> None:
    # Not synced: what a crash tears is no JSON, and only costs time.
    attempt = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")
    try:
        attempt.write_bytes(json_bytes(stamps))
        attempt.replace(path)
    except OSError as error:
        attempt.unlink(missing_ok=True)
        _LOG.info("What is verified cannot be noted, and is read again each time: %s", error)


def _stamps(directory: Path) -> dict[str, Stamp]:
    found = {}
    for parent, _, names in os.walk(directory):
        for name in names:
            path = Path(parent, name)
            seen = path.stat(follow_symlinks=False)
            found[path.relative_to(directory).as_posix()] = (
                seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns, seen.st_ino,
            )  # fmt: skip
    return found


def inventory_of(directory: Path, kind: str, content_id: str) -> dict[str, Any]:
    """Returns the inventory of the files in a directory.

    Raises:
        ValueError: there is a symbolic link, whose target no inventory can answer for.
    """
    if linked := list(_links(directory)):
        raise ValueError(
            f"{directory / linked[0]} is a symbolic link. Write a copy of what it leads to: an "
            f"artifact is its own files alone."
        )
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    files = [
        {
            "path": path.relative_to(directory).as_posix(),
            "size": path.stat().st_size,
            "sha256": file_sha256(path),
        }
        for path in paths
    ]
    return {"kind": kind, "content_id": content_id, "files": files}


def read_inventory(raw: bytes, key: tuple[str, str] | None = None) -> dict[str, Any]:
    """Returns what the bytes of an inventory say.

    Args:
        raw: the bytes.
        key: kind and content id that it has to be of.

    Raises:
        ValueError: it is none, or is that of another object.
    """
    try:
        inventory = json.loads(raw)
        str([(entry["path"], entry["size"], entry["sha256"]) for entry in inventory["files"]])
        found = inventory["kind"], inventory["content_id"]
        at = inventory.get("at", ".")
        for name in (*([] if at == "." else [at]), *(it["path"] for it in inventory["files"])):
            require_within(name)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"no valid inventory ({error})") from None
    if json_bytes(inventory) != raw:
        raise ValueError("no inventory as it was written: it was changed")
    if key is not None and found != key:
        raise ValueError(f"the inventory of {found[0]} {found[1][:12]}: it was exchanged")
    return inventory


def require_within(name: str) -> str:
    """Returns the name of a file within some directory, if it is one.

    Raises:
        ValueError: whoever opened a file of this name might open one elsewhere.
    """
    parts = name.split("/")
    if {"", ".", ".."} & set(parts) or "\0" in name or "\\" in name:
        raise ValueError(f"{name!r} names no file within the directory: it was changed")
    return name


def verify_files(directory: Path) -> None:
    """Checks every byte of a stored object against its inventory.

    Raises:
        DamagedArtifactError: names each file that is missing, changed, or not in the inventory.
    """
    require_none(file_faults(directory), directory)


def require_none(faults: Iterator[str] | Sequence[str], directory: Path) -> None:
    """Raises `DamagedArtifactError` if anything is wrong with an object."""
    if found := list(faults):
        raise DamagedArtifactError(
            f"{directory}: {'; '.join(found)}. Move it away with `levanter fsck --set-aside`, or "
            f"restore it from a copy, and run again: what is missing is made anew."
        )


def file_faults(
    directory: Path, *, key: tuple[str, str] | None = None, trusted: Collection[str] = ()
) -> Iterator[str]:
    """Yields what is wrong with a local object, of each file; what is wrong begins with its name.

    Args:
        directory: of the object.
        key: its kind and content id, if known.
        trusted: files that need not be read.
    """
    try:
        inventory = read_inventory((directory / INVENTORY).read_bytes(), key)
    except FileNotFoundError:
        yield f"{INVENTORY} is missing"
    except ValueError as error:
        yield f"{INVENTORY} is {error}"
    else:
        filesystem, entries = LocalFileSystem(), inventory["files"]
        for name, what in inventory_faults(filesystem, str(directory), entries, trusted=trusted):
            yield f"{name} {what}"


def inventory_faults(
    filesystem: Any,
    root: str,
    entries: Sequence[Mapping[str, Any]],
    *,
    trusted: Collection[str] = (),
) -> Iterator[tuple[str, str]]:
    """Yields name and fault of each file of an object that is not as published.

    Args:
        filesystem: that of fsspec where the object is.
        root: its directory there.
        entries: the files of its inventory.
        trusted: those that need not be read.
    """
    if isinstance(filesystem, LocalFileSystem):
        for name in _links(Path(root)):
            yield name, "is a symbolic link: what it leads to was not published"
    present = {name.removeprefix(root).lstrip("/") for name in filesystem.find(root)}
    for entry in entries:
        name = entry["path"]
        path = f"{root}/{name}"
        if name not in present:
            yield name, "is missing"
        elif (size := filesystem.size(path)) != entry["size"]:
            yield name, f"has {size} bytes, not {entry['size']}"
        elif name not in trusted and _stream_sha256(filesystem, path) != entry["sha256"]:
            yield name, "has other bytes than were published"
    for name in sorted(present - {entry["path"] for entry in entries} - {INVENTORY}):
        yield name, "was not published"


def _links(directory: Path) -> Iterator[str]:
    """Yields the names of symbolic links below a directory, to files and to directories."""
    for parent, directories, files in os.walk(directory):
        for name in (*directories, *files):
            if (path := Path(parent, name)).is_symlink():
                yield path.relative_to(directory).as_posix()


def file_sha256(path: Path) -> str:
    """Returns the SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _stream_sha256(filesystem: Any, path: str) -> str:
    with filesystem.open(path, "rb") as stream:
        digest = hashlib.sha256()
        while piece := stream.read(_PIECE_BYTES):
            digest.update(piece)
    return digest.hexdigest()
