"""A machine that fails: a disk that is full, a user who may not write.

Nothing here needs a privilege: what a machine permits is used, else the nearest that any permits.
"""

import contextlib
import ctypes
import os
import resource
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

NOBODY = 65534
Fill = Callable[[], contextlib.AbstractContextManager[None]]


@contextlib.contextmanager
def small_disk(tmp_path: Path, num_bytes: int) -> Iterator[tuple[Path, Fill]]:
    """Yields a directory on a disk of this size, and what fills the disk while it is entered.

    The disk is a tmpfs where mounting is permitted, so that writes fail with ENOSPC. Elsewhere no
    file of this process may be longer than a few bytes while it is full: they fail with EFBIG.
    """
    directory = tmp_path / "disk"
    directory.mkdir()
    libc = ctypes.CDLL(None, use_errno=True)
    options = f"size={num_bytes}".encode()
    is_mounted = libc.mount(b"tmpfs", os.fsencode(directory), b"tmpfs", 0, options) == 0
    try:
        yield directory, (lambda: _filled(directory)) if is_mounted else _no_long_files
    finally:
        if is_mounted and libc.umount2(os.fsencode(directory), 2):  # MNT_DETACH
            raise OSError(ctypes.get_errno(), f"cannot unmount {directory}")


@contextlib.contextmanager
def _filled(directory: Path) -> Iterator[None]:
    ballast = directory / "ballast"
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"\0" * 4096)
    try:
        yield
    finally:
        ballast.unlink()


@contextlib.contextmanager
def _no_long_files() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def as_nobody() -> Iterator[Path]:
    """Yields a directory of a user whom permissions bind, and is that user meanwhile."""
    with _as(NOBODY):
        candidates = [Path(tempfile.gettempdir()), Path("/var/tmp"), Path("/dev/shm")]
        usable = next(path for path in candidates if os.access(path, os.W_OK | os.X_OK,
                                                               effective_ids=True))  # fmt: skip
        directory = Path(tempfile.mkdtemp(dir=usable))
        try:
            yield directory
        finally:
            for path in [directory, *directory.rglob("*")]:
                path.chmod(0o755)
            shutil.rmtree(directory)


@contextlib.contextmanager
def _as(user: int) -> Iterator[None]:
    """Is this user, in all threads, if this is root, whom no permission binds."""
    if os.geteuid():
        yield
        return
    os.seteuid(user)
    try:
        yield
    finally:
        os.seteuid(0)
