"""Pins: what a run must keep of its checkpoints, whatever else it retires.

    checkpoints/<class>/pins/step-001000.json    {"why": ...}: it stays, the run over or not

A pin is a file beside the checkpoints, so that it needs no running trainer, no configuration and no
lock; the directory may be any fsspec URL. The trainer pins what `trainer.keep` makes permanent.
"""

import json
import re
from pathlib import Path

import fsspec

from modeling.artifacts import PINS
from modeling.notes import Note
from modeling.training.manifest import COMMIT, CheckpointError

REFUSED = ".refused"
"""Ends the name of a directory beside a run's checkpoints, for those that are of no use to it but
were pinned by hand."""
COPIED = "0" * 12
"""The attempt of a checkpoint that was put here on purpose, from whatever numerics class."""
_PIN = re.compile(r"step-(\d{6,})\.json")
_ATTEMPT = re.compile(r"step-(\d{6,})\.[0-9a-f]{12}")


def attempt_name(step: int, attempt: str) -> str:
    """Returns the name of the directory in which an attempt, 12 hex digits, writes a step."""
    return f"step-{step:06d}.{attempt}"


def step_of(name: str) -> int | None:
    """Returns the step that a directory of this name belongs to; None for any other directory."""
    match = _ATTEMPT.fullmatch(name)
    return None if match is None else int(match[1])


def pin(directory: Path | str, step: int, why: str = "by hand") -> None:
    """Keeps the checkpoint of a step for ever, or until it is unpinned.

    Args:
        directory: of a run's checkpoints, or its URL.
        step: of the checkpoint.
        why: for people.

    Raises:
        CheckpointError: there is no complete checkpoint of this step.
    """
    mark(directory, step, why)
    # In this order: a trainer that retires the step looks for a pin after it has removed `COMMIT`.
    if step not in (found := _committed_steps(directory)):
        unpin(directory, step)
        raise CheckpointError(
            f"{directory} has no complete checkpoint of step {step}; it has {sorted(found)}."
        )


def mark(directory: Path | str, step: int, why: str) -> None:
    """Pins a step whether there is a checkpoint of it or not yet."""
    filesystem, root = _open(directory)
    Note(filesystem, _path(root, step)).replace(f"{json.dumps({'why': why})}\n".encode())


def unpin(directory: Path | str, step: int) -> None:
    """Lets the next retirement have the checkpoint of a step.

    Raises:
        CheckpointError: it is not pinned.
    """
    filesystem, root = _open(directory)
    path = _path(root, step)
    if not filesystem.exists(path):
        raise CheckpointError(
            f"{path}: step {step} is not pinned; {sorted(pinned(directory))} are."
        )
    filesystem.rm_file(path)


def pinned(directory: Path | str) -> dict[int, str]:
    """Returns why each pinned step is."""
    filesystem, root = _open(directory)
    found = {}
    for path in map(str, filesystem.glob(f"{root}/{PINS}/step-*.json")):
        if (match := _PIN.fullmatch(path.rpartition("/")[2])) is not None:
            found[int(match[1])] = json.loads(filesystem.cat_file(path))["why"]
    return found


def is_pinned(directory: Path | str, step: int) -> bool:
    """Whether a step is pinned."""
    filesystem, root = _open(directory)
    return filesystem.exists(_path(root, step))


def _committed_steps(directory: Path | str) -> set[int]:
    filesystem, root = _open(directory)
    commits = map(str, filesystem.glob(f"{root}/step-*/{COMMIT}"))
    return {step for path in commits if (step := step_of(path.split("/")[-2])) is not None}


def _open(directory: Path | str) -> tuple[fsspec.AbstractFileSystem, str]:
    filesystem, root = fsspec.url_to_fs(str(directory))
    filesystem.invalidate_cache()  # others pin, too
    return filesystem, str(root).rstrip("/")


def _path(root: str, step: int) -> str:
    return f"{root}/{PINS}/step-{step:06d}.json"
