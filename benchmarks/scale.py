"""Memory and speed of tokenization as a corpus, or one document, grows.

    python benchmarks/scale.py [--gigabytes 10] [--one-document] [--rounds-of 0.1]

Documents are the standard library's sources, repeated with names changed at random, so that new
words go on coming. Tokenizes a small corpus (`--rounds-of` gigabytes) and the large one, each in a
process of its own, from a written raw corpus to a finished tokenized corpus. Prints JSON lines: the
machine, and for each size CPU seconds of the process, MB per CPU second, and peak resident memory
with (`VmHWM`) and without the files that are mapped (`RssAnon`, sampled). Needs about 1.2 times the
gigabytes on the disk of TMPDIR; all is deleted afterwards.
"""

import argparse
import json
import os
import platform
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from corpora import write_table

from modeling.artifacts import Workspace
from modeling.data import tokenized, tokenizer
from modeling.data.config import TokenizationConfig
from modeling.data.tokenizers_config import BpeTokenizerConfig

_NAME = re.compile(r"\b[a-z_]{5,}\b")


def main() -> None:
    """Writes each corpus, tokenizes it in a subprocess, and deletes it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=10.0)
    parser.add_argument("--rounds-of", type=float, default=0.1)
    parser.add_argument("--one-document", action="store_true")
    parser.add_argument("--tokenize", type=Path, help="used by itself: measures one corpus")
    arguments = parser.parse_args()
    if arguments.tokenize is not None:
        measure(arguments.tokenize)
        return
    print_line(benchmark="scale", cpus=os.cpu_count(), machine=platform.machine())
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        sources = stdlib_texts()
        train_tokenizer(root / "tokenizer", sources)
        for gigabytes in (arguments.rounds_of, arguments.gigabytes):
            write_corpus(root / "corpus", sources, int(gigabytes * 1e9), arguments.one_document)
            command = [sys.executable, __file__, "--tokenize", str(root)]
            subprocess.run(command, check=True)
            for path in sorted(root.rglob("*"), reverse=True):
                if path.is_file() and path.parent.name != "tokenizer":
                    path.unlink()


def stdlib_texts() -> list[str]:
    """Returns the sources of the standard library that are UTF-8."""
    paths = sorted(Path(os.__file__).parent.glob("*.py"))
    return [path.read_text(encoding="utf-8") for path in paths]


def train_tokenizer(directory: Path, texts: list[str]) -> None:
    """Trains byte-level BPE on the sources as they are."""
    raw = directory.with_name("sources")
    raw.mkdir()
    directory.mkdir()
    write_table(raw, ((f"{n}.py", text.encode()) for n, text in enumerate(texts)))
    config = BpeTokenizerConfig(type="bpe", vocab_size=8192)
    tokenizer.build(config, raw, Workspace(raw, directory))


def write_corpus(directory: Path, texts: list[str], num_bytes: int, one_document: bool) -> None:
    """Writes varied sources as the documents of one file, or end to end as one document."""
    directory.mkdir(exist_ok=True)
    varied = _varied(texts, num_bytes)
    if one_document:
        write_table(directory, iter([("all.jsonl#1", b"".join(varied))]))
    else:
        named = ((f"{n // 10_000}.jsonl#{n}", text) for n, text in enumerate(varied))
        write_table(directory, named)


def _varied(texts: list[str], num_bytes: int) -> Iterator[bytes]:
    draw = random.Random(0)
    written = 0
    while written < num_bytes:
        text = draw.choice(texts)
        start = draw.randrange(len(text))
        excerpt = text[start : start + draw.randint(500, 20_000)]
        old = draw.choice(_NAME.findall(excerpt) or ["x"])
        data = excerpt.replace(old, "".join(draw.choices("abcdefgh_", k=8))).encode() + b"\n"
        written += len(data)
        yield data


def measure(root: Path) -> None:
    """Tokenizes the corpus below `root` and prints what it took."""
    progress, output = root / "progress", root / "output"
    progress.mkdir(exist_ok=True)
    output.mkdir(exist_ok=True)
    peak = 0

    def watch() -> None:
        nonlocal peak
        while True:
            peak = max(peak, _memory("RssAnon"))
            time.sleep(0.05)

    threading.Thread(target=watch, daemon=True).start()
    wall, cpu = time.perf_counter(), time.process_time()
    space = Workspace(progress, output)
    inputs = TokenizationConfig(), root / "corpus", root / "tokenizer", space
    built = tokenized.build(*inputs)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    facts = built.facts["train"]
    print_line(
        megabytes=round(facts["bytes"] / 1e6, 1),
        documents=facts["documents"],
        tokens=facts["tokens"],
        shards=facts["shards"],
        cpu_s=round(cpu, 2),
        wall_s=round(wall, 2),
        mb_per_cpu_s=round(facts["bytes"] / 1e6 / cpu, 2),
        peak_anonymous_mb=round(peak / 1024),
        peak_resident_mb=round(_memory("VmHWM") / 1024),
    )


def _memory(field: str) -> int:
    """Returns a figure of this process in kB, as Linux counts it."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    found = re.search(rf"^{field}:\s+(\d+) kB$", status, re.MULTILINE)
    assert found is not None
    return int(found[1])


def print_line(**values: object) -> None:
    """Prints one JSON line."""
    print(json.dumps(values), flush=True)


if __name__ == "__main__":
    main()
