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

from modeling.data.sources import FoundFile

_REST_NS = 2 * 10**9


class DigestMemo:
    """Digests by location and stamp, shared by the processes of a machine."""

    def __init__(self, path: Path) -> None:
        """Keeps them in a database at `path`, which is made when something is to be kept."""
        self._path = path

    def find(self, file: FoundFile) -> tuple[int, str] | None:
        """Returns size and SHA-256 of a file that is as it was when they were computed."""
        if not self._path.exists() or (stamp := file.stamp()) is None:
            return None
        with self._opened() as database:
            return database.execute(
                "SELECT size, sha256 FROM file WHERE location = ? AND stamp = ?",
                (file.location, stamp),
            ).fetchone()

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
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._opened() as database:
            database.execute(
                "INSERT OR REPLACE INTO file VALUES (?, ?, ?, ?)",
                (file.location, stamp_before, sha256, size),
            )

    @contextlib.contextmanager
    def _opened(self) -> Iterator[sqlite3.Connection]:
        with contextlib.closing(sqlite3.connect(self._path, timeout=60)) as database, database:
            database.execute(
                "CREATE TABLE IF NOT EXISTS file "
                "(location TEXT PRIMARY KEY, stamp TEXT, sha256 TEXT, size INTEGER)"
            )
            yield database


def _has_rested(file: FoundFile) -> bool:
    if "://" in file.location:
        return True
    found = Path(file.location).stat()
    return time.time_ns() - max(found.st_mtime_ns, found.st_ctime_ns) > _REST_NS
