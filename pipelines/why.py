"""`levanter why`: what made an asset stale, field by field, and what its last making was for.

Three things decide whether an asset is up to date: the *data* it is made of, its *code* (the
version of its transform and the configuration that it reads), and the *environment* where that can
change bits (library versions that a recipe names, the numerics class). What does not decide, the
commit and other packages, is told apart from what does.
"""

import datetime
from collections.abc import Iterator, Mapping
from typing import Any

import dagster as dg

from modeling.artifacts import ArtifactStore
from modeling.difference import differences
from modeling.experiment import Catalog
from pipelines.plan import out_of_date
from pipelines.staleness import Staleness
from resources import materializations, provenance
from resources.materializations import Materialization


def why(
    key: dg.AssetKey,
    defs: dg.Definitions,
    instance: dg.DagsterInstance,
    store: ArtifactStore,
    catalog: Catalog,
) -> Iterator[str]:
    """Yields what is to be said of an asset, a line each.

    Raises:
        ValueError: the catalog has no such asset.
    """
    graph = defs.resolve_asset_graph()
    known = {asset.to_user_string() for asset in graph.toposorted_asset_keys}
    if key.to_user_string() not in known:
        raise ValueError(f"no asset is named {key.to_user_string()!r}; there are {sorted(known)}.")
    above = dg.AssetSelection.assets(key).upstream().resolve(graph)
    wanted = [asset for asset in graph.toposorted_asset_keys if asset in above]
    stale = out_of_date(defs, instance, store, catalog, wanted)
    yield from _now(key, stale)
    made = materializations.latest(instance, key)
    if made is not None:
        yield from _then(made)
        yield from _surroundings(store, made)


def _now(key: dg.AssetKey, stale: Mapping[dg.AssetKey, Staleness]) -> Iterator[str]:
    """Yields the asset's own causes, then those above it that have a cause of their own."""
    if key not in stale:
        yield f"{key.to_user_string()} is fresh: its data, code and environment are those it has."
        return
    name, found = key.to_user_string(), stale[key]
    if found.status == "UPSTREAM":
        yield f"{name} is as it was defined, but made of something that is not up to date:"
    else:
        yield f"{name} is {found.status.lower()}:"
    yield from (f"  {cause}" for cause in found.causes or ("never made",))
    for parent, found in stale.items():
        if parent != key and found.status != "UPSTREAM":
            causes = [cause for cause in found.causes if not cause.endswith("is not up to date")]
            for cause in causes or ["never made"]:
                yield f"  above it, {parent.to_user_string()} is {found.status.lower()}: {cause}"


def _then(made: Materialization) -> Iterator[str]:
    when = datetime.datetime.fromtimestamp(made.timestamp, datetime.UTC)
    yield f"Last materialized {when:%Y-%m-%d %H:%M:%S} UTC by run {made.run_id}, {_how(made)}."
    yield f"  because: {made.metadata.get('why', 'not recorded')}"


def _how(made: Materialization) -> str:
    built = "and computed" if made.metadata.get("was") == "built" else "and found on record"
    return f"{built}: content {made.content_id[:12]}, recipe {made.recipe_id[:12]}"


def _surroundings(store: ArtifactStore, made: Materialization) -> Iterator[str]:
    """Yields what is otherwise here than where the bytes were computed, and decides nothing."""
    try:
        then: Mapping[str, Any] = store.record(made.recipe_id, made.numerics)["provenance"]
    except FileNotFoundError:
        return
    now = provenance.collect([])
    changes = [
        *differences(
            *({"commit": str(side["git"]["commit"])[:12]} for side in (then, now)),
        ),
        *differences(
            then["packages"], {name: now["packages"].get(name) for name in then["packages"]}
        ),
    ]
    if changes:
        yield "Other than when it was computed, but no cause by itself:"
        yield from (f"  {change}" for change in changes)
