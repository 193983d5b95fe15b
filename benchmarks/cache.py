"""What another sequence length costs over a tokenized corpus that is there, and what a copy does.

    python benchmarks/cache.py [--tokens 1000000000] [--directory DIR]

A corpus of random ids is written as the tokenized corpus stage would (`corpora`). Then, each timed
alone and with its CPU seconds:

    view, concat        a new length: below 1 s and 0.1 % of the corpus's bytes
    view, documents     best-fit packing; the index grows with the number of documents
    copy                beside a file copy of the same bytes, synced as it is
"""

import argparse
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from corpora import random_documents, write_tokenized

from modeling.artifacts import Workspace
from modeling.data import cache
from modeling.data.config import TokenCacheConfig
from modeling.data.shards import sync_file

SHARD_TOKENS = 1 << 24
IDS = {"tokenized_id": "0" * 64, "tokenizer_id": "0" * 64}


def main() -> None:
    """Writes the corpus, runs each case, and prints a JSON line for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1_000_000_000)
    parser.add_argument("--directory", type=Path, default=None, help="on the disk to measure")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        root = Path(directory)
        documents = random_documents(arguments.tokens, SHARD_TOKENS)
        split = write_tokenized(fresh(root / "corpus"), documents)
        print_line(
            case="corpus",
            bytes=bytes_of(root / "corpus"),
            documents=split.documents,
            tokens=split.tokens,
        )
        measure(root)


def measure(root: Path) -> None:
    """Times each case on the corpus in `root`."""
    corpus = root / "corpus"
    size = bytes_of(corpus)
    for length in (128, 1024, 4096):
        view = build(root, TokenCacheConfig(length=length), size)
        if length != 1024:
            shutil.rmtree(view)
    for policy in ("split", "drop"):
        config = TokenCacheConfig(length=1024, packing="documents", long_documents=policy)
        shutil.rmtree(build(root, config, size))
    sources = sorted(corpus.glob("*.arrow"))
    os.sync()
    timed("file copy", lambda: copy_files(sources, fresh(root / "files")))
    shutil.rmtree(root / "files")
    workspace = Workspace(root, fresh(root / "copy"))
    timed("copy, concat", lambda: cache.copy(root / "L1024", corpus, workspace))


def build(root: Path, config: TokenCacheConfig, corpus_bytes: int) -> Path:
    """Builds a view and prints what it cost."""
    workspace = Workspace(root, fresh(root / config.name))
    found: dict[str, Any] = {}

    def run() -> None:
        found["built"] = cache.build(config, root / "corpus", workspace, **IDS)

    seconds, cpu = clocked(run)
    index = bytes_of(workspace.output)
    facts = found["built"].facts["train"]
    print_line(
        case=f"view {config.name} {config.long_documents}",
        seconds=seconds,
        cpu_s=cpu,
        index_bytes=index,
        share_of_corpus=round(index / corpus_bytes, 9),
        rows=facts["rows"],
        padding_share=facts["padding_share"],
        dropped_tokens=facts["dropped_tokens"],
    )
    return workspace.output


def copy_files(sources: list[Path], directory: Path) -> None:
    """Copies files and waits until they are on disk, as a cache's copy does."""
    for source in sources:
        shutil.copyfile(source, directory / source.name)
        sync_file(directory / source.name)


def timed(case: str, run: Callable[[], object]) -> None:
    """Runs a case and prints its seconds."""
    seconds, cpu = clocked(run)
    print_line(case=case, seconds=seconds, cpu_s=cpu)


def clocked(run: Callable[[], object]) -> tuple[float, float]:
    """Returns the seconds and the CPU seconds that `run` takes."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return round(time.perf_counter() - wall, 3), round(time.process_time() - cpu, 3)


def fresh(directory: Path) -> Path:
    """Returns an empty directory."""
    directory.mkdir()
    return directory


def bytes_of(directory: Path) -> int:
    """Returns the size of all files in a directory."""
    return sum(path.stat().st_size for path in directory.iterdir())


def print_line(**values: object) -> None:
    """Prints one JSON line."""
    print(json.dumps(values), flush=True)


if __name__ == "__main__":
    main()
