"""Remembers the SHA-256 of files that have not changed, so that looking again costs no reading.

    digests.sqlite    file(location, stamp, sha256, size), one row a file

A *stamp* (`FoundFile.stamp`) holds size, times and inode of a local file, the generation of an
object in Cloud Storage; it is asked for before and after reading, and must be the same. It is never
part of an identity: a digest that is remembered is one that was once computed of that very file.

The clock of a file system ticks in steps, so that a file could be written again with its stamp
unchanged; a local file is therefore remembered only once it has rested for two seconds.
"""

import contextlib
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

from modeling.data.sources import FoundFile, StorageError

_REST_NS = 2 * 10**9
_WRITTEN_EVERY_S = 1.0


class DigestMemo:
    """Digests by location and stamp, shared by the processes of a machine."""

    def __init__(self, path: Path) -> None:
        """Keeps them in a database at `path`, which is made when something is to be kept."""
        self._path = path

    @contextlib.contextmanager
    def session(self) -> Iterator["DigestSession"]:
        """Yields the memo with one connection to it, and keeps at last what it was told."""
        with contextlib.ExitStack() as stack:
            session = DigestSession(self._path, stack)
            try:
                yield session
            finally:
                session.write()


class DigestSession:
    """The memo while many files are looked at.

    What is new is written about once a second, so that other processes never wait for long, and a
    crash loses a second's digests.
    """

    def __init__(self, path: Path, stack: contextlib.ExitStack) -> None:
        """Connects to the database at `path` once there is one, until `stack` is closed."""
        self._path = path
        self._stack = stack
        self._database: sqlite3.Connection | None = None
        self._new: list[tuple[str, str, str, int]] = []
        self._written = time.monotonic()

    def find(self, file: FoundFile) -> tuple[int, str] | None:
        """Returns size and SHA-256 of a file that is as it was when they were computed."""
        if self._database is None and not self._path.exists():
            return None
        if (stamp := file.stamp()) is None:
            return None
        with self._told():
            return (
                self._connected()
                .execute(
                    "SELECT size, sha256 FROM file WHERE location = ? AND stamp = ?",
                    (file.location, stamp),
                )
                .fetchone()
            )

    def keep(self, file: FoundFile, stamp_before: str | None, size: int, sha256: str) -> None:
        """Remembers what was read of a file, unless it may have changed meanwhile.

        Args:
            file: it.
            stamp_before: its stamp before it was opened.
            size: bytes that were read.
            sha256: of these.
        """
        if stamp_before is None or file.stamp() != stamp_before or not _has_rested(file):
            return
        self._new.append((file.location, stamp_before, sha256, size))
        if time.monotonic() - self._written >= _WRITTEN_EVERY_S:
            self.write()

    def write(self) -> None:
        """Writes what is new."""
        if self._new:
            with self._told(), self._connected() as database:
                database.executemany("INSERT OR REPLACE INTO file VALUES (?, ?, ?, ?)", self._new)
        self._new.clear()
        self._written = time.monotonic()

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Raises what is wrong with the database by its name."""
        try:
            yield
        except sqlite3.DatabaseError as error:
            raise StorageError(
                f"{self._path}: the memory of digests cannot be used: {error}. If it is damaged, "
                f"delete it: files are then digested anew."
            ) from error

    def _connected(self) -> sqlite3.Connection:
        if self._database is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            opened = sqlite3.connect(self._path, timeout=60)
            self._database = self._stack.enter_context(contextlib.closing(opened))
            with self._database as database:
                database.execute(
                    "CREATE TABLE IF NOT EXISTS file "
                    "(location TEXT PRIMARY KEY, stamp TEXT, sha256 TEXT, size INTEGER)"
                )
        return self._database


def _has_rested(file: FoundFile) -> bool:
    if "://" in file.location:
        return True
    found = Path(file.location).stat()
    return time.time_ns() - max(found.st_mtime_ns, found.st_ctime_ns) > _REST_NS
