"""Looks after an artifact store: `check` reads every byte of it and says what is wrong.

What is damaged can be set aside, so that the next run makes it anew; nothing is changed unasked. A
record holds its own digest and that of its object's inventory, and the inventory those of the
files: no byte can change unseen unless record, inventory and file are changed to fit.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from modeling.artifacts import (
    UPLOAD,
    ArtifactStore,
    by_object,
    is_key,
    numerics_digest,
    set_aside_path,
)
from modeling.inventory import (
    INVENTORY,
    DamagedArtifactError,
    inventory_faults,
    read_inventory,
)
from modeling.progress import Meter, Report, ignore

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


def check(store: ArtifactStore, *, report: Report = ignore) -> list[Damage]:
    """Reads every object, record and alias, and returns what is wrong, in the order of paths."""
    on_record, found = records(store)
    known = by_object(on_record)
    objects = list(object_keys(store))
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
    for record in on_record:
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
    remove_if_empty(store, source)
    return target


def remove_if_empty(store: ArtifactStore, path: str) -> None:
    """Removes a directory without files, on a file system that has directories."""
    if store.filesystem.exists(path) and not store.filesystem.find(path):
        store.filesystem.rm(path, recursive=True)


def records(store: ArtifactStore) -> tuple[list[dict[str, Any]], list[Damage]]:
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


def object_keys(store: ArtifactStore) -> Iterator[Key]:
    """Yields the keys of all objects, whole or not."""
    for path in sorted(store.filesystem.glob(f"{store.root}/objects/*/*")):
        kind, content_id = path.rstrip("/").split("/")[-2:]
        if is_key(kind, content_id):
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
        f"({'whole' if key_of(given) in whole else 'lost as well'})"
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
    if key_of(record) not in objects:
        yield Damage(
            path,
            f"names {record['kind']} {record['content_id'][:12]}, which is not stored",
            f"Run again: {_how_to_rebuild(record, whole)}",
        )
    for name, given in sorted(record["recipe"]["inputs"].items()):
        if key_of(given) not in known:
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


def key_of(record: Mapping[str, Any]) -> Key:
    """Returns the object that a record, or an input of one, is about."""
    return record["kind"], record["content_id"]


def place_of(record: Mapping[str, Any]) -> tuple[str, str]:
    """Returns the directories that a record lies in: its recipe's id, and its numerics class's."""
    return record["recipe_id"], record["numerics"]["id"]


def _class_id(record: Mapping[str, Any]) -> str:
    return numerics_digest(record["numerics"]["class"] or None)
