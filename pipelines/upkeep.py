"""`levanter fsck`, `gc` and `alias`: looks after the artifact store from the command line."""

import sys

from modeling import collection, upkeep
from modeling.artifacts import ArtifactStore
from modeling.inventory import INVENTORY
from modeling.progress import Progress

_UNITS = ("B", "kB", "MB", "GB", "TB")


def fsck(store: ArtifactStore, *, set_aside: bool) -> int:
    """Verifies every byte of the store; returns 0 if all is as published, else 1.

    Args:
        store: what is verified.
        set_aside: moves damaged objects out of the way, so that the next run makes them anew.
    """
    found = upkeep.check(store, report=_progress)
    for damage in found:
        _say(str(damage))
    for key in sorted({damage.object for damage in found if damage.object is not None}):
        if set_aside:
            _say(f"set aside: {upkeep.set_aside(store, key)}")
    if not found:
        _say(f"{store.url}: every object, record and alias is as published.")
        return 0
    _say(f"{store.url}: {len(found)} faults." + ("" if set_aside else " Nothing was changed."))
    return 1


def gc(store: ArtifactStore, *, delete: bool, expire_records_after_days: float | None) -> int:
    """Lists what nothing reaches, and deletes it if asked to."""
    found = collection.garbage(store, expire_records_after_days=expire_records_after_days)
    for one in found:
        _say(f"{human_bytes(one.num_bytes):>9}  {one.path}  ({one.why})")
    total = f"{len(found)} of it, {human_bytes(sum(one.num_bytes for one in found))}"
    if not found:
        _say(f"{store.url}: nothing to collect.")
    elif delete:
        gone = collection.delete(store, found)
        freed = human_bytes(sum(one.num_bytes for one in gone))
        _say(f"Deleted: {len(gone)} of it, {freed}.")
        if len(gone) < len(found):
            _say(f"{len(found) - len(gone)} are in use by now, and were spared.")
    else:
        _say(f"Would delete: {total}. Do it with `levanter gc --delete`.")
    return 0


def alias(store: ArtifactStore, name: str, content_id: str) -> int:
    """Points a name at an artifact, which keeps it from collection."""
    store.set_alias(name, content_id)
    # In this order: a collection looks for aliases after it has taken an object away.
    if not store.filesystem.glob(f"{store.root}/objects/*/{content_id}/{INVENTORY}"):
        raise ValueError(
            f"{name} is {content_id} now, of which nothing is stored in {store.url}. Materialize "
            f"its asset again, or point the name elsewhere."
        )
    _say(f"{name} is {content_id}")
    return 0


def _progress(now: Progress | str) -> None:
    sys.stderr.write(f"{now}\n")


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")


def human_bytes(count: float) -> str:
    """Returns a size as people read it."""
    for unit in _UNITS:
        if count < 1000 or unit == _UNITS[-1]:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError
