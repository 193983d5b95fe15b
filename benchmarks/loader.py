"""Shuffled batches of [32, 1024] from a token cache: CPU seconds, and milliseconds a batch.

    python benchmarks/loader.py [--rounds 5] [--batches 400]

Contenders take turns and read the same rows of the same synthetic tokens: the training loader
with its data order, the cache given the rows, a NumPy memory map (the limit), and `datasets`.
Packed rows are others, put together of documents of 450 or 60 tokens on average, and come with
segments and masks. Last the loader as the trainer draws from it, which computes for 2 ms between
two batches: what it waits.
Prints JSON lines: the machine, then each contender's median over the rounds.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from pathlib import Path

import datasets
import numpy as np
from corpora import Documents, random_documents, write_tokenized

from modeling.artifacts import Workspace
from modeling.data import cache
from modeling.data.config import Packing, TokenCacheConfig
from modeling.data.loader import TrainLoader
from modeling.data.order import RowOrder
from modeling.training.config import DataOrderConfig

BATCH, LENGTH = 32, 1024
SHARDS, SHARD_TOKENS = 2, 1 << 24  # as 64 MiB of text, of which a shard is made, have them
COMPUTE_S = 0.002
PACKED = {450: "token cache, packed documents", 60: "token cache, packed short documents"}
"""By the mean of the documents' lengths."""
Contender = Callable[[int, np.ndarray], np.ndarray]


def main() -> None:
    """Writes a tokenized corpus and its cache to a temporary directory, then measures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, default=400)
    arguments = parser.parse_args()
    print_line(
        benchmark="loader",
        cpus=os.cpu_count(),
        machine=platform.machine(),
        load=os.getloadavg()[0],
        numpy=version("numpy"),
        datasets=version("datasets"),
    )
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        shards = list(random_documents(SHARDS * SHARD_TOKENS, SHARD_TOKENS))
        opened = build(root / "concat", shards, "concat")
        packed = {450: build(root / "packed", shards, "documents")}
        stream = np.concatenate([tokens for tokens, _ in shards])
        tokens = stream[: len(stream) // LENGTH * LENGTH]
        short = random_documents(SHARDS * SHARD_TOKENS, SHARD_TOKENS, 60)
        packed[60] = build(root / "short", short, "documents")
        tokens.tofile(root / "flat.bin")
        measure(root / "flat.bin", opened, packed, arguments)


def build(root: Path, shards: Iterable[Documents], packing: Packing) -> cache.TokenCache:
    """Writes documents as a tokenized corpus, and opens a cache of it."""
    (root / "view").mkdir(parents=True)
    write_tokenized(root, shards)
    config = TokenCacheConfig(length=LENGTH, packing=packing)
    ids = {"tokenized_id": "0" * 64, "tokenizer_id": "0" * 64}
    cache.build(config, root, Workspace(root, root / "view"), **ids)
    return cache.TokenCache.open(root / "view", root)


def measure(
    flat: Path,
    opened: cache.TokenCache,
    packed: Mapping[int, cache.TokenCache],
    arguments: argparse.Namespace,
) -> None:
    """Runs every contender in every round over the same rows and prints the medians."""
    num_rounds, num_batches = arguments.rounds, arguments.batches
    tokens = np.fromfile(flat, np.uint16)
    order = RowOrder(
        lambda wanted: opened.num_rows("train"), seed=0, era_rows=DataOrderConfig().era_rows
    )
    rows = [order.rows_at(step * BATCH, BATCH) for step in range(num_batches)]
    expected = [tokens.reshape(-1, LENGTH)[batch_rows] for batch_rows in rows[:10]]
    cpu_s: dict[str, list[float]] = {}
    batch_ms: dict[str, list[float]] = {}
    batch_cpu_ms: dict[str, list[float]] = {}
    for _ in range(num_rounds):
        for name, take in contenders(flat, opened, packed).items():
            for step, batch in enumerate(expected):
                if name not in PACKED.values() and not np.array_equal(
                    take(step, rows[step]), batch
                ):
                    raise SystemExit(f"{name} reads other rows.")
            before = time.process_time()
            for step, batch_rows in enumerate(rows):
                started, cpu_started = time.perf_counter(), time.thread_time()
                take(step, batch_rows)
                batch_cpu_ms.setdefault(name, []).append(1e3 * (time.thread_time() - cpu_started))
                batch_ms.setdefault(name, []).append(1e3 * (time.perf_counter() - started))
            cpu_s.setdefault(name, []).append(time.process_time() - before)
    for name, values in cpu_s.items():
        cpu = statistics.median(values)
        percentiles = statistics.quantiles(batch_ms[name], n=100)
        print_line(
            contender=name,
            cpu_s=round(cpu, 4),
            mtok_per_cpu_s=round(num_batches * BATCH * LENGTH / cpu / 1e6, 1),
            p50_ms=round(percentiles[49], 3),
            p99_ms=round(percentiles[98], 3),
            # What a busy machine does to the wall clock is no stall of the loader's.
            p99_cpu_ms=round(statistics.quantiles(batch_cpu_ms[name], n=100)[98], 3),
        )
    print_waits(opened, num_rounds * num_batches)


def print_waits(opened: cache.TokenCache, num_batches: int) -> None:
    """Prints how long a consumer waits for batches that are made while it computes."""
    wait_ms, cpu_ms = [], []
    with TrainLoader(opened, DataOrderConfig(), BATCH).stream(0) as batches:
        for _ in range(num_batches):
            time.sleep(COMPUTE_S)
            started, cpu_started = time.perf_counter(), time.thread_time()
            next(batches)
            cpu_ms.append(1e3 * (time.thread_time() - cpu_started))
            wait_ms.append(1e3 * (time.perf_counter() - started))
    waits, cpu = (statistics.quantiles(values, n=100) for values in (wait_ms, cpu_ms))
    print_line(
        contender="training loader, drawn from while computing",
        p50_ms=round(waits[49], 3),
        p99_ms=round(waits[98], 3),
        p99_cpu_ms=round(cpu[98], 3),
    )


def contenders(
    flat: Path, opened: cache.TokenCache, packed: Mapping[int, cache.TokenCache]
) -> dict[str, Contender]:
    """Returns what is compared: each takes a step and its rows and returns the batch."""
    loader = TrainLoader(opened, DataOrderConfig(), BATCH)
    tokens = np.fromfile(flat, np.uint16)
    mapped = np.memmap(flat, np.uint16, "r").reshape(-1, LENGTH)
    features = datasets.Features({"tokens": datasets.List(datasets.Value("uint16"), LENGTH)})
    column = {"tokens": tokens.reshape(-1, LENGTH)}
    peer = datasets.Dataset.from_dict(column, features=features).with_format("numpy")
    of_documents = {PACKED[mean]: packed_contender(one) for mean, one in packed.items()}
    return {
        "training loader, order included": lambda step, rows: loader.batch(step).tokens,
        "token cache, rows given": lambda step, rows: opened.rows("train", rows).tokens,
        **of_documents,
        "numpy memmap, uint16 as stored": lambda step, rows: mapped[rows],
        "numpy memmap, to int32": lambda step, rows: mapped[rows].astype(np.int32),
        "datasets, numpy format": lambda step, rows: peer[rows.tolist()]["tokens"],
    }


def packed_contender(packed: cache.TokenCache) -> Contender:
    """Returns what takes rows of packed documents."""
    num_rows = packed.num_rows("train")
    return lambda step, rows: packed.rows("train", rows % num_rows).tokens


def print_line(**values: object) -> None:
    """Prints one JSON line."""
    print(json.dumps(values), flush=True)


if __name__ == "__main__":
    main()
