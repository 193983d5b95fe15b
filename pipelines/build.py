"""The factory: a catalog of datasets and experiments in, Dagster definitions out.

    [data, raw_corpus] -> [data, tokenizer] -> [data, tokenized_corpus] -> [data, token_cache, L<n>]
    [data, token_cache, L<n>] -> [data, token_cache_copy, L<n>]   where the file asks for a copy
    [data, token_cache, L<n>] -> [run, checkpoint] -> [run, eval_report] and [run, hf_model]

Experiments on one dataset share its assets. There are no partitions: Dagster shows partitioned
assets as fresh when they are stale.

    LEVANTER_CATALOG     directory with `datasets/` and `experiments/`; else the one of this package
                         and, beside it, `$DAGSTER_HOME/catalog`, where `levanter train` writes
    LEVANTER_OVERRIDES   JSON, `{"nano": ["trainer.num_train_steps=50"]}`: reaches code servers and
                         run workers, which are processes that no command line reaches

Nothing here imports JAX: loading the definitions must take no longer than importing Dagster.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import dagster as dg

from assets.checkpoint import checkpoint_assets
from assets.corpus import corpus_assets
from assets.evaluation import evaluation_assets
from assets.export import export_assets
from assets.tokenizer import tokenizer_assets
from assets.tokens import cache_assets, tokenized_assets
from modeling.experiment import Catalog, ConfigError, load_catalog
from pipelines.automation import build_sensors, rerun_conditions
from pipelines.jobs import build_jobs
from resources.head_start import HeadStartResource
from resources.io_manager import ReferenceIOManagerFactory
from resources.launcher import LauncherResource
from resources.secrets import scrub
from resources.store import StoreResource

CATALOG = Path(__file__).resolve().parent


def build_defs(catalog: Catalog, **overrides: Any) -> dg.Definitions:
    """Returns the definitions of every dataset and experiment in `catalog`.

    Args:
        catalog: what to build.
        overrides: resources by name (`store`, `launcher`, `head_start`, `io_manager`) in place
            of the usual ones.
    """
    resources: dict[str, Any] = {
        "store": StoreResource(),
        "launcher": LauncherResource(),
        "head_start": HeadStartResource(),
        "io_manager": ReferenceIOManagerFactory(),
    }
    if unknown := sorted(set(overrides) - set(resources)):
        raise TypeError(f"no resource is named {unknown[0]!r}; there are {sorted(resources)}.")
    made = _assets(catalog)
    rerun = rerun_conditions(catalog)
    return dg.Definitions(
        assets=[
            one.map_asset_specs(
                lambda spec: spec.replace_attributes(automation_condition=rerun(spec.key))
            )
            for one in made
            if not isinstance(one, dg.AssetChecksDefinition)
        ],
        asset_checks=[one for one in made if isinstance(one, dg.AssetChecksDefinition)],
        jobs=build_jobs(catalog),
        sensors=build_sensors(catalog),
        resources=resources | overrides,
        # A step of its own process costs 6 to 8 CPU seconds of imports, and the stages that need
        # isolation have it: see `resources.launcher`.
        executor=dg.in_process_executor,
    )


def catalog_from_environment(environ: Mapping[str, str] = os.environ) -> Catalog:
    """Returns the catalog that the environment names, overrides applied.

    Raises:
        ConfigError: a file or an override is wrong; without the secrets that it may hold.
    """
    try:
        return _catalog(environ)
    except ConfigError as error:
        raise ConfigError(scrub(str(error))) from None


def _catalog(environ: Mapping[str, str]) -> Catalog:
    overrides = _overrides(environ.get("LEVANTER_OVERRIDES"))
    if named := environ.get("LEVANTER_CATALOG"):
        if not (Path(named) / "experiments").is_dir():
            raise ConfigError(
                f"LEVANTER_CATALOG: {named} has no `experiments` directory. Give the directory "
                f"that holds `datasets/` and `experiments/`."
            )
        return load_catalog(Path(named), overrides)
    home = environ.get("DAGSTER_HOME")
    return load_catalog([CATALOG, Path(home) / "catalog"] if home else CATALOG, overrides)


def with_overrides(environ: Mapping[str, str], experiment: str, changes: Sequence[str]) -> str:
    """Returns the value of `LEVANTER_OVERRIDES` that adds `changes` to what `environ` has."""
    known = dict(_overrides(environ.get("LEVANTER_OVERRIDES")))
    known[experiment] = [*known.get(experiment, ()), *changes]
    return json.dumps(known)


def _overrides(text: str | None) -> Mapping[str, Sequence[str]]:
    if not text:
        return {}
    try:
        overrides = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"LEVANTER_OVERRIDES: not valid JSON ({error}): {text!r}") from None
    is_right = isinstance(overrides, dict) and all(
        isinstance(changes, list) and all(isinstance(change, str) for change in changes)
        for changes in overrides.values()
    )
    if not is_right:
        raise ConfigError(
            f"LEVANTER_OVERRIDES: expected lists of assignments by experiment, such as "
            f'{{"nano": ["trainer.num_train_steps=50"]}}, found {text!r}.'
        )
    return overrides


def _assets(catalog: Catalog) -> list[dg.AssetsDefinition | dg.AssetChecksDefinition]:
    made: list[dg.AssetsDefinition | dg.AssetChecksDefinition] = []
    for name, dataset in catalog.datasets.items():
        made += corpus_assets(name, dataset)
        made += tokenizer_assets(name, dataset)
        on_it = {key: e for key, e in catalog.experiments.items() if e.dataset == name}
        made += tokenized_assets(name, dataset, on_it)
        for cache in dataset.sequence_lengths:
            made += cache_assets(name, cache, dataset)
    for name, experiment in catalog.experiments.items():
        made += checkpoint_assets(name, experiment)
        made += evaluation_assets(name, experiment)
        made += export_assets(name, experiment)
    return made
