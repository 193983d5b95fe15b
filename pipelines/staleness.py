"""Which assets are out of date, and why: the one module that uses a private Dagster interface.

Dagster's own answer reaches one layer: when a tokenizer's vocabulary changes, only the tokenizer is
stale, and what is made of it becomes so after the tokenizer has been made again. `stale_assets`
closes that over the graph, as a person thinks of it, and says what Dagster cannot: which field of
the configuration differs from the one that the asset was made with.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import dagster as dg
from dagster._core.definitions.data_version import (
    CachingStaleStatusResolver,
    StaleCause,
    StaleCauseCategory,
    StaleStatus,
)
from dagster._core.loader import LoadingContext

from resources import materializations

if TYPE_CHECKING:
    from dagster._core.definitions.assets.graph.base_asset_graph import BaseAssetNode


@dataclasses.dataclass(frozen=True)
class Staleness:
    """Why an asset is not up to date."""

    status: str
    """`MISSING`: never materialized. `STALE`: its own definition or an input has changed.
    `UPSTREAM`: only something further up has, so it may turn out unchanged."""
    causes: tuple[str, ...]


class _Loading(LoadingContext):
    def __init__(self, instance: dg.DagsterInstance) -> None:
        self._instance = instance
        self._loaders: dict = {}

    @property
    def instance(self) -> dg.DagsterInstance:
        return self._instance

    @property
    def loaders(self) -> dict:
        return self._loaders


def stale_assets(
    defs: dg.Definitions, instance: dg.DagsterInstance
) -> dict[dg.AssetKey, Staleness]:
    """Returns every asset that is not up to date, causes included, in the order of the graph."""
    graph = defs.resolve_asset_graph()
    resolver = CachingStaleStatusResolver(instance, graph, _Loading(instance))
    found: dict[dg.AssetKey, Staleness] = {}
    for key in graph.toposorted_asset_keys:
        status = resolver.get_status(key)
        above = sorted(parent for parent in graph.get(key).parent_keys if parent in found)
        if status == StaleStatus.FRESH and not above:
            continue
        causes = [
            told
            for cause in resolver.get_stale_causes(key)
            for told in _told(cause, graph.get(key), instance)
        ]
        causes += [f"{parent.to_user_string()} is not up to date" for parent in above]
        name = "UPSTREAM" if status == StaleStatus.FRESH else status.value
        found[key] = Staleness(name, tuple(causes))
    return found


def describe(stale: dict[dg.AssetKey, Staleness]) -> Sequence[str]:
    """Returns a line for each asset, for a terminal."""
    return [
        f"{key.to_user_string()}: {why.status.lower()}: {'; '.join(why.causes) or 'never made'}"
        for key, why in stale.items()
    ]


def _told(cause: StaleCause, node: "BaseAssetNode", instance: dg.DagsterInstance) -> Iterator[str]:
    """Yields a cause in terms of fields and content ids."""
    made = materializations.latest(instance, node.key)
    parent = cause.dependency_asset_key
    if cause.category == StaleCauseCategory.CODE and made is not None:
        config = node.metadata[materializations.CONFIG].value
        yield from materializations.definition_changes(made, node.code_version or "", config)
    elif cause.category == StaleCauseCategory.DATA and made is not None and parent is not None:
        name, now = parent.to_user_string(), materializations.latest(instance, parent)
        before, after = made.inputs.get(name, ""), now.data_version if now else ""
        yield f"{name} {before[:12] or 'unknown'} -> {after[:12] or 'never made'}"
    else:
        yield cause.reason
