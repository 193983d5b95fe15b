"""Saving and restoring a training state, by us and by others, taking turns.

    python benchmarks/checkpoint.py [--copies 1] [--rounds 3] [--directory DIR] [--peers PYTHON]
                                    [NAME ...]

The state has the shapes of GPT-2 124M in float32, layers stacked: 498 MB a copy, so `--copies 4`
is 2 GB. Each turn is a process of its own that makes the state, copies it in memory, saves it four
times and restores it. What a save takes is the median of the later three, since a run saves many
times; `first_` is what the first one takes. All sync what they write, and what is restored must be
the same bits. `--peers` names an interpreter that has `orbax-checkpoint`.

    ours          a copy into host memory that is used for each save, then digests, arrays,
                  manifest, commit and reading back in another thread, as the trainer saves on CPU;
                  `ours-resume` looks for the newest that is whole and falls back if need be, as a
                  run does that goes on
    raw           one file by `pwrite`; `raw-digest` with a SHA-256 of each array: the limit
    npy, safetensors, tensorstore (zarr 3, a chunk an array), orbax, orbax-async

Prints JSON lines: the machine, each turn, each contender's medians. `blocked` is what the caller
waits for; CPU seconds are of all threads. Ratios are of medians: of `blocked_s` to one copy into
memory that was used before, of a save's CPU to `raw-digest`'s, of a restore to `safetensors`'s.
Compare CPU seconds where the machine has other work.
"""

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

LAYERS, WIDTH = 12, 768
SHAPES: dict[str, tuple[int, ...]] = {
    "wte": (50257, WIDTH),
    "wpe": (1024, WIDTH),
    "ln_1.scale": (LAYERS, WIDTH),
    "ln_1.bias": (LAYERS, WIDTH),
    "attn.qkv": (LAYERS, WIDTH, 3 * WIDTH),
    "attn.qkv_bias": (LAYERS, 3 * WIDTH),
    "attn.out": (LAYERS, WIDTH, WIDTH),
    "attn.out_bias": (LAYERS, WIDTH),
    "ln_2.scale": (LAYERS, WIDTH),
    "ln_2.bias": (LAYERS, WIDTH),
    "mlp.up": (LAYERS, WIDTH, 4 * WIDTH),
    "mlp.up_bias": (LAYERS, 4 * WIDTH),
    "mlp.down": (LAYERS, 4 * WIDTH, WIDTH),
    "mlp.down_bias": (LAYERS, WIDTH),
    "ln_f.scale": (WIDTH,),
    "ln_f.bias": (WIDTH,),
}
SAVES = 4
Arrays = dict[str, np.ndarray]


def main() -> None:
    """Gives every contender a turn in each round, or is one of them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="contenders; all by default")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--copies", type=int, default=1, help="of 498 MB each")
    parser.add_argument("--directory", type=Path, help="on the disk to measure")
    parser.add_argument("--peers", type=Path, help="an interpreter with orbax-checkpoint")
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.contender:
        take_turn(arguments.contender, arguments.copies, arguments.directory)
        return
    names = arguments.names or list(CONTENDERS)
    if unknown := sorted(set(names) - set(CONTENDERS)):
        parser.error(f"{unknown[0]!r} is no contender; there are {list(CONTENDERS)}.")
    print_line(
        benchmark="checkpoint", cpus=os.cpu_count(), machine=platform.machine(),
        load=os.getloadavg(), copies=arguments.copies,
    )  # fmt: skip
    turns: dict[str, list[dict[str, float]]] = {}
    for round_number in range(arguments.rounds):
        for name in names:
            if name.startswith("orbax") and arguments.peers is None:
                print_line(contender=name, skipped="no --peers")
                continue
            found = turn(name, arguments)
            turns.setdefault(name, []).append(found)
            print_line(contender=name, round=round_number, **found)
    medians = {name: medians_of(found) for name, found in turns.items()}
    for name, found in medians.items():
        print_line(contender=name, **found, **ratios(found, medians))
    print_line(load=os.getloadavg())


def turn(name: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Runs a contender once in a process of its own and returns what it measured."""
    interpreter = str(arguments.peers) if name.startswith("orbax") else sys.executable
    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        command = [interpreter, __file__, "--contender", name, "--directory", directory,
                   "--copies", str(arguments.copies)]  # fmt: skip
        environment = os.environ | {"JAX_PLATFORMS": "cpu"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def take_turn(name: str, copies: int, directory: Path) -> None:
    """Measures one contender and prints what it took."""
    draw = np.random.default_rng(0)
    state = {
        f"copy{number}.{path}": draw.random(shape, np.float32)
        for number in range(copies)
        for path, shape in SHAPES.items()
    }
    buffers = {path: np.empty_like(array) for path, array in state.items()}

    def copy() -> None:
        for path, array in state.items():
            np.copyto(buffers[path], array)

    fresh = clocked(copy)
    used = statistics.median(clocked(copy) for _ in range(3))
    del buffers
    measured = {"copy_fresh_s": fresh, "copy_s": used}
    contender = CONTENDERS[name](state, directory)
    num_bytes = sum(array.nbytes for array in state.values())
    saves: list[dict[str, float]] = []
    for number in range(SAVES):
        os.sync()
        touch(num_bytes, directory)
        cpu, wall = time.process_time(), time.perf_counter()
        wait = contender.save(number)
        blocked = time.perf_counter() - wall
        wait()
        took, cpu_took = time.perf_counter() - wall, time.process_time() - cpu
        saves.append({"blocked_s": blocked, "save_s": took, "save_cpu_s": cpu_took})
    contender.close()
    measured |= {f"first_{key}": value for key, value in saves[0].items()} | medians_of(saves[1:])
    touch(num_bytes, directory)
    cpu, wall = time.process_time(), time.perf_counter()
    restored = contender.restore()
    measured["restore_s"] = time.perf_counter() - wall
    measured["restore_cpu_s"] = time.process_time() - cpu
    for path, array in state.items():
        if not np.array_equal(np.asarray(restored[path]), array):
            raise SystemExit(f"{name} restores other values of {path}.")
    print_line(**{key: round(value, 4) for key, value in measured.items()})


def touch(num_bytes: int, directory: Path) -> None:
    """Makes the host of a virtual machine give back the memory that it took when it was free.

    Otherwise whoever allocates first pays for it, more than for all else that is measured: memory
    of his own, and of the system's for what he writes to files.
    """
    np.empty(num_bytes, np.uint8)[:: os.sysconf("SC_PAGE_SIZE")] = 1
    piece = bytes(1 << 20)
    with (directory / "touched").open("wb", buffering=0) as file:
        for _ in range(0, num_bytes, len(piece)):
            file.write(piece)
    (directory / "touched").unlink()


@dataclasses.dataclass(frozen=True)
class Contender:
    """Saves the state under numbers from 0 on, and restores the last."""

    save: Callable[[int], Callable[[], object]]
    """Returns once the state may be changed; what it returns waits until all is on disk."""
    restore: Callable[[], Mapping[str, Any]]
    close: Callable[[], object] = lambda: None


def ours(state: Arrays, directory: Path, *, resumes: bool = False) -> Contender:
    """The trainer's way."""
    import jax
    import jax.numpy as jnp

    from modeling.training.leaves import HostMemory, snapshot
    from modeling.training.restoring import restore as restored
    from modeling.training.retention import open_checkpoints

    tree = {path: jnp.asarray(array) for path, array in state.items()}
    template = {path: jax.ShapeDtypeStruct(x.shape, x.dtype) for path, x in tree.items()}
    mesh, memory = jax.make_mesh((1,), ("data",)), HostMemory()
    stack = contextlib.ExitStack()
    held = stack.enter_context(open_checkpoints(directory, keep=2))

    def save(number: int) -> Callable[[], object]:
        held.wait_for_disk()
        held.save(
            snapshot(tree, memory), step=number, cursor={}, config={}, files={},
            done=lambda path: None,
        )  # fmt: skip
        return held.wait

    def restore() -> Mapping[str, Any]:
        def read(path: Path) -> Mapping[str, Any]:
            return jax.block_until_ready(restored(path, template, mesh=mesh))

        if not resumes:
            return read(max(directory.glob("step-*")))
        with open_checkpoints(directory, keep=2) as found:
            newest = found.resume(read)
            assert newest is not None
            return newest[1]

    return Contender(save, restore, stack.close)


def raw(state: Arrays, directory: Path, *, digest: bool = False) -> Contender:
    """One file of all bytes."""

    def save(number: int) -> Callable[[], object]:
        with (directory / f"raw-{number}").open("wb", buffering=0) as file:
            offset = 0
            for array in state.values():
                view = memoryview(array).cast("B")
                if digest:
                    hashlib.sha256(view).hexdigest()
                while view:  # a call writes 2 GB at most
                    count = os.pwrite(file.fileno(), view, offset)
                    offset, view = offset + count, view[count:]
            os.fsync(file.fileno())
        return lambda: None

    def restore() -> Mapping[str, Any]:
        found = {}
        with (directory / f"raw-{SAVES - 1}").open("rb", buffering=0) as file:
            for path, array in state.items():
                found[path] = np.empty_like(array)
                if file.readinto(memoryview(found[path]).cast("B")) != array.nbytes:
                    raise SystemExit("the raw file is too short.")
                if digest:
                    hashlib.sha256(memoryview(found[path]).cast("B")).hexdigest()
        return found

    return Contender(save, restore)


def npy(state: Arrays, directory: Path) -> Contender:
    """NumPy's own format, a file an array."""

    def save(number: int) -> Callable[[], object]:
        (directory / str(number)).mkdir()
        for path, array in state.items():
            with (directory / str(number) / f"{path}.npy").open("wb") as file:
                np.save(file, array)
                file.flush()
                os.fsync(file.fileno())
        return lambda: None

    return Contender(
        save, lambda: {path: np.load(directory / str(SAVES - 1) / f"{path}.npy") for path in state}
    )


def safetensors(state: Arrays, directory: Path) -> Contender:
    """One file, written and read by the library."""
    from safetensors.numpy import load_file, save_file

    def save(number: int) -> Callable[[], object]:
        path = directory / f"{number}.safetensors"
        save_file(state, path)
        with path.open("rb") as file:
            os.fsync(file.fileno())
        return lambda: None

    return Contender(save, lambda: load_file(directory / f"{SAVES - 1}.safetensors"))


def plain_tensorstore(state: Arrays, directory: Path) -> Contender:
    """Uncompressed, without checksums and digests; writes are synced by its file driver."""
    import tensorstore

    def spec(number: int, path: str, array: np.ndarray) -> dict[str, Any]:
        return {
            "driver": "zarr3",
            "kvstore": {"driver": "file", "path": f"{directory}/{number}/{path}/"},
            "metadata": {
                "shape": array.shape,
                "data_type": array.dtype.name,
                "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": array.shape}},
                "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
            },
        }

    def save(number: int) -> Callable[[], object]:
        opening = [tensorstore.open(spec(number, path, array), create=True)
                   for path, array in state.items()]  # fmt: skip
        writes = [
            store.result().write(array, can_reference_source_data_indefinitely=True)
            for store, array in zip(opening, state.values(), strict=True)
        ]
        return lambda: [write.result() for write in writes]

    def restore() -> Mapping[str, Any]:
        opening = {path: tensorstore.open(spec(SAVES - 1, path, array), open=True)
                   for path, array in state.items()}  # fmt: skip
        reads = {path: store.result().read() for path, store in opening.items()}
        return {path: read.result() for path, read in reads.items()}

    return Contender(save, restore)


def orbax(state: Arrays, directory: Path, *, is_async: bool = False) -> Contender:
    """Orbax's PyTree checkpointer with its defaults."""
    import jax
    import jax.numpy as jnp
    import orbax.checkpoint as ocp

    tree = {path: jnp.asarray(array) for path, array in state.items()}
    handler = ocp.PyTreeCheckpointHandler()
    checkpointer = ocp.AsyncCheckpointer(handler) if is_async else ocp.Checkpointer(handler)

    def save(number: int) -> Callable[[], object]:
        checkpointer.save(directory / f"orbax-{number}", args=ocp.args.PyTreeSave(tree))
        return getattr(checkpointer, "wait_until_finished", lambda: None)

    def restore() -> Mapping[str, Any]:
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        how = jax.tree.map(lambda _: ocp.ArrayRestoreArgs(sharding=device), tree)
        return ocp.Checkpointer(handler).restore(
            directory / f"orbax-{SAVES - 1}", args=ocp.args.PyTreeRestore(restore_args=how)
        )

    return Contender(save, restore, checkpointer.close)


CONTENDERS: dict[str, Callable[[Arrays, Path], Contender]] = {
    "ours": ours,
    "ours-resume": functools.partial(ours, resumes=True),
    "raw": raw,
    "raw-digest": functools.partial(raw, digest=True),
    "npy": npy,
    "safetensors": safetensors,
    "tensorstore": plain_tensorstore,
    "orbax": orbax,
    "orbax-async": functools.partial(orbax, is_async=True),
}


def clocked(run: Callable[[], object]) -> float:
    """Returns the wall seconds of a call."""
    wall = time.perf_counter()
    run()
    return time.perf_counter() - wall


def medians_of(turns: list[dict[str, float]]) -> dict[str, float]:
    """Returns the median of each measure."""
    return {key: round(statistics.median(one[key] for one in turns), 3) for key in turns[0]}


def ratios(
    found: Mapping[str, float], medians: Mapping[str, Mapping[str, float]]
) -> dict[str, float]:
    """Returns how a contender does beside one copy in memory, and beside the limits."""
    result = {"blocked_per_copy": found["blocked_s"] / found["copy_s"]}
    for measure, name in (
        ("save_cpu_s", "raw-digest"),
        ("save_s", "raw-digest"),
        ("restore_cpu_s", "safetensors"),
        ("restore_s", "safetensors"),
    ):
        if name in medians:
            result[f"{measure}_per_{name}"] = found[measure] / medians[name][measure]
    return {key: round(value, 2) for key, value in result.items()}


def print_line(**values: object) -> None:
    """Prints one JSON line."""
    print(json.dumps(values), flush=True)


if __name__ == "__main__":
    main()
