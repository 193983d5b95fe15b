"""The checkpoints of one run: saved in the background, found again by step, never all removed.

    checkpoints/LOCK                  held by the one trainer that may write here
    checkpoints/step-000123.<random>  see `checkpoint`; those without a valid `COMMIT` do not count

The newest checkpoint is the one of the highest step that *verifies*, not the one that was written
last: clocks go backwards and writers die. A checkpoint is removed only when enough newer ones have
been read back from disk.
"""

import contextlib
import fcntl
import logging
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from modeling.training import checkpoint
from modeling.training.manifest import CheckpointError, Manifest

_NAME = re.compile(r"step-(\d{6,})\.[0-9a-f]{12}")
_log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints in one directory, held by this process; see `open_checkpoints`."""

    def __init__(self, directory: Path, *, keep: int, executor: ThreadPoolExecutor) -> None:
        self._directory = directory
        self._keep = keep
        self._executor = executor
        self._verified: dict[Path, Manifest] = {}
        self._damaged: set[Path] = set()
        self._pending: Future[None] | None = None

    def newest(self) -> Path | None:
        """Returns the verified checkpoint of the highest step; damaged ones are told aloud."""
        for path in self._by_step():
            if self._verifies(path):
                return path
        return None

    def manifest(self, path: Path) -> Manifest:
        """Returns the manifest of a verified checkpoint."""
        return self._verified[path]

    def clear(self) -> None:
        """Removes every checkpoint: they are of no use to this run."""
        for path in self._by_step():
            _remove(path)
        self._verified.clear()

    def save(
        self,
        leaves: Sequence[checkpoint.HostLeaf],
        *,
        step: int,
        cursor: Mapping[str, int],
        config: Mapping[str, Any],
        files: Mapping[str, Mapping[str, Any]],
        done: Callable[[Path], None],
    ) -> None:
        """Writes, reads back and retires older ones, all in the background.

        Waits for the previous save first, and raises what it raised.

        Args:
            leaves: a snapshot of the state.
            step: the number of updates made.
            cursor: where the data stream stands.
            config: the resolved experiment.
            files: further JSON files of the state, by name.
            done: called, from the writing thread, with the verified directory.
        """
        self.wait()
        path = self._directory / f"step-{step:06d}.{uuid.uuid4().hex[:12]}"

        def write() -> None:
            checkpoint.write(path, leaves, step=step, cursor=cursor, config=config, files=files)
            self._verified[path] = checkpoint.verify(path)
            self._retire()
            done(path)

        self._pending = self._executor.submit(write)

    def wait(self) -> None:
        """Waits until the last save is on disk and verified; raises what went wrong with it."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _by_step(self) -> list[Path]:
        """All attempts, complete or not, highest step first."""
        found = [p for p in self._directory.iterdir() if p.is_dir() and _NAME.fullmatch(p.name)]
        return sorted(found, key=lambda p: (_step_of(p), p.name), reverse=True)

    def _verifies(self, path: Path) -> bool:
        if path in self._verified or path in self._damaged:
            return path in self._verified
        if not (path / checkpoint.COMMIT).exists():
            _log.info("%s was never completed; it does not count.", path)
            return False
        try:
            self._verified[path] = checkpoint.verify(path)
        except (CheckpointError, OSError) as error:
            _log.warning("DAMAGED CHECKPOINT: %s Falling back to an older one.", error)
            self._damaged.add(path)
            return False
        return True

    def _retire(self) -> None:
        """Removes what is older than the newest `keep` verified ones, and attempts that died."""
        kept = 0
        for path in self._by_step():
            if kept < self._keep:
                if self._verifies(path):
                    kept += 1
                elif not (path / checkpoint.COMMIT).exists():
                    shutil.rmtree(path)
            else:
                _remove(path)
                self._verified.pop(path, None)


@contextlib.contextmanager
def open_checkpoints(directory: Path, *, keep: int) -> Iterator[Checkpoints]:
    """Holds `directory` for this process; leaving waits for the last save.

    Raises:
        CheckpointError: another trainer holds it.
    """
    if keep < 2:
        raise ValueError(
            f"keep: {keep} checkpoints would leave none to fall back to; keep at least 2."
        )
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "LOCK").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise CheckpointError(
                f"{directory} is in use by another trainer (process {lock.read().strip() or '?'}). "
                "Wait for it or end it; two trainers must not write one run."
            ) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        with ThreadPoolExecutor(1, thread_name_prefix="checkpoint") as executor:
            checkpoints = Checkpoints(directory, keep=keep, executor=executor)
            yield checkpoints
            checkpoints.wait()


def _step_of(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1])


def _remove(path: Path) -> None:
    # Without its commit a half-removed checkpoint does not count.
    (path / checkpoint.COMMIT).unlink(missing_ok=True)
    shutil.rmtree(path)
