"""One update of GPT-2: ours against the same update written by hand in plain JAX, taking turns.

    python benchmarks/train_step.py [--rounds 5] [--seconds 4] [--size bench|nano] [--devices 2]

Both have the same sizes, dtype, AdamW, clipping and rematerialization. Contenders: the compiled
step, the whole training loop (data order, prefetch, metrics, observers), and plain JAX, on one
device; the step on more. Prints JSON lines: the machine, then for each contender the medians over
the rounds of milliseconds and CPU seconds a step (all threads), tokens a second, and the CPU
seconds that tracing and compiling took. On a machine with other work, compare CPU seconds.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from modeling.data.cache import TokenCache
from modeling.data.rows import Rows
from modeling.experiment import ExperimentConfig, validate
from modeling.numerics import environment

SIZES: dict[str, dict[str, int]] = {
    "bench": {"hidden_dim": 256, "num_layers": 4, "num_heads": 4, "length": 256, "batch": 8,
              "vocab": 8192},
    "nano": {"hidden_dim": 128, "num_layers": 4, "num_heads": 4, "length": 128, "batch": 16,
             "vocab": 4096},
}  # fmt: skip
Advance = Callable[[], Any]
"""Makes one update and returns something to wait for."""


def main() -> None:
    """Measures in this process, whose environment is pinned before JAX is imported."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="a contender's turn")
    parser.add_argument("--size", choices=sorted(SIZES), default="bench")
    parser.add_argument("--devices", type=int, default=2, help="of the FSDP contender")
    parser.add_argument("--mp", default="p=f32,c=f32")
    arguments = parser.parse_args()
    sizes = SIZES[arguments.size]
    sharded = experiment(sizes, arguments.mp, arguments.devices)
    os.environ.update(environment(sharded.trainer, os.environ.get("JAX_PLATFORMS", "cpu")))

    print_line(
        benchmark="train_step", size=arguments.size, mp=arguments.mp, **sizes,
        cpus=os.cpu_count(), load=os.getloadavg()[0],
        versions={name: version(name) for name in ("jax", "equinox", "optax")},
    )  # fmt: skip
    cache = RandomCache(sizes)
    contenders: dict[str, Advance] = {}
    build: dict[str, Callable[[], Advance]] = {
        "plain JAX": lambda: plain_step(sizes, arguments.mp),
        "ours": lambda: our_step(experiment(sizes, arguments.mp, 1), cache),
        f"ours, FSDP over {arguments.devices}": lambda: our_step(sharded, cache),
    }
    for name, make in build.items():
        began = time.process_time()
        contenders[name] = make()
        wait(contenders[name]())
        print_line(contender=name, start_cpu_s=round(time.process_time() - began, 2))
    measure(contenders, arguments.rounds, arguments.seconds, sizes)
    measure_loop(experiment(sizes, arguments.mp, 1), cache, sizes)


def measure(
    contenders: dict[str, Advance], rounds: int, seconds: float, sizes: dict[str, int]
) -> None:
    """Gives every contender a turn of `seconds` in each round."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, advance in contenders.items():
            cpu, wall, steps, last = time.process_time(), time.perf_counter(), 0, None
            while time.perf_counter() - wall < seconds or steps < 3:
                last, steps = advance(), steps + 1
                if steps % 4 == 0:
                    wait(last)
            wait(last)
            found[name].append(
                ((time.perf_counter() - wall) / steps, (time.process_time() - cpu) / steps)
            )
    tokens = sizes["batch"] * sizes["length"]
    base = statistics.median(cpu for _, cpu in found["plain JAX"])
    for name, turns in found.items():
        wall_s, cpu_s = (statistics.median(column) for column in zip(*turns, strict=True))
        print_line(
            contender=name, wall_ms=round(wall_s * 1e3, 2), cpu_ms=round(cpu_s * 1e3, 2),
            tokens_per_s=round(tokens / wall_s), tokens_per_cpu_s=round(tokens / cpu_s),
            cpu_against_plain=round(cpu_s / base, 3), rounds=len(turns),
        )  # fmt: skip


def measure_loop(config: ExperimentConfig, cache: TokenCache, sizes: dict[str, int]) -> None:
    """The main thread's Python between dispatches: everything the loop does but wait."""
    from modeling.artifacts import Workspace
    from modeling.training.trainer import train

    with tempfile.TemporaryDirectory() as directory:
        space = Workspace(Path(directory) / "progress", Path(directory) / "output")
        for each in (space.progress, space.output):
            each.mkdir()
        facts = train(config, cache, space).facts
    print_line(
        contender="ours, whole loop with one save", tokens_per_s=round(facts["tokens_per_second"]),
        steps=facts["steps"], host_ms_per_step=round(facts["host_s"] / facts["steps"] * 1e3, 3),
    )  # fmt: skip


def wait(value: Any) -> None:
    """Waits for the device."""
    import jax

    jax.block_until_ready(value)


def print_line(**fields: Any) -> None:
    """Prints one JSON line at once."""
    print(json.dumps(fields), flush=True)


class RandomCache(TokenCache):
    """Random rows in memory."""

    def __init__(self, sizes: dict[str, int]) -> None:
        shape = (512, sizes["length"])
        self.content_id = "0" * 64
        self.sequence_length = sizes["length"]
        self.vocab_size = sizes["vocab"]
        self._rows = np.random.default_rng(0).integers(0, sizes["vocab"], shape, dtype=np.int32)

    @property
    def splits(self) -> tuple[str, ...]:
        """One to train on and one held out."""
        return ("train", "validation")

    def num_rows(self, split: str) -> int:
        """All rows are for training."""
        return len(self._rows)

    def rows(self, split: str, indices: np.ndarray) -> Rows:
        """Returns copies of rows."""
        return Rows(self._rows[indices])


def experiment(sizes: dict[str, int], mp: str, devices: int) -> ExperimentConfig:
    """Returns the experiment of these sizes."""
    model = {name: sizes[name] for name in ("hidden_dim", "num_layers", "num_heads")}
    trainer = {"num_train_steps": 40, "train_batch_size": sizes["batch"], "mp": mp,
               "mesh": {"data": devices}}  # fmt: skip
    fields = {"dataset": "random", "sequence_length": sizes["length"], "trainer": trainer,
              "model": model, "optimizer": {"learning_rate": 6e-4}}  # fmt: skip
    return validate(ExperimentConfig, fields, "benchmark")


def our_step(config: ExperimentConfig, cache: TokenCache) -> Advance:
    """Returns our compiled update, called as the loop calls it."""
    import jax

    from modeling.training.step import compile_step
    from modeling.training.trainer import make_plan

    plan = make_plan(config, cache)
    step = compile_step(
        plan.blueprint, config.optimizer, config.trainer, plan.layout,
        Batch=plan.batch_axis(0), Pos=plan.Pos,
    )  # fmt: skip
    arrays = plan.blueprint.initialize(plan.make, jax.random.PRNGKey(0))
    rows = np.arange(plan.batch_axis(0).size)

    def advance() -> Any:
        nonlocal arrays
        batch = jax.device_put(cache.rows("train", rows), step.batch_sharding)
        arrays, metrics = step.run(arrays, batch)
        return metrics.loss

    return advance


def plain_step(sizes: dict[str, int], mp: str) -> Advance:
    """Returns the same update in jnp and lax alone."""
    import jax
    import jax.numpy as jnp
    import optax

    L, D, H = sizes["num_layers"], sizes["hidden_dim"], sizes["num_heads"]
    V, T, B = sizes["vocab"], sizes["length"], sizes["batch"]
    compute = jnp.bfloat16 if "c=b" in mp else jnp.float32

    def init(key: Any) -> dict[str, Any]:
        keys = jax.random.split(key, 6)
        layers = {
            "ln1": jnp.ones((L, D)), "ln1b": jnp.zeros((L, D)),
            "ln2": jnp.ones((L, D)), "ln2b": jnp.zeros((L, D)),
            "qkv": jax.random.normal(keys[0], (L, D, 3, H, D // H)) * 0.02,
            "qkvb": jnp.zeros((L, 3, H, D // H)),
            "out": jax.random.normal(keys[1], (L, H, D // H, D)) * 0.02 / (2 * L) ** 0.5,
            "outb": jnp.zeros((L, D)),
            "up": jax.random.normal(keys[2], (L, D, 4 * D)) * 0.02,
            "upb": jnp.zeros((L, 4 * D)),
            "down": jax.random.normal(keys[3], (L, 4 * D, D)) * 0.02 / (2 * L) ** 0.5,
            "downb": jnp.zeros((L, D)),
        }  # fmt: skip
        return {
            "wte": jax.random.normal(keys[4], (V, D)) * 0.02,
            "wpe": jax.random.normal(keys[5], (T, D)) * 0.02,
            "layers": layers, "lnf": jnp.ones(D), "lnfb": jnp.zeros(D),
        }  # fmt: skip

    def norm(x: Any, weight: Any, bias: Any) -> Any:
        x32 = x.astype(jnp.float32)
        centred = x32 - x32.mean(-1, keepdims=True)
        scaled = centred * jax.lax.rsqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
        return scaled.astype(x.dtype) * weight + bias

    mask = jnp.tril(jnp.ones((T, T), bool))

    @jax.checkpoint
    def block(x: Any, p: dict[str, Any]) -> tuple[Any, None]:
        qkv = jnp.einsum("btd,dchk->cbhtk", norm(x, p["ln1"], p["ln1b"]), p["qkv"])
        q, k, v = qkv + p["qkvb"][:, None, :, None]
        scores = jnp.einsum("bhtk,bhsk->bhts", q / (D // H) ** 0.5, k)
        weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1)
        x = x + jnp.einsum("bhts,bhsk,hkd->btd", weights, v, p["out"]) + p["outb"]
        hidden = jax.nn.gelu(norm(x, p["ln2"], p["ln2b"]) @ p["up"] + p["upb"])
        return x + hidden @ p["down"] + p["downb"], None

    def loss(params: Any, tokens: Any) -> Any:
        p = jax.tree.map(lambda w: w.astype(compute), params)
        x, _ = jax.lax.scan(block, p["wte"][tokens] + p["wpe"], p["layers"])
        x = norm(x, p["lnf"], p["lnfb"])
        logits = jnp.einsum("btd,vd->btv", x, p["wte"], preferred_element_type=jnp.float32)
        targets = jnp.roll(tokens, -1, axis=1)[..., None]
        picked = jnp.take_along_axis(logits, targets, axis=-1)[..., 0]
        return (jax.nn.logsumexp(logits, axis=-1) - picked)[:, :-1].mean()

    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(6e-4, 0.9, 0.95, weight_decay=0.1)
    )

    def update(params: Any, state: Any, tokens: Any) -> tuple[Any, Any, Any]:
        value, gradient = jax.value_and_grad(loss)(params, tokens)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    step = jax.jit(update, donate_argnums=(0, 1))
    params = jax.jit(init)(jax.random.PRNGKey(0))
    state = jax.jit(optimizer.init)(params)
    rows = np.random.default_rng(0).integers(0, V, (B, T), dtype=np.int32)

    def advance() -> Any:
        nonlocal params, state
        params, state, value = step(params, state, jnp.asarray(rows))
        return value

    return advance


if __name__ == "__main__":
    main()
