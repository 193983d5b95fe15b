"""The checkpoints of one run: saved in the background, found again by step, never all removed.

    checkpoints/LOCK                  held by the one trainer that may write here
    checkpoints/step-000123.<random>  see `checkpoint`; those without a valid `COMMIT` do not count

The newest checkpoint is the one of the highest step that *verifies*, not the one that was written
last: clocks go backwards and writers die. A run that goes on reads it once, digesting what it
restores, and takes the one before if a file is damaged. If all of them are, it does not begin anew
unless it is told to. A checkpoint is removed only when enough
newer ones have been read back from disk, and never while it is pinned: see `pins`. Where the store
is remote, each is sent there as soon as it is verified here: see `remote`.
"""

import contextlib
import fcntl
import hashlib
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from modeling import faults
from modeling.artifacts import Progress, needing_space
from modeling.notes import make_directory, sync_directory
from modeling.training import checkpoint
from modeling.training.leaves import HostLeaf
from modeling.training.manifest import COMMIT, CheckpointError, DamagedCheckpointError, Manifest
from modeling.training.other_classes import Refusal, adopted
from modeling.training.pins import (
    REFUSED,
    attempt_name,
    is_pinned,
    mark,
    pinned,
    step_of,
    unpin,
)
from modeling.training.processes import Crew
from modeling.training.reading import inspect, read_manifest, verify
from modeling.training.remote import FETCHING, RemoteCheckpoints
from modeling.training.saving import PINNED_BY

_log = logging.getLogger(__name__)
Read = TypeVar("Read")
_RETIRED = "RETIRED"
"""What `COMMIT` is called while its checkpoint is being removed."""
_REFUSED = "refused"
"""What the first process of a crew says if it may neither go on nor begin anew."""


class Checkpoints:
    """The checkpoints in one directory, held by this process; see `open_checkpoints`."""

    def __init__(
        self,
        directory: Path,
        *,
        keep: int,
        executor: ThreadPoolExecutor,
        sender: ThreadPoolExecutor,
        crew: Crew | None,
        remote: RemoteCheckpoints | None,
        may_begin_anew: bool,
    ) -> None:
        self._directory = directory
        self._remote = remote
        self._may_begin_anew = may_begin_anew
        self._keep = keep
        self._crew = crew
        self._launch = _shared(crew, uuid.uuid4().hex)
        self._executor = executor
        self._manifests: dict[Path, Manifest] = {}
        self._verified: set[Path] = set()
        self._damaged: dict[Path, str] = {}
        """What is wrong with each."""
        self._fetched: set[str] = set()
        self._sender = sender
        self._pending: Future[None] | None = None
        self._sending: Future[None] | None = None

    def newest(self) -> Path | None:
        """Returns the verified checkpoint of the highest step; damaged ones are told aloud."""
        found = self.resume(verify)
        return found and found[0]

    def resume(self, read: Callable[[Path], Read]) -> tuple[Path, Read] | None:
        """Returns the checkpoint of the highest step that can be read, and what was read of it.

        Damaged ones are told aloud and passed over. Bytes are read once, by `read`. The first
        process of a crew says which to read; one that cannot makes all take the one before.

        Args:
            read: reads a checkpoint, and verifies all of it: `restore` does, and `verify`.

        Raises:
            CheckpointError: there are checkpoints, and none can be read.
        """
        while (path := self._most_promising()) is not None:
            found: list[Read] = []
            try:
                found.append(read(path))
            except (DamagedCheckpointError, OSError) as error:
                self._tell_damaged(path, error)
            if all(_each_says(self._crew, bool(found))):
                self._verified.add(path)
                return path, found[0]
            self._damaged.setdefault(path, f"{path} could not be read by all processes.")
        return None

    def _most_promising(self) -> Path | None:
        """Returns the newest that may be whole, here or, once it is here, elsewhere."""
        found = self._found_by_first() if self._is_first else None
        refusal = self._refusal() if self._is_first and found is None else ""
        name = _shared(self._crew, found.name if found else _REFUSED if refusal else "")
        if not name:
            return None
        if name == _REFUSED:
            raise CheckpointError(refusal or "No checkpoint can be read: the first process tells.")
        path = self._directory / name
        if not self._is_first:
            self._manifests[path] = read_manifest(path)
        return path

    def _refusal(self) -> str:
        """Returns why a run must not begin anew, none of its checkpoints being readable."""
        lost = sorted(self._damaged, key=_step_of, reverse=True)
        if not lost:
            return ""
        told = " ".join(self._damaged[path] for path in lost)
        places = " and ".join(map(str, self._places))
        what = (
            f"None of the {len(lost)} checkpoints of this run can be read, the newest of step "
            f"{_step_of(lost[0]):,}: {told}"
        )
        if self._may_begin_anew:
            _log.warning("%s ALL IS LOST, and training begins anew, as it was told.", what)
            return ""
        return (
            f"{what} Training does not begin anew by itself. Restore one of them from a copy in "
            f"{places}; or, to lose them, set trainer.begin_anew_if_damaged: true."
        )

    def _found_by_first(self) -> Path | None:
        here = {path.name for path in self._by_step()}
        there = set() if self._remote is None else set(self._remote.names())
        for name in sorted(here | there, key=lambda name: (step_of(name), name), reverse=True):
            path = self._directory / name
            if name in here and self._looks_whole(path):
                return path
            if name in there and self._comes(name):
                return path
        return None

    def _looks_whole(self, path: Path) -> bool:
        if path in self._verified or path in self._damaged:
            return path in self._verified
        if not (path / COMMIT).exists():
            _log.info("%s was never completed; it does not count.", path)
            return False
        try:
            self._manifests[path] = inspect(path)
        except (CheckpointError, OSError) as error:
            self._tell_damaged(path, error)
            return False
        return True

    def _tell_damaged(self, path: Path, error: Exception) -> None:
        _log.warning("DAMAGED CHECKPOINT: %s Falling back to an older one.", error)
        self._damaged[path] = str(error)

    def _comes(self, name: str) -> bool:
        assert self._remote is not None
        path = self._directory / name
        if name in self._fetched:
            return False  # a disk that spoils it again will do so for ever
        self._fetched.add(name)
        try:
            self._manifests[path] = self._remote.fetch(name, self._directory)
        except CheckpointError as error:
            self._tell_damaged(path, error)
            return False
        self._damaged.pop(path, None)
        _log.warning("%s was copied from %s.", name, self._remote.url)
        return True

    def adopt(self, others: Sequence[Progress], refusal: Refusal) -> bool:
        """Takes in the newest checkpoint that others have; says whether there was one."""
        found = self._is_first and adopted(self._directory, others, refusal) is not None
        return bool(_shared(self._crew, "yes" if found else ""))

    def manifest(self, path: Path) -> Manifest:
        """Returns the manifest of a checkpoint that was found, or saved."""
        return self._manifests[path]

    def clear(self) -> None:
        """Removes every checkpoint: they are of no use to this run.

        Those that were pinned by hand are moved beside, to a directory that ends with `REFUSED`.
        """
        if self._is_first:
            pins = {place: pinned(place) for place in self._places}
            kept = {s for by in pins.values() for s, why in by.items() if why != PINNED_BY}
            aside = self._directory.with_name(f"{self._directory.name}{REFUSED}")
            for path in self._by_step():
                if _step_of(path) in kept and (path / COMMIT).exists():
                    mark(aside, _step_of(path), "of a run that began anew")
                    path.rename(aside / path.name)
                else:
                    (path / COMMIT).unlink(missing_ok=True)
                    _remove_uncommitted(path)
            if self._remote is not None:
                self._remote.clear(kept)
            for place, by_step in pins.items():
                for step in by_step:
                    unpin(place, step)
        self._verified.clear()
        self._damaged.clear()
        self._manifests.clear()

    def save(
        self,
        leaves: Sequence[HostLeaf] | Callable[[], Sequence[HostLeaf]],
        *,
        step: int,
        cursor: Mapping[str, int],
        config: Mapping[str, Any],
        files: Mapping[str, Mapping[str, Any]],
        done: Callable[[Path], None],
        check: Callable[[Sequence[HostLeaf]], None] = lambda leaves: None,
        is_permanent: bool = False,
    ) -> None:
        """Writes, reads back and retires older ones, all in the background.

        Waits until the previous save is on disk first, and raises what it raised. To a remote store
        one is sent at a time, beside the next save; not before it is there may another one be sent.

        Args:
            leaves: a snapshot of the state, or what takes it, called in the writing thread.
            step: the number of updates made.
            cursor: where the data stream stands.
            config: the resolved experiment.
            files: further JSON files of the state, by name.
            done: called, from the writing thread, with the verified directory.
            check: called before, in the same thread; what it raises is raised instead of a save.
            is_permanent: pins it.
        """
        self.wait_for_disk()
        # New for each attempt, and known to every process without asking.
        attempt = hashlib.sha256(f"{self._launch} {step}".encode()).hexdigest()[:12]
        path = self._directory / attempt_name(step, attempt)
        writers = self._crew and checkpoint.Writers(self._crew.index, self._crew.count)

        def write() -> None:
            state = leaves() if callable(leaves) else leaves
            check(state)
            if is_permanent and self._is_first:
                for place in self._places:
                    mark(place, step, PINNED_BY)
            with needing_space(f"the checkpoint of step {step}", path), _removed_on_failure(path):
                written = checkpoint.write(
                    path, state, step=step, cursor=cursor, config=config, files=files,
                    writers=writers,
                )  # fmt: skip
            self._manifests[path] = verify(path, _held(state)) if self._is_first else written
            self._verified.add(path)
            if self._is_first:
                self._send(path, step)
                self._retire(step)
            done(path)

        self._pending = self._executor.submit(write)

    def _send(self, path: Path, step: int) -> None:
        """Begins to send a verified checkpoint; it stays here as long, for it is the newest."""
        remote = self._remote
        if remote is None:
            return

        def send() -> None:
            remote.send(path)
            remote.retire(self._keep, step, is_pinned=self._is_pinned)

        if self._sending is not None:
            self._sending.result()
        self._sending = self._sender.submit(send)

    def wait_for_disk(self) -> None:
        """Waits until the last save is on disk and verified; raises what went wrong with it."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def wait(self) -> None:
        """Waits until the last save is wherever it has to be; raises what went wrong with it."""
        self.wait_for_disk()
        sending, self._sending = self._sending, None
        if sending is not None:
            sending.result()

    def raise_failure(self) -> None:
        """Raises what went wrong with the last save, if that is known; waits for nothing."""
        if self._pending is not None and self._pending.done():
            self.wait_for_disk()
        sending = self._sending
        if sending is not None and sending.done():
            sending.result()

    @property
    def is_writing(self) -> bool:
        """Whether a save is under way."""
        return self._pending is not None and not self._pending.done()

    @property
    def _is_first(self) -> bool:
        return self._crew is None or self._crew.is_first

    @property
    def _places(self) -> list[Path | str]:
        return [self._directory, *([] if self._remote is None else [self._remote.url])]

    def _is_pinned(self, step: int) -> bool:
        """Whether a step is to stay: who pins it here or in the store means both."""
        return any(is_pinned(place, step) for place in self._places)

    def _by_step(self) -> list[Path]:
        """All attempts, complete or not, highest step first."""
        found = [p for p in self._directory.iterdir() if _is_attempt(p)]
        return sorted(found, key=lambda p: (_step_of(p), p.name), reverse=True)

    def _verifies(self, path: Path) -> bool:
        """Whether every byte of it has been read back."""
        if path not in self._verified and self._looks_whole(path):
            try:
                self._manifests[path] = verify(path)
                self._verified.add(path)
            except (CheckpointError, OSError) as error:
                self._tell_damaged(path, error)
        return path in self._verified and (path / COMMIT).exists()

    def _retire(self, step: int) -> None:
        """Removes what is older than the newest `keep` verified ones, and attempts that died."""
        kept = 0
        for path in self._by_step():
            if (path / _RETIRED).exists() and self._is_pinned(_step_of(path)):
                _give_back(path)  # the process was killed that should have done so
            if kept < self._keep:
                if self._verifies(path):
                    kept += 1
                # What is beyond this step is being written by the rest of the crew.
                elif not (path / COMMIT).exists() and _step_of(path) <= step:
                    _remove_uncommitted(path)
            elif not self._is_pinned(_step_of(path)):
                _remove(path, step)
                self._verified.discard(path)
                self._manifests.pop(path, None)


@contextlib.contextmanager
def open_checkpoints(
    directory: Path,
    *,
    keep: int,
    crew: Crew | None = None,
    remote: str | None = None,
    may_begin_anew: bool = False,
) -> Iterator[Checkpoints]:
    """Holds `directory` for this process; leaving waits for the last save.

    The lock of a crew is its first process's.

    Args:
        directory: of the run's checkpoints.
        keep: how many of the newest verified ones stay.
        crew: the processes that save together; this one alone by default.
        remote: the URL that every checkpoint is sent to as well, and taken from where it is newer.
        may_begin_anew: whether a run whose checkpoints are all damaged may begin at step 0.

    Raises:
        CheckpointError: another trainer holds it.
    """
    if keep < 2:
        raise ValueError(
            f"keep: {keep} checkpoints would leave none to fall back to; keep at least 2."
        )
    make_directory(directory)
    with contextlib.ExitStack() as stack:
        if crew is None or crew.is_first:
            stack.enter_context(_locked(directory))
            for leftover in directory.glob(f"{FETCHING}*"):
                shutil.rmtree(leftover)
        sender = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="sending"))
        executor = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="checkpoint"))
        there = None if remote is None else RemoteCheckpoints(remote)
        checkpoints = Checkpoints(
            directory, keep=keep, executor=executor, sender=sender, crew=crew, remote=there,
            may_begin_anew=may_begin_anew,
        )  # fmt: skip
        yield checkpoints
        checkpoints.wait()


@contextlib.contextmanager
def _removed_on_failure(attempt: Path) -> Iterator[None]:
    """Gives a full disk back what a failed attempt took, once no one can be writing there."""
    try:
        yield
    except OSError:
        if not (attempt / COMMIT).exists():
            shutil.rmtree(attempt, ignore_errors=True)
        raise


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
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
        yield


def _held(leaves: Sequence[HostLeaf]) -> dict[tuple[str, tuple[int, ...]], np.ndarray]:
    return {(leaf.path, start): chunk for leaf in leaves for start, chunk in leaf.chunks.items()}


def _each_says(crew: Crew | None, yes: bool) -> list[bool]:
    return [yes] if crew is None else crew.each_says(yes)


def _shared(crew: Crew | None, text: str) -> str:
    return text if crew is None else crew.said_by_first(text)


def _step_of(path: Path) -> int:
    step = step_of(path.name)
    assert step is not None
    return step


def _is_attempt(path: Path) -> bool:
    """Whether a path is the directory of a checkpoint, complete or not."""
    if step_of(path.name) is None or not path.is_dir():
        return False
    if path.is_symlink():
        _log.warning(
            "%s is a symbolic link and does not count: what it leads to may change or go unseen. "
            "Put a copy of it in its place.", path,
        )  # fmt: skip
        return False
    return True


def _remove(path: Path, step: int) -> None:
    """Removes a checkpoint unless it is pinned, by this very moment."""
    # Without its commit a half-removed checkpoint does not count.
    commit = path / COMMIT
    if commit.exists():
        commit.rename(path / _RETIRED)
        if is_pinned(path.parent, _step_of(path)):
            _give_back(path)
            return
    faults.reach("during-retention", step)
    _remove_uncommitted(path)


def _give_back(path: Path) -> None:
    """Makes a checkpoint count again that was to be removed."""
    (path / _RETIRED).rename(path / COMMIT)
    sync_directory(path)


def _remove_uncommitted(path: Path) -> None:
    """Removes an attempt that does not count, and would not if the power went meanwhile."""
    sync_directory(path)
    shutil.rmtree(path)
