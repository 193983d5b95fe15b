"""What each stage of the chain depends on: its transform version, its fields, its inputs.

This is the one place that decides identity. A stage's `version` is raised by hand when the same
fields and inputs would give other bytes; golden tests fail when bytes change without it. `*_params`
is the slice of the YAML that the stage reads: the recipe and Dagster's `code_version` are both made
of it.
"""

import importlib.metadata
from collections.abc import Mapping
from typing import Any

from modeling import canonical
from modeling.artifacts import Artifact, Input, Recipe
from modeling.data.config import DatasetConfig, TokenCacheConfig
from modeling.data.tokenizers_config import TokenizerConfig, TrainedTokenizerConfig
from modeling.experiment import ExperimentConfig

VERSIONS = {
    "raw_corpus": 1,
    "tokenizer": 1,
    "tokenized_corpus": 2,
    "token_cache": 3,
    "token_cache_copy": 1,
    "checkpoint": 2,
    "eval_report": 1,
    "hf_model": 1,
}
"""Transform versions by artifact kind."""

WEIGHT_ROOTS = {
    "last": "parameters",
    "ema": "parameters.ema",
    "tail_average": "parameters.tail_average",
}
"""Names of a checkpoint's roots, by the weights that a stage takes."""

INITIAL_CHECKPOINT = "initial_checkpoint"
"""What the checkpoint that training begins from is to the one that comes of it."""


def code_version(kind: str, params: Any) -> str:
    """Returns what Dagster compares to see that a stage's own definition has changed."""
    return f"{VERSIONS[kind]}-{canonical.digest(f'code/{kind}', params)[:16]}"


def corpus_params(dataset: DatasetConfig) -> dict[str, Any]:
    """What documents are read of the files, which are kept, and which are held out.

    Where the files lie is no part of it: that is found by what they hold, see `corpus_recipe`, and
    a path may carry a password.
    """
    sources = {"sources": dataset.sources} if dataset.sources else {"source": dataset.source}
    readings = {name: one.reading() for name, one in dataset.formats.items()}
    return {**sources, "validation": dataset.validation} | _formats(readings)


def corpus_recipe(dataset: DatasetConfig, listing_root: str) -> Recipe:
    """Takes the digest of the listing found now, not the paths: moving the files is no change."""
    return _recipe("raw_corpus", corpus_params(dataset) | {"listing": listing_root})


def _formats(by_source: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Returns what records are, once where all sources have the same; nothing for plain text."""
    first, *others = by_source.values()
    if any(other != first for other in others):
        return {"formats": {name: dict(one) for name, one in by_source.items()}}
    return {"format": first} if first else {}


def is_trained_here(tokenizer: TokenizerConfig) -> bool:
    """Whether a tokenizer depends on the corpus."""
    return isinstance(tokenizer, TrainedTokenizerConfig)


def tokenizer_params(dataset: DatasetConfig) -> dict[str, Any]:
    """How the tokenizer is trained, or what it is taken from; where that lies is no part of it."""
    return {"tokenizer": dataset.tokenizer, "tokenizers": importlib.metadata.version("tokenizers")}


def tokenizer_recipe(
    dataset: DatasetConfig, corpus: Artifact | None, files_root: str | None = None
) -> Recipe:
    """Depends on the decoded documents alone if trained here, else on the files that are named.

    Args:
        dataset: says which tokenizer.
        corpus: what a tokenizer is trained on; None for one that is not trained here.
        files_root: the digest of the files found now, where a path names them.
    """
    params = tokenizer_params(dataset)
    if files_root is not None:
        params |= {"files": files_root}
    inputs = {} if corpus is None else {"corpus": corpus.as_input("documents")}
    return _recipe("tokenizer", params, **inputs)


def tokenized_params(dataset: DatasetConfig) -> Any:
    """The policy on special tokens, templates, and the version of the library that encodes."""
    params = {
        "tokenization": dataset.tokenization,
        "tokenizers": importlib.metadata.version("tokenizers"),
    }
    params |= _formats({name: one.rendering() for name, one in dataset.formats.items()})
    if dataset.max_skipped:
        params["on_error_skip"] = sorted(dataset.max_skipped)
    # Of several sources it says how much text each has, which the order of rows depends on.
    return params | ({"shares": "text_bytes"} if len(dataset.named_sources) > 1 else {})


def tokenized_recipe(dataset: DatasetConfig, corpus: Artifact, tokenizer: Artifact) -> Recipe:
    """Depends on documents and tokenizer."""
    inputs = {"corpus": corpus.as_input("documents"), "tokenizer": tokenizer.as_input()}
    return _recipe("tokenized_corpus", tokenized_params(dataset), **inputs)


def cache_params(config: TokenCacheConfig) -> Any:
    """The row length and how documents are laid into rows."""
    params: dict[str, Any] = {"sequence_length": config.length, "packing": config.packing}
    if config.packing == "documents":
        params["long_documents"] = config.long_documents
    return params


def cache_recipe(config: TokenCacheConfig, tokenized: Artifact) -> Recipe:
    """Depends on the tokens; no retokenizing for another length."""
    return _recipe("token_cache", cache_params(config), tokenized_corpus=tokenized.as_input())


def cache_copy_params() -> Any:
    """Nothing but its cache decides what a copy is."""
    return {}


def cache_copy_recipe(token_cache: Artifact) -> Recipe:
    """Depends on the rows of the cache, whose content id it has."""
    return _recipe("token_cache_copy", cache_copy_params(), token_cache=token_cache.as_input())


def checkpoint_params(experiment: ExperimentConfig) -> Any:
    """The science of a run: model, optimizer, schedule, seeds, order, precision, steps."""
    return {
        "model": experiment.model,
        "optimizer": experiment.optimizer,
        "trainer": experiment.trainer,
    }


def checkpoint_code_params(experiment: ExperimentConfig) -> Any:
    """The science, how it is executed and, unless bits are the same on all, the layout."""
    trainer = experiment.trainer
    layout = {
        "mesh": dict(trainer.mesh),
        "processes": trainer.processes,
        "axis_resources": dict(trainer.axis_resources),
        "parameter_axis_resources": dict(trainer.parameter_axis_resources),
        "cpu_threads": trainer.cpu_threads,
    }
    if not trainer.deterministic:
        layout["deterministic"] = False
    science = checkpoint_params(experiment) | {"execution": experiment.model.execution}
    if trainer.xla_flags:
        science["xla_flags"] = list(trainer.xla_flags)
    return science if trainer.reproducibility == "elastic" else science | {"layout": layout}


def checkpoint_recipe(experiment: ExperimentConfig, token_cache: Artifact) -> Recipe:
    """Depends on the rows of the cache, and on the checkpoint that it begins with, if any."""
    inputs = {"token_cache": token_cache.as_input()}
    if experiment.trainer.initialize_from is not None:
        known = experiment.trainer.initialize_from.checkpoint
        inputs[INITIAL_CHECKPOINT] = Input("checkpoint", known, known)
    return _recipe("checkpoint", checkpoint_params(experiment), **inputs)


def checkpoint_stand_in(experiment: ExperimentConfig, tokenized_recipe_id: str) -> Recipe:
    """Stands for `checkpoint_recipe` while the tokens are being made by a recipe: see `begun_as`.

    It only tells where progress is kept; nothing is published under it.
    """
    params = {
        "checkpoint": checkpoint_params(experiment),
        "token_cache": [experiment.sequence_length, experiment.packing],
        "tokenized_corpus_recipe": tokenized_recipe_id,
    }
    return _recipe("checkpoint", params)


def evaluation_params(experiment: ExperimentConfig) -> Any:
    """What the report measures."""
    return {"evaluation": experiment.evaluation, "mp": experiment.trainer.mp}


def evaluation_recipe(
    experiment: ExperimentConfig, checkpoint: Artifact, token_cache: Input, tokenizer: Input
) -> Recipe:
    """Depends on the parameters, not on the optimizer state beside them."""
    return _recipe(
        "eval_report",
        evaluation_params(experiment),
        checkpoint=checkpoint.as_input(WEIGHT_ROOTS[experiment.evaluation.weights]),
        token_cache=token_cache,
        tokenizer=tokenizer,
    )


def export_params(experiment: ExperimentConfig) -> Any:
    """The dtype of the exported weights."""
    return {"export": experiment.export}


def export_recipe(
    experiment: ExperimentConfig,
    checkpoint: Artifact,
    tokenizer: Input,
    initial_checkpoint: str | None = None,
) -> Recipe:
    """Depends on the parameters, the tokenizer and, as the card names it, how training began.

    Args:
        experiment: says in which dtype.
        checkpoint: whose weights are exported.
        tokenizer: that it was trained with.
        initial_checkpoint: content id of the checkpoint that its training began from, if it did.
    """
    inputs = {
        "checkpoint": checkpoint.as_input(WEIGHT_ROOTS[experiment.export.weights]),
        "tokenizer": tokenizer,
    }
    if initial_checkpoint is not None:
        inputs[INITIAL_CHECKPOINT] = Input("checkpoint", initial_checkpoint, initial_checkpoint)
    return _recipe("hf_model", export_params(experiment), **inputs)


def _recipe(kind: str, params: Any, **inputs: Input) -> Recipe:
    return Recipe(kind, VERSIONS[kind], params, inputs)
