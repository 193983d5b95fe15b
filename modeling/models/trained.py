"""A trained model back from its checkpoint, for whoever wants the weights and no optimizer."""

import json
from pathlib import Path

import equinox as eqx
import jax

from haliax import Axis
from modeling.experiment import ExperimentConfig
from modeling.models.lm import Model, build_model
from modeling.training.config import WeightsChoice
from modeling.training.precision import Policy
from modeling.training.restoring import restore_parameters

DESCRIPTION = "model.json"
"""Beside the arrays: `{"vocab_size": ..., "sequence_length": ..., ...}`."""


def load_model(
    checkpoint_dir: Path, experiment: ExperimentConfig, weights: WeightsChoice = "last"
) -> Model:
    """Returns the model of a checkpoint of `experiment`, verified, in the trainer's dtype."""
    sizes = json.loads((checkpoint_dir / DESCRIPTION).read_text(encoding="utf-8"))
    Vocab = Axis("vocab", sizes["vocab_size"])
    Pos = Axis("position", sizes["sequence_length"])

    def build() -> Model:
        model = build_model(experiment.model, Vocab, Pos, key=jax.random.key(0))
        # Averages are kept in float32, whatever the weights are.
        return policy.cast_to_param(model) if weights == "last" else model

    policy = Policy.parse(experiment.trainer.mp)
    template = eqx.filter_eval_shape(build)
    return policy.cast_to_param(restore_parameters(checkpoint_dir, template, weights=weights))
