"""Tokenization of the standard library: CPU seconds of our encoder and of the library's.

    python benchmarks/tokenization.py [--rounds 3] [--vocab-size 8192]

Contenders take turns, each round from a cold start, and must agree on every id. CPU seconds are
of the whole process, all threads. Prints JSON lines: the machine, each run, each contender's median
and its ratio to `encode_batch_fast`.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from itertools import chain
from pathlib import Path

import numpy as np

from modeling.artifacts import Workspace
from modeling.data import corpus, encoding, tokenized, tokenizer
from modeling.data.config import (
    BpeTokenizerConfig,
    PyStdlibSource,
    TokenizationConfig,
    ValidationConfig,
)

BATCH_BYTES = 4 * 1024 * 1024
BASELINE = "encode_batch_fast"
Contender = Callable[[], np.ndarray]


def main() -> None:
    """Builds corpus and tokenizer in a temporary directory, then measures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--vocab-size", type=int, default=8192)
    arguments = parser.parse_args()
    print_line(
        benchmark="tokenization",
        cpus=os.cpu_count(),
        machine=platform.machine(),
        load=os.getloadavg()[0],
        tokenizers=version("tokenizers"),
        pyarrow=version("pyarrow"),
    )
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        prepare(root, arguments.vocab_size)
        measure(root, arguments.rounds)


def prepare(root: Path, vocab_size: int) -> None:
    """Writes corpus and tokenizer below `root`."""
    source = PyStdlibSource(type="pystdlib")
    listing = corpus.scan(source, validation=ValidationConfig())
    corpus.build(source, listing, workspace(root, "corpus"))
    config = BpeTokenizerConfig(type="bpe", vocab_size=vocab_size)
    tokenizer.build(config, root / "corpus", workspace(root, "tokenizer"))


def measure(root: Path, num_rounds: int) -> None:
    """Runs every contender in every round and prints what each took."""
    texts = list(corpus.texts(root / "corpus", corpus.TRAIN))
    megabytes = sum(map(len, texts)) / 1e6
    reference = None
    seconds: dict[str, list[float]] = {}
    for turn in range(num_rounds):
        for name, run in contenders(root, texts, turn).items():
            wall, cpu = time.perf_counter(), time.process_time()
            ids = run()
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            reference = ids if reference is None else reference
            if not np.array_equal(ids, reference):
                raise SystemExit(f"{name} gives other ids than encode_batch.")
            seconds.setdefault(name, []).append(cpu)
            print_line(round=turn, contender=name, cpu_s=round(cpu, 3), wall_s=round(wall, 3))
    baseline = statistics.median(seconds[BASELINE])
    for name, values in seconds.items():
        median = statistics.median(values)
        print_line(
            contender=name,
            megabytes=round(megabytes, 1),
            tokens=len(reference) if reference is not None else 0,
            cpu_s=round(median, 3),
            mb_per_cpu_s=round(megabytes / median, 2),
            times_encode_batch_fast=round(baseline / median, 2),
        )


def contenders(root: Path, texts: list[bytes], turn: int) -> dict[str, Contender]:
    """Returns what is compared; every one gives the ids of the training split, without EOS."""
    backend = tokenizer.Tokenizer.load(root / "tokenizer").backend
    dtype = np.dtype(np.uint16)

    def ours() -> np.ndarray:
        encoder = encoding.WordEncoder(backend, dtype)
        return np.concatenate([encoder.encode(batch).tokens for batch in batches(texts)])

    def library(method: str) -> Contender:
        encode = getattr(backend, method)

        def run() -> np.ndarray:
            encoded = (
                encoding.ids
                for batch in batches(texts)
                for encoding in encode([t.decode() for t in batch], add_special_tokens=False)
            )
            return np.fromiter(chain.from_iterable(encoded), dtype)

        return run

    def whole_stage() -> np.ndarray:
        config = TokenizationConfig(append_eos=False)
        space = workspace(root, f"tokenized-{turn}")
        tokenized.build(config, root / "corpus", root / "tokenizer", space)
        split = tokenized.Manifest.read(space.output).splits[corpus.TRAIN]
        tokens = tokenized.flat_tokens(space.output, split, dtype)
        return np.array(tokens.span(0, len(tokens)))

    return {
        "encode_batch": library("encode_batch"),
        "encode_batch_fast": library("encode_batch_fast"),
        "distinct words": ours,
        "distinct words, stage with both splits, digests and files": whole_stage,
    }


def batches(texts: list[bytes]) -> Iterator[list[bytes]]:
    """Yields texts by about four MiB, as the stage takes them."""
    batch: list[bytes] = []
    for text in texts:
        batch.append(text)
        if sum(map(len, batch)) >= BATCH_BYTES:
            yield batch
            batch = []
    yield batch


def workspace(root: Path, name: str) -> Workspace:
    """Makes the directories of one build."""
    (root / name).mkdir()
    (root / f"{name}-progress").mkdir()
    return Workspace(root / f"{name}-progress", root / name)


def print_line(**values: object) -> None:
    """Prints one JSON line."""
    print(json.dumps(values), flush=True)


if __name__ == "__main__":
    main()
