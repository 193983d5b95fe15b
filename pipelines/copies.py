"""Where the checkpoints of experiments are: on this machine, in a remote store, published.

A checkpoint is named by an experiment (`nano`: what it has published, or the last step that it has
saved), by one of its steps that is still there (`nano@1200`), by an artifact's content id, the
first digits of it, or an alias, or by its directory or URL. Whoever looks into one of a remote
store gets a verified copy. None of this loads JAX.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import dagster as dg
from fsspec.implementations.local import LocalFileSystem

from modeling import recipes
from modeling.artifacts import FETCHED, Artifact, ArtifactStore, Recipe
from modeling.experiment import Catalog, ConfigError, ExperimentConfig
from modeling.inventory import INVENTORY, inventory_faults
from modeling.training import pins, reading  # noqa: TID253 (none loads JAX)
from modeling.training.manifest import COMMIT, CheckpointError, Manifest  # noqa: TID253
from modeling.training.remote import RemoteCheckpoints  # noqa: TID253
from pipelines.build import catalog_from_environment
from resources import materializations

_PROGRESS = "progress/checkpoints"


def find(store: ArtifactStore, reference: str) -> Path:
    """Returns a local directory with the checkpoint that is meant.

    Raises:
        ConfigError: nothing has that name.
        CheckpointError: it is in a remote store alone, and damaged there.
    """
    return copies(store, reference)[0].local(store)


@dataclasses.dataclass(frozen=True)
class Copy:
    """A checkpoint at one place: on this machine, or in a remote store."""

    name: str
    """Of the directory."""
    path: Path | None = None
    remote: RemoteCheckpoints | None = None

    @property
    def run(self) -> str:
        """The directory, or URL, of the run's checkpoints."""
        return str(self.path.parent) if self.path else self._remote.url

    @property
    def place(self) -> str:
        """The checkpoint's own directory or URL."""
        return f"{self.run}/{self.name}"

    @property
    def step(self) -> int:
        """Of the state; 0 where the name does not say."""
        return pins.step_of(self.name) or 0

    @property
    def _remote(self) -> RemoteCheckpoints:
        assert self.remote is not None
        return self.remote

    def local(self, store: ArtifactStore) -> Path:
        """Returns a directory on this machine with it, which is copied here if need be."""
        if self.path:
            return self.path
        run = store.scratch / FETCHED / hashlib.sha256(self.run.encode()).hexdigest()[:12]
        if not (run / self.name / COMMIT).exists():
            run.mkdir(parents=True, exist_ok=True)
            self._remote.fetch(self.name, run)
        return run / self.name

    def faults(self) -> Iterator[str]:
        """Yields what is wrong with it, where it is."""
        if self.path:
            yield from faults(self.path)
            return
        try:
            self._remote.verify(self.name)
        except CheckpointError as error:
            yield str(error)

    def manifest(self) -> Manifest:
        """Returns its manifest."""
        return reading.read_manifest(self.path) if self.path else self._remote.manifest(self.name)


def copies(store: ArtifactStore, reference: str) -> list[Copy]:
    """Returns the checkpoint that is meant, at each place where it is, this machine first."""
    name, at, step = reference.partition("@")
    catalog = catalog_from_environment()
    if name in catalog.experiments:  # before a directory of its name, which is `./nano`
        return _of_experiment(store, catalog, name, step if at else None)
    if "://" in reference:
        return [_at_url(reference.rstrip("/"))]
    if Path(reference).is_dir():
        return [_at(_newest_in(Path(reference)))]
    content_id = _content_id(store, reference)
    if not store.contains("checkpoint", content_id):
        raise ConfigError(
            f"{reference}: {content_id[:12]} is no checkpoint; see `levanter lineage`."
        )
    return [_at(store.local("checkpoint", content_id, verified=False))]


def _at(directory: Path) -> Copy:
    return Copy(directory.name, path=directory)


def _at_url(url: str) -> Copy:
    """Returns the checkpoint of a URL, or the newest complete one of a run's URL."""
    run, _, name = url.rpartition("/")
    if pins.step_of(name) is not None:
        return Copy(name, remote=RemoteCheckpoints(run))
    remote = RemoteCheckpoints(url)
    if not (names := remote.names()):
        raise ConfigError(f"{url}: neither a checkpoint nor a place of complete ones.")
    return Copy(names[0], remote=remote)


def _content_id(store: ArtifactStore, reference: str) -> str:
    from pipelines.run import object_of

    try:
        return object_of(store, reference, kind="checkpoint")[1]
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


def _of_experiment(
    store: ArtifactStore, catalog: Catalog, name: str, step: str | None
) -> list[Copy]:
    if step is not None and not step.isdecimal():
        raise ConfigError(f"{name}@{step}: expected the number of a step, such as {name}@100.")
    with dg.DagsterInstance.get() as instance:
        ids = recipe_ids(store, instance, catalog, name)
        made = materializations.latest(instance, dg.AssetKey([name, "checkpoint"]))
    if made is not None and store.contains(made.kind, made.content_id):
        steps = store.record(made.recipe_id, made.numerics)["facts"]["steps"]
        if step is None or int(step) == steps:
            return [_at(store.local(made.kind, made.content_id, verified=False))]
    found = [copy for recipe_id in ids for copy in complete(store, recipe_id)]
    if step is not None:
        found = [copy for copy in found if copy.step == int(step)]
    if not found:
        what = "no checkpoint" if step is None else f"no complete checkpoint of step {step}"
        raise ConfigError(f"{name}: {what} is there; `levanter checkpoint ls {name}` lists them.")
    best = max(found, key=lambda copy: (copy.step, copy.path is not None, _committed_at(copy)))
    return [copy for copy in found if copy.name == best.name]


def _committed_at(copy: Copy) -> float:
    return (copy.path / COMMIT).stat().st_mtime if copy.path else 0.0


def complete(store: ArtifactStore, recipe_id: str, numerics: str = "*") -> Iterator[Copy]:
    """Yields the complete checkpoints of a recipe: those on this machine, then those elsewhere.

    Args:
        store: where to look.
        recipe_id: of a checkpoint, or what stands in for it.
        numerics: the id of the numerics class; all of them by default.
    """
    for path in all_attempts(store, recipe_id, numerics):
        if (path / COMMIT).exists() and not path.parent.name.endswith(pins.REFUSED):
            yield _at(path)
    for remote in remote_runs(store, recipe_id, numerics):
        if not remote.url.endswith(pins.REFUSED):
            yield from (Copy(name, remote=remote) for name in remote.names())


def remote_runs(
    store: ArtifactStore, recipe_id: str, numerics: str = "*"
) -> list[RemoteCheckpoints]:
    """Returns the places in a remote store where a recipe's checkpoints are; none if it is local.

    Args:
        store: as of `complete`.
        recipe_id: as of `complete`.
        numerics: as of `complete`.
    """
    if store.is_local:
        return []
    found = store.filesystem.glob(f"{store.root}/work/{recipe_id}/{numerics}/{_PROGRESS}/*")
    below = [str(path).rstrip("/").removeprefix(store.root) for path in sorted(found)]
    return [RemoteCheckpoints(f"{store.url.rstrip('/')}{path}") for path in below]


def recipe_ids(
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


def all_attempts(store: ArtifactStore, recipe_id: str, numerics: str = "*") -> list[Path]:
    """Returns the directories of a recipe's checkpoints on this machine, complete or not."""
    found = (store.scratch / "work" / recipe_id).glob(f"{numerics}/{_PROGRESS}/*")
    return [path for directory in sorted(found) for path in _attempts(directory)]


def faults(directory: Path) -> Iterator[str]:
    """Yields what is wrong with a checkpoint, and with a published one's further files."""
    found = list(reading.faults(directory))
    yield from found
    if (directory / INVENTORY).exists():
        entries = json.loads((directory / INVENTORY).read_text())["files"]
        for name, what in inventory_faults(LocalFileSystem(), str(directory), entries):
            if not any(name in fault for fault in found):
                yield f"{directory / name} {what}"
