"""`levanter checkpoint ls|show|diff|export|verify|pin|unpin`: what training has saved.

`copies` says how a checkpoint is named, and where it is found. None of this loads JAX, and none of
it builds the model.
"""

import dataclasses
import datetime
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import dagster as dg

from modeling.artifacts import BEFORE, ArtifactStore
from modeling.experiment import ConfigError
from modeling.inventory import INVENTORY
from modeling.training import inspecting, pins, reading  # noqa: TID253 (none loads JAX)
from modeling.training.manifest import (  # noqa: TID253
    AVERAGES_PREFIX,
    COMMIT,
    MODEL_PREFIX,
    CheckpointError,
    Manifest,
)
from pipelines import copies
from pipelines.build import catalog_from_environment
from pipelines.upkeep import human_bytes

_PARTS = {
    MODEL_PREFIX: "model",
    AVERAGES_PREFIX: "averages",
    "opt_state": "optimizer",
    "key": "PRNG key",
    "step": "counter of steps",
}
_COLUMNS = ("checkpoint", "step", "size", "age", "state", "kept", "class", "directory")


@dataclasses.dataclass(frozen=True)
class Saved:
    """One checkpoint in the list."""

    name: str
    """By which other commands know it."""
    step: int
    num_bytes: int
    age_s: float
    state: str
    """`verified`, `complete` (each file is there in its size), `incomplete` or `DAMAGED`."""
    kept: str
    """Why it is never retired; empty if it may be."""
    numerics: str
    """The first digits of the numerics class."""
    numerics_before: Sequence[Mapping[str, Any]]
    """Other classes that it was begun in, `{"class": ..., "until": step}`, oldest first."""
    directory: str


def ls(store: ArtifactStore, experiment: str | None, *, verify: bool, as_json: bool) -> int:
    """Lists checkpoints in progress and published, of one experiment or all in the store."""
    catalog = catalog_from_environment()
    names = [experiment] if experiment is not None else sorted(catalog.experiments)
    rows, builders = [], []
    records = [record for record in store.records() if record["kind"] == "checkpoint"]
    with dg.DagsterInstance.get() as instance:
        wanted = {name: copies.recipe_ids(store, instance, catalog, name) for name in names}
    for name, ids in wanted.items():
        for recipe_id in ids:
            rows += _in_progress(store, name, recipe_id, verify=verify)
            rows += _in_store(store, name, recipe_id, verify=verify)
            builders += [f"{name} is being trained by {it}." for it in store.builders(recipe_id)]
        own = [record for record in records if record["recipe_id"] in ids]
        rows += _published(store, own, verify=verify)
    if experiment is None:
        known = {recipe_id for ids in wanted.values() for recipe_id in ids}
        others = [record for record in records if record["recipe_id"] not in known]
        rows += _published(store, others, verify=verify)
    if as_json:
        _say(json.dumps([dataclasses.asdict(row) for row in rows], indent=2))
        return 0
    for line in _table([_COLUMNS, *map(_cells, rows)]) if rows else ():
        _say(line)
    for line in builders:
        _say(line)
    if not rows:
        _say(f"{store.url}: no checkpoints of {', '.join(names)}, saved or published.")
    return 0


def show(store: ArtifactStore, reference: str, *, as_json: bool) -> int:
    """Prints every array of a checkpoint, and what they add up to."""
    copy = copies.copies(store, reference)[0]
    manifest = copy.manifest()  # of one in a remote store, no array is copied
    leaves = sorted(manifest.leaves, key=lambda leaf: leaf.path)
    if as_json:
        shown = [
            {"path": x.path, "dtype": x.dtype, "shape": x.shape, "axes": x.axes, "sha256": x.sha256}
            for x in leaves
        ]
        _say(json.dumps(_summary(copy.place, manifest) | {"leaves": shown}, indent=2))
        return 0
    lines = [
        (x.path, inspecting.described(x), human_bytes(inspecting.num_bytes(x)), x.sha256[:12])
        for x in leaves
    ]
    for line in _table([("array", "dtype[named shape]", "size", "sha-256"), *lines]):
        _say(line)
    for name, value in _summary(copy.place, manifest).items():
        _say(f"{name}: {json.dumps(value) if isinstance(value, dict | list) else value}")
    return 0


def diff(store: ArtifactStore, one: str, other: str) -> int:
    """Compares two checkpoints array by array; returns 0 if they are the same, else 1."""
    directories = copies.find(store, one), copies.find(store, other)
    first, second = map(reading.read_manifest, directories)
    found = list(inspecting.differences(*directories))
    for difference in found:
        _say(f"{difference.path}: {difference.what}")
    if first.cursor != second.cursor:
        _say(f"data: {dict(first.cursor)} in the first, {dict(second.cursor)} in the second")
    paths = {leaf.path for leaf in (*first.leaves, *second.leaves)}
    _say(f"{len(paths) - len(found)} of {len(paths)} arrays are equal.")
    return 0 if first.content_id == second.content_id else 1


def export(store: ArtifactStore, reference: str, target: Path, *, weights: str) -> int:
    """Writes the weights of a checkpoint to one safetensors file."""
    num = inspecting.export(copies.find(store, reference), target, weights)
    _say(f"{target}: {num} arrays, {human_bytes(target.stat().st_size)}.")
    return 0


def verify(store: ArtifactStore, reference: str) -> int:
    """Reads every byte of a checkpoint; returns 1 and names each damaged file if any is."""
    num_damaged = 0
    for copy in copies.copies(store, reference):
        faults = list(copy.faults())
        for fault in faults:
            _say(fault)
        num_damaged += bool(faults)
        if not faults:
            manifest = copy.manifest()
            told = f"all {len(manifest.leaves)} arrays are as written"
            _say(f"{copy.place}: {told}; content id {manifest.content_id}.")
    return 1 if num_damaged else 0


def pin(store: ArtifactStore, reference: str, why: str) -> int:
    """Keeps a saved step, whatever the run retires."""
    for copy, step in _steps_in_progress(store, reference):
        pins.pin(copy.run, step, why)
        _say(f"{copy.place}: step {step} is kept until it is unpinned.")
    return 0


def unpin(store: ArtifactStore, reference: str) -> int:
    """Lets a saved step be retired again."""
    copies = _steps_in_progress(store, reference)
    held = [(copy, step) for copy, step in copies if pins.is_pinned(copy.run, step)]
    for copy, step in held or copies:  # which raises where none is
        pins.unpin(copy.run, step)
        _say(f"{copy.place}: step {step} is not pinned any more.")
    return 0


def _steps_in_progress(store: ArtifactStore, reference: str) -> list[tuple[copies.Copy, int]]:
    """Returns a saved step at each place where it is."""
    found = []
    for copy in copies.copies(store, reference):
        step = pins.step_of(copy.name)
        if step is None:
            raise ConfigError(
                f"{reference} is a published artifact, which no run retires. `levanter alias` "
                f"gives it a name, which keeps it when records expire."
            )
        found.append((copy, step))
    return found


def _in_progress(
    store: ArtifactStore, name: str, recipe_id: str, *, verify: bool
) -> Iterator[Saved]:
    for path in sorted(copies.all_attempts(store, recipe_id), key=lambda path: path.name):
        try:
            yield _saved(name, path, verify=verify)
        except FileNotFoundError:  # retired meanwhile
            if path.exists():
                raise


def _in_store(store: ArtifactStore, name: str, recipe_id: str, *, verify: bool) -> Iterator[Saved]:
    now = datetime.datetime.now(datetime.UTC)
    for remote in copies.remote_runs(store, recipe_id):
        why = remote.pinned()
        for attempt, sizes in reversed(remote.attempts()):
            step = pins.step_of(attempt)
            assert step is not None
            is_committed = COMMIT in sizes
            state, copy = "incomplete", copies.Copy(attempt, remote=remote)
            if is_committed and verify:
                damaged = any(True for _ in copy.faults())
                state = "DAMAGED" if damaged else "verified"
            elif is_committed:
                state = "complete" if remote.is_whole(attempt, sizes) else "DAMAGED"
            born = remote.changed(attempt, COMMIT if is_committed else min(sizes))
            yield Saved(
                _name_of(name, step, f"{remote.url}/{attempt}"),
                step,
                sum(sizes.values()),
                (now - born).total_seconds(),
                state,
                f"pinned: {why[step]}" if step in why else "",
                remote.url.rpartition("/")[2][:12],
                _classes_before(copy) if is_committed else (),
                f"{remote.url}/{attempt}",
            )


def _name_of(experiment: str, step: int, place: str) -> str:
    """Returns by what commands know a checkpoint: one that a run refused, by its place alone."""
    is_refused = place.split("/")[-2].endswith(pins.REFUSED)
    return place if is_refused else f"{experiment}@{step}"


def _saved(name: str, path: Path, *, verify: bool) -> Saved:
    step = pins.step_of(path.name)
    assert step is not None
    files = [file.stat() for file in path.rglob("*") if file.is_file()]
    why = pins.pinned(path.parent).get(step)
    committed = path / COMMIT
    born = committed.stat().st_mtime if committed.exists() else path.stat().st_mtime
    return Saved(
        _name_of(name, step, str(path)),
        step,
        sum(file.st_size for file in files),
        datetime.datetime.now().timestamp() - born,
        _state(path, verify=verify) if committed.exists() else "incomplete",
        "" if why is None else f"pinned: {why}",
        path.parent.name[:12],
        _classes_before(copies.Copy(path.name, path)) if committed.exists() else (),
        str(path),
    )


def _classes_before(copy: copies.Copy) -> Sequence[Mapping[str, Any]]:
    try:
        return copy.manifest().config.get("numerics_before", ())
    except CheckpointError:  # which `state` tells
        return ()


def _state(directory: Path, *, verify: bool) -> str:
    if verify:
        return "DAMAGED" if any(True for _ in reading.faults(directory)) else "verified"
    try:
        manifest = reading.read_manifest(directory)
        for leaf in manifest.leaves:
            for record in (leaf.metadata, *(chunk.file for chunk in leaf.chunks)):
                reading.require_size(directory, record)
    except CheckpointError:
        return "DAMAGED"
    return "complete"


def _published(
    store: ArtifactStore, records: Sequence[dict[str, Any]], *, verify: bool
) -> Iterator[Saved]:
    aliases = {content_id: alias for alias, content_id in store.aliases().items()}
    now = datetime.datetime.now(datetime.UTC)
    for record in records:
        key = record["kind"], record["content_id"]
        if not store.contains(*key):
            continue
        path = store.object_path(*key)
        inventory = json.loads(store.filesystem.cat_file(f"{path}/{INVENTORY}"))
        ended = record["provenance"].get("times", {}).get("ended")
        born = now if ended is None else datetime.datetime.fromisoformat(ended)
        state = "complete"
        if verify:
            files = store.local(*key, verified=False)
            state = "DAMAGED" if any(True for _ in copies.faults(files)) else "verified"
        yield Saved(
            key[1][:12],
            record["facts"]["steps"],
            sum(entry["size"] for entry in inventory["files"]),
            (now - born).total_seconds(),
            state,
            f"published as {aliases[key[1]]}" if key[1] in aliases else "published",
            record["numerics"]["id"][:12],
            record["numerics"]["class"].get(BEFORE, ()),
            path,
        )


def _summary(place: str, manifest: Manifest) -> dict[str, Any]:
    """Returns what a checkpoint's arrays add up to, and where its run stands."""
    parts: dict[str, list[int]] = {}
    for leaf in manifest.leaves:
        part = next(
            (name for prefix, name in _PARTS.items() if leaf.path.startswith(prefix)), "other"
        )
        parts.setdefault(part, []).append(inspecting.num_bytes(leaf))
    totals = {
        name: f"{len(sizes)} arrays, {human_bytes(sum(sizes))}"
        for name, sizes in sorted(parts.items())
    }
    return {
        "directory": place,
        "step": manifest.step,
        "cursor": dict(manifest.cursor),
        "numerics": manifest.config.get("numerics", "not on record"),
        "numerics_before": list(manifest.config.get("numerics_before", ())),
        "content_id": manifest.content_id,
        "roots": manifest.roots,
        "files": ", ".join(record.path for record in manifest.files),
        "total": f"{len(manifest.leaves)} arrays, {human_bytes(sum(map(sum, parts.values())))}",
        **totals,
    }


def _cells(row: Saved) -> tuple[str, ...]:
    return (
        row.name,
        f"{row.step:,}",
        human_bytes(row.num_bytes),
        _age(row.age_s),
        row.state,
        row.kept,
        ", after ".join((row.numerics, *map(_told_class, reversed(row.numerics_before)))),
        row.directory,
    )


def _told_class(one: Mapping[str, Any]) -> str:
    return f"{one['class'][:12]} until step {one['until']}"


def _age(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def _table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = zip(row, widths, strict=True)
        yield "  ".join(cell.ljust(width) for cell, width in cells).rstrip()


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
