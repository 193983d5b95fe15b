"""What importing the trainer costs beside the libraries that it stands on, taking turns.

    python benchmarks/imports.py [--rounds 9] [--slowest 20]

Each import is a process of its own, with bytecode kept, in a directory that only this benchmark
uses. Prints a JSON line for each: the median of the CPU seconds of its processes, and the ratio to
`import jax`. With `--slowest`, also the modules that `import jax` does not load and that take
longest themselves, in milliseconds, medians too.
"""

import argparse
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping

CODES = {
    "jax": "import jax",
    "equinox": "import equinox",
    "optax": "import equinox, optax",
    "haliax": "import haliax",
    "experiment": "import jax, modeling.experiment",
    "trainer": "import modeling.training.trainer",
    "trainer, a run begun": "import modeling.training.trainer, modeling.optim.build, pyarrow",
}
_MODULE = re.compile(r"import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)")


def main() -> None:
    """Measures every import."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--slowest", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as bytecode:
        environment = {**os.environ, "PYTHONPYCACHEPREFIX": bytecode}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        spent: dict[str, list[float]] = {name: [] for name in CODES}
        for code in CODES.values():  # Leaves its bytecode.
            cpu_s_of(code, environment)
        for _ in range(arguments.rounds):
            for name, code in CODES.items():
                spent[name].append(cpu_s_of(code, environment))
        medians = {name: statistics.median(found) for name, found in spent.items()}
        for name, median in medians.items():
            line = {"import": name, "cpu_s": round(median, 3)}
            print(json.dumps(line | {"against_jax": round(median / medians["jax"], 2)}), flush=True)
        for name, ms in slowest(arguments.slowest, environment, arguments.rounds):
            print(json.dumps({"module": name, "ms": round(ms, 1)}))


def cpu_s_of(code: str, environment: Mapping[str, str]) -> float:
    """Returns the CPU seconds of a process that runs `code`."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def slowest(count: int, environment: Mapping[str, str], rounds: int) -> list[tuple[str, float]]:
    """Returns modules and the milliseconds that each takes without what it imports."""
    if not count:
        return []
    mine, base = (
        [own_ms(CODES[name], environment) for _ in range(rounds)] for name in ("trainer", "jax")
    )
    medians = {
        name: statistics.median(ms[name] for ms in mine) for name in mine[0] if name not in base[0]
    }
    return sorted(medians.items(), key=lambda item: -item[1])[:count]


def own_ms(code: str, environment: Mapping[str, str]) -> dict[str, float]:
    """Returns the milliseconds of each module of one process, without what it imports."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", code],
        env=environment, check=True, capture_output=True, text=True,
    )  # fmt: skip
    return {match[2]: int(match[1]) / 1000 for match in _MODULE.finditer(done.stderr)}


if __name__ == "__main__":
    main()
