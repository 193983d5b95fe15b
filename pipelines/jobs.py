"""Jobs, for the command line and CI: each natural unit of an experiment, and a dataset's own.

    <experiment>             everything: the model, its report, its export, and all above them
    <experiment>__on_demand  the same, with training begun before the corpus is tokenized
    <experiment>__tokenize   the rows that it trains on, from the corpus down
    <experiment>__pretrain   the checkpoint
    <experiment>__evaluate   the report on the checkpoint
    <experiment>__export     the Hugging Face model
    <dataset>__data          the dataset's assets at every length

Each job takes along all that its last assets are made of. So it works on an empty store too, and
costs next to nothing where that is on record: every asset looks itself up before it computes.
"""

from typing import TYPE_CHECKING

import dagster as dg

from modeling.experiment import Catalog, ConfigError, ExperimentConfig
from resources.head_start import ON_DEMAND_TAG

if TYPE_CHECKING:
    from dagster._core.definitions.unresolved_asset_job_definition import (
        UnresolvedAssetJobDefinition,
    )

ON_DEMAND = "__on_demand"
DATA = "__data"
TOKENIZE = "__tokenize"
MODEL_STAGES = ("checkpoint", "eval_report", "hf_model")
_MODEL_UNITS = {"__pretrain": "checkpoint", "__evaluate": "eval_report", "__export": "hf_model"}


def build_jobs(catalog: Catalog) -> list["UnresolvedAssetJobDefinition"]:
    """Returns the jobs of every experiment and of every dataset.

    Raises:
        ConfigError: one of them is named like a job.
    """
    for name in (*catalog.experiments, *catalog.datasets):
        if experiment_of(name) != name or name.endswith(DATA):
            raise ConfigError(
                f"{name!r}: this name would be that of a job of another; let it not end in "
                f"{'__' + name.rpartition('__')[2]}."
            )
    jobs = [
        job for name, experiment in catalog.experiments.items() for job in _jobs(name, experiment)
    ]
    return jobs + [
        dg.define_asset_job(
            f"{name}{DATA}",
            dg.AssetSelection.key_prefixes([name]),
            description=dataset.description or None,
        )
        for name, dataset in catalog.datasets.items()
    ]


def experiment_of(job: str) -> str:
    """Returns the experiment whose fields a job reads: its name without the unit's."""
    for unit in (ON_DEMAND, TOKENIZE, *_MODEL_UNITS):
        if job.endswith(unit):
            return job.removesuffix(unit)
    return job


def _jobs(name: str, experiment: ExperimentConfig) -> list["UnresolvedAssetJobDefinition"]:
    models = {unit: [name, stage] for unit, stage in _MODEL_UNITS.items()}
    units = {TOKENIZE: [experiment.dataset, "token_cache", experiment.cache_name]} | models
    everything = dg.AssetSelection.assets(*models.values()).upstream()
    return [
        dg.define_asset_job(name, everything, description=experiment.description or None),
        dg.define_asset_job(
            f"{name}{ON_DEMAND}",
            everything,
            description="As the job without the suffix, but training begins while the corpus is "
            "still being tokenized.",
            tags={ON_DEMAND_TAG: name},
        ),
        *(
            dg.define_asset_job(
                f"{name}{unit}",
                dg.AssetSelection.assets(key).upstream(),
                description=f"{'/'.join(key)}, with what it is made of where that is not up to "
                "date.",
            )
            for unit, key in units.items()
        ),
    ]
