"""What `trainer.reproducibility: elastic` costs against the fast mode, taking turns.

    python benchmarks/elastic.py [--rounds 7] [--devices 1 4] [--rows 1 2] [--optimizer adamw]
                                 [small|gpt2 ...]

All compile the same model with FSDP over the same virtual devices of one process, and take turns
of a few updates; elastic ones have 8 logical shards of `--rows` rows each. `pieces` is the fast
mode with microbatches, so many that a device multiplies the rows of one shard at a time, as in the
elastic mode: what it costs more than `fast` is what products of few rows cost. Prints a JSON line
for each size, number of rows and of devices: medians of CPU milliseconds an update, ratios, and CPU
seconds to compile. CPU seconds count the work of all devices, so that what every device does alike
counts for each.
"""

import argparse
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from train_step import MODEL_FIELDS, random_cache

from modeling import numerics
from modeling.experiment import ExperimentConfig, validate

SIZES: dict[str, dict[str, int]] = {
    "small": {"hidden_dim": 128, "num_layers": 4, "num_heads": 4, "length": 128, "vocab": 4096},
    # The width and heads of GPT-2 124M, with fewer layers, positions and ids.
    "gpt2": {"hidden_dim": 768, "num_layers": 2, "num_heads": 12, "length": 256, "vocab": 8192},
}  # fmt: skip
MODES = ("fast", "pieces", "elastic")
SHARDS = 8


def main() -> None:
    """Measures every size on every number of devices."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("sizes", nargs="*", default=["small"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--updates", type=int, default=2)
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--rows", type=int, nargs="+", default=[2], help="of a logical shard")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--optimizer", default="adamw")
    arguments = parser.parse_args()
    most = max(arguments.devices)
    largest = experiment(SIZES["small"] | {"batch": SHARDS}, "elastic", most, arguments.optimizer)
    # Before JAX is imported, as the launcher would.
    os.environ |= numerics.environment(largest.trainer, "cpu")
    for size in arguments.sizes:
        for rows, devices in itertools.product(arguments.rows, arguments.devices):
            found = compared(SIZES[size] | {"batch": SHARDS * rows}, devices, arguments)
            line = {"size": size, "rows_a_shard": rows, "devices": devices} | found
            print(json.dumps(line), flush=True)


def experiment(sizes: dict[str, int], mode: str, devices: int, optimizer: str) -> ExperimentConfig:
    """Returns what is trained."""
    trainer = {"num_train_steps": 10**6, "train_batch_size": sizes["batch"], "mp": "p=f32,c=f32",
               "mesh": {"data": devices}, "elastic_shards": SHARDS,
               "reproducibility": "elastic" if mode == "elastic" else "fast",
               "num_microbatches": SHARDS // devices if mode == "pieces" else 1}  # fmt: skip
    fields = {"dataset": "random", "sequence_length": sizes["length"], "trainer": trainer,
              "model": {field: sizes[field] for field in MODEL_FIELDS if field in sizes},
              "optimizer": {"type": optimizer}}  # fmt: skip
    return validate(ExperimentConfig, fields, "benchmark")


def compared(sizes: dict[str, int], devices: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the figures of the modes, after turns in alternating order."""
    advance, compile_s, modes = {}, {}, arguments.modes
    for mode in modes:
        began = time.process_time()
        advance[mode] = contender(experiment(sizes, mode, devices, arguments.optimizer), sizes)
        advance[mode](2)
        compile_s[mode] = time.process_time() - began
    spent: dict[str, list[float]] = {mode: [] for mode in modes}
    for turn in range(arguments.rounds):
        for mode in modes if turn % 2 else reversed(modes):
            began = time.process_time()
            advance[mode](arguments.updates)
            spent[mode].append((time.process_time() - began) / arguments.updates)
    ms = {mode: 1000 * statistics.median(times) for mode, times in spent.items()}
    return {
        "optimizer": arguments.optimizer,
        "cpu_ms": {mode: round(found, 1) for mode, found in ms.items()},
        "over": {
            f"{one} / {other}": round(ms[one] / ms[other], 3)
            for one, other in itertools.combinations(reversed(modes), 2)
        },
        "compile_cpu_s": {mode: round(found, 1) for mode, found in compile_s.items()},
    }


def contender(config: ExperimentConfig, sizes: dict[str, int]) -> Callable[[int], None]:
    """Returns a function that makes so many updates and waits for the last."""
    import jax

    from modeling.training.step import compile_step
    from modeling.training.trainer import make_plan

    cache = random_cache(sizes)
    plan = make_plan(config, cache)
    step = compile_step(
        plan.blueprint, config.optimizer, config.trainer, plan.layout,
        Batch=plan.batch_axis(0), Pos=plan.Pos,
    )  # fmt: skip
    arrays = plan.blueprint.initialize(plan.make, jax.random.PRNGKey(0))
    rows = cache.rows("train", np.arange(sizes["batch"]))

    def advance(count: int) -> None:
        nonlocal arrays
        for _ in range(count):
            arrays, _ = step.run(arrays, jax.device_put(rows, step.batch_sharding))
        jax.block_until_ready(arrays)

    return advance


if __name__ == "__main__":
    main()
