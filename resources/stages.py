"""What a launched process runs: each function is an entry of `worker`, a thin call into `modeling`.

Imports of JAX stand inside the functions, after the worker has tied itself to its parent.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modeling.artifacts import Workspace
from modeling.experiment import ExperimentConfig, validate
from resources.worker import Channel

if TYPE_CHECKING:
    from modeling.data.cache import TokenCache

Arguments = Mapping[str, Any]
PARITY_ROWS = 4


def train(arguments: Arguments, workspace: Workspace | None, channel: Channel) -> Mapping[str, Any]:
    """Trains, or goes on training, to the last step."""
    raise NotImplementedError


def evaluate(
    arguments: Arguments, workspace: Workspace | None, channel: Channel
) -> Mapping[str, Any]:
    """Builds an eval report."""
    from modeling.evaluation import report

    assert workspace is not None
    built = report.build(
        _experiment(arguments),
        Path(arguments["checkpoint"]),
        _cache(arguments),
        Path(arguments["tokenizer"]),
        workspace,
        report=channel.say,
    )
    return dataclasses.asdict(built)


def export(
    arguments: Arguments, workspace: Workspace | None, channel: Channel
) -> Mapping[str, Any]:
    """Builds a Hugging Face model."""
    from modeling.hf import export

    assert workspace is not None
    built = export.build(
        _experiment(arguments),
        Path(arguments["checkpoint"]),
        Path(arguments["tokenizer"]),
        arguments["lineage"],
        workspace,
        report=channel.say,
    )
    return dataclasses.asdict(built)


def parity(
    arguments: Arguments, workspace: Workspace | None, channel: Channel
) -> Mapping[str, Any]:
    """Compares the logits of an export, by NumPy from its files, with the checkpoint's own."""
    import jax
    import numpy as np

    import haliax as hax
    from modeling.hf import reference
    from modeling.models.trained import load_model

    model = load_model(Path(arguments["checkpoint"]), _experiment(arguments))
    cache = _cache(arguments)
    split = "validation" if cache.num_rows("validation") else "train"
    rows = cache.rows(split, np.arange(min(PARITY_ROWS, cache.num_rows(split))))
    with jax.default_matmul_precision("highest"):
        logits = model(hax.named(rows, ("batch", model.Pos.resize(rows.shape[1]))))
    ours = np.asarray(logits.rearrange(("batch", model.Pos.name, model.Vocab.name)).array)
    difference = reference.max_abs_logit_difference(Path(arguments["export"]), rows, ours)
    return {"max_abs_logit_difference": difference, "num_logits": ours.size}


def _cache(arguments: Arguments) -> "TokenCache":
    from modeling.data.cache import TokenCache

    return TokenCache.open(Path(arguments["token_cache"]), Path(arguments["tokenized_corpus"]))


def _experiment(arguments: Arguments) -> ExperimentConfig:
    return validate(ExperimentConfig, arguments["experiment"], f"experiment {arguments['name']}")
