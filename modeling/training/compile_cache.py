"""Compiled programs kept between processes, so that a resumed run starts in seconds.

    <directory>/<key>-cache.<sha256>      one program as JAX's persistent cache stores it
    <directory>/process-<random>/         what one process reads and writes; links to the above

JAX writes an entry in place and never looks at it again: an entry torn by a kill would stay, and a
flipped bit would be run. So each process gets a directory of its own, into which only entries that
still have their digest are linked, and what it compiles is published under its digest by a rename.

The directory must belong to one numerics class: JAX's key knows the program, the flags and the
library, but a program compiled for one processor may round otherwise on another, or crash there.
"""

import contextlib
import hashlib
import logging
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from modeling.inventory import file_sha256

_log = logging.getLogger(__name__)
_SUFFIX = "-cache"
_ABANDONED_S = 24 * 3600.0
MAX_BYTES = 2**31
"""Programs beyond this are removed, the oldest first."""


class CompileCache:
    """The programs of one numerics class, in use by this process; see `open_compile_cache`."""

    def __init__(self, directory: Path, own: Path) -> None:
        self._directory = directory
        self._own = own
        self._known: set[str] = set()

    def publish(self) -> None:
        """Makes what was compiled so far available to later processes."""
        for path in sorted(self._own.glob(f"*{_SUFFIX}")):
            if path.name not in self._known:
                # No rename: JAX may want to read it again.
                attempt = self._directory / f".{uuid.uuid4().hex}"
                attempt.write_bytes(content := path.read_bytes())
                digest = hashlib.sha256(content).hexdigest()
                attempt.replace(self._directory / f"{path.name}.{digest}")
                self._known.add(path.name)

    def _link(self) -> None:
        for path in _entries(self._directory):
            name, _, digest = path.name.rpartition(".")
            try:
                if file_sha256(path) != digest:
                    _log.warning("%s is damaged; it is removed and compiled again.", path)
                    path.unlink()
                elif name not in self._known:
                    os.link(path, self._own / name)
                    self._known.add(name)
            except FileNotFoundError:  # Another process has just removed it.
                continue


@contextlib.contextmanager
def open_compile_cache(directory: Path, *, max_bytes: int = MAX_BYTES) -> Iterator[CompileCache]:
    """Lets JAX find compiled programs in `directory`, and puts those that it compiles there."""
    own = directory / f"process-{uuid.uuid4().hex[:12]}"
    own.mkdir(parents=True)
    _remove_abandoned(directory)
    cache = CompileCache(directory, own)
    cache._link()
    options = {
        "jax_compilation_cache_dir": str(own),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
        # Autotuning is off where bits matter, and its cache would carry the directory's name.
        "jax_persistent_cache_enable_xla_caches": "none",
    }
    before = {name: getattr(jax.config, name) for name in options}
    _configure(options)
    try:
        yield cache
    finally:
        cache.publish()
        _retire(directory, max_bytes)
        _configure(before)
        shutil.rmtree(own)


def _configure(options: dict[str, object]) -> None:
    for name, value in options.items():
        jax.config.update(name, value)
    reset_cache()  # It has the old directory open.


def _entries(directory: Path) -> list[Path]:
    return sorted(path for path in directory.glob(f"*{_SUFFIX}.*") if path.is_file())


def _retire(directory: Path, max_bytes: int) -> None:
    found = [(path.stat().st_mtime, path.stat().st_size, path) for path in _entries(directory)]
    excess = sum(size for _, size, _ in found) - max_bytes
    for _, size, path in sorted(found):
        if excess <= 0:
            break
        path.unlink(missing_ok=True)
        excess -= size


def _remove_abandoned(directory: Path) -> None:
    """Removes what processes that were killed have left."""
    for path in directory.iterdir():
        is_left = path.name.startswith(("process-", ".")) and (
            time.time() - path.stat().st_mtime > _ABANDONED_S
        )
        if is_left and path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif is_left:
            path.unlink(missing_ok=True)
