"""A trained model back from its checkpoint, for whoever wants the weights and no optimizer."""

import json
from pathlib import Path

import equinox as eqx
import jax

from haliax import Axis
from modeling.experiment import ExperimentConfig
from modeling.models.gpt2 import Gpt2LmHeadModel
from modeling.models.lm import build_model
from modeling.training.checkpoint import restore_parameters
from modeling.training.precision import Policy

DESCRIPTION = "model.json"
"""Beside the arrays: `{"vocab_size": ..., "sequence_length": ..., ...}`."""


def load_model(checkpoint_dir: Path, experiment: ExperimentConfig) -> Gpt2LmHeadModel:
    """Returns the model of a checkpoint of `experiment`, verified, in the dtype it is stored in."""
    sizes = json.loads((checkpoint_dir / DESCRIPTION).read_text(encoding="utf-8"))
    Vocab = Axis("vocab", sizes["vocab_size"])
    Pos = Axis("position", sizes["sequence_length"])

    def build() -> Gpt2LmHeadModel:
        model = build_model(experiment.model, Vocab, Pos, key=jax.random.key(0))
        return Policy.parse(experiment.trainer.mp).cast_to_param(model)

    return restore_parameters(checkpoint_dir, eqx.filter_eval_shape(build))
