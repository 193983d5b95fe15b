"""The eval report: how well a checkpoint predicts held-out text, as JSON and as a page."""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import dagster as dg

from assets.catalog import stage
from assets.checks import artifact_check
from modeling import recipes
from modeling.artifacts import Artifact
from modeling.experiment import ExperimentConfig
from resources import panel
from resources.launcher import LauncherResource
from resources.pools import ACCELERATOR
from resources.store import StoreResource

FIGURES = ("loss", "perplexity", "bits_per_byte")


def evaluation_assets(
    name: str, experiment: ExperimentConfig
) -> list[dg.AssetsDefinition | dg.AssetChecksDefinition]:
    """Returns `[name, eval_report]` and its check."""

    @stage(
        "eval_report",
        recipes.evaluation_params(experiment),
        [name, "eval_report"],
        of=experiment,
        kinds={"jax"},
        ins={"checkpoint": [name, "checkpoint"]},
        pool=ACCELERATOR,
    )
    def eval_report(
        context: dg.AssetExecutionContext,
        checkpoint: Artifact,
        store: StoreResource,
        launcher: LauncherResource,
    ) -> dg.MaterializeResult[Artifact]:
        """Perplexity and bits per byte over the validation rows, and greedy samples.

        Its only parent is the checkpoint, whose record names the rows and the tokenizer.
        """
        above = store.inputs_above(checkpoint)
        cache, tokenizer = above["token_cache"], above["tokenizer"]
        files = {
            "checkpoint": store.files(checkpoint),
            "token_cache": store.files(cache),
            "tokenized_corpus": store.files(above["tokenized_corpus"]),
            "tokenizer": store.files(tokenizer),
        }
        return store.materialize(
            recipes.evaluation_recipe(
                experiment, checkpoint, cache.as_input(), tokenizer.as_input()
            ),
            lambda space: launcher.build(
                context, launcher.job("evaluate", name, experiment, space, **files)
            ),
            numerics=launcher.numerics(experiment),
            show=_samples_and_page,
        )

    figures_agree = artifact_check(
        dg.AssetKey([name, "eval_report"]),
        "figures_agree",
        "Loss, perplexity and bits per byte are finite and positive, perplexity is exp(loss), and "
        "the content id is over the figures in the file.",
        _faults,
    )
    return [eval_report, figures_agree]


def _samples_and_page(artifact: Artifact, files: Path) -> Mapping[str, Any]:
    from modeling.evaluation.heat_map import TokenView, drawing

    samples = "\n\n".join(
        f"**{sample['prompt']!r}** ({sample['num_tokens']} tokens)\n\n"
        # Indented, the one way to quote in Markdown that no sample can end.
        + "\n".join(f"    {line}" for line in (sample["prompt"] + sample["text"]).splitlines())
        for sample in artifact.facts["samples"]
    )
    row = json.loads((files / "report.json").read_text(encoding="utf-8"))["row"]
    seen = [TokenView(token["text"], token["probability"]) for token in row]
    return {
        "token_probabilities": panel.picture(
            "token probabilities", drawing(seen).encode(), "image/svg+xml"
        ),
        "samples": dg.MetadataValue.md(samples),
        # A browser follows no link from the UI's page to a file, so the path is for copying.
        "page": dg.MetadataValue.path(files / "report.html"),
    }


def _faults(artifact: Artifact, files: Path, store: StoreResource) -> Iterator[str]:
    from modeling.evaluation.results import content_id

    figures = json.loads((files / "report.json").read_text(encoding="utf-8"))
    known = [name for name in FIGURES if name != "bits_per_byte" or figures[name] is not None]
    bad = [name for name in known if not 0 < figures[name] < math.inf]
    if bad:
        yield from (f"{name} is {figures[name]}; expected a finite number above 0." for name in bad)
        return
    if not math.isclose(figures["perplexity"], math.exp(figures["loss"]), rel_tol=1e-9):
        yield f"perplexity {figures['perplexity']} is not exp({figures['loss']})."
    if (found := content_id(files)) != artifact.content_id:
        yield f"the figures in report.json give the content id {found[:12]}."
