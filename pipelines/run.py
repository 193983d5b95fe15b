"""`levanter run` and `levanter status`: plan, run, and tell, over the persistent instance.

The plan is what is missing or stale through all layers, plus a look at two things that no
orchestrator knows: whether the source's files have changed, and whether the bytes of a fresh asset
are still in the store. The run is an ordinary Dagster run of just those assets, in this process;
within it every stage looks itself up, so one that comes out unchanged ends the rebuilding.
"""

import contextlib
import dataclasses
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import dagster as dg

from modeling import recipes
from modeling.artifacts import ArtifactStore
from modeling.experiment import Catalog, ConfigError
from pipelines.abandoned import end_abandoned_runs, this_process
from pipelines.build import build_defs, catalog_from_environment
from pipelines.jobs import MODEL_STAGES
from pipelines.staleness import Staleness, stale_assets
from pipelines.terminal import Terminal, terminal_logger
from resources.store import open_store


@dataclasses.dataclass(frozen=True)
class Row:
    """One asset in the table that ends a run."""

    key: dg.AssetKey
    state: str
    """`built`, `reused` (found on record), `fresh` (not in the plan), `missing` or `stale`."""
    record: Mapping[str, Any] | None
    """Of the artifact that is current now."""
    seconds: float | None
    parity: float | None = None


def run(experiment: str, overrides: Sequence[str]) -> int:
    """Makes what is missing or stale of `experiment`; returns the exit code."""
    if overrides:
        # In the environment, where run workers and the stages' own processes find them too.
        known = json.loads(os.environ.get("LEVANTER_OVERRIDES") or "{}")
        known[experiment] = [*known.get(experiment, ()), *overrides]
        os.environ["LEVANTER_OVERRIDES"] = json.dumps(known)
    catalog = catalog_from_environment()
    _require(experiment, catalog)
    defs = dg.Definitions.merge(
        build_defs(catalog), dg.Definitions(loggers={"terminal": terminal_logger})
    )
    started = time.monotonic()
    with dg.DagsterInstance.get() as instance, _terminal() as terminal:
        store = open_store()
        wanted = _wanted(defs, experiment)
        stale = _stale(defs, instance, store, catalog, wanted)
        terminal.plan(experiment, wanted, stale)
        succeeded = not stale or _execute(defs, instance, experiment, list(stale), terminal)
        rows = [_row(instance, store, key, stale, terminal.seconds) for key in wanted]
        terminal.table(experiment, rows, store, time.monotonic() - started)
    return 0 if succeeded else 1


def status(experiment: str | None) -> int:
    """Prints each asset's state and why; of one experiment or of the whole catalog."""
    catalog = catalog_from_environment()
    if experiment is not None:
        _require(experiment, catalog)
    defs = build_defs(catalog)
    with dg.DagsterInstance.get() as instance:
        store = open_store()
        graph = defs.resolve_asset_graph()
        wanted = _wanted(defs, experiment) if experiment else list(graph.toposorted_asset_keys)
        stale = _stale(defs, instance, store, catalog, wanted)
        rows = [_row(instance, store, key, stale, {}) for key in wanted]
        Terminal(sys.stdout).status(rows, stale)
    return 0


def content_id_of(store: ArtifactStore, reference: str) -> str:
    """Returns the content id of an asset's current artifact, or of anything the store resolves.

    Raises:
        ValueError: nothing has that name.
    """
    if "/" not in reference:
        return store.resolve(reference)
    with dg.DagsterInstance.get() as instance:
        metadata = _latest(instance, dg.AssetKey(reference.split("/")))
    if metadata is None:
        raise ValueError(
            f"{reference}: no such asset has been materialized; see `levanter status`."
        )
    return metadata["content_id"]


def _require(experiment: str, catalog: Catalog) -> None:
    if experiment not in catalog.experiments:
        raise ConfigError(
            f"no experiment is named {experiment!r}; there are {sorted(catalog.experiments)}."
        )


def _wanted(defs: dg.Definitions, experiment: str) -> list[dg.AssetKey]:
    """Returns the experiment's assets and everything above them, parents first."""
    graph = defs.resolve_asset_graph()
    stages = dg.AssetSelection.assets(*([experiment, stage] for stage in MODEL_STAGES))
    selected = stages.upstream().resolve(graph)
    return [key for key in graph.toposorted_asset_keys if key in selected]


def _stale(
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
    metadata = _latest(instance, key)
    if metadata is None:
        return None
    if not store.contains(metadata["kind"], metadata["content_id"]):
        return Staleness("MISSING", (f"its bytes are gone from {store.url}",))
    if metadata["kind"] == "raw_corpus":
        from modeling.data import corpus

        dataset = catalog.datasets[key.path[0]]
        listing = corpus.scan(dataset.source, validation=dataset.validation)
        if recipes.corpus_recipe(dataset, listing.root).id != metadata["recipe_id"]:
            return Staleness("STALE", ("the source's files have changed",))
    return None


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


def _latest(instance: dg.DagsterInstance, key: dg.AssetKey) -> dict[str, Any] | None:
    """Returns kind, content id, recipe id and numerics of the asset's last materialization."""
    event = instance.get_latest_materialization_event(key)
    made = event.asset_materialization if event else None
    if made is None or "content_id" not in made.metadata:
        return None
    names = ("content_id", "recipe_id", "numerics")
    values = {name: str(made.metadata[name].value) for name in names}
    return values | {"kind": "token_cache" if "token_cache" in key.path else key.path[-1]}


def _execute(
    defs: dg.Definitions,
    instance: dg.DagsterInstance,
    experiment: str,
    keys: list[dg.AssetKey],
    terminal: Terminal,
) -> bool:
    """Runs the job of `experiment` on `keys`; what the stages print goes to a file."""
    log = Path(os.environ["DAGSTER_HOME"]) / "logs" / f"{experiment}-{os.getpid()}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    end_abandoned_runs(instance)
    terminal.show_events()
    with _output_to(log):
        result = defs.resolve_job_def(experiment).execute_in_process(
            instance=instance,
            asset_selection=keys,
            raise_on_error=False,
            run_config={"loggers": {"terminal": {"config": {}}}},
            tags={"levanter/command": "run"} | this_process(),
        )
    if not result.success:
        terminal.failure(log)
    return result.success


def _row(
    instance: dg.DagsterInstance,
    store: ArtifactStore,
    key: dg.AssetKey,
    stale: Mapping[dg.AssetKey, Staleness],
    seconds: Mapping[str, float],
) -> Row:
    metadata = _latest(instance, key)
    name = key.to_user_string()
    if name in seconds and metadata is not None:
        event = instance.get_latest_materialization_event(key)
        assert event is not None
        assert event.asset_materialization is not None
        state = str(event.asset_materialization.metadata["was"].value)
    elif key in stale:
        state = stale[key].status.lower()
    else:
        state = "fresh"
    record = None
    if metadata and store.contains(metadata["kind"], metadata["content_id"]):
        record = store.record(metadata["recipe_id"], metadata["numerics"])
    return Row(key, state, record, seconds.get(name), _parity(instance, key))


def _parity(instance: dg.DagsterInstance, key: dg.AssetKey) -> float | None:
    """Returns the largest logit difference that the export's check has found."""
    if key.path[-1] != "hf_model":
        return None
    check = dg.AssetCheckKey(key, "logits_match")
    record = instance.event_log_storage.get_asset_check_execution_history(check, limit=1)
    event = record[0].event if record else None
    evaluation = event.asset_check_evaluation if event else None
    if evaluation is None or "max_abs_logit_difference" not in evaluation.metadata:
        return None
    value = evaluation.metadata["max_abs_logit_difference"].value
    assert isinstance(value, int | float)
    return float(value)


@contextlib.contextmanager
def _terminal() -> Iterator[Terminal]:
    """Yields a terminal on a copy of standard output, which stays when the stages' own is moved."""
    stream: TextIO
    with os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8") as stream:
        yield Terminal(stream)


@contextlib.contextmanager
def _output_to(path: Path) -> Iterator[None]:
    """Sends what this process and its children print to a file."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    with path.open("ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(kept[0], 1)
        os.dup2(kept[1], 2)
        for copy in kept:
            os.close(copy)
