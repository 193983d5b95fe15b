"""Looks after an artifact store: `check` reads every byte of it, `garbage` finds what nobody needs.

Both only look. What `check` finds damaged can be set aside, so that the next run makes it anew;
what `garbage` finds can be deleted. Neither happens unless asked for.

Others build and publish meanwhile. What has changed since it was found is spared. An object first
loses its name (locally it goes to `trash/`, on object stores its inventory goes); then records,
aliases, leases and instances are read once more, and what any of them names by now gets its name
back. Who publishes looks in the other order: the record is written, then the object looked for, and
stored again if it has gone. So neither can miss the other, nor a deletion that is cut off leave
half an object that seems to be whole.

A record holds the digest of its object's inventory, and the inventory those of the files: no byte
of an object can change unseen unless record, inventory and file are changed to fit.

What is needed: every artifact on record, and all it was made of; what an alias names (a pin for
people), what is current in a Dagster instance (`refs/<scope>/latest`), and what builds under way
read, as their leases say. Records last for ever
unless they are given an age: then those that no alias and no instance reaches are let go.
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
    numerics_digest,
    parse_reference,
    set_aside_path,
    unpinned,
)
from modeling.inventory import (
    INVENTORY,
    VERIFIED,
    DamagedArtifactError,
    inventory_faults,
    read_inventory,
)
from modeling.leases import holder_of
from modeling.notes import Note, is_attempt
from modeling.progress import Meter, Report, ignore

_DAY_S = 86400.0
_GRACE_S = _DAY_S
"""What is younger may belong to a build that has not put it on record yet."""
_TRASH = "trash"
"""Where in a local store, or on this machine, is what has lost its name and is being deleted."""
_NEVER = datetime.datetime.min.replace(tzinfo=datetime.UTC)

Key = tuple[str, str]
"""Kind and content id of an artifact."""


@dataclasses.dataclass(frozen=True)
class Damage:
    """One thing that is not as it was published."""

    path: str
    what: str
    remedy: str
    object: Key | None = None
    """The object that cannot be trusted any more."""

    def __str__(self) -> str:
        return f"{self.path}: {self.what}. {self.remedy}"


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


def check(store: ArtifactStore, *, report: Report = ignore) -> list[Damage]:
    """Reads every object, record and alias, and returns what is wrong, in the order of paths."""
    records, found = _records(store)
    known = by_object(records)
    objects = list(_objects(store))
    meter = Meter(report, "checking objects", len(objects), "objects")
    damaged: dict[Key, list[tuple[str, str]]] = {}
    for key in objects:
        promised = {record["inventory"] for record in known.get(key, [])}
        if faults := list(_faults(store, key, promised)):
            damaged[key] = faults
        meter.advance(1)
    meter.finish()
    whole = set(objects) - set(damaged)
    for key, faults in damaged.items():
        remedy = "No record says how it was made: remove it, or restore it from a copy."
        if key in known:
            remedy = f"Set it aside and run again: {_how_to_rebuild(known[key][0], whole)}"
        found += [Damage(path, what, remedy, key) for path, what in faults]
    for record in records:
        found += _broken_links(store, record, set(objects), whole, known)
    found += _broken_aliases(store, set(objects))
    found += _strays(store)
    return sorted(found, key=lambda one: one.path)


def set_aside(store: ArtifactStore, key: Key) -> str:
    """Moves a damaged object away, so that its recipe is built again; returns where to."""
    kind, content_id = key
    source, target = store.object_path(*key), set_aside_path(store.root, kind, content_id)
    store.filesystem.makedirs(target.rpartition("/")[0], exist_ok=True)
    if store.is_local:
        Path(source).rename(target)
        return target
    files = [str(path) for path in store.filesystem.find(source)]
    for path in files:
        copy = f"{target}{path.removeprefix(source)}"
        store.filesystem.makedirs(copy.rpartition("/")[0], exist_ok=True)
        store.filesystem.copy(path, copy)
    # Cut off from here on, what is left is no object any more.
    for path in sorted(files, key=lambda path: path != f"{source}/{INVENTORY}"):
        store.filesystem.rm_file(path)
    _remove_if_empty(store, source)
    return target


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
    records, unreadable = _records(store)
    if unreadable:
        raise ValueError(f"nothing is collected while a record is damaged: {unreadable[0]}")
    known = by_object(records)
    pinned = _reached(_pins(store) | _leased(store, moment, grace_s), known)
    kept, expired = [], []
    for record in records:
        is_old = (
            expire_records_after_days is not None
            and _age_s(record, moment) > expire_records_after_days * _DAY_S
        )
        is_expired = is_old and _key(record) not in pinned
        (expired if is_expired else kept).append(record)
    reached = _reached({_key(record) for record in kept}, known) | pinned
    # What is reached keeps its records too: a lineage with holes proves nothing.
    expired = [record for record in expired if _key(record) not in reached]
    found = []
    for record in expired:
        one = _seen(store.filesystem, store.record_path(*_place(record)), "its record has expired")
        found.append(dataclasses.replace(one, object=_key(record), is_record=True, num_bytes=0))
    for key in _objects(store):
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
    finished = {_place(record) for record in kept if _key(record) in whole}
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
    gone += _delete_objects(store, [one for one in found if one.object and not one.is_record])
    gone += [one for one in found if one.object is None and _delete_other(store, one)]
    for note in _leftover_notes(store):
        Path(note.path).unlink(missing_ok=True)
    return gone


def _needed(store: ArtifactStore, *, with_records: bool) -> set[Key]:
    """Returns what is reached at this moment: from names and leases, or from records as well."""
    records, unreadable = _records(store)
    if unreadable:
        raise ValueError(f"nothing is collected while a record is damaged: {unreadable[0]}")
    roots = _pins(store) | _leased(store, datetime.datetime.now(datetime.UTC), _GRACE_S)
    if with_records:
        roots |= {_key(record) for record in records}
    return _reached(roots, by_object(records))


def _delete_objects(store: ArtifactStore, found: list[Garbage]) -> list[Garbage]:
    taken = [(one, *_take_away(store, one)) for one in found if _is_unchanged(store, one)]
    try:
        needed = _needed(store, with_records=True)
    except BaseException:
        for one, files, inventory in taken:
            _give_back(store, one, files, inventory)
        raise
    gone = []
    for one, files, inventory in taken:
        if one.object in needed:
            _give_back(store, one, files, inventory)
            continue
        _remove(store, files)
        _remove_if_empty(store, one.path)
        gone.append(one)
    return gone


def _remove(store: ArtifactStore, paths: Iterable[str]) -> None:
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            store.filesystem.rm(path, recursive=True)


def _remove_if_empty(store: ArtifactStore, path: str) -> None:
    """Removes a directory without files, on a file system that has directories."""
    if store.filesystem.exists(path) and not store.filesystem.find(path):
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


def _records(store: ArtifactStore) -> tuple[list[dict[str, Any]], list[Damage]]:
    """Returns the records that make sense, and what is wrong with the others."""
    good, bad = [], []
    fs = store.filesystem
    for path in sorted(fs.glob(f"{store.root}/recipes/*/*/artifact.json")):
        try:
            record = store.read_record(path)
            if _class_id(record) != record["numerics"]["id"]:
                raise DamagedArtifactError(f"{path}: its numerics class has another id")
        except FileNotFoundError:  # expired meanwhile
            continue
        except DamagedArtifactError as error:
            remedy = "Restore it from a copy, or remove it: the next run computes its recipe again."
            bad.append(Damage(path, f"no valid record ({error})", remedy))
        else:
            good.append(record)
    return good, bad


def _objects(store: ArtifactStore) -> Iterator[Key]:
    for path in sorted(store.filesystem.glob(f"{store.root}/objects/*/*")):
        kind, content_id = path.rstrip("/").split("/")[-2:]
        if is_key(kind, content_id):
            yield kind, content_id


def _whole_objects(store: ArtifactStore) -> Iterator[Key]:
    for path in store.filesystem.glob(f"{store.root}/objects/*/*/{INVENTORY}"):
        kind, content_id = path.split("/")[-3:-1]
        yield kind, content_id


def _strays(store: ArtifactStore) -> Iterator[Damage]:
    """Yields what lies among the objects and has no object's name."""
    for path in sorted(store.filesystem.glob(f"{store.root}/objects/*/*")):
        if not is_key(*path.rstrip("/").split("/")[-2:]):
            yield Damage(path, "has no object's name", "Remove it: nothing here put it there.")


def _faults(store: ArtifactStore, key: Key, promised: set[str]) -> Iterator[tuple[str, str]]:
    """Yields path and fault of each file of an object that is not as published.

    Args:
        promised: the digests of its inventory on record.
    """
    fs, root = store.filesystem, store.object_path(*key)
    path = f"{root}/{INVENTORY}"
    try:
        inventory = read_inventory(fs.cat_file(path), key)
    except FileNotFoundError:
        yield path, "missing: this object was never wholly stored, or has lost its inventory"
        return
    except ValueError as error:
        yield path, str(error)
        return
    if promised - {store.inventory_sha256(*key)}:
        yield path, "other bytes than the record says"
    files = store.files_path(*key)
    for name, what in inventory_faults(fs, files, inventory["files"]):
        yield f"{files}/{name}", what
    if files != root:
        for stray in fs.find(root):
            if stray != path and not stray.startswith(f"{root}/{UPLOAD}"):
                yield stray, "was not published"


def _how_to_rebuild(record: Mapping[str, Any], whole: set[Key]) -> str:
    """Returns what making an object again takes."""
    inputs = [
        f"{name}: {given['kind']} {given['content_id'][:12]} "
        f"({'whole' if _key(given) in whole else 'lost as well'})"
        for name, given in sorted(record["recipe"]["inputs"].items())
    ]
    needs = ", ".join(inputs) or "its source alone"
    return f"recipe {record['recipe_id'][:12]} makes it from {needs}."


def _broken_links(
    store: ArtifactStore,
    record: Mapping[str, Any],
    objects: set[Key],
    whole: set[Key],
    known: Mapping[Key, list[dict[str, Any]]],
) -> Iterator[Damage]:
    path = store.record_path(record["recipe_id"], record["numerics"]["id"])
    if _key(record) not in objects:
        yield Damage(
            path,
            f"names {record['kind']} {record['content_id'][:12]}, which is not stored",
            f"Run again: {_how_to_rebuild(record, whole)}",
        )
    for name, given in sorted(record["recipe"]["inputs"].items()):
        if _key(given) not in known:
            yield Damage(
                path,
                f"its input `{name}`, {given['kind']} {given['content_id'][:12]}, has no record",
                "Its lineage ends there: restore the record from a copy.",
            )


def _broken_aliases(store: ArtifactStore, objects: set[Key]) -> Iterator[Damage]:
    known = {content_id for _, content_id in objects}
    for name, content_id in store.aliases().items():
        if content_id not in known:
            yield Damage(
                f"{store.root}/aliases/{name}",
                f"points at {content_id[:12]}, which is not stored",
                "Point it elsewhere with `levanter alias`, or make that artifact again.",
            )


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
    yield from _objects(store)
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
                waiting += map(_key, record["recipe"]["inputs"].values())
    return reached


def _leftover_uploads(
    store: ArtifactStore, now: datetime.datetime, grace_s: float
) -> Iterator[Garbage]:
    """Yields uploads of objects that another upload was quicker to publish."""
    for kind, content_id in () if store.is_local else _objects(store):
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
    """Yields copies of remote step checkpoints that tools have looked into."""
    for path in sorted((store.scratch / FETCHED).glob("*/*")):
        one = _seen(LocalFileSystem(), str(path), "a copy, which has been looked into")
        if (now - one.changed).total_seconds() > grace_s:
            yield one


def _leftover_notes(store: ArtifactStore) -> Iterator[Garbage]:
    """Yields what machines noted of objects that are gone."""
    known = set(_objects(store))
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


def _key(record: Mapping[str, Any]) -> Key:
    return record["kind"], record["content_id"]


def _place(record: Mapping[str, Any]) -> tuple[str, str]:
    return record["recipe_id"], record["numerics"]["id"]


def _class_id(record: Mapping[str, Any]) -> str:
    return numerics_digest(record["numerics"]["class"] or None)


def _age_s(record: Mapping[str, Any], now: datetime.datetime) -> float:
    """Returns the seconds since an artifact was made; 0 where the record does not say."""
    ended = record["provenance"].get("times", {}).get("ended")
    return 0.0 if ended is None else (now - datetime.datetime.fromisoformat(ended)).total_seconds()


def _is_older(store: ArtifactStore, path: str, now: datetime.datetime, age_s: float) -> bool:
    newest = _last_change(store.filesystem, path)
    return newest == _NEVER or (now - newest).total_seconds() > age_s
