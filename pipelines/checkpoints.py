"""`levanter checkpoint ls|show|diff|export|verify|pin|unpin`: what training has saved.

A checkpoint is named by an experiment (`nano`: what it has published, or the last step that it has
saved), by one of its steps that is still there (`nano@1200`), by an artifact's content id, the
first digits of it, or an alias, or by its directory. None of this loads JAX, and none of it builds
the model.
"""

import dataclasses
import datetime
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import dagster as dg
from fsspec.implementations.local import LocalFileSystem

from modeling import recipes
from modeling.artifacts import Artifact, ArtifactStore, Recipe
from modeling.experiment import Catalog, ConfigError, ExperimentConfig
from modeling.inventory import INVENTORY, inventory_faults
from modeling.training import inspecting, pins, reading  # noqa: TID253 (none loads JAX)
from modeling.training.manifest import (  # noqa: TID253
    AVERAGES_PREFIX,
    COMMIT,
    MODEL_PREFIX,
    CheckpointError,
    Manifest,
)
from pipelines.build import catalog_from_environment
from pipelines.upkeep import human_bytes
from resources import materializations

_PROGRESS = "progress/checkpoints"
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
    directory: str


def ls(store: ArtifactStore, experiment: str | None, *, verify: bool, as_json: bool) -> int:
    """Lists checkpoints in progress and published, of one experiment or all in the store."""
    catalog = catalog_from_environment()
    names = [experiment] if experiment is not None else sorted(catalog.experiments)
    rows, builders = [], []
    records = [record for record in store.records() if record["kind"] == "checkpoint"]
    with dg.DagsterInstance.get() as instance:
        wanted = {name: _recipe_ids(store, instance, catalog, name) for name in names}
    for name, ids in wanted.items():
        for recipe_id in ids:
            rows += _in_progress(store, name, recipe_id, verify=verify)
            builders += [f"{name} is being trained by {it}." for it in store.builders(recipe_id)]
        own = [record for record in records if record["recipe_id"] in ids]
        rows += _published(store, own, verify=verify)
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
    directory = find(store, reference)
    manifest = reading.read_manifest(directory)
    leaves = sorted(manifest.leaves, key=lambda leaf: leaf.path)
    if as_json:
        shown = [
            {"path": x.path, "dtype": x.dtype, "shape": x.shape, "axes": x.axes, "sha256": x.sha256}
            for x in leaves
        ]
        _say(json.dumps(_summary(directory, manifest) | {"leaves": shown}, indent=2))
        return 0
    lines = [
        (x.path, inspecting.described(x), human_bytes(inspecting.num_bytes(x)), x.sha256[:12])
        for x in leaves
    ]
    for line in _table([("array", "dtype[named shape]", "size", "sha-256"), *lines]):
        _say(line)
    for name, value in _summary(directory, manifest).items():
        _say(f"{name}: {json.dumps(value)}" if isinstance(value, dict) else f"{name}: {value}")
    return 0


def diff(store: ArtifactStore, one: str, other: str) -> int:
    """Compares two checkpoints array by array; returns 0 if they are the same, else 1."""
    directories = find(store, one), find(store, other)
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
    num = inspecting.export(find(store, reference), target, weights)
    _say(f"{target}: {num} arrays, {human_bytes(target.stat().st_size)}.")
    return 0


def verify(store: ArtifactStore, reference: str) -> int:
    """Reads every byte of a checkpoint; returns 1 and names each damaged file if any is."""
    directory = find(store, reference)
    faults = list(_faults(directory))
    for fault in faults:
        _say(fault)
    if not faults:
        manifest = reading.read_manifest(directory)
        num = len(manifest.leaves)
        _say(f"{directory}: all {num} arrays are as written; content id {manifest.content_id}.")
    return 1 if faults else 0


def pin(store: ArtifactStore, reference: str, why: str) -> int:
    """Keeps a saved step, whatever the run retires."""
    directory, step = _step_in_progress(store, reference)
    pins.pin(directory.parent, step, why)
    _say(f"{directory}: step {step} is kept until it is unpinned.")
    return 0


def unpin(store: ArtifactStore, reference: str) -> int:
    """Lets a saved step be retired again."""
    directory, step = _step_in_progress(store, reference)
    pins.unpin(directory.parent, step)
    _say(f"{directory}: step {step} is not pinned any more.")
    return 0


def find(store: ArtifactStore, reference: str) -> Path:
    """Returns the directory of the checkpoint that is meant.

    Raises:
        ConfigError: nothing has that name.
    """
    name, at, step = reference.partition("@")
    catalog = catalog_from_environment()
    if name in catalog.experiments:  # before a directory of its name, which is `./nano`
        return _of_experiment(store, catalog, name, step if at else None)
    if Path(reference).is_dir():
        return _newest_in(Path(reference))
    content_id = _content_id(store, reference)
    if not store.contains("checkpoint", content_id):
        raise ConfigError(
            f"{reference}: {content_id[:12]} is no checkpoint; see `levanter lineage`."
        )
    return store.local("checkpoint", content_id, verified=False)


def _content_id(store: ArtifactStore, reference: str) -> str:
    from pipelines.run import content_id_of

    try:
        return content_id_of(store, reference)
    except ValueError as error:
        known = sorted(catalog_from_environment().experiments)
        raise ConfigError(
            f"{error} It is neither an experiment, of which there are {known}, nor a directory."
        ) from None


def _newest_in(directory: Path) -> Path:
    """Returns a checkpoint's directory, or the newest complete one of a run's directory."""
    if (directory / COMMIT).exists() or pins.step_of(directory.name) is not None:
        return directory
    found = [path for path in _attempts(directory) if (path / COMMIT).exists()]
    if not found:
        raise ConfigError(f"{directory}: neither a checkpoint nor a directory of complete ones.")
    return max(found, key=lambda path: pins.step_of(path.name) or 0)


def _of_experiment(store: ArtifactStore, catalog: Catalog, name: str, step: str | None) -> Path:
    if step is not None and not step.isdecimal():
        raise ConfigError(f"{name}@{step}: expected the number of a step, such as {name}@100.")
    with dg.DagsterInstance.get() as instance:
        ids = _recipe_ids(store, instance, catalog, name)
        made = materializations.latest(instance, dg.AssetKey([name, "checkpoint"]))
    if made is not None and store.contains(made.kind, made.content_id):
        steps = store.record(made.recipe_id, made.numerics)["facts"]["steps"]
        if step is None or int(step) == steps:
            return store.local(made.kind, made.content_id, verified=False)
    found = [path for recipe_id in ids for path in _all_attempts(store, recipe_id)]
    found = [path for path in found if (path / COMMIT).exists()]
    if step is not None:
        found = [path for path in found if pins.step_of(path.name) == int(step)]
    if not found:
        what = "no checkpoint" if step is None else f"no complete checkpoint of step {step}"
        raise ConfigError(f"{name}: {what} is there; `levanter checkpoint ls {name}` lists them.")
    return max(
        found, key=lambda path: (pins.step_of(path.name) or 0, (path / COMMIT).stat().st_mtime)
    )


def _step_in_progress(store: ArtifactStore, reference: str) -> tuple[Path, int]:
    directory = find(store, reference)
    step = pins.step_of(directory.name)
    if step is None:
        raise ConfigError(
            f"{reference} is a published artifact, which no run retires. `levanter alias` gives it "
            f"a name, which keeps it when records expire."
        )
    return directory, step


def _recipe_ids(
    store: ArtifactStore, instance: dg.DagsterInstance, catalog: Catalog, name: str
) -> list[str]:
    """Returns the recipes under which an experiment, as it is now defined, keeps checkpoints.

    That of its token cache as it is now, and those that stand in for it while that is being made.
    """
    if name not in catalog.experiments:
        raise ConfigError(
            f"no experiment is named {name!r}; there are {sorted(catalog.experiments)}."
        )
    experiment = catalog.experiments[name]
    latest = {
        kind: _latest(store, instance, [experiment.dataset, *kind.split("/")])
        for kind in ("raw_corpus", "tokenizer", f"token_cache/{experiment.cache_name}")
    }
    corpus, tokenizer, cache = latest.values()
    wanted: list[Recipe] = []
    if cache is not None:
        wanted.append(recipes.checkpoint_recipe(experiment, cache))
    if corpus is not None and tokenizer is not None:
        wanted.append(_stand_in(experiment, catalog, corpus, tokenizer))
    return [recipe.id for recipe in wanted]


def _stand_in(
    experiment: ExperimentConfig, catalog: Catalog, corpus: Artifact, tokenizer: Artifact
) -> Recipe:
    tokenized = recipes.tokenized_recipe(catalog.datasets[experiment.dataset], corpus, tokenizer)
    return recipes.checkpoint_stand_in(experiment, tokenized.id)


def _latest(
    store: ArtifactStore, instance: dg.DagsterInstance, key: Sequence[str]
) -> Artifact | None:
    made = materializations.latest(instance, dg.AssetKey(key))
    if made is None or not store.contains(made.kind, made.content_id):
        return None
    return store.from_record(store.record(made.recipe_id, made.numerics))


def _attempts(directory: Path) -> list[Path]:
    return [path for path in directory.glob("step-*") if pins.step_of(path.name) is not None]


def _all_attempts(store: ArtifactStore, recipe_id: str) -> list[Path]:
    found = (store.scratch / "work" / recipe_id).glob(f"*/{_PROGRESS}/*")
    return [path for directory in sorted(found) for path in _attempts(directory)]


def _in_progress(
    store: ArtifactStore, name: str, recipe_id: str, *, verify: bool
) -> Iterator[Saved]:
    for path in sorted(_all_attempts(store, recipe_id), key=lambda path: path.name):
        try:
            yield _saved(name, path, verify=verify)
        except FileNotFoundError:  # retired meanwhile
            if path.exists():
                raise


def _saved(name: str, path: Path, *, verify: bool) -> Saved:
    step = pins.step_of(path.name)
    assert step is not None
    files = [file.stat() for file in path.rglob("*") if file.is_file()]
    why = pins.pinned(path.parent).get(step)
    committed = path / COMMIT
    born = committed.stat().st_mtime if committed.exists() else path.stat().st_mtime
    return Saved(
        f"{name}@{step}",
        step,
        sum(file.st_size for file in files),
        datetime.datetime.now().timestamp() - born,
        _state(path, verify=verify) if committed.exists() else "incomplete",
        "" if why is None else f"pinned: {why}",
        path.parent.name[:12],
        str(path),
    )


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
            state = "DAMAGED" if any(True for _ in _faults(files)) else "verified"
        yield Saved(
            key[1][:12],
            record["facts"]["steps"],
            sum(entry["size"] for entry in inventory["files"]),
            (now - born).total_seconds(),
            state,
            f"published as {aliases[key[1]]}" if key[1] in aliases else "published",
            record["numerics"]["id"][:12],
            path,
        )


def _faults(directory: Path) -> Iterator[str]:
    """Yields what is wrong with a checkpoint, and with a published one's further files."""
    found = list(reading.faults(directory))
    yield from found
    if (directory / INVENTORY).exists():
        entries = json.loads((directory / INVENTORY).read_text())["files"]
        for name, what in inventory_faults(LocalFileSystem(), str(directory), entries):
            if not any(name in fault for fault in found):
                yield f"{directory / name} {what}"


def _summary(directory: Path, manifest: Manifest) -> dict[str, Any]:
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
        "directory": str(directory),
        "step": manifest.step,
        "cursor": dict(manifest.cursor),
        "numerics": manifest.config.get("numerics", "not on record"),
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
        row.numerics,
        row.directory,
    )


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
