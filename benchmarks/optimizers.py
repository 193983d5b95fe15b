"""Optimizers at equal steps: a small GPT-2 on real text, each at several learning rates.

    python benchmarks/optimizers.py --steps 300 --rates 0.3 1 3      prints one JSON line a run

The text is the standard library's own source, as bytes; the last twentieth is held out. Every run
has the same initial weights, rows and schedule (10 % of warmup, cosine to a tenth), and a rate of
the optimizer's default times one of `--rates`. `validation_loss` is in nats a byte.
"""

import argparse
import json
import sysconfig
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from haliax import NamedArray
from modeling.data.rows import Rows
from modeling.experiment import ExperimentConfig, validate
from modeling.models.lm import LmExample, next_token_loss
from modeling.training.step import compile_step
from modeling.training.trainer import make_plan

OPTIMIZERS = ("adamw", "lion", "adafactor", "muon", "sophia_g", "sophia_h")
VALIDATION_ROWS = 256


class Text:
    """Rows of bytes, as a plan asks for them."""

    content_id = "0" * 64
    vocab_size = 256

    def __init__(self, length: int, num_bytes: int) -> None:
        files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
        text = np.frombuffer(b"".join(f.read_bytes() for f in files)[:num_bytes], np.uint8)
        rows = text[: len(text) // length * length].reshape(-1, length).astype(np.int32)
        self.sequence_length = length
        self.validation = rows[-VALIDATION_ROWS:]
        self.train = rows[: len(rows) * 19 // 20]

    def batch(self, step: int, size: int) -> np.ndarray:
        """Returns rows drawn for a step, the same for every optimizer."""
        draw = np.random.default_rng((7, step))
        return self.train[draw.integers(len(self.train), size=size)]


def run(arguments: argparse.Namespace, text: Text, optimizer: str, rate: float) -> dict[str, Any]:
    """Trains once and returns its figures."""
    experiment = _experiment(arguments, {"type": optimizer})
    peak = experiment.optimizer.learning_rate * rate
    experiment = _experiment(arguments, {"type": optimizer, "learning_rate": peak})
    plan = make_plan(experiment, text)  # pyright: ignore[reportArgumentType]
    step = compile_step(
        plan.blueprint, experiment.optimizer, experiment.trainer, plan.layout,
        Batch=plan.batch_axis(0), Pos=plan.Pos,
    )  # fmt: skip
    arrays = plan.blueprint.initialize(plan.make, jax.random.PRNGKey(0))
    losses, clipped = [], []
    began = time.perf_counter()
    for number in range(arguments.steps):
        rows = Rows(text.batch(number, arguments.batch))
        arrays, metrics = step.run(arrays, jax.device_put(rows, step.batch_sharding))
        losses.append(metrics.loss)
        clipped.append(metrics.figures.get("clipped_share", jnp.nan))
    losses = [float(loss) for loss in losses]
    seconds = time.perf_counter() - began
    shares = np.asarray(clipped, np.float64)
    return {
        "optimizer": optimizer,
        "learning_rate": round(peak, 8),
        "steps": arguments.steps,
        "validation_loss": round(_validation_loss(plan, arrays, text), 4),
        "train_loss_last_tenth": round(float(np.mean(losses[-max(len(losses) // 10, 1) :])), 4),
        "clipped_share": None if np.isnan(shares).all() else round(float(shares.mean()), 3),
        "ms_per_step": round(1000 * seconds / arguments.steps, 1),
    }


def _experiment(arguments: argparse.Namespace, optimizer: dict[str, Any]) -> ExperimentConfig:
    raw = {
        "dataset": "stdlib",
        "sequence_length": arguments.length,
        "model": {"type": "gpt2", "hidden_dim": 128, "num_layers": 4, "num_heads": 4},
        "optimizer": {"schedule": {"warmup": 0.1}} | optimizer,
        "trainer": {
            "num_train_steps": arguments.steps,
            "train_batch_size": arguments.batch,
            "mp": "p=f32,c=f32",
        },
    }
    return validate(ExperimentConfig, raw, "benchmark")


def _validation_loss(plan: Any, arrays: Any, text: Text) -> float:
    model = plan.blueprint.unflatten(arrays).model

    @jax.jit
    def sums(model: Any, tokens: Any) -> Any:
        named = NamedArray(tokens, (plan.batch_axis(0), plan.Pos))
        return next_token_loss(model, LmExample.causal(named, plan.Pos))

    size = plan.batch_axis(0).size
    found = [sums(model, text.validation[i : i + size])
             for i in range(0, VALIDATION_ROWS - size + 1, size)]  # fmt: skip
    return float(sum(total for total, _ in found) / sum(weight for _, weight in found))


def main() -> None:
    """Runs every optimizer at every rate."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rates", type=float, nargs="+", default=[1.0])
    parser.add_argument("--optimizers", nargs="+", default=OPTIMIZERS, choices=OPTIMIZERS)
    arguments = parser.parse_args()
    text = Text(arguments.length, num_bytes=8_000_000)
    for optimizer in arguments.optimizers:
        for rate in arguments.rates:
            print(json.dumps(run(arguments, text, optimizer, rate)), flush=True)


if __name__ == "__main__":
    main()
