"""Looks after an artifact store: `check` reads every byte of it, `garbage` finds what nobody needs.

Both only look. What `check` finds damaged can be set aside, so that the next run makes it anew;
what `garbage` finds can be deleted. Neither happens unless asked for.

A record holds the digest of its object's inventory, and the inventory those of the files: no byte
of an object can change unseen unless record, inventory and file are changed to fit.

What is needed: every artifact on record, and all it was made of; what an alias names (a pin for
people), and what is current in a Dagster instance (`refs/<scope>/latest`). Records last for ever
unless they are given an age: then those that no alias and no instance reaches are let go.
"""

import contextlib
import dataclasses
import datetime
import fcntl
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from modeling.artifacts import (
    UPLOAD,
    ArtifactStore,
    by_object,
    numerics_digest,
    set_aside_path,
    unpinned,
)
from modeling.inventory import INVENTORY, VERIFIED, inventory_faults, read_inventory
from modeling.progress import Meter, Report, ignore

_DAY_S = 86400.0
_GRACE_S = _DAY_S
"""What is younger may belong to a build that has not put it on record yet."""

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
    return sorted(found, key=lambda one: one.path)


def set_aside(store: ArtifactStore, key: Key) -> str:
    """Moves a damaged object away, so that its recipe is built again; returns where to."""
    kind, content_id = key
    target = set_aside_path(store.root, kind, content_id)
    store.filesystem.makedirs(target.rpartition("/")[0], exist_ok=True)
    store.filesystem.mv(store.object_path(kind, content_id), target, recursive=True)
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
    pinned = _reached(_pins(store), known)
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
    found = [
        Garbage(store.record_path(r["recipe_id"], r["numerics"]["id"]), 0, "its record has expired")
        for r in expired
    ]
    for kind, content_id in _objects(store):
        path = store.object_path(kind, content_id)
        if (kind, content_id) not in reached and _is_older(store, path, moment, grace_s):
            found.append(Garbage(path, _size(store, path), "no record, alias or instance has it"))
    found += _leftover_uploads(store, moment, grace_s)
    found += _leftover_leases(store, moment, grace_s)
    finished = {_place(record) for record in kept}
    found += _leftover_work(store, finished, moment, grace_s)
    found += _leftover_remote_work(store, finished)
    found += _leftover_notes(store)
    return sorted(found, key=lambda one: one.path)


def delete(store: ArtifactStore, found: list[Garbage]) -> None:
    """Deletes what `garbage` has found, records before what they name, notes after it."""
    for one in sorted(found, key=lambda one: "/recipes/" not in one.path):
        is_here = Path(one.path).is_relative_to(store.scratch)
        filesystem = LocalFileSystem() if is_here else store.filesystem
        filesystem.rm(one.path, recursive=True)
    for note in _leftover_notes(store):
        Path(note.path).unlink(missing_ok=True)


def _records(store: ArtifactStore) -> tuple[list[dict[str, Any]], list[Damage]]:
    """Returns the records that make sense, and what is wrong with the others."""
    good, bad = [], []
    fs = store.filesystem
    for path in sorted(fs.glob(f"{store.root}/recipes/*/*/artifact.json")):
        try:
            record = json.loads(fs.cat_file(path))
            place = path.split("/")[-3], path.split("/")[-2]
            if _place(record) != place or _class_id(record) != place[1]:
                raise ValueError(f"it is the record of {_place(record)}, and lies under {place}")
            inputs = record["recipe"]["inputs"].values()
            str([_key(record), record["inventory"], *map(_key, inputs)])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            remedy = "Restore it from a copy, or remove it: the next run computes its recipe again."
            bad.append(Damage(path, f"no valid record ({error})", remedy))
        else:
            good.append(record)
    return good, bad


def _objects(store: ArtifactStore) -> Iterator[Key]:
    for path in sorted(store.filesystem.glob(f"{store.root}/objects/*/*")):
        kind, content_id = path.rstrip("/").split("/")[-2:]
        yield kind, content_id


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
    pins = {key for key in _objects(store) if key[1] in named}
    for path in store.filesystem.find(f"{store.root}/refs"):
        if "/latest/" in path:
            pins.add(_key(json.loads(store.filesystem.cat_file(path))))
    return pins


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
                yield Garbage(upload, _size(store, upload), "another upload was published")


def _leftover_leases(
    store: ArtifactStore, now: datetime.datetime, grace_s: float
) -> Iterator[Garbage]:
    """Yields leases that their holders have neither renewed nor given back."""
    for path in sorted(store.filesystem.glob(f"{store.root}/leases/*/*.json")):
        if _is_older(store, path, now, grace_s):
            yield Garbage(path, _size(store, path), "its holder is gone")


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
                    yield Garbage(path, _tree_bytes(Path(path)), "its build is on record")
            elif age > grace_s:
                for attempt in sorted(work.glob("attempt-*")):
                    yield Garbage(str(attempt), _tree_bytes(attempt), "its process is gone")


def _leftover_remote_work(
    store: ArtifactStore, finished: set[tuple[str, str]]
) -> Iterator[Garbage]:
    """Yields what builds that are on record have left in a remote store."""
    for place in [] if store.is_local else sorted(store.filesystem.glob(f"{store.root}/work/*/*")):
        if tuple(str(place).split("/")[-2:]) in finished:
            for path in unpinned(store.filesystem, str(place)):
                yield Garbage(path, _size(store, path), "its build is on record")


def _leftover_notes(store: ArtifactStore) -> Iterator[Garbage]:
    """Yields what machines noted of objects that are gone."""
    known = set(_objects(store))
    for path in sorted((store.scratch / VERIFIED).glob("*/*/*")):
        if (path.parent.name, path.name.removesuffix(".json")) not in known:
            yield Garbage(str(path), path.stat().st_size, "its object is gone")


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
    newest = max(map(store.filesystem.modified, store.filesystem.find(path)), default=None)
    return newest is None or (now - newest).total_seconds() > age_s


def _size(store: ArtifactStore, path: str) -> int:
    return int(store.filesystem.du(path))


def _tree_bytes(directory: Path) -> int:
    if directory.is_file():
        return directory.stat().st_size
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
