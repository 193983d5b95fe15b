"""What may change the bits of a training run without changing its science, and how it is pinned.

The same recipe in the same *numerics class* gives the same bits; another class gives the same
experiment with other rounding. The class holds what decides the order and precision of
floating-point operations: library versions, the device, the mesh and the axis mappings (they decide
who sums what), the CPU thread pool (it decides how a matrix product is cut), and XLA's flags.

`environment` is the other half: the variables that a launcher must set *before* Python starts, so
that nothing in the surroundings can choose otherwise. XLA reads them once, when its first backend
starts, and sizes its CPU pool by max(`NPROC` or the number of cores, number of devices); `NPROC` is
therefore always set, or a machine with more cores would give other bits.

An *elastic* run (`trainer.reproducibility`) gives the same bits on any number of devices, so that
its class holds no mesh, and its thread pool is as large on one device as on the most it may take.

With `trainer.deterministic: false` a GPU may take kernels that sum in the order of arrival, and
pick the fastest by stopwatch. Such runs are a class of their own, in which bits are not promised.

No JAX is imported here: whether an artifact exists must be known without starting a device.
"""

import importlib.metadata
import math
import platform as host_platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modeling.training.config import AxisMapping, TrainerConfig

LIBRARIES = ("jax", "jaxlib", "equinox", "optax")
"""Packages whose version can change the order of operations in the compiled program."""

INSTRUCTION_SETS = (
    "sse4_2", "avx", "f16c", "fma", "avx2", "avx_vnni", "avx512f", "avx512bw", "avx512cd",
    "avx512dq", "avx512vl", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16",
    "amx_int8", "asimd", "asimdhp", "sve", "sve2", "bf16", "i8mm",
)  # fmt: skip
"""Features, as Linux spells them, for which XLA and its kernel libraries have code of their own."""

GPU_FLAGS = (
    # Scatter-adds and reductions by atomics sum in the order of arrival.
    "--xla_gpu_exclude_nondeterministic_ops=true",
    # Autotuning picks kernels by stopwatch, so two compilations may differ.
    "--xla_gpu_autotune_level=0",
)

_NUMERIC_PREFIXES = (
    "JAX_", "XLA_", "NPROC",
    "NVIDIA_TF32", "CUBLAS_", "CUBLASLT_", "CUDNN_",
    "NCCL_",  # algorithm, protocol and channels decide in which order devices are summed
    "LIBTPU_",  # LIBTPU_INIT_ARGS holds flags of the compiler
)  # fmt: skip
_HARMLESS = (
    "JAX_COMPILATION_CACHE_DIR",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES",
    # By which wire a machine reaches the others, without which a cluster may not come up at all.
    "NCCL_DEBUG", "NCCL_DEBUG_FILE", "NCCL_DEBUG_SUBSYS", "NCCL_SOCKET_FAMILY",
    "NCCL_SOCKET_IFNAME", "NCCL_IB_GID_INDEX", "NCCL_IB_HCA", "NCCL_IB_TC", "NCCL_IB_TIMEOUT",
)  # fmt: skip
_DEVICE_COUNT = "--xla_force_host_platform_device_count"
COLLECTIVES = "JAX_CPUCOLLECTIVES_IMPLEMENTATION"
_ACCELERATORS = {"gpu": "cuda", "cuda": "cuda", "rocm": "rocm", "tpu": "tpu"}


def numerics_class(
    trainer: TrainerConfig,
    *,
    platform: str = "cpu",
    device_kind: str | None = None,
    execution: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Returns everything besides the recipe that the bits of a run of `trainer` depend on.

    Args:
        trainer: its mesh, mappings and threads belong to the class.
        platform: `cpu`, `gpu` or `tpu`.
        device_kind: what JAX calls the accelerator (`jax.devices()[0].device_kind`). Left out on
            CPU, where the processor is read from the operating system.
        execution: how the model computes the same sums (`model.execution`).
    """
    variables = environment(trainer, platform)
    if platform == "cpu":
        device: Any = _processor()
    elif device_kind is None:
        raise ValueError(
            f"numerics_class: platform {platform!r} needs `device_kind`, the accelerator; "
            f"pass `jax.devices()[0].device_kind`."
        )
    else:
        device = device_kind
    common = {
        "platform": platform,
        "device": device,
        "libraries": _libraries(platform),
        "execution": dict(execution or {}),
    }
    if trainer.reproducibility == "elastic":
        return common | {"elastic": True, "environment": _without_layout(variables)}
    return common | {
        "mesh": [[axis, size] for axis, size in trainer.mesh.items()],
        "processes": trainer.processes,
        "axis_resources": _plain(trainer.axis_resources),
        "parameter_axis_resources": _plain(trainer.parameter_axis_resources),
        "environment": variables,
    }


def _without_layout(variables: Mapping[str, str]) -> dict[str, str]:
    flags = re.sub(rf"{_DEVICE_COUNT}=\d+", "", variables["XLA_FLAGS"]).strip()
    kept = {name: value for name, value in variables.items() if name != COLLECTIVES}
    return kept | {"XLA_FLAGS": flags}


def _plain(mapping: AxisMapping) -> dict[str, Any]:
    """A mapping as JSON reads it back."""
    return {
        logical: physical if isinstance(physical, str) else list(physical)
        for logical, physical in mapping.items()
    }


def environment(trainer: TrainerConfig, platform: str = "cpu") -> dict[str, str]:
    """Returns the variables to set before Python starts; they replace any from the surroundings."""
    num_devices = math.prod(trainer.mesh.values()) // trainer.processes
    elastic_shards = trainer.elastic_shards if trainer.reproducibility == "elastic" else 0
    pinned = {
        # Random bits must depend on the key and the position, not on how an array is split.
        "JAX_THREEFRY_PARTITIONABLE": "true",
        "JAX_DEFAULT_PRNG_IMPL": "threefry2x32",
        "JAX_ENABLE_X64": "false",
        "JAX_DEFAULT_MATMUL_PRECISION": "default",
    }
    if platform == "cpu":
        return (
            pinned
            | ({COLLECTIVES: "gloo"} if trainer.processes > 1 else {})
            | {
                "JAX_PLATFORMS": "cpu",
                "NPROC": str(max(trainer.cpu_threads, num_devices, elastic_shards)),
                "XLA_FLAGS": " ".join((f"{_DEVICE_COUNT}={num_devices}", *trainer.xla_flags)),
            }
        )
    if platform not in _ACCELERATORS:
        raise ValueError(f"platform: {platform!r} is not one of {['cpu', *sorted(_ACCELERATORS)]}.")
    deterministic = GPU_FLAGS if trainer.deterministic and platform != "tpu" else ()
    flags = " ".join((*deterministic, *trainer.xla_flags))
    # Batches and checkpoints pass through the CPU backend, which is therefore loaded as well.
    return pinned | {"JAX_PLATFORMS": f"{_ACCELERATORS[platform]},cpu", "XLA_FLAGS": flags}


def trainer_fields(known: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the trainer's fields that a class on record stands for, to compute in it again.

    The inverse of `numerics_class`, as far as there is one: an elastic class holds no mesh, and
    `NPROC` stands for the threads also where those were fewer than the devices.
    """
    variables: Mapping[str, str] = known["environment"]
    flags = [flag for flag in variables["XLA_FLAGS"].split() if not flag.startswith(_DEVICE_COUNT)]
    fields: dict[str, Any] = {"xla_flags": tuple(flag for flag in flags if flag not in GPU_FLAGS)}
    if known["platform"] == "cpu":
        fields["cpu_threads"] = int(variables["NPROC"])
    elif known["platform"] == "gpu":
        fields["deterministic"] = set(GPU_FLAGS) <= set(flags)
    if "mesh" in known:
        fields |= {"mesh": dict(known["mesh"]), "processes": known["processes"]}
        for name in ("axis_resources", "parameter_axis_resources"):
            fields[name] = {
                logical: physical if isinstance(physical, str) else tuple(physical)
                for logical, physical in known[name].items()
            }
    return fields


def inherited(surroundings: Mapping[str, str]) -> dict[str, str]:
    """Returns the surroundings without what could change the bits behind `environment`'s back."""
    return {name: value for name, value in surroundings.items() if not _moves_bits(name)}


def overruled(surroundings: Mapping[str, str], variables: Mapping[str, str]) -> list[str]:
    """Returns the names of what `inherited` leaves out and `variables` do not set to the same."""
    return sorted(
        name
        for name, value in surroundings.items()
        if _moves_bits(name) and variables.get(name) != value
    )


def _moves_bits(name: str) -> bool:
    return name.startswith(_NUMERIC_PREFIXES) and name not in _HARMLESS


def _libraries(platform: str) -> dict[str, str]:
    """Versions of what does the arithmetic; an accelerator's own libraries are packages too."""
    found = {name: importlib.metadata.version(name) for name in LIBRARIES}
    if platform != "cpu":
        for distribution in importlib.metadata.distributions():
            name = distribution.metadata["Name"].lower().replace("_", "-")
            if name.startswith(("jax-cuda", "jax-rocm", "nvidia-", "libtpu")):
                found[name] = distribution.version
    return dict(sorted(found.items()))


def _processor() -> dict[str, Any]:
    """The processor as far as code generation and matrix blocking look at it."""
    found: dict[str, Any] = {"machine": host_platform.machine()}
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found |= parse_cpuinfo(cpuinfo.read_text())
    else:
        found["model"] = host_platform.processor()
    # Eigen blocks matrix products by cache size, and blocks decide the order of summation.
    found["caches"] = _cache_sizes(Path("/sys/devices/system/cpu/cpu0/cache"))
    return found


def parse_cpuinfo(text: str) -> dict[str, Any]:
    """Returns the model and instruction sets of the first processor in Linux's `/proc/cpuinfo`.

    The model counts besides its features: LLVM chooses vector widths by model.
    """
    fields: Mapping[str, str] = dict(
        re.findall(r"^(.*?)[ \t]*:[ \t]*(.*)$", text.split("\n\n")[0], re.MULTILINE)
    )
    known_as = ("vendor_id", "cpu family", "model", "CPU implementer", "CPU part")
    features = set((fields.get("flags") or fields.get("Features") or "").split())
    return {
        "model": "/".join(fields[name] for name in known_as if name in fields),
        "instruction_sets": [name for name in INSTRUCTION_SETS if name in features],
    }


def _cache_sizes(directory: Path) -> list[str]:
    return [
        "L{} {} {}".format(
            *((index / name).read_text().strip() for name in ("level", "type", "size"))
        )
        for index in sorted(directory.glob("index*"))
        if (index / "size").exists()
    ]
