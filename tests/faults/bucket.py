"""`bucket:///directory`: an object store on local disk, for several processes, that may list late.

As in an object store, a file is there whole or not at all, directories do not exist, nothing can be
renamed, and what was written is read back at once. Listings may be stale: while `Bucket.late` is
set, they miss what was written since, and still have what was removed.
"""

import datetime
import errno
import os
import shutil
import uuid
from pathlib import Path
from typing import Any, ClassVar

import fsspec
from fsspec import AbstractFileSystem


class Bucket(AbstractFileSystem):
    """Paths are those of the directory that it is kept in."""

    protocol = "bucket"
    late: ClassVar[bool] = False
    _seen: ClassVar[set[str]] = set()

    @classmethod
    def list_late(cls, root: str) -> None:
        """Freezes listings as they are."""
        cls.late = False
        cls._seen = set(cls().find(root))
        cls.late = True

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        found = Path(self._strip_protocol(path))
        if found.is_file():
            return {"name": str(found), "size": found.stat().st_size, "type": "file"}
        if self._listed(found):
            return {"name": str(found), "size": 0, "type": "directory"}
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)

    def _listed(self, directory: Path) -> set[str]:
        """Returns all that is listed below, as it is or was."""
        if self.late:
            return {path for path in self._seen if path.startswith(f"{directory}/")}
        return {str(path) for path in directory.rglob("*") if path.is_file()}

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:
        directory = Path(self._strip_protocol(path))
        found: dict[str, dict[str, Any]] = {}
        for name in sorted(self._listed(directory)):
            parts = Path(name).relative_to(directory).parts
            child = str(directory / parts[0])
            kind = "file" if len(parts) == 1 else "directory"
            size = Path(name).stat().st_size if kind == "file" and Path(name).exists() else 0
            found[child] = {"name": child, "size": size, "type": kind}
        if not found and directory.is_file():
            found[str(directory)] = self.info(path)
        if not found:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        return list(found.values()) if detail else list(found)

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        if mode != "rb":
            raise NotImplementedError("objects are put whole")
        return Path(path).open("rb")

    def cat_file(
        self, path: str, start: int | None = None, end: int | None = None, **_: Any
    ) -> Any:
        return Path(self._strip_protocol(path)).read_bytes()[start:end]

    def pipe_file(self, path: str, value: Any, mode: str = "overwrite", **kwargs: Any) -> None:
        target = Path(self._strip_protocol(path))
        target.parent.mkdir(parents=True, exist_ok=True)
        attempt = target.with_name(f".{uuid.uuid4().hex}")
        attempt.write_bytes(value)
        try:
            if mode == "create":
                target.hardlink_to(attempt)
            else:
                shutil.copyfile(attempt, f"{attempt}.whole")
                Path(f"{attempt}.whole").replace(target)
        finally:
            attempt.unlink()

    def put_file(self, lpath: str, rpath: str, **kwargs: Any) -> None:
        self.pipe_file(rpath, Path(lpath).read_bytes())

    def get_file(self, rpath: str, lpath: str, **kwargs: Any) -> None:
        Path(lpath).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self._strip_protocol(rpath), lpath)

    def rm_file(self, path: str) -> None:
        Path(self._strip_protocol(path)).unlink()

    def modified(self, path: str) -> datetime.datetime:
        return datetime.datetime.fromtimestamp(
            Path(self._strip_protocol(path)).stat().st_mtime, datetime.UTC
        )

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Does nothing: there are no directories."""


def register() -> None:
    """Makes `bucket://` known to fsspec."""
    fsspec.register_implementation(Bucket.protocol, Bucket, clobber=True)
