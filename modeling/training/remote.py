"""A run's checkpoints on an object store, for a training on another machine to go on from.

    <store>/work/<recipe>/<numerics>/progress/checkpoints/<class>/
        step-000123.<random>/    as of `checkpoint`
        pins/                    as of `pins`

A checkpoint is written to a local directory, verified there, and then sent: every file, each read
back and compared, and `COMMIT` last, so that whoever sees a commit sees a whole checkpoint. It is
taken back the same way: copied, verified to the last byte, and only then given its name. Any file
system of fsspec's will do; none need rename, nor list at once what was written.
"""

import hashlib
import shutil
import uuid
from pathlib import Path
from typing import Any

import fsspec

from modeling import faults
from modeling.inventory import file_sha256
from modeling.notes import sync_directory, sync_tree
from modeling.training.manifest import COMMIT, CheckpointError, Manifest
from modeling.training.pins import is_pinned, step_of
from modeling.training.reading import verify

FETCHING = "fetching-"
"""Begins the name of a local directory whose files are still coming."""
_PIECE_BYTES = 1 << 22


class RemoteCheckpoints:
    """The checkpoints of one run under one URL."""

    def __init__(self, url: str) -> None:
        """Opens `url`, which need not exist yet."""
        self.url = url.rstrip("/")
        filesystem, root = fsspec.url_to_fs(self.url)
        self._filesystem: Any = filesystem
        self._root = str(root).rstrip("/")

    def names(self) -> list[str]:
        """Returns the attempts that are complete, highest step first."""
        return [name for name, files in self._attempts() if COMMIT in files]

    def send(self, directory: Path) -> None:
        """Copies a verified local checkpoint; returns once it counts there, too.

        Raises:
            CheckpointError: a file arrived as another; it is named, and the checkpoint does not
                count.
        """
        names = [p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file()]
        step = _step(directory.name)
        for name in sorted(set(names) - {COMMIT}):
            self._send_file(directory, name)
            faults.reach("during-send", step)
        self._send_file(directory, COMMIT)

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
        digest = hashlib.sha256()
        with self._filesystem.open(path, "rb") as stream:
            while piece := stream.read(_PIECE_BYTES):
                digest.update(piece)
        return digest.hexdigest()

    def fetch(self, name: str, directory: Path) -> Manifest:
        """Copies a checkpoint into `directory`, where it counts once all of it is verified.

        Returns its manifest.

        Raises:
            CheckpointError: naming the file that is missing or damaged.
        """
        attempt = directory / f"{FETCHING}{uuid.uuid4().hex[:12]}"
        source = f"{self._root}/{name}"
        try:
            for path in map(str, self._filesystem.find(source)):
                target = attempt / path.removeprefix(source).lstrip("/")
                target.parent.mkdir(parents=True, exist_ok=True)
                self._filesystem.get_file(path, str(target))
            manifest = verify(attempt)
        except (CheckpointError, FileNotFoundError) as error:
            shutil.rmtree(attempt, ignore_errors=True)
            found = str(error).replace(str(attempt), f"{self.url}/{name}")
            raise CheckpointError(found) from error
        sync_tree(attempt)
        attempt.replace(directory / name)
        sync_directory(directory)
        return manifest

    def retire(self, keep: int, step: int) -> None:
        """Removes all but the newest `keep` and those that are pinned, and attempts that died.

        Args:
            keep: how many.
            step: the newest that was sent; what is beyond it may still be coming from elsewhere.
        """
        kept = 0
        for name, files in self._attempts():
            is_whole = COMMIT in files
            if is_whole and kept < keep:
                kept += 1
            elif _step(name) <= step and not (is_whole and is_pinned(self.url, _step(name))):
                self._remove(name, files, unless_pinned=is_whole)

    def clear(self) -> None:
        """Removes every checkpoint."""
        for name, files in self._attempts():
            self._remove(name, files)

    def _remove(self, name: str, files: set[str], *, unless_pinned: bool = False) -> None:
        commit = f"{self._root}/{name}/{COMMIT}"
        if COMMIT in files:
            # Without its commit a half-removed checkpoint does not count.
            content = self._filesystem.cat_file(commit)
            self._filesystem.rm_file(commit)
            if unless_pinned and is_pinned(self.url, _step(name)):
                self._filesystem.pipe_file(commit, content)  # pinned in this very moment
                return
        for file in sorted(files - {COMMIT}):
            self._filesystem.rm_file(f"{self._root}/{name}/{file}")

    def _attempts(self) -> list[tuple[str, set[str]]]:
        """Returns all attempts, complete or not, with their files, highest step first."""
        self._filesystem.invalidate_cache()  # others write, too
        found: dict[str, set[str]] = {}
        for path in map(str, self._filesystem.find(self._root)):
            name, _, file = path.removeprefix(self._root).lstrip("/").partition("/")
            if file and step_of(name) is not None:
                found.setdefault(name, set()).add(file)
        return sorted(found.items(), key=lambda item: (_step(item[0]), item[0]), reverse=True)


def _step(name: str) -> int:
    step = step_of(name)
    assert step is not None
    return step
