"""The plan: which assets are not up to date, through all layers, and why.

To what Dagster knows (`pipelines.staleness`) this adds what no orchestrator can: whether the files
have changed that a corpus or a tokenizer is taken from, whether the bytes of a fresh asset are
still in the store, whether they are of the numerics class that would be computed in here, and
whether its checks have passed.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import dagster as dg

from modeling import canonical, recipes
from modeling.artifacts import EXACT, ArtifactStore, numerics_digest
from modeling.difference import differences
from modeling.experiment import Catalog
from pipelines.jobs import MODEL_STAGES
from pipelines.staleness import Staleness, stale_assets
from resources import materializations
from resources.digests import open_memo
from resources.launcher import LauncherResource
from resources.materializations import Materialization

if TYPE_CHECKING:
    from modeling.data.config import DatasetConfig

_MOST_FILES = 5


def wanted_assets(defs: dg.Definitions, experiment: str) -> list[dg.AssetKey]:
    """Returns the experiment's assets and everything above them, parents first."""
    graph = defs.resolve_asset_graph()
    stages = dg.AssetSelection.assets(*([experiment, stage] for stage in MODEL_STAGES))
    selected = stages.upstream().resolve(graph)
    return [key for key in graph.toposorted_asset_keys if key in selected]


def out_of_date(
    defs: dg.Definitions,
    instance: dg.DagsterInstance,
    store: ArtifactStore,
    catalog: Catalog,
    wanted: Sequence[dg.AssetKey],
) -> dict[dg.AssetKey, Staleness]:
    """Returns what is not up to date among `wanted`, parents first."""
    known = stale_assets(defs, instance)
    graph = defs.resolve_asset_graph()
    found: dict[dg.AssetKey, Staleness] = {}
    for key in wanted:
        above = [parent for parent in wanted if parent in graph.get(key).parent_keys]
        why = known.get(key) or _changed_outside(key, instance, store, catalog)
        why = why or _of_another_class(key, instance, store, catalog)
        why = why or _unchecked(key, instance, graph.get_check_keys_for_assets({key}))
        if why is None and (changed := [p.to_user_string() for p in above if p in found]):
            why = Staleness("UPSTREAM", tuple(f"{name} is not up to date" for name in changed))
        if why is not None:
            found[key] = why
    return found


def _changed_outside(
    key: dg.AssetKey, instance: dg.DagsterInstance, store: ArtifactStore, catalog: Catalog
) -> Staleness | None:
    """Returns what the orchestrator cannot know of a fresh asset, if anything has happened."""
    made = materializations.latest(instance, key)
    if made is None:
        return None
    if not store.contains(made.kind, made.content_id):
        return Staleness("MISSING", (f"its bytes are gone from {store.url}",))
    found = {"raw_corpus": _corpus_now, "tokenizer": tokenizer_now}.get(made.kind)
    if found is None:
        return None
    # Imported here, as all that reads data is: Dagster loads this module with its code.
    from modeling.data.pretrained import PretrainedTokenizerError
    from modeling.data.sources import SourceError

    try:
        now = found(catalog.datasets[key.path[0]])
    except (SourceError, PretrainedTokenizerError) as error:
        return Staleness("STALE", (f"its files cannot be listed: {error}",))
    if now is None or now.recipe_id == made.recipe_id:
        return None
    return Staleness("STALE", _changed_files(store, made, now.files))


def _of_another_class(
    key: dg.AssetKey, instance: dg.DagsterInstance, store: ArtifactStore, catalog: Catalog
) -> Staleness | None:
    """Returns what rounds otherwise here than where a fresh model was trained or evaluated."""
    made = materializations.latest(instance, key)
    if made is None or made.numerics == EXACT or key.path[0] not in catalog.experiments:
        return None
    try:
        now = LauncherResource().numerics(catalog.experiments[key.path[0]])
    except RuntimeError as error:
        return Staleness("STALE", (f"its numerics class cannot be compared: {error}",))
    if numerics_digest(now) == made.numerics:
        return None
    record = store.record(made.recipe_id, made.numerics)
    changes = differences(record["numerics"]["class"], canonical.plain(now))
    told = "; ".join(map(str, changes))
    return Staleness("STALE", (f"the same experiment, in another numerics class: {told}",))


class Outside(NamedTuple):
    """What a root of the graph would be made of now."""

    recipe_id: str
    files: Mapping[str, str]
    """The digest of each file, by name."""


def _corpus_now(dataset: "DatasetConfig") -> Outside:
    from modeling.data import corpus

    listing = corpus.scan(dataset.named_sources, validation=dataset.validation, memo=open_memo())
    files = {file.logical_path: file.sha256 for file in listing.files}
    return Outside(recipes.corpus_recipe(dataset, listing.root).id, files)


def tokenizer_now(dataset: "DatasetConfig") -> Outside | None:
    """Returns what a tokenizer would be made of; None where no path names its files.

    Raises:
        PretrainedTokenizerError: the files are not there, or are no tokenizer's.
    """
    from modeling.data import tokenizer

    files = tokenizer.file_digests(dataset.tokenizer)
    root = tokenizer.files_root(files)
    return Outside(recipes.tokenizer_recipe(dataset, None, root).id, files) if files else None


def _changed_files(
    store: ArtifactStore, made: Materialization, files: Mapping[str, str]
) -> tuple[str, ...]:
    """Returns which files are new, changed or gone since, the first few by name."""
    leaves = store.record(made.recipe_id, made.numerics)["leaves"]
    before = {
        name.removeprefix("files/"): leaf
        for name, leaf in leaves.items()
        if name.startswith("files/")
    }
    by_change = {
        "new": [name for name in files if name not in before],
        "gone": [name for name in before if name not in files],
        "changed": [name for name in before if files.get(name, before[name]) != before[name]],
    }
    told = [
        f"{len(names)} of its files {'is' if len(names) == 1 else 'are'} {change}: "
        + ", ".join(sorted(names)[:_MOST_FILES])
        + (", ..." if len(names) > _MOST_FILES else "")
        for change, names in by_change.items()
        if names
    ]
    return tuple(told) or ("its files are ordered or split otherwise",)


def _unchecked(
    key: dg.AssetKey, instance: dg.DagsterInstance, checks: Iterable[dg.AssetCheckKey]
) -> Staleness | None:
    """Returns which checks a made asset has not passed: failed, or prevented by a kill."""
    made = instance.get_latest_materialization_event(key)
    if made is None:
        return None
    lacking = []
    for check in sorted(checks, key=lambda check: check.name):
        found = instance.event_log_storage.get_asset_check_execution_history(check, limit=1)
        event = found[0].event if found else None
        verdict = event.asset_check_evaluation if event else None
        target = verdict.target_materialization_data if verdict else None
        if not (verdict and verdict.passed and target and target.run_id == made.run_id):
            lacking.append(f"it has not passed the check {check.name}")
    return Staleness("STALE", tuple(lacking)) if lacking else None
