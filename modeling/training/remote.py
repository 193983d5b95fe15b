"""A run's checkpoints on an object store, for a training on another machine to go on from.

    <store>/work/<recipe>/<numerics>/progress/checkpoints/<class>/
        step-000123.<random>/    as of `checkpoint`
        pins/                    as of `pins`

A checkpoint is written to a local directory, verified there, and then sent: every file, each read
back and compared, and `COMMIT` last, so that whoever sees a commit sees a whole checkpoint. It is
taken back the same way: copied, verified to the last byte, and only then given its name. Any file
system of fsspec's will do; none need rename, nor list at once what was written or removed: a
listing only says where to look, and what is there is read.
"""

import contextlib
import datetime
import hashlib
import logging
import shutil
import uuid
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import fsspec

from modeling import faults
from modeling.inventory import file_sha256
from modeling.notes import sync_directory, sync_tree
from modeling.training.manifest import (
    COMMIT,
    CRC_BYTES,
    MANIFEST,
    CheckpointError,
    DamagedCheckpointError,
    FileRecord,
    Manifest,
)
from modeling.training.pins import REFUSED, mark, pinned, step_of
from modeling.training.reading import parse_manifest, read_manifest, verify

_log = logging.getLogger(__name__)
FETCHING = "fetching-"
"""Begins the name of a local directory whose files are still coming."""
_PIECE_BYTES = 1 << 22


class RemoteCheckpoints:
    """The checkpoints of one run under one URL."""

    def __init__(self, url: str) -> None:
        """Opens `url`, which need not exist yet."""
        self.url = url.rstrip("/")
        # Listings that are kept show others' work as it was.
        filesystem, root = fsspec.url_to_fs(self.url, use_listings_cache=False)
        self._filesystem: Any = filesystem
        self._root = str(root).rstrip("/")
        self._verified: set[str] = set()
        self._damaged: set[str] = set()

    @property
    def place(self) -> tuple[Any, str]:
        """File system of fsspec's, and path."""
        return self._filesystem, self._root

    def names(self) -> list[str]:
        """Returns the attempts that are complete, highest step first."""
        return [name for name, _ in self.attempts() if self._is_committed(name)]

    def _is_committed(self, name: str) -> bool:
        return self._filesystem.exists(f"{self._root}/{name}/{COMMIT}")

    def send(self, directory: Path) -> None:
        """Copies a verified local checkpoint; returns once it counts there, too.

        Raises:
            CheckpointError: a file arrived as another; it is named, and the checkpoint does not
                count.
        """
        step = _step(directory.name)
        for name in sorted({*read_manifest(directory).paths} - {COMMIT}):
            self._send_file(directory, name)
            faults.reach("during-send", step)
        self._send_file(directory, COMMIT)
        self._verified.add(directory.name)

    def _send_file(self, directory: Path, name: str) -> None:
        target = f"{self._root}/{directory.name}/{name}"
        self._filesystem.makedirs(target.rpartition("/")[0], exist_ok=True)
        self._filesystem.put_file(str(directory / name), target)
        if self._sha256(target) != file_sha256(directory / name):
            self._filesystem.rm_file(target)
            raise CheckpointError(
                f"{self.url}/{directory.name}/{name} arrived with other bytes than were sent."
            )

    def _sha256(self, path: str) -> str:
        return self._digested(path, 0)[0]

    def _digested(self, path: str, tail: int) -> tuple[str, int, str]:
        """Returns SHA-256 of all but the last `tail` bytes, the size, and those bytes in hex."""
        digest, size, held = hashlib.sha256(), 0, b""
        with self._filesystem.open(path, "rb") as stream:
            while piece := stream.read(_PIECE_BYTES):
                size += len(piece)
                held += piece
                end = max(len(held) - tail, 0)
                digest.update(held[:end])
                held = held[end:]
        return digest.hexdigest(), size, held.hex()

    def fetch(self, name: str, directory: Path) -> Manifest:
        """Copies a checkpoint into `directory`, where it counts once all of it is verified.

        Only then does it take the place of what has its name there. Returns its manifest.

        Raises:
            CheckpointError: naming the file that is missing or damaged.
        """
        attempt, source = directory / f"{FETCHING}{uuid.uuid4().hex[:12]}", f"{self._root}/{name}"
        try:
            manifest = self.manifest(name)
            for path in manifest.paths:
                (attempt / path).parent.mkdir(parents=True, exist_ok=True)
                try:
                    self._filesystem.get_file(f"{source}/{path}", str(attempt / path))
                except FileNotFoundError as error:
                    raise CheckpointError(f"{attempt / path} is missing.") from error
            manifest = verify(attempt)
        except CheckpointError as error:
            shutil.rmtree(attempt, ignore_errors=True)
            found = str(error).replace(str(attempt), f"{self.url}/{name}")
            raise CheckpointError(found) from error
        sync_tree(attempt)
        if (directory / name).exists():
            spoiled = directory / f"{FETCHING}{uuid.uuid4().hex[:12]}"
            (directory / name).rename(spoiled)
            attempt.replace(directory / name)
            shutil.rmtree(spoiled)
        else:
            attempt.replace(directory / name)
        sync_directory(directory)
        self._verified.add(name)
        return manifest

    def manifest(self, name: str) -> Manifest:
        """Returns the manifest of a checkpoint, read from the store.

        Raises:
            CheckpointError: as of `parse_manifest`, or for want of a file.
        """
        source = f"{self._root}/{name}"
        try:
            promised = self._filesystem.cat_file(f"{source}/{COMMIT}")
            raw = self._filesystem.cat_file(f"{source}/{MANIFEST}")
        except FileNotFoundError as error:
            lost = [file for file in (COMMIT, MANIFEST)
                    if not self._filesystem.exists(f"{source}/{file}")]  # fmt: skip
            raise DamagedCheckpointError(
                f"{self.url}/{name}/{' and '.join(lost)} is missing."
            ) from error
        return parse_manifest(raw, promised, f"{self.url}/{name}")

    def verify(self, name: str) -> Manifest:
        """Reads every byte of a checkpoint where it is, and returns its manifest.

        Raises:
            CheckpointError: naming the file that is missing or damaged.
        """
        manifest = self.manifest(name)
        for record in manifest.whole_files:
            self._require_as_written(name, record, "")
        for chunk in manifest.chunks:
            self._require_as_written(name, chunk.file, chunk.crc32c)
        return manifest

    def _require_as_written(self, name: str, record: FileRecord, crc32c: str) -> None:
        path = f"{self._root}/{name}/{record.path}"
        try:
            found = self._digested(path, CRC_BYTES if crc32c else 0)
        except FileNotFoundError as error:
            raise DamagedCheckpointError(f"{self.url}/{name}/{record.path} is missing.") from error
        if found != (record.sha256, record.size, crc32c):
            raise DamagedCheckpointError(
                f"{self.url}/{name}/{record.path} holds other bytes than were written."
            )

    def _verifies(self, name: str) -> bool:
        """Whether every byte of it has been read back from the store, and it is still there."""
        if name not in self._verified | self._damaged:
            try:
                self.verify(name)
                self._verified.add(name)
            except CheckpointError as error:
                self._damaged.add(name)
                _log.warning("DAMAGED CHECKPOINT: %s It does not count as kept.", error)
        return name in self._verified and self._is_committed(name)

    def retire(self, keep: int, step: int, *, is_pinned: Callable[[int], bool]) -> None:
        """Removes what is older than the newest `keep` verified ones, and attempts that died.

        Args:
            keep: how many.
            step: the newest that was sent; what is beyond it may still be coming from elsewhere.
            is_pinned: whether a step is to stay.
        """
        attempts, kept = self.attempts(), 0
        # Nothing is read back if nothing would be removed.
        needs_room = len(attempts) > keep
        for name, files in attempts:
            if kept < keep:
                if self._is_committed(name):
                    kept += not needs_room or self._verifies(name)
                elif _step(name) <= step:
                    self._remove(name, files)
            elif _step(name) <= step and not (self._is_committed(name) and is_pinned(_step(name))):
                self._remove(name, files, is_pinned=is_pinned)

    def clear(self, kept: Collection[int] = ()) -> None:
        """Removes every checkpoint, but moves those of some steps aside, where they count no more.

        Args:
            kept: the steps.
        """
        for name, files in self.attempts():
            if _step(name) in kept and self._is_committed(name):
                mark(f"{self.url}{REFUSED}", _step(name), "of a run that began anew")
                for file in (*sorted(set(files) - {COMMIT}), COMMIT):
                    target = f"{self._root}{REFUSED}/{name}/{file}"
                    self._filesystem.makedirs(target.rpartition("/")[0], exist_ok=True)
                    content = self._filesystem.cat_file(f"{self._root}/{name}/{file}")
                    self._filesystem.pipe_file(target, content)
            self._remove(name, files)
        self._verified.clear()

    def _remove(
        self,
        name: str,
        files: Iterable[str],
        *,
        is_pinned: Callable[[int], bool] = lambda step: False,
    ) -> None:
        commit = f"{self._root}/{name}/{COMMIT}"
        # Without its commit a half-removed checkpoint does not count.
        with contextlib.suppress(FileNotFoundError):
            content = self._filesystem.cat_file(commit)
            self._filesystem.rm_file(commit)
            if is_pinned(_step(name)):
                self._filesystem.pipe_file(commit, content)  # pinned in this very moment
                return
        self._verified.discard(name)
        for file in sorted(set(files) - {COMMIT}):
            with contextlib.suppress(FileNotFoundError):  # listed still, but gone
                self._filesystem.rm_file(f"{self._root}/{name}/{file}")

    def pinned(self) -> dict[int, str]:
        """Returns why each pinned step is."""
        return pinned(self.url)

    def changed(self, name: str, file: str) -> datetime.datetime:
        """Returns when a file of an attempt was written."""
        return self._filesystem.modified(f"{self._root}/{name}/{file}")

    def is_whole(self, name: str, sizes: Mapping[str, int]) -> bool:
        """Whether a committed attempt has all of its files, by their sizes."""
        try:
            manifest = self.manifest(name)
        except CheckpointError:
            return False
        records = (*manifest.whole_files, *(chunk.file for chunk in manifest.chunks))
        return all(sizes.get(record.path) == record.size for record in records)

    def attempts(self) -> list[tuple[str, dict[str, int]]]:
        """Returns all attempts, complete or not, with sizes of files, highest step first."""
        self._filesystem.invalidate_cache()  # others write, too
        found: dict[str, dict[str, int]] = {}
        for path, told in self._filesystem.find(self._root, detail=True).items():
            name, _, file = str(path).removeprefix(self._root).lstrip("/").partition("/")
            if file and step_of(name) is not None:
                found.setdefault(name, {})[file] = int(told["size"])
        return sorted(found.items(), key=lambda item: (_step(item[0]), item[0]), reverse=True)


def _step(name: str) -> int:
    step = step_of(name)
    assert step is not None
    return step
