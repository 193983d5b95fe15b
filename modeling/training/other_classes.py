"""Going on with what was done in another numerics class, where this one has nothing of its own.

A run that is preempted on eight devices and started again on four is in another class: the same
experiment, rounded otherwise. Its work is not lost: the newest checkpoint that verifies is copied
to where this class keeps its own, and gone on with. It says in its manifest where it comes from,

    config.numerics           the class that wrote it
    config.numerics_before    [{"class": ..., "until": step}, ...], those before, if there were any

and what comes of it is never taken for a product of one class: see `Built.numerics_before`.
"""

import logging
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from modeling.artifacts import Progress
from modeling.notes import sync_directory, sync_tree
from modeling.training.manifest import CheckpointError, Manifest
from modeling.training.pins import REFUSED, step_of
from modeling.training.reading import copy_checkpoint, inspect, verify
from modeling.training.remote import FETCHING, RemoteCheckpoints

_log = logging.getLogger(__name__)
_CHECKPOINTS = "checkpoints"
Refusal = Callable[[Path, Manifest], str | None]
"""Returns why a checkpoint cannot be gone on with, if it cannot."""


def adopted(directory: Path, others: Sequence[Progress], refusal: Refusal) -> Path | None:
    """Copies the newest checkpoint of any other class to `directory`, and returns the copy.

    Damaged ones, and those of another experiment or of other rows, are told aloud and passed over.

    Args:
        directory: of this class's checkpoints, held by this process.
        others: where to look.
        refusal: says whether a checkpoint is of this run.
    """
    found = sorted(_attempts(others), key=lambda one: (step_of(one[0]), one[0]), reverse=True)
    for name, place in found:
        try:
            if isinstance(place, RemoteCheckpoints):
                manifest, copy = place.fetch(name, directory), directory / name
            else:
                manifest, copy = _copied(place / name, directory)
        except (CheckpointError, OSError) as error:
            _log.warning("DAMAGED CHECKPOINT: %s Falling back to an older one.", error)
            continue
        if (why := refusal(copy, manifest)) is None:
            return copy
        shutil.rmtree(copy)
        _log.warning("%s of another numerics class is of no use here: %s", name, why)
    return None


def classes_before(manifest: Manifest, numerics: str) -> list[dict[str, Any]]:
    """Returns which classes had a part in a checkpoint that `numerics` goes on from, and until."""
    before = [dict(one) for one in manifest.config.get("numerics_before", ())]
    writer = manifest.config.get("numerics")
    return before if writer == numerics else [*before, {"class": writer, "until": manifest.step}]


def _attempts(others: Sequence[Progress]) -> Iterator[tuple[str, Path | RemoteCheckpoints]]:
    """Yields the names of all checkpoints, complete or not, and where they are."""
    for other in others:
        here = {
            path.name: path.parent
            for path in (other.local / _CHECKPOINTS).glob("*/*")
            if step_of(path.name) is not None and not path.parent.name.endswith(REFUSED)
        }
        yield from here.items()
        for place in _remote_places(other):
            yield from ((name, place) for name in place.names() if name not in here)


def _remote_places(other: Progress) -> Iterator[RemoteCheckpoints]:
    if other.remote is None:
        return
    filesystem, root = RemoteCheckpoints(f"{other.remote}/{_CHECKPOINTS}").place
    names = {str(path).split("/")[-2] for path in filesystem.glob(f"{root}/*/*")}
    found = {name for name in names if not name.endswith(REFUSED)}
    yield from (
        RemoteCheckpoints(f"{other.remote}/{_CHECKPOINTS}/{name}") for name in sorted(found)
    )


def _copied(source: Path, directory: Path) -> tuple[Manifest, Path]:
    """Returns a verified copy that counts in `directory`."""
    inspect(source)  # spares copying what is not whole
    attempt = directory / f"{FETCHING}{uuid.uuid4().hex[:12]}"
    try:
        copy_checkpoint(source, attempt)
        manifest = verify(attempt)
    except (CheckpointError, OSError) as error:
        shutil.rmtree(attempt, ignore_errors=True)
        raise CheckpointError(str(error).replace(str(attempt), str(source))) from error
    sync_tree(attempt)
    target = directory / source.name
    attempt.replace(target)
    sync_directory(directory)
    return manifest, target
