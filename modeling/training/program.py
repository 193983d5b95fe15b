"""What a compiled program does, read from it: the products it makes and the memory it takes.

XLA's own cost analysis counts the body of a loop once, however often it runs, so a scan over
layers would seem to be one layer. `product_flops` reads the program's text instead and multiplies
each loop by its trip count, which XLA writes beside it. Only matrix products are counted, 2 m n k
each: they are what peaks are told of. Kernels of a library (cuDNN's attention) cannot be seen.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_SHAPE = re.compile(r"^\w+\[([\d,]*)\]")
_DOT = re.compile(r"\bdot\(([^)]*)\)")
_GEMM = re.compile(r"custom-call\(([^)]*)\), custom_call_target=\"__cublas\$")
_CONTRACTED = re.compile(r"lhs_contracting_dim(?:ension)?s\"?[=:]\s*[{\[]([\d,\" ]*)[}\]]")
_CALLED = re.compile(r"\b(calls|to_apply|body|condition)=%?([\w.\-]+)")
_BRANCHES = re.compile(
    r"branch_computations=\{([^}]*)\}"
    r"|true_computation=%?([\w.\-]+), false_computation=%?([\w.\-]+)"
)
_TRIPS = re.compile(r"\"known_trip_count\":\{\"n\":\"(\d+)\"\}")


def product_flops(text: str) -> int:
    """Returns the FLOPs of all matrix products of one run on one device.

    A loop whose trip count XLA does not know counts once; of a choice, the dearest branch does.

    Args:
        text: an optimized program, `compiled.as_text()`.
    """
    computations, entry = _computations(text)

    @functools.cache
    def flops(name: str) -> int:
        lines = computations[name]
        shapes = {found[1]: found[2] for line in lines if (found := _INSTRUCTION.match(line))}
        return sum(_product(line, shapes) + _called(line) for line in lines)

    def _called(line: str) -> int:
        trips = _TRIPS.search(line)
        repeats = int(trips[1]) if trips else 1
        total = sum(flops(name) for _, name in _CALLED.findall(line)) * repeats
        if branches := _BRANCHES.search(line):
            names = branches[1].split(",") if branches[1] else [branches[2], branches[3]]
            total += max(flops(name.strip().lstrip("%")) for name in names)
        return total

    return flops(entry)


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    found: dict[str, list[str]] = {}
    entry, current = "", []
    for line in text.splitlines():
        if opening := _COMPUTATION.match(line):
            current = found[opening[1]] = []
            entry = opening[1] if line.startswith("ENTRY") else entry
        else:
            current.append(line)
    if not entry:
        raise ValueError("text: no ENTRY computation; give the text of a compiled XLA program.")
    return found, entry


def _product(line: str, shapes: Mapping[str, str]) -> int:
    operands = _DOT.search(line) or _GEMM.search(line)
    instruction = _INSTRUCTION.match(line)
    if not operands or not instruction:
        return 0
    left = shapes[operands[1].split(",")[0].split()[-1].lstrip("%")]
    contracted = _CONTRACTED.search(line)
    assert contracted is not None, line
    summed = [int(d) for d in re.findall(r"\d+", contracted[1])]
    # A library call gives a tuple of the product and its workspace.
    result = _dimensions(instruction[2].lstrip("("))
    return 2 * math.prod(result) * math.prod(_dimensions(left)[d] for d in summed)


def _dimensions(text: str) -> Sequence[int]:
    shape = _SHAPE.match(text)
    assert shape is not None, text
    return [int(size) for size in shape[1].split(",") if size]


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device that a program needs at once."""

    arguments: int
    """The state and the batch."""
    results: int
    """Those that do not take over an argument's memory."""
    temporaries: int
    """Activations, gradients, and copies."""

    @property
    def total(self) -> int:
        """All of them."""
        return self.arguments + self.results + self.temporaries


def memory_of(compiled: Any) -> Memory | None:
    """Returns what a compiled program needs, or None where XLA does not say."""
    found = compiled.memory_analysis()
    if found is None:
        return None
    results = found.output_size_in_bytes - found.alias_size_in_bytes
    return Memory(
        found.argument_size_in_bytes,
        max(results, 0),
        found.temp_size_in_bytes,
    )


def peak_bytes_in_use(devices: Sequence[Any]) -> int | None:
    """Returns the most that any of the devices has held so far, where the backend counts it."""
    stats = [device.memory_stats() or {} for device in devices]
    known = [found["peak_bytes_in_use"] for found in stats if "peak_bytes_in_use" in found]
    return max(known) if known else None
