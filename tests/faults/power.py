"""What is left of a directory when the power goes: what was synced for certain, the rest perhaps.

A file's content and a directory's names are each on disk once they are synced, and not before. What
a disk writes unasked is anyone's guess, so two guesses are tried at every moment: nothing at all,
and all names but no content, as a file system does that journals its metadata alone.

    with power_may_go(directory) as moments:
        ...                                     every `os.fsync` in here is noted
    for moment in moments:
        moment.names_kept(target)               writes what would be left to `target`
"""

import contextlib
import dataclasses
import os
import stat
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

Names = Mapping[str, int]
"""Inodes by name."""


@dataclasses.dataclass(frozen=True)
class Moment:
    """What is on disk just before a sync, or at the end."""

    root: int
    synced: Mapping[int, Names]
    """Of directories, by inode."""
    present: Mapping[int, Names]
    contents: Mapping[int, bytes]
    """Of files, as they were last synced."""
    told: Any
    """What had been promised by then."""

    def nothing_more_kept(self, target: Path) -> Path:
        """Writes what was synced and nothing else."""
        return self._write(self.root, target, self.synced)

    def names_kept(self, target: Path) -> Path:
        """Writes all names; files that were not synced are empty."""
        return self._write(self.root, target, self.present)

    def _write(self, inode: int, target: Path, names: Mapping[int, Names]) -> Path:
        target.mkdir()
        for name, child in names.get(inode, {}).items():
            if child in self.present or child in names:
                self._write(child, target / name, names)
            else:
                (target / name).write_bytes(self.contents.get(child, b""))
        return target


class _Disk:
    """Follows what is synced."""

    def __init__(self, root: Path, told: Callable[[], Any]) -> None:
        self._root, self._told = root, told
        self._lock = threading.Lock()
        self._synced = _all_names(root)
        self._contents = {
            path.stat().st_ino: path.read_bytes() for path in root.rglob("*") if path.is_file()
        }
        self.moments: list[Moment] = []

    def sync(self, descriptor: int) -> None:
        with self._lock:
            self.note()
            status, path = os.fstat(descriptor), Path(f"/proc/self/fd/{descriptor}")
            if stat.S_ISDIR(status.st_mode):
                self._synced[status.st_ino] = _names(path)
            else:
                self._contents[status.st_ino] = path.read_bytes()

    def note(self) -> None:
        found = Moment(
            self._root.stat().st_ino, dict(self._synced), _all_names(self._root),
            dict(self._contents), self._told(),
        )  # fmt: skip
        if not self.moments or found != self.moments[-1]:
            self.moments.append(found)


def _names(directory: Path) -> Names:
    with os.scandir(directory) as entries:
        return {entry.name: entry.inode() for entry in entries}


def _all_names(root: Path) -> dict[int, Names]:
    return {Path(path).stat().st_ino: _names(Path(path)) for path, _, _ in os.walk(root)}


@contextlib.contextmanager
def power_may_go(root: Path, *, told: Callable[[], Any] = lambda: None) -> Iterator[list[Moment]]:
    """Yields what fills with each moment at which the power might go; `root` is on disk before."""
    disk = _Disk(root, told)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", disk.sync)
        yield disk.moments
    disk.note()
