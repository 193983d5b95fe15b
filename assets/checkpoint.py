"""The checkpoint: the trained model, trained in a process of its own that any retry resumes."""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import dagster as dg

from assets.catalog import stage
from assets.checks import artifact_check
from assets.pictures import loss_picture
from modeling import recipes
from modeling.artifacts import Artifact
from modeling.difference import differences
from modeling.experiment import ConfigError, ExperimentConfig
from resources import panel
from resources.head_start import HeadStartResource, stand_ins
from resources.launcher import LauncherResource
from resources.pools import ACCELERATOR
from resources.store import StoreResource


def checkpoint_assets(
    name: str, experiment: ExperimentConfig
) -> list[dg.AssetsDefinition | dg.AssetChecksDefinition]:
    """Returns `[name, checkpoint]` and its checks."""

    @stage(
        "checkpoint",
        recipes.checkpoint_code_params(experiment),
        [name, "checkpoint"],
        of=experiment,
        kinds={"jax"},
        ins={"token_cache": [experiment.dataset, "token_cache", experiment.cache_name]},
        pool=ACCELERATOR,
    )
    def checkpoint(
        context: dg.AssetExecutionContext,
        token_cache: Artifact,
        store: StoreResource,
        launcher: LauncherResource,
        head_start: HeadStartResource,
    ) -> dg.MaterializeResult[Artifact]:
        """Weights, optimizer state and data position after the last step of training.

        Killed anywhere and run again, training goes on from its last committed step and ends with
        the same bits.
        """
        tokenized = store.input_of(token_cache, "tokenized_corpus")
        files = training_files(experiment, token_cache, store)
        numerics = launcher.numerics(experiment)
        head_start.finish(context)
        return store.materialize(
            recipes.checkpoint_recipe(experiment, token_cache),
            lambda space: launcher.build(
                context, launcher.job("train", name, experiment, space, numerics=numerics, **files)
            ),
            numerics=numerics,
            begun_as=stand_ins(experiment, tokenized, store),
            show=_shown,
        )

    key = dg.AssetKey([name, "checkpoint"])
    leaves_verify = artifact_check(
        key,
        "leaves_verify",
        "Every array of the state, read back, has the digest that was taken before it was written.",
        _leaf_faults,
    )
    has_learned = artifact_check(
        key,
        "has_learned",
        "Every loss on record is finite, and the last is below the first.",
        _loss_faults,
    )
    return [checkpoint, leaves_verify, has_learned]


def training_files(
    experiment: ExperimentConfig, token_cache: Artifact, store: StoreResource
) -> dict[str, Path]:
    """Returns the directories that a training process reads, by the names it knows them by."""
    above = store.inputs_above(token_cache)
    files = {
        "token_cache": store.files(token_cache),
        "tokenized_corpus": store.files(above["tokenized_corpus"]),
        "tokenizer": store.files(above["tokenizer"]),
    }
    return files | initial_checkpoint(experiment, store, above["tokenizer"])


def initial_checkpoint(
    experiment: ExperimentConfig, store: StoreResource, tokenizer: Artifact
) -> dict[str, Path]:
    """Returns the files of the checkpoint to begin with, if there is to be one.

    Raises:
        ConfigError: the store does not have it; or it was trained on ids of another tokenizer than
            `tokenizer`, which `trainer.initialize_from.allow_changed` does not name.
    """
    wanted = experiment.trainer.initialize_from
    if wanted is None:
        return {}
    opened = store.open()
    if not opened.contains("checkpoint", wanted.checkpoint):
        raise ConfigError(
            f"trainer.initialize_from.checkpoint: {opened.url} has no checkpoint "
            f"{wanted.checkpoint}. Name the content id of one that it has, or copy it there."
        )
    if not wanted.allows_other_tokenizer:
        _require_same_tokenizer(wanted.checkpoint, store, tokenizer)
    return {"initial_checkpoint": opened.local("checkpoint", wanted.checkpoint)}


def _require_same_tokenizer(content_id: str, store: StoreResource, tokenizer: Artifact) -> None:
    opened = store.open()
    record = opened.records_by_object()["checkpoint", content_id][-1]
    before = store.inputs_above(opened.from_record(record))["tokenizer"]
    if before.content_id == tokenizer.content_id:
        return
    recipes_of_both = (
        opened.record(one.recipe_id, one.numerics)["recipe"]["params"]
        for one in (before, tokenizer)
    )
    found = "; ".join(map(str, differences(*recipes_of_both))) or "the same fields, another corpus"
    raise ConfigError(
        f"trainer.initialize_from: checkpoint {content_id[:12]} was trained on ids of tokenizer "
        f"{before.content_id[:12]}, and this experiment has ids of tokenizer "
        f"{tokenizer.content_id[:12]} ({found}): the same id would stand for other text. Take that "
        f"tokenizer, or name `tokenizer` in trainer.initialize_from.allow_changed."
    )


def _leaf_faults(artifact: Artifact, files: Path, store: StoreResource) -> Iterator[str]:
    from modeling.training.manifest import CheckpointError
    from modeling.training.reading import verify

    try:
        manifest = verify(files)
    except CheckpointError as error:
        yield str(error)
        return
    if manifest.content_id != artifact.content_id:
        yield f"its leaves give the content id {manifest.content_id[:12]}."
    for name, root in manifest.roots.items():
        if root != artifact.roots.get(name):
            yield f"its leaves give the root {root[:12]} for {name}."


def _loss_faults(artifact: Artifact, files: Path, store: StoreResource) -> Iterator[str]:
    from modeling.training.history import read_losses

    losses = read_losses(files)
    if len(losses) != artifact.facts["steps"]:
        yield f"{len(losses)} losses are on record for {artifact.facts['steps']} steps."
    bad = [f"the loss of step {n} is {x}." for n, x in enumerate(losses, 1) if not math.isfinite(x)]
    yield from bad
    if len(losses) > 1 and not bad and losses[-1] >= losses[0]:
        yield f"the last loss, {losses[-1]:.4f}, is not below the first, {losses[0]:.4f}."


def _shown(artifact: Artifact, files: Path) -> Mapping[str, Any]:
    """Returns the loss curve, the arrays, and what else to look at."""
    from modeling.training.history import read_losses

    manifest = json.loads((files / "manifest.json").read_text(encoding="utf-8"))
    shown: dict[str, Any] = {
        "loss_curve": loss_picture(read_losses(files)),
        "arrays": panel.table(
            ("array", "dtype", "shape", "axes", "sha256"),
            (
                (leaf["path"], leaf["dtype"], " x ".join(map(str, leaf["shape"])),
                 ", ".join(leaf["axes"] or ()), leaf["sha256"])
                for leaf in manifest["leaves"]
            ),
        ),
    }  # fmt: skip
    for name, pattern in (("profile", "profiles/*/trace.json.gz"), ("picture", "pictures/*.html")):
        if found := sorted(files.glob(pattern)):
            shown[name] = dg.MetadataValue.path(found[-1])
    return shown
