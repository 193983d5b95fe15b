"""Collects the garbage of an artifact store: `garbage` finds it, `delete` removes it.

Needed are every artifact on record, and all it was made of; what an alias names (a pin for people),
what is current in a Dagster instance (`refs/<scope>/latest`), and what builds under way read, as
their leases say. Records last for ever unless they are given an age: then those that no alias, no
instance and no lease reaches are let go.

Others build and publish meanwhile. What has changed since it was found is spared. An object first
loses its name (locally it goes to `trash/`, on object stores its inventory goes); then records,
aliases, leases and instances are read once more, and what any of them names by now gets its name
back. Who publishes looks in the other order: the record is written, then the object looked for, and
stored again if it has gone. So neither can miss the other, nor does a deletion that is cut off
leave half an object that seems to be whole.
"""

import contextlib
import dataclasses
import datetime
import fcntl
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from modeling.artifacts import (
    FETCHED,
    UPLOAD,
    ArtifactStore,
    by_object,
    is_key,
    parse_reference,
    unpinned,
)
from modeling.inventory import INVENTORY, VERIFIED
from modeling.leases import holder_of
from modeling.notes import Note, is_attempt, sync_directory
from modeling.upkeep import Key, key_of, object_keys, place_of, records, remove_if_empty

_DAY_S = 86400.0
_GRACE_S = _DAY_S
"""What is younger may belong to a build that has not put it on record yet."""
_TRASH = "trash"
"""Where in a local store, or on this machine, is what has lost its name and is being deleted."""
_NEVER = datetime.datetime.fromtimestamp(0, datetime.UTC)


@dataclasses.dataclass(frozen=True)
class Garbage:
    """One directory or file that nothing reaches."""

    path: str
    num_bytes: int
    why: str
    changed: datetime.datetime = _NEVER
    """When any file of it was last written: what changes after it was found is no garbage."""
    object: Key | None = None
    """The object that it is, or that the record is of."""
    is_record: bool = False
    lock: Path | None = None
    """Who holds it is at work there."""


def garbage(
    store: ArtifactStore,
    *,
    now: datetime.datetime | None = None,
    expire_records_after_days: float | None = None,
    grace_s: float = _GRACE_S,
) -> list[Garbage]:
    """Returns what nothing reaches, in the order of paths; nothing is deleted.

    Args:
        now: the time to reckon ages from.
        expire_records_after_days: lets go of older records that no alias and no instance reaches.
        grace_s: spares what is younger, since a build puts an object on record after storing it.

    Raises:
        ValueError: a record or reference cannot be read, so that what it reaches is unknown.
    """
    moment = now or datetime.datetime.now(datetime.UTC)
    on_record, unreadable = records(store)
    if unreadable:
        raise ValueError(f"nothing is collected while a record is damaged: {unreadable[0]}")
    known = by_object(on_record)
    pinned = _reached(_pins(store) | _leased(store, moment, grace_s), known)
    kept, expired = [], []
    for record in on_record:
        is_old = (
            expire_records_after_days is not None
            and _age_s(record, moment) > expire_records_after_days * _DAY_S
        )
        is_expired = is_old and key_of(record) not in pinned
        (expired if is_expired else kept).append(record)
    reached = _reached({key_of(record) for record in kept}, known) | pinned
    # What is reached keeps its records too: a lineage with holes proves nothing.
    expired = [record for record in expired if key_of(record) not in reached]
    found = []
    for record in expired:
        one = _seen(
            store.filesystem, store.record_path(*place_of(record)), "its record has expired"
        )
        found.append(dataclasses.replace(one, object=key_of(record), is_record=True, num_bytes=0))
    for key in object_keys(store):
        path = store.object_path(*key)
        if key not in reached and _is_older(store, path, moment, grace_s):
            why = "no record, alias, lease or instance has it"
            found.append(dataclasses.replace(_seen(store.filesystem, path, why), object=key))
    found += _leftover_trash(store)
    found += _leftover_uploads(store, moment, grace_s)
    found += _leftover_leases(store, moment, grace_s)
    found += _leftover_attempts(store, moment, grace_s)
    # A build on record whose object is lost is begun again.
    whole = set(_whole_objects(store))
    done = [record for record in kept if key_of(record) in whole]
    finished = set(map(place_of, done))
    # One that began in another numerics class was made where it ended.
    finished |= {
        (record["recipe_id"], record["numerics"]["ended_in"])
        for record in done
        if "ended_in" in record["numerics"]
    }
    found += _leftover_work(store, finished, moment, grace_s)
    found += _leftover_remote_work(store, finished)
    found += _leftover_notes(store)
    found += _leftover_copies(store, moment, grace_s)
    return sorted(found, key=lambda one: one.path)


def delete(store: ArtifactStore, found: list[Garbage]) -> list[Garbage]:
    """Deletes what `garbage` has found, but what is needed by now; returns what is gone.

    Raises:
        ValueError: a record or reference cannot be read any more; no object is deleted then.
    """
    needed = _needed(store, with_records=False)
    gone = []
    for one in found:
        # Records go before the objects that they name.
        if one.is_record and one.object not in needed and _is_unchanged(store, one):
            store.filesystem.rm_file(one.path)
            gone.append(one)
    _sync_names(store, (one.path for one in gone))
    gone += _delete_objects(store, [one for one in found if one.object and not one.is_record])
    gone += [one for one in found if one.object is None and _delete_other(store, one)]
    for note in _leftover_notes(store):
        Path(note.path).unlink(missing_ok=True)
    return gone


def _needed(store: ArtifactStore, *, with_records: bool) -> set[Key]:
    """Returns what is reached at this moment: from names and leases, or from records as well."""
    on_record, unreadable = records(store)
    if unreadable:
        raise ValueError(f"nothing is collected while a record is damaged: {unreadable[0]}")
    roots = _pins(store) | _leased(store, datetime.datetime.now(datetime.UTC), _GRACE_S)
    if with_records:
        roots |= {key_of(record) for record in on_record}
    return _reached(roots, by_object(on_record))


def _delete_objects(store: ArtifactStore, found: list[Garbage]) -> list[Garbage]:
    taken = [(one, *_take_away(store, one)) for one in found if _is_unchanged(store, one)]
    try:
        needed = _needed(store, with_records=True)
    except BaseException:
        for one, files, inventory in taken:
            _give_back(store, one, files, inventory)
        raise
    for one, files, inventory in taken:
        if one.object in needed:
            _give_back(store, one, files, inventory)
    _sync_names(store, (one.path for one, *_ in taken))
    gone = []
    for one, files, _ in taken:
        if one.object not in needed:
            _remove(store, files)
            remove_if_empty(store, one.path)
            gone.append(one)
    return gone


def _sync_names(store: ArtifactStore, paths: Iterable[str]) -> None:
    """Makes it last that names are gone, before what they named goes.

    Else a loss of power could bring a name back, but not what it stood for.
    """
    if store.is_local:
        for directory in sorted({Path(path).parent for path in paths}):
            with contextlib.suppress(FileNotFoundError):  # another collection has removed it
                sync_directory(directory)


def _remove(store: ArtifactStore, paths: Iterable[str]) -> None:
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            store.filesystem.rm(path, recursive=True)


def _take_away(store: ArtifactStore, one: Garbage) -> tuple[list[str], bytes | None]:
    """Makes an object be none; returns all that is to be deleted, and its inventory if remote."""
    assert one.object is not None
    kind, content_id = one.object
    if one.path.startswith(f"{store.root}/{_TRASH}/"):
        return [one.path], None
    if store.is_local:
        moved = Path(store.root, _TRASH, kind, f"{content_id}.{uuid.uuid4().hex[:12]}")
        moved.parent.mkdir(parents=True, exist_ok=True)
        Path(one.path).rename(moved)
        return [str(moved)], None
    # Who stores the same meanwhile does so in a directory of his own, which is not among these.
    files = [str(path) for path in store.filesystem.find(one.path)]
    note = Note(store.filesystem, f"{one.path}/{INVENTORY}")
    inventory = note.read()
    note.remove()
    return [path for path in files if path != note.path], inventory


def _give_back(store: ArtifactStore, one: Garbage, files: list[str], raw: bytes | None) -> None:
    """Makes a needed object be one again, unless it has been stored anew meanwhile."""
    assert one.object is not None
    path = store.object_path(*one.object)
    if store.is_local:
        if not Path(path).exists():
            Path(files[0]).rename(path)
        elif Path(path, INVENTORY).exists():
            shutil.rmtree(files[0])
    elif raw is not None and not Note(store.filesystem, f"{path}/{INVENTORY}").create(raw):
        _remove(store, files)


def _delete_other(store: ArtifactStore, one: Garbage) -> bool:
    """Deletes what is no object, unless it has changed since; returns whether it is gone."""
    with contextlib.ExitStack() as stack:
        if one.lock is not None and not stack.enter_context(_unless_held(one.lock)):
            return False
        if not _is_unchanged(store, one):
            return False
        if _is_here(store, one):
            # What was half deleted would seem to be work in progress.
            trash = store.scratch / _TRASH / f"{Path(one.path).name}.{uuid.uuid4().hex[:12]}"
            trash.parent.mkdir(parents=True, exist_ok=True)
            Path(one.path).rename(trash)
            if trash.is_dir():
                shutil.rmtree(trash)
            else:
                trash.unlink()
        else:
            # Commits first, for the same reason.
            files = [str(path) for path in store.filesystem.find(one.path)]
            for path in sorted(files, key=lambda path: (not path.endswith("/COMMIT"), path)):
                with contextlib.suppress(FileNotFoundError):
                    store.filesystem.rm_file(path)
    return True


def _is_here(store: ArtifactStore, one: Garbage) -> bool:
    return Path(one.path).is_relative_to(store.scratch)


def _filesystem_of(store: ArtifactStore, one: Garbage) -> Any:
    return LocalFileSystem() if _is_here(store, one) else store.filesystem


def _is_unchanged(store: ArtifactStore, one: Garbage) -> bool:
    """Whether it is still there, and all of it is as old as when it was found."""
    filesystem = _filesystem_of(store, one)
    return filesystem.exists(one.path) and _last_change(filesystem, one.path) == one.changed


def _seen(filesystem: Any, path: str, why: str) -> Garbage:
    return Garbage(path, int(filesystem.du(path)), why, _last_change(filesystem, path))


def _last_change(filesystem: Any, path: str) -> datetime.datetime:
    """Returns when any file at or below a path was written; `_NEVER` if there is none."""
    times = []
    for file in filesystem.find(path):
        with contextlib.suppress(FileNotFoundError):  # removed meanwhile
            times.append(filesystem.modified(file))
    return max(times, default=_NEVER)


def _whole_objects(store: ArtifactStore) -> Iterator[Key]:
    for path in store.filesystem.glob(f"{store.root}/objects/*/*/{INVENTORY}"):
        kind, content_id = path.split("/")[-3:-1]
        yield kind, content_id


def _pins(store: ArtifactStore) -> set[Key]:
    """Returns what aliases and Dagster instances name."""
    named = set(store.aliases().values())
    pins = {key for key in _every_key(store) if key[1] in named}
    for path in map(str, store.filesystem.find(f"{store.root}/refs")):
        if "/latest/" in path and not is_attempt(path.rpartition("/")[2]):
            artifact = parse_reference(store.filesystem.cat_file(path), path)
            pins.add((artifact.kind, artifact.content_id))
    return pins


def _every_key(store: ArtifactStore) -> Iterator[Key]:
    """Yields the keys of all objects, and of those that have just lost their names."""
    yield from object_keys(store)
    for one in _leftover_trash(store):
        if one.object is not None:
            yield one.object


def _leased(store: ArtifactStore, now: datetime.datetime, grace_s: float) -> set[Key]:
    """Returns what builds under way read."""
    leased: set[Key] = set()
    for path in map(str, store.filesystem.glob(f"{store.root}/leases/*/*.json")):
        if not _is_older(store, path, now, grace_s):
            holder = holder_of(Note(store.filesystem, path))
            inputs = () if holder is None else holder.inputs
            leased |= {(kind, content_id) for kind, content_id in inputs}
    return leased


def _reached(roots: set[Key], known: Mapping[Key, list[dict[str, Any]]]) -> set[Key]:
    """Returns the roots and all that they were made of, by any recipe on record."""
    reached: set[Key] = set()
    waiting = list(roots)
    while waiting:
        key = waiting.pop()
        if key not in reached:
            reached.add(key)
            for record in known.get(key, []):
                waiting += map(key_of, record["recipe"]["inputs"].values())
    return reached


def _leftover_uploads(
    store: ArtifactStore, now: datetime.datetime, grace_s: float
) -> Iterator[Garbage]:
    """Yields uploads of objects that another upload was quicker to publish."""
    for kind, content_id in () if store.is_local else object_keys(store):
        if not store.contains(kind, content_id):
            continue
        path, counts = store.object_path(kind, content_id), store.files_path(kind, content_id)
        for upload in sorted(store.filesystem.glob(f"{path}/{UPLOAD}*")):
            if upload.rstrip("/") != counts and _is_older(store, upload, now, grace_s):
                yield _seen(store.filesystem, upload, "another upload was published")


def _leftover_leases(
    store: ArtifactStore, now: datetime.datetime, grace_s: float
) -> Iterator[Garbage]:
    """Yields leases that their holders have neither renewed nor given back."""
    for path in sorted(store.filesystem.glob(f"{store.root}/leases/*/*.json")):
        if _is_older(store, path, now, grace_s):
            yield _seen(store.filesystem, path, "its holder is gone")


def _leftover_attempts(
    store: ArtifactStore, now: datetime.datetime, grace_s: float
) -> Iterator[Garbage]:
    """Yields notes that were being written when their writers were killed."""
    for place in ("aliases", "leases", "recipes", "refs"):
        for path in map(str, store.filesystem.find(f"{store.root}/{place}")):
            if is_attempt(path.rpartition("/")[2]) and _is_older(store, path, now, grace_s):
                yield _seen(store.filesystem, path, "its writer was killed")


def _leftover_trash(store: ArtifactStore) -> Iterator[Garbage]:
    """Yields what earlier collections had begun to delete."""
    why = "an earlier collection was cut off"
    for path in sorted((store.scratch / _TRASH).glob("*")):
        if is_key(path.name, "0" * 64) and path.is_dir():
            for moved in sorted(path.iterdir()):
                key = path.name, moved.name.partition(".")[0]
                yield dataclasses.replace(_seen(LocalFileSystem(), str(moved), why), object=key)
        else:
            yield _seen(LocalFileSystem(), str(path), why)


def _leftover_work(
    store: ArtifactStore, finished: set[tuple[str, str]], now: datetime.datetime, grace_s: float
) -> Iterator[Garbage]:
    """Yields progress of builds that are on record, and attempts whose process is gone."""
    for lock in sorted((store.scratch / "work").glob("*/*.lock")):
        work = lock.with_suffix("")
        with _unless_held(lock) as is_free:
            if not is_free or not work.is_dir():
                continue
            age = now.timestamp() - work.stat().st_mtime
            if (lock.parent.name, work.name) in finished:
                for path in unpinned(LocalFileSystem(), str(work)):
                    one = _seen(LocalFileSystem(), path, "its build is on record")
                    yield dataclasses.replace(one, lock=lock)
            elif age > grace_s:
                for attempt in sorted(work.glob("attempt-*")):
                    one = _seen(LocalFileSystem(), str(attempt), "its process is gone")
                    yield dataclasses.replace(one, lock=lock)


def _leftover_remote_work(
    store: ArtifactStore, finished: set[tuple[str, str]]
) -> Iterator[Garbage]:
    """Yields what builds that are on record have left in a remote store."""
    for place in [] if store.is_local else sorted(store.filesystem.glob(f"{store.root}/work/*/*")):
        recipe_id, numerics = str(place).split("/")[-2:]
        # Who has a lease may be at work there all the same, on another machine.
        if (recipe_id, numerics) in finished and not store.builders(recipe_id):
            for path in unpinned(store.filesystem, str(place)):
                yield _seen(store.filesystem, path, "its build is on record")


def _leftover_copies(
    store: ArtifactStore, now: datetime.datetime, grace_s: float
) -> Iterator[Garbage]:
    """Yields what this machine has copied from a remote store, and needs no more."""
    looked_into = sorted((store.scratch / FETCHED).glob("*/*"))
    objects = [] if store.is_local else sorted((store.scratch / "objects").glob("*/*"))
    gone = [path for path in objects if not _is_copy(store, path)]
    for path in (*looked_into, *gone):
        why = (
            "a copy of what is gone, or was never whole" if path in gone else "a copy to look into"
        )
        one = _seen(LocalFileSystem(), str(path), why)
        # One that is still coming may have no file yet.
        if now.timestamp() - max(one.changed.timestamp(), path.stat().st_mtime) > grace_s:
            yield one


def _is_copy(store: ArtifactStore, path: Path) -> bool:
    """Whether a local directory has the name of an object that is in the store."""
    key = path.parent.name, path.name
    return is_key(*key) and store.contains(*key)


def _leftover_notes(store: ArtifactStore) -> Iterator[Garbage]:
    """Yields what machines noted of objects that are gone."""
    known = set(object_keys(store))
    for path in sorted((store.scratch / VERIFIED).glob("*/*/*")):
        if (path.parent.name, path.name.removesuffix(".json")) not in known:
            yield _seen(LocalFileSystem(), str(path), "its object is gone")


@contextlib.contextmanager
def _unless_held(lock: Path) -> Iterator[bool]:
    """Yields whether no build holds the lock, and holds it meanwhile."""
    with lock.open("r+") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def _age_s(record: Mapping[str, Any], now: datetime.datetime) -> float:
    """Returns the seconds since an artifact was made; 0 where the record does not say."""
    ended = record["provenance"].get("times", {}).get("ended")
    return 0.0 if ended is None else (now - datetime.datetime.fromisoformat(ended)).total_seconds()


def _is_older(store: ArtifactStore, path: str, now: datetime.datetime, age_s: float) -> bool:
    newest = _last_change(store.filesystem, path)
    return newest == _NEVER or (now - newest).total_seconds() > age_s
