"""Tokenization of text: CPU seconds of our encoder and of the library's.

    python benchmarks/tokenization.py [--rounds 3] [--vocab-size 8192] [--megabytes 8]
                                      [--patterns gpt2 llama3 o200k] [--peers PYTHON]
                                      [--texts FILE... | --made-up-words]

The text is the standard library's sources; or of files in UTF-8, a document each, and of a single
one each paragraph; or words of random letters, nearly all of which occur once, which is the worst
there is for an encoder that remembers words.

Each pattern has a tokenizer of its own. Contenders take turns, each from a cold start, and
must agree on every id. CPU seconds are of the whole process, all threads. Prints JSON lines: the
machine, each run, each contender's median and its ratio to `encode_batch_fast`.

`--peers` names an interpreter that has `datasets` and `datatrove`. They run as subprocesses, from
JSON lines to what they leave on disk, imports and their own worker processes included, and must
make as many ids; one that is not installed there is reported as skipped.
"""

import argparse
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from itertools import chain
from pathlib import Path

import numpy as np
from corpora import write_table

from modeling.artifacts import Workspace
from modeling.data import corpus, encoding, token_files, tokenized, tokenizer
from modeling.data.config import TokenizationConfig
from modeling.data.sources_config import PyStdlibSource, ValidationConfig
from modeling.data.splits import TRAIN
from modeling.data.tokenizers_config import BpeTokenizerConfig, Pattern

BATCH_BYTES = 4 * 1024 * 1024
BASELINE = "encode_batch_fast"
STAGE = "distinct words, the whole stage with digests and files"
PATTERNS: tuple[Pattern, ...] = ("gpt2", "llama3", "o200k")
Contender = Callable[[], np.ndarray]


def main() -> None:
    """Builds corpus and tokenizer in a temporary directory, then measures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--megabytes", type=float, default=8, help="of text, from its start on")
    parser.add_argument("--patterns", nargs="+", choices=PATTERNS, default=PATTERNS)
    parser.add_argument("--peers", type=Path, help="an interpreter with datasets and datatrove")
    parser.add_argument("--texts", nargs="+", type=Path, help="files to read instead")
    parser.add_argument("--made-up-words", action="store_true", help="instead of any text")
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
        texts = chosen_texts(arguments, root)
        write_start(texts, fresh(root / "corpus"), arguments.megabytes * 1e6)
        for pattern in arguments.patterns:
            of_pattern = root / pattern
            of_pattern.mkdir()
            (of_pattern / "corpus").symlink_to(root / "corpus")
            config = BpeTokenizerConfig(
                type="bpe", vocab_size=arguments.vocab_size, pattern=pattern
            )
            tokenizer.build(config, root / "corpus", workspace(of_pattern, "tokenizer"))
            measure(of_pattern, arguments)


def measure(root: Path, arguments: argparse.Namespace) -> None:
    """Runs every contender in every round; `root` is named as its pattern."""
    num_rounds, interpreter = arguments.rounds, arguments.peers
    texts = list(map(bytes, corpus.texts(root / "corpus", TRAIN)))
    peers = [] if interpreter is None else installed_peers(interpreter)
    write_json_lines(root / "peers", texts)
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
            print_line(
                pattern=root.name,
                round=turn,
                contender=name,
                cpu_s=round(cpu, 3),
                wall_s=round(wall, 3),
            )
        for name in peers:
            before, wall = children_cpu(), time.perf_counter()
            num_ids = run_peer(str(interpreter), name, root, turn)
            cpu, wall = children_cpu() - before, time.perf_counter() - wall
            if reference is None or num_ids != len(reference):
                raise SystemExit(f"{name} gives {num_ids} ids, other than encode_batch.")
            seconds.setdefault(name, []).append(cpu)
            print_line(
                pattern=root.name,
                round=turn,
                contender=name,
                cpu_s=round(cpu, 3),
                wall_s=round(wall, 3),
            )
    baseline = statistics.median(seconds[BASELINE])
    for name, values in seconds.items():
        median = statistics.median(values)
        print_line(
            pattern=root.name,
            contender=name,
            megabytes=round(megabytes, 1),
            tokens=len(reference) if reference is not None else 0,
            cpu_s=round(median, 3),
            mb_per_cpu_s=round(megabytes / median, 2),
            times_encode_batch_fast=round(baseline / median, 2),
        )


def contenders(root: Path, texts: list[bytes], turn: int) -> dict[str, Contender]:
    """Returns what is compared; every one gives the ids of the training split, without EOS."""
    loaded = tokenizer.Tokenizer.load(root / "tokenizer")
    dtype = np.dtype(np.uint16)

    def ours() -> np.ndarray:
        encoder = encoding.WordEncoder(loaded, dtype)
        return np.concatenate([encoder.encode(batch).tokens for batch in batches(texts)])

    def library(method: str) -> Contender:
        # Its own, since the library remembers words, too.
        own = tokenizer.Tokenizer.load(root / "tokenizer")
        encode = getattr(own.backend, method)

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
        split = token_files.Manifest.read(space.output).splits[TRAIN]
        tokens = token_files.flat_tokens(space.output, split, dtype)
        return np.array(tokens.span(0, len(tokens)))

    return {
        "encode_batch": library("encode_batch"),
        "encode_batch_fast": library("encode_batch_fast"),
        "distinct words": ours,
        STAGE: whole_stage,
    }


PEERS = {
    "datasets": """
import sys, datasets, tokenizers
from pathlib import Path
root, output = map(Path, sys.argv[1:])
datasets.disable_progress_bars()
backend = tokenizers.Tokenizer.from_file(str(root / "tokenizer" / "tokenizer.json"))
backend.encode_special_tokens = True
def encode(rows):
    encodings = backend.encode_batch_fast(rows["text"], add_special_tokens=False)
    return {"input_ids": [encoding.ids for encoding in encodings]}
files = str(root / "peers" / "texts.jsonl")
rows = datasets.load_dataset("json", data_files=files, cache_dir=str(output), split="train")
mapped = rows.map(encode, batched=True, remove_columns=rows.column_names)
print(sum(len(row.values) for row in mapped.data.column("input_ids").chunks))
""",
    "datatrove": """
import sys
from pathlib import Path
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer
root, output = map(Path, sys.argv[1:])
reader = JsonlReader(str(root / "peers"), glob_pattern="*.jsonl")
writer = DocumentTokenizer(
    str(output / "ids"), tokenizer_name_or_path=str(root / "tokenizer" / "tokenizer.json"),
    local_working_dir=str(output / "local"), shuffle_documents=False, eos_token=None,
)
LocalPipelineExecutor([reader, writer], tasks=1, logging_dir=str(output / "logs")).run()
print(sum(path.stat().st_size for path in (output / "ids").glob("*.ds")) // 2)
""",
}


def installed_peers(interpreter: Path) -> list[str]:
    """Returns the peers that `interpreter` can import; prints a line for each that it cannot."""
    found = []
    for name in PEERS:
        command = [str(interpreter), "-c", f"import {name}"]
        if subprocess.run(command, check=False, capture_output=True).returncode == 0:
            found.append(name)
        else:
            print_line(contender=name, skipped=f"not installed in {interpreter}")
    return found


def run_peer(interpreter: str, name: str, root: Path, turn: int) -> int:
    """Tokenizes the texts by a peer and returns how many ids it wrote."""
    output = root / f"{name}-{turn}"
    output.mkdir()
    command = [interpreter, "-c", PEERS[name], str(root), str(output)]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-2000:]}")
    return int(done.stdout.split()[-1])


def children_cpu() -> float:
    """Returns the CPU seconds of all processes below this one that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def write_json_lines(directory: Path, texts: list[bytes]) -> None:
    """Writes what the peers read."""
    directory.mkdir()
    with (directory / "texts.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text.decode()}) + "\n" for text in texts)


def chosen_texts(arguments: argparse.Namespace, root: Path) -> Iterator[bytes]:
    """Yields the documents that the command line asks for."""
    if arguments.made_up_words:
        return made_up_texts()
    if arguments.texts is None:
        source = PyStdlibSource(type="pystdlib")
        listing = corpus.scan(source, validation=ValidationConfig())
        corpus.build(source, listing, workspace(root, "all"))
        return map(bytes, corpus.texts(root / "all", TRAIN))
    if len(arguments.texts) == 1:
        return iter(arguments.texts[0].read_bytes().split(b"\n\n"))
    return (path.read_bytes() for path in arguments.texts)


def made_up_texts() -> Iterator[bytes]:
    """Yields documents of 500 words, each of 3 to 12 of the commonest letters."""
    draw = random.Random(0)
    while True:
        lengths = (draw.randint(3, 12) for _ in range(500))
        yield " ".join("".join(draw.choices("etaoinshrdlu", k=n)) for n in lengths).encode()


def write_start(texts: Iterator[bytes], directory: Path, num_bytes: float) -> None:
    """Writes the first documents, of so many bytes, as a raw corpus."""

    def first() -> Iterator[tuple[str, bytes]]:
        left = num_bytes
        for number, text in enumerate(texts):
            yield f"{number}.txt", text
            left -= len(text)
            if left <= 0:
                return

    write_table(directory, first())


def fresh(directory: Path) -> Path:
    """Returns an empty directory."""
    directory.mkdir()
    return directory


def batches(texts: list[bytes]) -> Iterator[list[bytes]]:
    """Yields texts by about four MiB, as the stage takes them."""
    batch: list[bytes] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
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
