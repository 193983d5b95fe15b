"""Jobs, for the command line and CI: `<experiment>` with everything above it, `<dataset>__data`."""

from typing import TYPE_CHECKING

import dagster as dg

from modeling.experiment import Catalog

if TYPE_CHECKING:
    from dagster._core.definitions.unresolved_asset_job_definition import (
        UnresolvedAssetJobDefinition,
    )

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
    datasets = [
        dg.define_asset_job(
            f"{name}__data",
            dg.AssetSelection.key_prefixes([name]),
            description=dataset.description or None,
        )
        for name, dataset in catalog.datasets.items()
    ]
    return experiments + datasets
