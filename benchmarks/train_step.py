"""One update of GPT-2 or Llama by us and by others, taking turns: its time, and that of compiling.

    python benchmarks/train_step.py [--rounds 5] [--seconds 4] [--size bench|nano] [NAME ...]
    python benchmarks/train_step.py --platform gpu --size gpt2|llama

All have the same sizes, batch, dtype, AdamW and clipping, no dropout. Each contender is a process
of its own, which waits while others have their turn, so that a noisy machine is noisy for all:

    plain      the update written by hand in jnp and lax: the limit with this compiler
    ours       our compiled update, called as the loop calls it; `ours-kept` without recomputation,
               `ours-free` with `trainer.deterministic: false`, which only a GPU heeds
    fsdp       ours over `--devices` virtual devices, weights and optimizer state split
    loop       our whole training loop, data order, prefetch and metrics included
    torch      PyTorch eager; `compiled` by torch.compile; `hf` and `hf-compiled` are transformers'
               models. All with torch's own fused attention

The models of `plain`, `torch` and `hf` are in `plain_models` and `torch_models`. On a GPU attention
is cuDNN's, also that of `plain`, products are bfloat16 (torch: autocast), and one device is used.

Prints JSON lines: the machine; for each contender the CPU seconds of its process tree up to the
first update, and of them those that tracing and compiling the update took, where it is JAX's; the
rest are medians over the rounds: CPU and wall milliseconds an update, tokens for each second of
both kinds, share of the best matrix product that XLA or torch made in the same process
(`share_of_peak`, by model FLOPs of the PaLM formula), peak memory of the host. On a GPU `mfu` is
the share of the published peak. Compare CPU seconds where the machine has other work; threads that
wait do not spin (OMP_WAIT_POLICY=PASSIVE).
"""

import argparse
import dataclasses
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from modeling.data.cache import TokenCache
    from modeling.experiment import ExperimentConfig
    from modeling.training.accounting import ModelShape

SIZES: dict[str, dict[str, int]] = {
    "bench": {"hidden_dim": 256, "num_layers": 4, "num_heads": 4, "length": 256, "batch": 8,
              "vocab": 8192},
    "nano": {"hidden_dim": 128, "num_layers": 4, "num_heads": 4, "length": 128, "batch": 16,
             "vocab": 4096},
    "tiny": {"hidden_dim": 64, "num_layers": 2, "num_heads": 2, "length": 64, "batch": 4,
             "vocab": 512},
    "tiny-llama": {"hidden_dim": 64, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2,
                   "mlp_dim": 176, "length": 64, "batch": 4, "vocab": 512},
    "nano-llama": {"hidden_dim": 128, "num_layers": 4, "num_heads": 4, "num_kv_heads": 2,
                   "mlp_dim": 352, "length": 128, "batch": 16, "vocab": 4096},
    "gpt2": {"hidden_dim": 768, "num_layers": 12, "num_heads": 12, "length": 1024, "batch": 16,
             "vocab": 50304},
    "llama": {"hidden_dim": 1024, "num_layers": 24, "num_heads": 16, "num_kv_heads": 8,
              "mlp_dim": 2816, "length": 1024, "batch": 16, "vocab": 32000},
}  # fmt: skip
"""`gpt2` is GPT-2 124M with a padded vocabulary, `llama` a Llama of 350 M weights; for GPUs."""
MODEL_FIELDS = ("hidden_dim", "num_layers", "num_heads", "num_kv_heads", "mlp_dim")
THREADS = 2
Advance = Callable[[], Any]
"""Makes one update and returns something to wait for."""


def main() -> None:
    """Gives every contender a turn in each round, or is one of them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="contenders; all by default")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="a contender's turn")
    parser.add_argument("--size", choices=sorted(SIZES), default="bench")
    parser.add_argument("--devices", type=int, default=4, help="of the FSDP contender")
    parser.add_argument("--mp", help="of those in JAX; bfloat16 products on a GPU, else float32")
    parser.add_argument("--platform", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.mp = arguments.mp or f"p=f32,c={'bf16' if arguments.platform == 'gpu' else 'f32'}"
    if arguments.contender:
        take_turns(arguments)
        return
    print_line(
        benchmark="train_step", size=arguments.size, platform=arguments.platform,
        mp=arguments.mp, **SIZES[arguments.size],
        cpus=os.cpu_count(), load=os.getloadavg()[0],
        versions={name: version(name) for name in ("jax", "jaxlib", "torch", "transformers")},
    )  # fmt: skip
    left_out = NOT_ASKED_FOR[arguments.platform]
    names = arguments.names or [name for name in CONTENDERS if name not in left_out]
    if unknown := sorted(set(names) - set(CONTENDERS)):
        parser.error(f"{unknown[0]!r} is no contender; there are {list(CONTENDERS)}.")
    running = {}
    for name in names:
        if (child := start(name, arguments, sys.argv[1:])) is not None:
            running[name] = child
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in running}
    for _ in range(arguments.rounds):
        for name, child in running.items():
            found[name].append(ask(child, "turn"))
    peaks = [ask(child, "peak") for child in running.values()]
    best = max((peak["flops_per_cpu_s"] for peak in peaks), default=0.0)
    published = next((peak["published"] for peak in peaks if peak["published"]), None)
    report(SIZES[arguments.size], found, best, published)


def start(
    name: str, arguments: argparse.Namespace, argv: Sequence[str]
) -> "subprocess.Popen[str] | None":
    """Starts a contender and returns it after its first update; says so if it cannot run."""
    from modeling.numerics import environment, inherited

    command = [sys.executable, __file__, *argv, "--contender", name]
    passive = {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": str(THREADS)}
    pinned = environment(experiment(arguments, name).trainer, arguments.platform)
    child = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=inherited(os.environ) | passive | pinned,
    )  # fmt: skip
    try:
        print_line(contender=name, **answer(child))
    except ValueError:
        print_line(contender=name, failed_with=child.wait())
        return None
    return child


def ask(child: "subprocess.Popen[str]", what: str) -> dict[str, Any]:
    """Lets a contender do something and returns what it measured."""
    assert child.stdin is not None
    child.stdin.write(what + "\n")
    child.stdin.flush()
    return answer(child)


def answer(child: "subprocess.Popen[str]") -> dict[str, Any]:
    """Returns a contender's next line."""
    assert child.stdout is not None
    return json.loads(child.stdout.readline())


def report(
    sizes: dict[str, int],
    found: dict[str, list[dict[str, Any]]],
    peak_flops: float,
    published: float | None,
) -> None:
    """Prints the medians; `published` are the FLOPs a second of a GPU."""
    tokens = sizes["batch"] * sizes["length"]
    flops = tokens * model_shape(sizes).flops_per_token()
    cpu = {name: statistics.median(t["cpu_s"] for t in turns) for name, turns in found.items()}
    for name, turns in found.items():
        wall_s = statistics.median(turn["wall_s"] for turn in turns)
        against = {f"cpu_against_{base}": round(cpu[name] / cpu[base], 3)
                   for base in ("plain", "torch", "ours") if base in cpu}  # fmt: skip
        if published is not None:
            against["mfu"] = round(flops / wall_s / published, 3)
        print_line(
            contender=name, cpu_ms=round(cpu[name] * 1e3, 1), wall_ms=round(wall_s * 1e3, 1),
            tokens_per_cpu_s=round(tokens / cpu[name]), tokens_per_s=round(tokens / wall_s),
            **against,
            share_of_peak=round(flops / cpu[name] / peak_flops, 3),
            spread=[round(pick(t["cpu_s"] for t in turns) / cpu[name], 2) for pick in (min, max)],
            peak_mib=max(turn["peak_mib"] for turn in turns), turns=len(turns),
        )  # fmt: skip
    print_line(peak_gflops_per_cpu_s=round(peak_flops / 1e9, 1))


def is_llama(sizes: dict[str, int]) -> bool:
    """Returns whether the sizes are those of a Llama."""
    return "num_kv_heads" in sizes


def model_shape(sizes: dict[str, int]) -> "ModelShape":
    """Returns what the model FLOPs depend on."""
    D, L, V = sizes["hidden_dim"], sizes["num_layers"], sizes["vocab"]
    from modeling.training.accounting import ModelShape

    weights = V * D + L * (12 * D * D + 13 * D) + 2 * D
    if is_llama(sizes):
        keys = D // sizes["num_heads"] * sizes["num_kv_heads"]
        weights = V * D + L * (2 * D * (D + keys) + 3 * D * sizes["mlp_dim"] + 2 * D) + D
    return ModelShape(weights, L, sizes["num_heads"], D // sizes["num_heads"], sizes["length"])


def take_turns(arguments: argparse.Namespace) -> None:
    """Is a contender: answers each line of the standard input by a line."""
    sizes = SIZES[arguments.size]
    advance, wait, product = CONTENDERS[arguments.contender](sizes, arguments)
    updates = LOOP_STEPS if arguments.contender == "loop" else 1
    wait(advance())
    print_line(first_update_cpu_s=round(cpu_s(), 2), **COMPILED)
    for line in sys.stdin:
        if line.strip() == "peak":
            # What a GPU multiplies takes no CPU time; its maker says what it could do.
            is_cpu = arguments.platform == "cpu"
            print_line(
                flops_per_cpu_s=best_product(product) if is_cpu else 1.0,
                published=None if is_cpu else published_flops(arguments.contender),
            )
            return
        began, cpu, steps, last = time.perf_counter(), cpu_s(), 0, None
        while time.perf_counter() - began < arguments.seconds or steps < 3:
            last, steps = advance(), steps + updates
            if steps % 4 == 0:
                wait(last)
        wait(last)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print_line(
            wall_s=(time.perf_counter() - began) / steps, cpu_s=(cpu_s() - cpu) / steps,
            steps=steps, peak_mib=peak // 1024,
        )  # fmt: skip


COMPILED: dict[str, float] = {}
"""What a contender in JAX tells of compiling its update."""


def compiled(compile_update: Callable[[], Any]) -> Any:
    """Returns the compiled update, and notes the CPU seconds of tracing and compiling it."""
    began = cpu_s()
    made = compile_update()
    COMPILED["compile_cpu_s"] = round(cpu_s() - began, 2)
    return made


def published_flops(name: str) -> float | None:
    """Returns the published FLOPs a second of the GPU, for 16-bit products."""
    from modeling.training.peak import published_peak

    if name in TORCH:
        import torch

        kind = torch.cuda.get_device_name()
    else:
        import jax

        kind = jax.devices()[0].device_kind
    peak = published_peak(kind, "bfloat16")
    return peak and peak.flops


def cpu_s() -> float:
    """CPU seconds of this process, all its threads, and children that have ended."""
    return sum(os.times()[:4])


def best_product(product: Callable[[], Any], size: int = 1024, turns: int = 12) -> float:
    """Returns the FLOPs for each CPU second of the best of some products of two squares."""
    product()
    best = 0.0
    for _ in range(turns):
        began = cpu_s()
        for _ in range(8):
            product()
        best = max(best, 8 * 2.0 * size**3 / max(cpu_s() - began, 1e-9))
    return best


def print_line(**fields: Any) -> None:
    """Prints one JSON line at once."""
    print(json.dumps(fields), flush=True)


def random_cache(sizes: dict[str, int]) -> "TokenCache":
    """Returns random rows in memory."""
    from modeling.data.cache import TokenCache
    from modeling.data.rows import TOKENS_ALONE, Columns, Rows

    class RandomCache(TokenCache):
        def __init__(self) -> None:
            shape = (512, sizes["length"])
            self.content_id = "0" * 64
            self.sequence_length = sizes["length"]
            self.vocab_size = sizes["vocab"]
            self._rows = np.random.default_rng(0).integers(0, sizes["vocab"], shape, np.int32)

        @property
        def splits(self) -> tuple[str, ...]:
            return ("train",)

        @property
        def columns(self) -> Columns:
            return TOKENS_ALONE

        def num_rows(self, split: str) -> int:
            return len(self._rows)

        def known_rows(self, split: str, wanted: int) -> int:
            return len(self._rows)

        def share(self, split: str) -> int:
            return 1

        def rows(self, split: str, indices: np.ndarray) -> Rows:
            return Rows(self._rows[indices])

    return RandomCache()


def experiment(arguments: argparse.Namespace, name: str) -> "ExperimentConfig":
    """Returns what a contender trains."""
    from modeling.experiment import ExperimentConfig, validate

    sizes, devices = SIZES[arguments.size], arguments.devices if name == "fsdp" else 1
    model: dict[str, Any] = {field: sizes[field] for field in MODEL_FIELDS if field in sizes}
    model["type"] = "llama" if is_llama(sizes) else "gpt2"
    model["gradient_checkpointing"] = name != "ours-kept"
    trainer = {
        "num_train_steps": 10**6,
        "save_every_steps": 10**6,
        "cpu_threads": THREADS,
        "train_batch_size": sizes["batch"],
        "mp": arguments.mp,
        "mesh": {"data": devices},
        "deterministic": name != "ours-free",
    }
    fields = {"dataset": "random", "sequence_length": sizes["length"], "trainer": trainer,
              "model": model, "optimizer": {"learning_rate": 6e-4}}  # fmt: skip
    return validate(ExperimentConfig, fields, "benchmark")


Contender = tuple[Advance, Callable[[Any], Any], Callable[[], Any]]
"""An update, how to wait for one, and a product of two squares of 1024 to measure the peak by."""


def jax_tools() -> tuple[Callable[[Any], Any], Callable[[], Any]]:
    """Returns how to wait, and the product."""
    import jax
    import jax.numpy as jnp

    square = jnp.ones((1024, 1024), jnp.float32)
    multiply = jax.jit(jnp.matmul)
    return jax.block_until_ready, lambda: multiply(square, square).block_until_ready()


def our_step(sizes: dict[str, int], arguments: argparse.Namespace) -> Contender:
    """Returns our compiled update, called as the loop calls it."""
    import jax

    from haliax import Axis
    from modeling.training.step import compile_step
    from modeling.training.trainer import make_plan

    config, cache = experiment(arguments, arguments.contender), random_cache(sizes)
    plan = make_plan(config, cache)
    Batch = Axis("batch", sizes["batch"])
    step = compiled(
        lambda: compile_step(
            plan.blueprint, config.optimizer, config.trainer, plan.layout, Batch=Batch, Pos=plan.Pos
        )
    )
    arrays = plan.blueprint.initialize(plan.make, jax.random.PRNGKey(0))
    rows = np.arange(Batch.size)

    def advance() -> Any:
        nonlocal arrays
        tokens = jax.device_put(cache.rows("train", rows), step.batch_sharding)
        arrays, metrics = step.run(arrays, tokens)
        return metrics.loss

    return advance, *jax_tools()


def our_loop(sizes: dict[str, int], arguments: argparse.Namespace) -> Contender:
    """Returns updates of the whole loop, which runs in a thread and stops after each ten."""
    import threading

    from modeling.artifacts import Workspace
    from modeling.training.observer import Silent
    from modeling.training.trainer import train

    wanted, made = threading.Semaphore(0), threading.Semaphore(0)

    class Stepwise(Silent):
        def step(self, report: Any) -> None:
            made.release()
            wanted.acquire()

    def run() -> None:
        with tempfile.TemporaryDirectory() as directory:
            space = Workspace(Path(directory) / "progress", Path(directory) / "output")
            space.progress.mkdir()
            space.output.mkdir()
            try:
                train(looped, random_cache(sizes), space, observer=Stepwise())
            finally:
                os._exit(1)  # It has no end: this is an error, and the other thread waits.

    # Ten updates between two reports, so that the loop runs as it does in earnest.
    config = experiment(arguments, "loop")
    trainer = dataclasses.replace(config.trainer, log_every_steps=LOOP_STEPS)
    looped = dataclasses.replace(config, trainer=trainer)
    threading.Thread(target=run, daemon=True).start()
    made.acquire()  # the first update, which is always reported

    def advance() -> Any:
        wanted.release()
        made.acquire()

    return advance, lambda value: None, jax_tools()[1]


LOOP_STEPS = 10
"""Updates that `loop` makes at once."""


def plain_step(sizes: dict[str, int], arguments: argparse.Namespace) -> Contender:
    """Returns the same update in jnp and lax alone."""
    import jax
    import jax.numpy as jnp
    import optax
    import plain_models

    compute = jnp.bfloat16 if "c=bf" in arguments.mp else jnp.float32
    architecture = plain_models.llama if is_llama(sizes) else plain_models.gpt2
    init, loss = architecture(sizes, arguments.platform, compute)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(6e-4, 0.9, 0.95, weight_decay=0.1)
    )

    def update(params: Any, state: Any, tokens: Any) -> tuple[Any, Any, Any]:
        value, gradient = jax.value_and_grad(loss)(params, tokens)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    params = jax.jit(init)(jax.random.PRNGKey(0))
    state = jax.jit(optimizer.init)(params)
    shape = sizes["batch"], sizes["length"]
    rows = np.random.default_rng(0).integers(0, sizes["vocab"], shape, dtype=np.int32)
    jitted = jax.jit(update, donate_argnums=(0, 1))
    step = compiled(lambda: jitted.lower(params, state, jnp.asarray(rows)).compile())

    def advance() -> Any:
        nonlocal params, state
        params, state, value = step(params, state, jnp.asarray(rows))
        return value

    return advance, *jax_tools()


def torch_tools(device: str) -> tuple[Callable[[Any], Any], Callable[[], Any]]:
    """Returns how to wait, which a CPU needs not, and the product."""
    import torch

    torch.set_num_threads(THREADS)
    square = torch.ones(1024, 1024)

    def wait(value: Any) -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    return wait, lambda: square @ square


def torch_contender(
    model: Any, sizes: dict[str, int], arguments: argparse.Namespace, *, by_compiler: bool = False
) -> Contender:
    """Returns AdamW with clipping on what `model` gives for rows: their loss."""
    import torch

    device = "cuda" if arguments.platform == "gpu" else "cpu"
    model.to(device)
    called = torch.compile(model) if by_compiler else model
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    spared = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": spared, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=6e-4, betas=(0.9, 0.95), fused=True)
    shape = (sizes["batch"], sizes["length"])
    drawn = np.random.default_rng(0).integers(0, sizes["vocab"], shape)
    rows = torch.from_numpy(drawn).to(device)

    def advance() -> Any:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = called(rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss

    return advance, *torch_tools(device)


def torch_step(sizes: dict[str, int], arguments: argparse.Namespace) -> Contender:
    """Returns the model in PyTorch with its fused attention, eager or by torch.compile."""
    import torch_models

    by_compiler = arguments.contender == "compiled"
    model = (torch_models.llama if is_llama(sizes) else torch_models.gpt2)(sizes)
    return torch_contender(model, sizes, arguments, by_compiler=by_compiler)


def transformers_step(sizes: dict[str, int], arguments: argparse.Namespace) -> Contender:
    """Returns Hugging Face's model, eager or by torch.compile."""
    import torch_models

    by_compiler, model = arguments.contender == "hf-compiled", torch_models.of_transformers(sizes)
    return torch_contender(model, sizes, arguments, by_compiler=by_compiler)


CONTENDERS: dict[str, Callable[[dict[str, int], argparse.Namespace], Contender]] = {
    "plain": plain_step,
    "ours": our_step,
    "ours-kept": our_step,
    "ours-free": our_step,
    "fsdp": our_step,
    "loop": our_loop,
    "torch": torch_step,
    "compiled": torch_step,
    "hf": transformers_step,
    "hf-compiled": transformers_step,
}
TORCH = {"torch", "compiled", "hf", "hf-compiled"}
NOT_ASKED_FOR = {"cpu": {"ours-free", "hf-compiled"}, "gpu": {"fsdp"}}
"""Contenders that run only where they are named."""


if __name__ == "__main__":
    main()
