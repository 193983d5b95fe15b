"""The artifact store as a resource: which URL, and how an artifact becomes a materialization.

The URL is the resource's `url`, else `LEVANTER_STORE`, else `$DAGSTER_HOME/store`. Builds of a
remote store (`gs://...`) happen under `LEVANTER_SCRATCH`, else `$DAGSTER_HOME/scratch`.

`materialize` is what every asset body calls: it looks the recipe up first, so a stage whose recipe
is on record computes nothing, from whatever entry route the run came. It also tags the run, so that
the UI's list of runs can be searched by what came of them: `content/nano/checkpoint=CONTENT_ID`.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import dagster as dg
from pydantic import Field

from modeling import recipes
from modeling.artifacts import Artifact, ArtifactStore, Build, Recipe
from resources import materializations, panel, provenance
from resources.scratch import scratch_directory

CONTENT_TAG = "content/"
_MOST_ROWS = 12
"""Of a table that stands before the plain facts; the panel shows every row of each."""


class StoreLocationError(ValueError):
    """Nothing says where artifacts are kept."""


def store_url(configured: str | None = None, environ: Mapping[str, str] = os.environ) -> str:
    """Returns where artifacts are kept."""
    if url := configured or environ.get("LEVANTER_STORE"):
        # Absolute, since code servers and run workers may stand in another directory.
        return url if "://" in url else str(Path(url).absolute())
    if home := environ.get("DAGSTER_HOME"):
        return str(Path(home) / "store")
    raise StoreLocationError(
        "no artifact store: neither LEVANTER_STORE nor DAGSTER_HOME is set. Set LEVANTER_STORE to "
        "a directory or an fsspec URL (gs://bucket/path), or DAGSTER_HOME to use its store."
    )


def open_store(configured: str | None = None) -> ArtifactStore:
    """Opens the store that the environment names."""
    return ArtifactStore(store_url(configured), scratch=scratch_directory())


class StoreResource(dg.ConfigurableResource):
    """Content-addressed artifacts under one URL."""

    url: str | None = Field(
        default=None,
        description="Directory or fsspec URL; else LEVANTER_STORE, else DAGSTER_HOME/store.",
    )

    def open(self) -> ArtifactStore:
        """Returns the store itself."""
        return open_store(self.url)

    def materialize(
        self,
        recipe: Recipe,
        build: Build,
        *,
        numerics: Mapping[str, Any] | None = None,
        begun_as: Sequence[Recipe] = (),
        show: Callable[[Artifact, Path], Mapping[str, Any]] = lambda artifact, files: {},
        key: dg.AssetKey | None = None,
    ) -> dg.MaterializeResult[Artifact]:
        """Returns the artifact of `recipe`, built unless it is on record, as an asset returns it.

        Args:
            recipe: what to make of which inputs.
            build: makes it; not called when it is on record.
            numerics: the numerics class, for products of floating-point training.
            begun_as: see `ArtifactStore.materialize`.
            show: gives metadata of the stage's own, beside the ids and facts of every artifact.
            key: the asset, where the step that runs makes several.

        Raises:
            DamagedArtifactError: it is on record, but a file of it is damaged.
        """
        store = self.open()
        context = dg.AssetExecutionContext.get()
        key = key or context.asset_key
        before = materializations.latest(context.instance, key)
        artifact, is_new, seconds = provenance.materialize(
            store,
            recipe,
            build,
            numerics=numerics,
            begun_as=begun_as,
            report=lambda said: context.log.info(str(said)),
        )
        files = store.local(artifact.kind, artifact.content_id)
        record = store.record(artifact.recipe_id, artifact.numerics)
        shown = show(artifact, files)
        tables = {name: value for name, value in shown.items() if _is_long(value)}
        shown = {name: value for name, value in shown.items() if name not in tables}
        shown_id = artifact.content_id[:12]
        run_tags = {f"{CONTENT_TAG}{key.to_user_string()}": artifact.content_id}
        context.instance.add_run_tags(context.run.run_id, run_tags)
        return dg.MaterializeResult(
            value=artifact,
            data_version=dg.DataVersion(artifact.content_id),
            metadata={
                "id": shown_id,
                "was": "built" if is_new else "reused",
                "why": _why(store, before, recipe, numerics),
                "seconds": round(seconds, 2),
                **shown,
                "inputs": _input_table(record),
                **panel.flat({"cost": record["provenance"].get("cost", {})}),
                "path": dg.MetadataValue.path(artifact.uri.removeprefix("file://")),
                "content_id": artifact.content_id,
                "recipe_id": artifact.recipe_id,
                "numerics": artifact.numerics,
                # Beside the other facts; a picture of one stands for its figures.
                **(panel.flat(artifact.facts) | dict(shown)),
                materializations.CONFIG: context.assets_def.metadata_by_key[key][
                    materializations.CONFIG
                ],
                **tables,
            },
        )

    def files(self, artifact: Artifact) -> Path:
        """Returns a local directory with the artifact's files."""
        return self.open().local(artifact.kind, artifact.content_id)

    def input_of(self, artifact: Artifact, name: str) -> Artifact:
        """Returns the artifact that `artifact` was made from as its input `name`.

        So evaluation and export find tokenizer and cache with the checkpoint as only parent: an
        edge of their own would let Dagster pair a new tokenizer with an old checkpoint.
        """
        store = self.open()
        inputs = _inputs(store, artifact)
        if name not in inputs:
            raise ValueError(
                f"{artifact.kind} {artifact.content_id[:12]} has no input `{name}`; it has "
                f"{sorted(inputs)}."
            )
        return _made(store, artifact, inputs[name], store.records_by_object())

    def inputs_above(self, artifact: Artifact) -> dict[str, Artifact]:
        """Returns everything that `artifact` was made from, directly or not, by kind.

        A checkpoint that training began from is no such thing: its rows and tokenizer may be
        others. `input_of` finds it.
        """
        store = self.open()
        known = store.records_by_object()
        above: dict[str, Artifact] = {}
        waiting = [artifact]
        while waiting:
            child = waiting.pop(0)
            for role, wanted in _inputs(store, child).items():
                if role == recipes.INITIAL_CHECKPOINT:
                    continue
                made = _made(store, child, wanted, known)
                # The nearest counts: a tokenizer may be of an older corpus that gave the same one.
                if made.kind not in above:
                    above[made.kind] = made
                    waiting.append(made)
        return above

    def initial_checkpoint_id(self, checkpoint: Artifact) -> str | None:
        """Returns the content id of the checkpoint that training began from, if it did."""
        inputs = _inputs(self.open(), checkpoint)
        if recipes.INITIAL_CHECKPOINT not in inputs:
            return None
        return inputs[recipes.INITIAL_CHECKPOINT]["content_id"]


def _made(
    store: ArtifactStore,
    child: Artifact,
    wanted: Mapping[str, str],
    known: Mapping[tuple[str, str], Sequence[Mapping[str, Any]]],
) -> Artifact:
    """Returns an input of an artifact, by its record."""
    records = known.get((wanted["kind"], wanted["content_id"]))
    if not records:
        raise ValueError(
            f"{child.kind} {child.content_id[:12]} was made from {wanted['kind']} "
            f"{wanted['content_id'][:12]}, of which {store.url} has no record. "
            f"Materialize the assets above it again."
        )
    return store.from_record(records[-1])


def _is_long(value: Any) -> bool:
    return isinstance(value, dg.TableMetadataValue) and len(value.records) > _MOST_ROWS


def _why(
    store: ArtifactStore,
    before: materializations.Materialization | None,
    recipe: Recipe,
    numerics: Mapping[str, Any] | None,
) -> str:
    """Returns what is new since the asset's last materialization, field by field."""
    if before is None:
        return "first materialization"
    try:
        changes = materializations.recipe_changes(store, before, recipe, numerics)
    except FileNotFoundError:
        return "the record of the last materialization is not in this store"
    return "; ".join(changes) or "asked for again; nothing has changed"


def _inputs(store: ArtifactStore, artifact: Artifact) -> Mapping[str, Mapping[str, str]]:
    return store.record(artifact.recipe_id, artifact.numerics)["recipe"]["inputs"]


def _input_table(record: Mapping[str, Any]) -> dg.TableMetadataValue:
    """Returns what an artifact was made from, and which id of it its recipe holds."""
    inputs: Mapping[str, Mapping[str, str]] = record["recipe"]["inputs"]
    columns = ("kind", "content_id", "used")
    rows = ((role, *(given[name] for name in columns)) for role, given in inputs.items())
    return panel.table(("input", *columns), rows)
