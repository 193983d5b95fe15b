"""`levanter run` and `levanter status`: plan, run, and tell, over the persistent instance.

The run is an ordinary Dagster run of just the assets that are not up to date (`pipelines.plan`), in
this process; within it every stage looks itself up, so one that comes out unchanged ends the
rebuilding.
"""

import contextlib
import dataclasses
import os
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import dagster as dg

from modeling.artifacts import ArtifactStore
from modeling.experiment import Catalog, ConfigError
from pipelines.build import build_defs, catalog_from_environment, with_overrides
from pipelines.jobs import ON_DEMAND
from pipelines.plan import out_of_date, wanted_assets
from pipelines.replay import Replay, replay
from pipelines.staleness import Staleness
from pipelines.terminal import Terminal, terminal_logger
from pipelines.verify import Verdict, record_of_asset, verify
from pipelines.why import why
from resources import materializations
from resources.abandoned import PROCESS, end_abandoned_runs, process_tags
from resources.head_start import require_on_demand
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


def run(
    experiment: str,
    overrides: Sequence[str],
    *,
    on_demand: bool = False,
    check_reproducible: bool = False,
) -> int:
    """Makes what is missing or stale of `experiment`; returns the exit code.

    Args:
        experiment: a name of the catalog.
        overrides: assignments to its fields for this run.
        on_demand: begins to train while the corpus is still being tokenized.
        check_reproducible: makes all that was computed a second time, and fails where bytes differ.
    """
    if overrides:
        # In the environment, where run workers and the stages' own processes find them too.
        changed = with_overrides(os.environ, experiment, overrides)
        os.environ["LEVANTER_OVERRIDES"] = changed
    catalog = catalog_from_environment()
    _require(experiment, catalog)
    if on_demand:
        require_on_demand(catalog.experiments[experiment])
    job = f"{experiment}{ON_DEMAND}" if on_demand else experiment
    defs = dg.Definitions.merge(
        build_defs(catalog), dg.Definitions(loggers={"terminal": terminal_logger})
    )
    started = time.monotonic()
    with dg.DagsterInstance.get() as instance, _terminal() as terminal:
        store = open_store()
        wanted = wanted_assets(defs, experiment)
        stale = out_of_date(defs, instance, store, catalog, wanted)
        terminal.plan(experiment, wanted, stale)
        succeeded = not stale or _execute(defs, instance, job, list(stale), terminal)
        rows = [_row(instance, store, key, stale, terminal.seconds) for key in wanted]
        terminal.table(experiment, rows, store, time.monotonic() - started)
    if succeeded and check_reproducible:
        built = [row.key.to_user_string() for row in rows if row.state == "built"]
        return max([verify_asset(asset) for asset in built], default=0)
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
        wanted = (
            wanted_assets(defs, experiment) if experiment else list(graph.toposorted_asset_keys)
        )
        stale = out_of_date(defs, instance, store, catalog, wanted)
        rows = [_row(instance, store, key, stale, {}) for key in wanted]
        Terminal(sys.stdout).status(rows, stale)
    return 0


def explain(asset: str) -> int:
    """Prints why an asset is not up to date, and what it was made for."""
    catalog = catalog_from_environment()
    defs = build_defs(catalog)
    with dg.DagsterInstance.get() as instance:
        key = dg.AssetKey(asset.split("/"))
        for line in why(key, defs, instance, open_store(), catalog):
            sys.stdout.write(f"{line}\n")
    return 0


def verify_asset(reference: str, steps: tuple[int, int] | None = None) -> int:
    """Makes an artifact again, compares, and prints the verdict; returns 1 if it is not the same.

    Args:
        reference: an asset's key, for what it is now; or an alias, or digits of a content id.
        steps: for a checkpoint, makes only the updates after the first of them up to the second.
    """
    store, today = open_store(), catalog_from_environment()
    log = _log_file("verify")
    with dg.DagsterInstance.get() as instance, _terminal() as terminal:
        if "/" in reference:
            record = record_of_asset(dg.AssetKey(reference.split("/")), instance, store)
        else:
            record = store.records_by_object()[store.resolve_object(reference)][-1]
        terminal.say(
            f"Making {record['kind']} {record['content_id'][:12]} again, from its records; what "
            f"that prints is in {log}."
        )
        verdict: Verdict | Replay
        with _output_to(log):
            if steps is None:
                verdict = verify(record, instance, store, today, say=terminal.say)
            else:
                verdict = replay(record, steps, instance, store, say=terminal.say)
        for line in verdict.lines():
            terminal.say(line)
    return 0 if verdict.is_equal else 1


def object_of(store: ArtifactStore, reference: str, *, kind: str | None = None) -> tuple[str, str]:
    """Returns kind and content id of an asset's current artifact, or of what the store resolves.

    Args:
        store: where artifacts are on record.
        reference: an asset's key, or see `ArtifactStore.resolve_object`.
        kind: that it has to be of, if only one makes sense.

    Raises:
        ValueError: nothing has that name, or several have.
    """
    if "/" not in reference:
        return store.resolve_object(reference, kind=kind)
    with dg.DagsterInstance.get() as instance:
        made = materializations.latest(instance, dg.AssetKey(reference.split("/")))
    if made is None:
        raise ValueError(
            f"{reference}: no such asset has been materialized; see `levanter status`."
        )
    if kind not in (None, made.kind):
        raise ValueError(f"{reference} is no {kind}, but a {made.kind}.")
    return made.kind, made.content_id


def _require(experiment: str, catalog: Catalog) -> None:
    if experiment not in catalog.experiments:
        raise ConfigError(
            f"no experiment is named {experiment!r}; there are {sorted(catalog.experiments)}."
        )


def _execute(
    defs: dg.Definitions,
    instance: dg.DagsterInstance,
    job: str,
    keys: list[dg.AssetKey],
    terminal: Terminal,
) -> bool:
    """Runs a job on `keys`; what the stages print goes to a file."""
    log, run_id = _log_file(job), str(uuid.uuid4())
    end_abandoned_runs(instance)
    terminal.show_events()
    with _output_to(log):
        result = defs.resolve_job_def(job).execute_in_process(
            instance=instance,
            run_id=run_id,
            asset_selection=keys,
            raise_on_error=False,
            run_config={"loggers": {"terminal": {"config": {}}}},
            tags={"levanter/command": "run"} | process_tags(run_id, PROCESS, [os.getpid()]),
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
    made = materializations.latest(instance, key)
    name = key.to_user_string()
    if name in seconds and made is not None:
        state = str(made.metadata["was"])
    elif key in stale:
        state = stale[key].status.lower()
    else:
        state = "fresh"
    record = None
    if made and store.contains(made.kind, made.content_id):
        record = store.record(made.recipe_id, made.numerics)
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


def _log_file(name: str) -> Path:
    """Returns where this process keeps what its stages print."""
    log = Path(os.environ["DAGSTER_HOME"]) / "logs" / f"{name}-{os.getpid()}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    return log


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
