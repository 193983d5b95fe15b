"""What is left of a directory when the power goes: what was synced for certain, the rest perhaps.

A file's content and a directory's names are each on disk once they are synced, and not before. What
a disk writes unasked is anyone's guess, so several are tried at every moment: nothing at all; all
names but no content, as a file system does that journals its metadata alone; and the names in some
directories, but not in those above them, or not in those below.

    with power_may_go(directory) as moments:
        ...                                     every `os.fsync` in here is noted
    for moment, left in what_may_be_left(moments):
        left(target)                            writes what would be left to `target`
"""

import contextlib
import dataclasses
import os
import stat
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import partial
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

    def guesses(self) -> Iterator["Tree"]:
        """Yields what may be left, of every directory either what was synced or what there is."""
        depths = self._depths()
        yield self._tree(self.root, depths.keys(), frozenset())
        yield self._tree(self.root, depths.keys(), depths.keys())
        for limit in range(1, max(depths.values()) + 1):
            below = {inode for inode, depth in depths.items() if depth >= limit}
            yield self._tree(self.root, depths.keys(), below)
            yield self._tree(self.root, depths.keys(), depths.keys() - below)

    def _depths(self) -> dict[int, int]:
        """Returns how deep each directory lies, or lay."""
        found, coming = {}, [(self.root, 0)]
        while coming:
            inode, depth = coming.pop()
            found[inode] = depth
            names = [*self.synced.get(inode, {}).values(), *self.present.get(inode, {}).values()]
            coming += [(child, depth + 1) for child in set(names) - found.keys()
                       if child in self.synced or child in self.present]  # fmt: skip
        return found

    def _tree(self, inode: int, directories: Collection[int], kept: Collection[int]) -> "Tree":
        """Returns a directory; one that is removed, and whose removals are kept, is empty."""
        names = (self.present if inode in kept else self.synced).get(inode, {})
        return {
            name: self._tree(child, directories, kept)
            if child in directories
            else self.contents.get(child, b"")
            for name, child in names.items()
        }


Tree = dict[str, Any]
"""Directories and the bytes of files, by name."""


def what_may_be_left(moments: Iterable[Moment]) -> Iterator[tuple[Moment, Callable[[Path], Path]]]:
    """Yields each thing that may be left, but once, and what writes it to a new directory."""
    seen = set()
    for moment in moments:
        for tree in moment.guesses():
            mark = repr((tree, moment.told))
            if mark not in seen:
                seen.add(mark)
                yield moment, partial(_written, tree)


def _written(tree: Tree, target: Path) -> Path:
    target.mkdir()
    for name, child in tree.items():
        if isinstance(child, bytes):
            (target / name).write_bytes(child)
        else:
            _written(child, target / name)
    return target


class _Disk:
    """Follows what is synced."""

    def __init__(self, root: Path, told: Callable[[], Any]) -> None:
        self._root, self._told = root, told
        self._lock = threading.Lock()
        self._held: dict[int, int] = {}
        self._synced = _all_names(root)
        for path in (root, *root.rglob("*")):
            self._hold(path)
        self._contents = {
            path.stat().st_ino: path.read_bytes() for path in root.rglob("*") if path.is_file()
        }
        self.moments: list[Moment] = []

    def _hold(self, path: Path) -> None:
        """Keeps the number of an inode from being given to another one when it is removed."""
        if (inode := path.stat().st_ino) not in self._held:
            self._held[inode] = os.open(path, os.O_PATH)

    def close(self) -> None:
        for descriptor in self._held.values():
            os.close(descriptor)

    def sync(self, descriptor: int) -> None:
        with self._lock:
            self.note()
            self._hold(Path(f"/proc/self/fd/{descriptor}"))
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
    disk.close()
