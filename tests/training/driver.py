"""Runs training cases one after another in a process of their own, as the launcher would.

    python driver.py CASES.json    prints one JSON line a case; exits with 75 if preempted
    python driver.py --nursery     imports JAX, touches no device, forks such processes on demand

A case is `{"workspace": directory, "experiment": fields}`, perhaps with a `compile_cache` and with
the `seat` of one process of several. The rows are made up by arithmetic, so that no corpus is
needed: each one counts up from a start and a stride of its own, which a tiny model can learn.

The nursery is there because Python and its imports cost most of a tiny run. A forked child is a
process like any other: it has its own devices, flags, signals and death.
"""

import contextlib
import dataclasses
import errno
import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from modeling import numerics
from modeling.artifacts import Workspace
from modeling.data.cache import TokenCache
from modeling.data.rows import TOKENS_ALONE, Columns, Rows
from modeling.experiment import ExperimentConfig, validate

VOCAB, LENGTH, ROWS = 61, 16, 200

QUICK = ["--xla_backend_optimization_level=0"]
"""Halves what compilation costs, most of such a run; `test_bitwise` also takes XLA's default."""

TINY: dict[str, Any] = {
    "dataset": "counting",
    "sequence_length": LENGTH,
    "model": {"type": "gpt2", "hidden_dim": 32, "num_layers": 2, "num_heads": 2},
    "optimizer": {"type": "adamw", "learning_rate": 1e-2, "schedule": {"warmup": 2}},
    "trainer": {
        "num_train_steps": 6,
        "train_batch_size": 8,
        "mp": "p=f32,c=f32",
        "save_every_steps": 2,
        "log_every_steps": 2,
        "data_order": {"era_rows": 64},
        "xla_flags": QUICK,
    },
}


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `base` with nested fields replaced by those of `changes`; mappings as a whole."""
    result = dict(base)
    for key, value in changes.items():
        whole = key in ("mesh", "axis_resources", "parameter_axis_resources")
        nested = isinstance(value, Mapping) and not whole
        result[key] = merged(result.get(key, {}), value) if nested else value
    return result


def experiment(**changes: Any) -> ExperimentConfig:
    return validate(ExperimentConfig, merged(TINY, changes), "tiny")


class CountingCache(TokenCache):
    """A cache whose row r is start + stride * i modulo the vocabulary, with no files behind it."""

    def __init__(self, length: int, rows: int) -> None:
        self.content_id = "c0" * 32
        self.sequence_length = length
        self.vocab_size = VOCAB
        r, i = np.arange(rows)[:, None], np.arange(length)[None, :]
        self.tokens = ((7 * r + (r % 3 + 1) * i) % VOCAB).astype(np.int32)

    @property
    def splits(self) -> tuple[str, ...]:
        """One to train on and one held out."""
        return ("train", "validation")

    @property
    def columns(self) -> Columns:
        return TOKENS_ALONE

    def num_rows(self, split: str) -> int:
        return len(self.tokens)

    def share(self, split: str) -> int:
        return 1

    def rows(self, split: str, indices: np.ndarray) -> Rows:
        return Rows(self.tokens[indices])


def counting_cache(length: int = LENGTH, rows: int = ROWS) -> TokenCache:
    return CountingCache(length, rows)


def workspace(directory: Path) -> Workspace:
    """Returns the progress of `directory` and a fresh output."""
    number = len(list(directory.glob("output-*"))) if directory.exists() else 0
    space = Workspace(directory / "progress", directory / f"output-{number}")
    space.progress.mkdir(parents=True, exist_ok=True)
    space.output.mkdir()
    return space


def run(case: Mapping[str, Any]) -> dict[str, Any]:
    from modeling.training import history, trainer
    from modeling.training.compile_cache import open_compile_cache

    directory, config = Path(case["workspace"]), experiment(**case["experiment"])
    is_first = case.get("seat", {}).get("index", 0) == 0
    space = workspace(directory) if is_first else Workspace(directory / "progress", directory)
    with contextlib.ExitStack() as stack:
        cache = None
        if "compile_cache" in case:
            directory = Path(case["compile_cache"]) / trainer.class_here(config)
            cache = stack.enter_context(open_compile_cache(directory))
        built = trainer.train(config, counting_cache(), space, compile_cache=cache)
    losses = history.read_losses(space.output) if is_first else []
    return dataclasses.asdict(built) | {"losses": [loss.hex() for loss in losses]}


def run_cases(path: str) -> int:
    from modeling.training import processes
    from modeling.training.preemption import EXIT_CODE, Preempted

    for case in json.loads(Path(path).read_text()):
        if "seat" in case:
            processes.join(case["seat"])
        try:
            result = run(case)
        except Preempted as stop:
            sys.stderr.write(f"{stop}\n")
            return EXIT_CODE
        sys.stdout.write(json.dumps(result) + "\n")
        sys.stdout.flush()
    return 0


def keys_for_any_device() -> dict[str, Any]:
    """Functions for `jax._src.cache_key` to find a program for one device whichever compiled it.

    JAX's key names the device on CPU, but the code is the same, and compiling is most of a test.
    """
    from jax._src import cache_key

    original = cache_key._hash_serialized_compile_options

    def hash_options(hashed: Any, options: Any, strip_device_assignment: bool = False) -> Any:
        placed = options.device_assignment
        is_alone = placed and placed.replica_count() * placed.computation_count() == 1
        return original(hashed, options, strip_device_assignment or is_alone)

    return {
        "_hash_serialized_compile_options": hash_options,
        # Otherwise how many devices there are.
        "_hash_accelerator_config": cache_key._hash_devices,
    }


def fork() -> int:
    """Forks, if need be once others have ended: a machine may limit how many threads it has."""
    deadline = time.monotonic() + 120
    while True:
        try:
            return os.fork()
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.ENOMEM) or time.monotonic() > deadline:
                raise
            sys.stderr.write(f"nursery: {error}; trying again\n")
            time.sleep(1)


def nursery() -> None:
    """Answers each line of JSON on stdin with one on stdout: births, and deaths when asked."""
    import jax
    from jax._src import cache_key

    from modeling.training import compile_cache, trainer  # noqa: F401  children find them loaded

    for name, function in keys_for_any_device().items():
        setattr(cache_key, name, function)
    for line in sys.stdin:
        order = json.loads(line)
        if "wait" in order:
            flags = 0 if order["block"] else os.WNOHANG
            pid, status = os.waitpid(order["wait"], flags)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = fork()
            if answer == 0:
                os.setsid()
                os.environ.update(order["environment"])
                if (collectives := order["environment"].get(numerics.COLLECTIVES)) is not None:
                    jax.config.update("jax_cpu_collectives_implementation", collectives)
                for number, path in enumerate((os.devnull, order["out"], order["err"])):
                    opened = os.open(path, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT)
                    os.dup2(opened, number)
                sys.exit(run_cases(order["cases"]))
        sys.stdout.write(f"{json.dumps(answer)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(nursery() if sys.argv[1] == "--nursery" else run_cases(sys.argv[1]))
