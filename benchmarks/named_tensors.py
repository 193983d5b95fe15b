"""What names cost: eager calls, tracing, compiling and running, against the same in plain jnp.

    python benchmarks/named_tensors.py [--repeats 30] > named_tensors.jsonl

Prints one JSON object a line: `{"case", "library", "named_us", "jnp_us", "ratio"}`, where `library`
is the `haliax` that is importable: this repository's, or PyPI's in an environment that has it. The
two sides of a case alternate, so that both see the same machine, and each figure is a median.
"""

import argparse
import importlib.metadata
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

import haliax as hax
import haliax.nn

Batch, Pos, Embed, Mlp = (
    hax.Axis(*a) for a in (("batch", 8), ("pos", 16), ("embed", 32), ("mlp", 64))
)
Case = tuple[str, Callable[[], Any], Callable[[], Any], int]


def library() -> str:
    """Which `haliax` this is."""
    if "site-packages" in Path(hax.__file__).parts:
        return f"haliax {importlib.metadata.version('haliax')} (PyPI)"
    return "this repository"


def eager_cases() -> Iterator[Case]:
    """Single operations, dispatched one by one."""
    key = jax.random.PRNGKey(0)
    x = hax.random.normal(key, (Batch, Pos, Embed))
    y = hax.random.normal(key, (Batch, Pos, Embed))
    bias = hax.random.normal(key, Embed)
    weight = hax.random.normal(key, (Embed, Mlp))
    rx, ry, rb, rw = (v.array for v in (x, y, bias, weight))
    layer = hax.nn.LayerNorm.init(Embed)
    scale, shift = layer.weight.array, layer.bias.array

    def norm(r: Any) -> Any:
        centered = r - r.mean(-1, keepdims=True)
        inverse = jax.lax.rsqrt((centered**2).mean(-1, keepdims=True) + 1e-5)
        return centered * inverse * scale + shift

    yield "eager add, same axes", lambda: x + y, lambda: rx + ry, 200
    yield "eager add, bias", lambda: x + bias, lambda: rx + rb, 200
    yield "eager exp", lambda: hax.exp(x), lambda: jnp.exp(rx), 200
    yield "eager sum", lambda: hax.sum(x, Embed), lambda: jnp.sum(rx, -1), 200
    contract = lambda: jnp.einsum("bpe,em->bpm", rx, rw)
    yield "eager dot", lambda: hax.dot(x, weight, axis=Embed), contract, 100
    yield "eager layer norm", lambda: layer(x), lambda: norm(rx), 20


def call_cases() -> Iterator[Case]:
    """Calls of a compiled function with a hundred arrays."""
    tree = {f"w{i}": hax.ones(Embed) for i in range(100)}
    raw = {name: w.array for name, w in tree.items()}
    double = lambda t: jax.tree_util.tree_map(lambda a: a * 2, t)
    plain = jax.jit(double)
    compiled, named_compiled = jax.jit(double), hax.named_jit(double)
    yield "jit call, 100 arrays", lambda: compiled(tree), lambda: plain(raw), 30
    yield "named_jit call, 100 arrays", lambda: named_compiled(tree), lambda: plain(raw), 30


class Block(eqx.Module):
    """Two linear layers and a norm, with a residual connection."""

    norm: Any
    up: Any
    down: Any

    @staticmethod
    def init(key: Any) -> "Block":
        """Random weights."""
        k_up, k_down = jax.random.split(key)
        return Block(
            hax.nn.LayerNorm.init(Embed),
            hax.nn.Linear.init(Embed, Mlp, key=k_up, out_first=True),
            hax.nn.Linear.init(Mlp, Embed, key=k_down, out_first=True),
        )

    def __call__(self, x: Any) -> Any:
        """One layer."""
        return x + self.down(hax.nn.gelu(self.up(self.norm(x))))


def _plain_block(p: Any, x: Any) -> Any:
    (scale, shift), (w_up, b_up), (w_down, b_down) = p
    centered = x - x.mean(-1, keepdims=True)
    normed = centered * jax.lax.rsqrt((centered**2).mean(-1, keepdims=True) + 1e-5) * scale + shift
    hidden = jax.nn.gelu(jnp.einsum("bpe,me->bpm", normed, w_up) + b_up)
    return x + jnp.einsum("bpm,em->bpe", hidden, w_down) + b_down


def _weights(block: Block) -> Any:
    return [(m.weight.array, m.bias.array) for m in (block.norm, block.up, block.down)]


def model_cases(depth: int = 12) -> Iterator[Case]:
    """Tracing, compiling and running a stack of blocks."""
    keys = jax.random.split(jax.random.PRNGKey(0), depth)
    blocks = [Block.init(key) for key in keys]
    plain = [_weights(block) for block in blocks]
    stack = hax.nn.Stacked.init(hax.Axis("layers", depth), Block)(keys)
    stacked = _weights(stack.stacked)
    x = hax.random.normal(keys[0], (Batch, Pos, Embed))

    def unrolled(blocks: Any, x: Any) -> Any:
        for block in blocks:
            x = block(x)
        return x

    def plain_unrolled(params: Any, x: Any) -> Any:
        for p in params:
            x = _plain_block(p, x)
        return x

    def loss(blocks: Any, x: Any) -> Any:
        return (unrolled(blocks, x) ** 2).mean().scalar()

    def plain_loss(params: Any, x: Any) -> Any:
        return (plain_unrolled(params, x) ** 2).mean()

    def folded(stack: Any, x: Any) -> Any:
        return stack.fold(x)

    def plain_folded(params: Any, x: Any) -> Any:
        return jax.lax.scan(lambda c, p: (_plain_block(p, c), None), x, params)[0]

    def trace(fn: Any, *args: Any) -> Any:
        # A fresh function each time: traces are cached by identity.
        return lambda: jax.jit(lambda *a: fn(*a)).trace(*args)

    def compile_(fn: Any, *args: Any) -> Any:
        return lambda: jax.jit(lambda *a: fn(*a)).lower(*args).compile()

    raw = x.array
    yield f"trace {depth} layers", trace(unrolled, blocks, x), trace(plain_unrolled, plain, raw), 1
    grads = jax.grad(loss), jax.grad(plain_loss)
    yield (
        f"trace {depth} layers, gradient",
        trace(grads[0], blocks, x),
        trace(grads[1], plain, raw),
        1,
    )
    yield "trace Stacked", trace(folded, stack, x), trace(plain_folded, stacked, raw), 1
    yield "compile Stacked", compile_(folded, stack, x), compile_(plain_folded, stacked, raw), 1
    run, plain_run = jax.jit(folded), jax.jit(plain_folded)
    yield "run Stacked", lambda: run(stack, x), lambda: plain_run(stacked, raw), 10


def measure(case: Case, repeats: int) -> dict[str, Any]:
    """Medians of both sides, taken in turns."""
    name, named, plain, inner = case
    times: dict[str, list[float]] = {"named": [], "jnp": []}
    sides = {"named": named, "jnp": plain}
    for fn in sides.values():
        jax.block_until_ready(jax.tree_util.tree_leaves(fn()))
    for _ in range(repeats if inner > 1 else max(3, repeats // 3)):
        for side, fn in sides.items():
            start = time.perf_counter()
            for _ in range(inner):
                result = fn()
            jax.block_until_ready(jax.tree_util.tree_leaves(result))
            times[side].append((time.perf_counter() - start) / inner * 1e6)
    named_us, jnp_us = (statistics.median(times[side]) for side in ("named", "jnp"))
    figures = {"named_us": round(named_us, 1), "jnp_us": round(jnp_us, 1)}
    return {"case": name, "library": library(), **figures, "ratio": round(named_us / jnp_us, 2)}


def main() -> None:
    """Measures every case."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=30, help="measurements of each side")
    repeats = parser.parse_args().repeats
    for cases in (eager_cases, call_cases, model_cases):
        for case in cases():
            print(json.dumps(measure(case, repeats)), flush=True)


if __name__ == "__main__":
    main()
