"""Jobs, for the command line and CI.

`<experiment>` makes it and everything above it, `<experiment>__on_demand` the same with training
begun before the corpus is tokenized, `<dataset>__data` the assets of a dataset.
"""

from typing import TYPE_CHECKING

import dagster as dg

from modeling.experiment import Catalog
from resources.head_start import ON_DEMAND_TAG

if TYPE_CHECKING:
    from dagster._core.definitions.unresolved_asset_job_definition import (
        UnresolvedAssetJobDefinition,
    )

ON_DEMAND = "__on_demand"
MODEL_STAGES = ("checkpoint", "eval_report", "hf_model")


def build_jobs(catalog: Catalog) -> list["UnresolvedAssetJobDefinition"]:
    """Returns a job for each experiment, named by it, and one for each dataset's own assets."""
    experiments = [
        dg.define_asset_job(
            name,
            dg.AssetSelection.assets(*([name, stage] for stage in MODEL_STAGES)).upstream(),
            description=experiment.description or None,
        )
        for name, experiment in catalog.experiments.items()
    ]
    on_demand = [
        dg.define_asset_job(
            f"{name}{ON_DEMAND}",
            dg.AssetSelection.assets(*([name, stage] for stage in MODEL_STAGES)).upstream(),
            description="As the job without the suffix, but training begins while the corpus is "
            "still being tokenized.",
            tags={ON_DEMAND_TAG: name},
        )
        for name in catalog.experiments
    ]
    datasets = [
        dg.define_asset_job(
            f"{name}__data",
            dg.AssetSelection.key_prefixes([name]),
            description=dataset.description or None,
        )
        for name, dataset in catalog.datasets.items()
    ]
    return experiments + on_demand + datasets
