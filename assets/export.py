"""The Hugging Face model: what `transformers` opens, with the checkpoint's own logits."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg

from assets.catalog import guarded, stage
from assets.checks import artifact_check, verdict
from modeling import recipes
from modeling.artifacts import Artifact
from modeling.experiment import ExperimentConfig
from modeling.inventory import INVENTORY
from resources import panel
from resources.launcher import LauncherResource
from resources.pools import ACCELERATOR
from resources.store import StoreResource


def export_assets(
    name: str, experiment: ExperimentConfig
) -> list[dg.AssetsDefinition | dg.AssetChecksDefinition]:
    """Returns `[name, hf_model]` and its checks."""
    key = dg.AssetKey([name, "hf_model"])

    @stage(
        "hf_model",
        recipes.export_params(experiment),
        key.path,
        of=experiment,
        kinds={"huggingface"},
        ins={"checkpoint": [name, "checkpoint"]},
        pool=ACCELERATOR,
    )
    def hf_model(
        context: dg.AssetExecutionContext,
        checkpoint: Artifact,
        store: StoreResource,
        launcher: LauncherResource,
    ) -> dg.MaterializeResult[Artifact]:
        """`config.json`, `model.safetensors`, tokenizer files and a model card with the lineage."""
        above = store.inputs_above(checkpoint)
        arguments: dict[str, Any] = {
            "checkpoint": store.files(checkpoint),
            "tokenizer": store.files(above["tokenizer"]),
            "lineage": card_lineage(store, checkpoint),
        }
        began_from, tokenizer = store.initial_checkpoint_id(checkpoint), above["tokenizer"]
        return store.materialize(
            recipes.export_recipe(experiment, checkpoint, tokenizer.as_input(), began_from),
            lambda space: launcher.build(
                context, launcher.job("export", name, experiment, space, **arguments)
            ),
            show=lambda _, files: {"inventory": _table(files)},
        )

    description = (
        "Logits of the exported files, computed by NumPy alone, equal the checkpoint's own in "
        "float32 to 1e-5 (or to the rounding of larger logits), over rows of held-out text."
    )

    def compare_logits(
        context: dg.AssetCheckExecutionContext,
        artifact: Artifact,
        checkpoint: Artifact,
        store: StoreResource,
        launcher: LauncherResource,
    ) -> dg.AssetCheckResult:
        above = store.inputs_above(checkpoint)
        arguments: dict[str, Any] = {
            "export": store.files(artifact),
            "checkpoint": store.files(checkpoint),
            "token_cache": store.files(above["token_cache"]),
            "tokenized_corpus": store.files(above["tokenized_corpus"]),
        }
        found = launcher.run(context, launcher.job("parity", name, experiment, **arguments))
        limit, difference = found["limit"], found["max_abs_logit_difference"]
        faults = [] if difference <= limit else [f"logits differ by {difference:g} > {limit:g}."]
        return verdict(description, faults, **found)

    logits_match = dg.asset_check(
        asset=key,
        name="logits_match",
        description=description,
        blocking=True,
        pool=ACCELERATOR,
        additional_ins={"checkpoint": dg.AssetIn([name, "checkpoint"])},
    )(guarded(compare_logits, dg.AssetCheckExecutionContext))
    files_are_whole = artifact_check(
        key,
        "files_are_whole",
        "The files that `transformers` needs are there, byte for byte as they were exported.",
        _missing_files,
    )
    return [hf_model, files_are_whole, logits_match]


def card_lineage(store: StoreResource, checkpoint: Artifact) -> dict[str, str]:
    """Returns the content ids that lead from a checkpoint to the corpus, by kind.

    The checkpoint that its training began from, if it did, stands beside its own.
    """
    ids = {kind: artifact.content_id for kind, artifact in store.inputs_above(checkpoint).items()}
    began_from = store.initial_checkpoint_id(checkpoint)
    first = {} if began_from is None else {recipes.INITIAL_CHECKPOINT: began_from}
    return ids | first | {"checkpoint": checkpoint.content_id}


def _missing_files(artifact: Artifact, files: Path, store: StoreResource) -> Iterator[str]:
    for name in ("config.json", "model.safetensors", "tokenizer.json", "README.md"):
        if not (files / name).is_file():
            yield f"{name} is missing."


def _table(files: Path) -> dg.TableMetadataValue:
    inventory = json.loads((files / INVENTORY).read_text(encoding="utf-8"))
    columns = ("path", "size", "sha256")
    return panel.table(columns, ([file[name] for name in columns] for file in inventory["files"]))
