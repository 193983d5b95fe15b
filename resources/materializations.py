"""What Dagster's event log knows of an asset's last materialization, and what is new since.

Each materialization keeps the slice of the configuration that its stage read, so that "stale"
can be told by field (`tokenizer.vocab_size 4096 -> 8192`) and not just by a digest that differs.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import dagster as dg

from modeling import canonical
from modeling.artifacts import BEFORE, ArtifactStore, Recipe
from modeling.difference import differences

CONFIG = "config"
"""Metadata of a definition, and of a materialization, that holds the slice of the configuration."""
_CODE_VERSION, _DATA_VERSION = "dagster/code_version", "dagster/data_version"
_INPUT = "dagster/input_data_version/"


@dataclasses.dataclass(frozen=True)
class Materialization:
    """One materialization, as far as staleness goes."""

    key: dg.AssetKey
    run_id: str
    timestamp: float
    """Seconds since 1970."""
    code_version: str
    data_version: str
    inputs: Mapping[str, str]
    """Data version by asset, such as `nano/tokenizer`."""
    config: Any
    """None if it was made before configurations were kept."""
    metadata: Mapping[str, Any]

    @property
    def kind(self) -> str:
        """The artifact's kind."""
        return kind_of(self.key)

    @property
    def content_id(self) -> str:
        """What the asset is now."""
        return str(self.metadata["content_id"])

    @property
    def recipe_id(self) -> str:
        """How it came to be that."""
        return str(self.metadata["recipe_id"])

    @property
    def numerics(self) -> str:
        """The id of the numerics class."""
        return str(self.metadata["numerics"])


def kind_of(key: dg.AssetKey) -> str:
    """Returns the kind of artifact that an asset is."""
    # The caches of a dataset have a key each: [dataset, token_cache, L1024].
    return key.path[1]


def latest(instance: dg.DagsterInstance, key: dg.AssetKey) -> Materialization | None:
    """Returns the last materialization of an asset by its stage; None if there was none."""
    event = instance.get_latest_materialization_event(key)
    return _of_event(event) if event is not None else None


def of_run(instance: dg.DagsterInstance, run_id: str) -> list[Materialization]:
    """Returns what the stages of a run have materialized, in that order."""
    events = instance.all_logs(run_id, of_type=dg.DagsterEventType.ASSET_MATERIALIZATION)
    return [made for made in map(_of_event, events) if made is not None]


def _of_event(event: dg.EventLogEntry) -> Materialization | None:
    """Returns a materialization; None of one that no stage of ours has made."""
    made = event.asset_materialization
    if made is None or "content_id" not in made.metadata:
        return None
    tags, metadata = made.tags or {}, {name: item.value for name, item in made.metadata.items()}
    return Materialization(
        made.asset_key,
        event.run_id,
        event.timestamp,
        tags.get(_CODE_VERSION, ""),
        tags.get(_DATA_VERSION, ""),
        {tag.removeprefix(_INPUT): v for tag, v in tags.items() if tag.startswith(_INPUT)},
        metadata.get(CONFIG),
        metadata,
    )


def definition_changes(made: Materialization, code_version: str, config: Any) -> list[str]:
    """Returns what differs in an asset's definition from when it was made, field by field."""
    before, after = (version.partition("-")[0] for version in (made.code_version, code_version))
    changes = [] if before == after else [f"transform version {before} -> {after}"]
    if made.config is None:
        return changes or ["its definition has changed; the older one was not kept"]
    return changes + [str(change) for change in differences(made.config, config)]


def recipe_changes(
    store: ArtifactStore,
    made: Materialization,
    recipe: Recipe,
    numerics: Mapping[str, Any] | None,
) -> list[str]:
    """Returns what differs between the recipe on record of a materialization and another one."""
    before = store.record(made.recipe_id, made.numerics)
    recipes = before["recipe"], recipe.plain()
    changes = [*differences(recipes[0]["params"], recipes[1]["params"])]
    changes += differences(*({"transform version": one["version"]} for one in recipes))
    changes += differences(*({"input": _short_ids(one["inputs"])} for one in recipes))
    after = canonical.plain(dict(numerics or {}))
    # What was begun elsewhere and ended in a class is found by that class: nothing has changed.
    ended_in = {k: v for k, v in before["numerics"]["class"].items() if k != BEFORE}
    changes += differences(*({"numerics": one} for one in (ended_in, after)))
    return [str(change) for change in changes]


def _short_ids(inputs: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    return {role: given["used"][:12] for role, given in inputs.items()}
