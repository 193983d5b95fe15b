"""How many floating-point operations a second the devices of a run could do at most.

Accelerators are looked up by the name that JAX gives them, in the makers' data sheets; where there
is none, as for processors, a large product is measured once and the figure kept in a file.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from modeling.artifacts import write_durably


@dataclasses.dataclass(frozen=True)
class Peak:
    """What all devices of a run together could do at most."""

    flops: float
    """Floating-point operations a second, of dense matrix products."""
    source: str
    """`published` or `measured`."""


# Dense tensor-core figures of the makers' data sheets, in TFLOP/s: 16-bit, and float32 as XLA
# multiplies it by default (TF32 on NVIDIA, where products are rounded to 10 bits of mantissa).
_PUBLISHED: Sequence[tuple[str, float, float | None]] = (
    ("NVIDIA H100 PCIe", 756.0, 378.0),
    ("NVIDIA H100 NVL", 835.0, 417.5),
    ("NVIDIA H100", 989.4, 494.7),
    ("NVIDIA H200", 989.4, 494.7),
    ("NVIDIA GH200", 989.4, 494.7),
    ("NVIDIA B200", 2250.0, 1125.0),
    ("NVIDIA A100", 312.0, 156.0),
    ("NVIDIA L40S", 362.0, 183.0),
    ("NVIDIA L4", 121.0, 60.0),
    # Google publishes none for float32, which a TPU multiplies in bfloat16 by default.
    ("TPU v6", 918.0, 918.0),
    ("TPU v5 lite", 197.0, 197.0),
    ("TPU v5e", 197.0, 197.0),
    ("TPU v5", 459.0, 459.0),
    ("TPU v4", 275.0, 275.0),
    ("TPU v3", 61.5, 61.5),  # a JAX device is one of the two cores of a chip
    ("TPU v2", 22.5, 22.5),
)


def published_peak(device_kind: str, dtype: str) -> Peak | None:
    """Returns the published peak of one device as JAX names it, or None if it is not known.

    Args:
        device_kind: `jax.devices()[0].device_kind`; the longest known beginning counts.
        dtype: of the operands of products: `float32`, `bfloat16` or `float16`.
    """
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"dtype: {dtype!r} is not one of float32, bfloat16, float16.")
    known = [row for row in _PUBLISHED if device_kind.startswith(row[0])]
    if not known:
        return None
    _, half, full = max(known, key=lambda row: len(row[0]))
    teraflops = full if dtype == "float32" else half
    return None if teraflops is None else Peak(teraflops * 1e12, "published")


def peak_of(devices: Sequence[Any], dtype: str, memo: Path) -> Peak:
    """Returns the peak of `devices` together, measured only if no maker has published one.

    Args:
        devices: of one kind.
        dtype: of the operands of products, where published figures tell dtypes apart.
        memo: a file for what was measured; of one machine and one set of XLA flags.
    """
    kind = devices[0].device_kind
    published = published_peak(kind, dtype)
    if published is not None:
        return Peak(published.flops * len(devices), "published")
    if memo.exists():
        flops = json.loads(memo.read_text())["flops"]
    else:
        flops = measured_flops(devices[0])
        memo.parent.mkdir(parents=True, exist_ok=True)
        write_durably(memo, {"device_kind": kind, "dtype": "float32", "flops": flops})
    # Virtual devices share one processor.
    return Peak(flops * (1 if devices[0].platform == "cpu" else len(devices)), "measured")


def measured_flops(
    device: Any, *, size: int = 1024, turns: int = 8, tick: Callable[[], float] = time.perf_counter
) -> float:
    """Returns the FLOP/s of the fastest of some float32 products of two `size` x `size` arrays."""
    square = jax.device_put(jnp.ones((size, size), jnp.float32), device)
    multiply = jax.jit(jnp.matmul).lower(square, square).compile()
    fastest = float("inf")
    for _ in range(turns):
        began = tick()
        multiply(square, square).block_until_ready()
        fastest = min(fastest, tick() - began)
    return 2.0 * size**3 / fastest
