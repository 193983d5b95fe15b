"""The numerics class must be known without JAX, and must change with all that moves bits."""

import dataclasses
import json
import subprocess
import sys

import pytest

from modeling import canonical, numerics
from modeling.training.config import TrainerConfig

TRAINER = TrainerConfig(num_train_steps=1, train_batch_size=8, mesh={"data": 2})

CPUINFO = """processor\t: 0
vendor_id\t: AuthenticAMD
cpu family\t: 25
model\t\t: 17
model name\t: AMD EPYC
flags\t\t: fpu sse4_2 avx fma avx2 avx512f hypervisor

processor\t: 1
vendor_id\t: other
"""


def test_the_class_and_environment_are_known_without_importing_jax():
    code = """
import json, sys
from modeling import numerics
from modeling.training.config import TrainerConfig
trainer = TrainerConfig(num_train_steps=1, train_batch_size=8, mesh={"data": 2})
found = numerics.numerics_class(trainer)
assert not {"jax", "jaxlib", "equinox", "optax"} & set(sys.modules), "JAX was imported"
print(json.dumps(found))
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert json.loads(out.stdout) == numerics.numerics_class(TRAINER)


@pytest.mark.parametrize(
    "change",
    [
        {"mesh": {"data": 4}},
        {"mesh": {"model": 2}},
        {"axis_resources": {"batch": "data", "mlp": "model"}},
        {"parameter_axis_resources": {}},
        {"cpu_threads": 3},
        {"processes": 2},
        {"xla_flags": ("--xla_backend_optimization_level=0",)},
    ],
)
def test_whatever_moves_bits_is_another_class(change):
    def digest(trainer):
        return canonical.digest("numerics/1", numerics.numerics_class(trainer))

    assert digest(dataclasses.replace(TRAINER, **change)) != digest(TRAINER)
    assert digest(dataclasses.replace(TRAINER, log_every_steps=3)) == digest(TRAINER)


def test_the_class_of_an_elastic_run_holds_no_mesh_and_a_pool_for_the_largest():
    def elastic(devices, shards=8, **more):
        return dataclasses.replace(
            TRAINER,
            mesh={"data": devices},
            reproducibility="elastic",
            elastic_shards=shards,
            **more,
        )

    one, eight = numerics.numerics_class(elastic(1)), numerics.numerics_class(elastic(8))
    assert one == eight == numerics.numerics_class(elastic(4, processes=2))
    assert one != numerics.numerics_class(TRAINER)
    for devices in (1, 8):
        variables = numerics.environment(elastic(devices))
        assert variables["NPROC"] == "8"
        assert variables["XLA_FLAGS"].endswith(f"device_count={devices}")


def test_not_being_elastic_leaves_older_identities_as_they_were():
    assert b"elastic" not in canonical.encode(TRAINER)
    assert b"elastic" in canonical.encode(dataclasses.replace(TRAINER, reproducibility="elastic"))
    four = dataclasses.replace(TRAINER, reproducibility="elastic", elastic_shards=4)
    assert b"elastic_shards" in canonical.encode(four)
    with pytest.raises(ValueError, match="elastic_shards: 4 has no effect"):
        dataclasses.replace(TRAINER, elastic_shards=4)


def test_the_order_of_mesh_axes_counts():
    one, other = (
        numerics.numerics_class(dataclasses.replace(TRAINER, mesh=mesh))
        for mesh in ({"data": 2, "model": 2}, {"model": 2, "data": 2})
    )
    assert canonical.digest("numerics/1", one) != canonical.digest("numerics/1", other)


def test_the_cpu_environment_pins_devices_and_threads():
    four = dataclasses.replace(TRAINER, mesh={"data": 2, "model": 2})
    variables = numerics.environment(four, "cpu")
    assert variables["XLA_FLAGS"] == "--xla_force_host_platform_device_count=4"
    # XLA takes the larger of the two, so the class states what really holds.
    assert variables["NPROC"] == "4"
    assert numerics.environment(dataclasses.replace(four, cpu_threads=6), "cpu")["NPROC"] == "6"
    assert variables["JAX_PLATFORMS"] == "cpu"


def test_gpu_flags_are_known_to_this_xla_and_ask_for_determinism():
    variables = numerics.environment(TRAINER, "gpu")
    assert "exclude_nondeterministic_ops=true" in variables["XLA_FLAGS"]
    code = "import jax; print(jax.numpy.ones(2).sum())"  # XLA aborts on a flag it does not know
    env = variables | {"JAX_PLATFORMS": "cpu"}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert out.returncode == 0, out.stderr[-2000:]
    found = numerics.numerics_class(TRAINER, platform="gpu", device_kind="NVIDIA H100 80GB HBM3")
    assert found["device"] == "NVIDIA H100 80GB HBM3"


def test_a_gpu_may_sum_in_any_order_if_told_to_and_is_then_another_class():
    free = dataclasses.replace(TRAINER, deterministic=False)
    assert numerics.environment(free, "gpu")["XLA_FLAGS"] == ""
    gpu = {"platform": "gpu", "device_kind": "NVIDIA H100 80GB HBM3"}
    assert numerics.numerics_class(free, **gpu) != numerics.numerics_class(TRAINER, **gpu)
    assert canonical.encode(free) == canonical.encode(TRAINER)
    with pytest.raises(ValueError, match=r"deterministic: false.*elastic"):
        dataclasses.replace(free, reproducibility="elastic")


def test_an_accelerator_must_be_named_and_a_platform_known():
    with pytest.raises(ValueError, match="device_kind"):
        numerics.numerics_class(TRAINER, platform="gpu")
    with pytest.raises(ValueError, match=r"'quantum'.*cpu"):
        numerics.environment(TRAINER, "quantum")


def test_the_processor_is_its_model_and_instruction_sets():
    assert numerics.parse_cpuinfo(CPUINFO) == {
        "model": "AuthenticAMD/25/17",
        "instruction_sets": ["sse4_2", "avx", "fma", "avx2", "avx512f"],
    }


def test_surroundings_that_move_bits_do_not_reach_the_process():
    surroundings = {
        "PATH": "/bin",
        "JAX_DEFAULT_PRNG_IMPL": "rbg",
        "JAX_ENABLE_X64": "true",
        "XLA_FLAGS": "--xla_cpu_enable_fast_math=true",
        "NVIDIA_TF32_OVERRIDE": "0",
        "NPROC": "64",
        "NCCL_ALGO": "Tree",
        "LIBTPU_INIT_ARGS": "--xla_tpu_enable_data_parallel_all_reduce_opt=true",
        "JAX_COMPILATION_CACHE_DIR": "/somewhere",
        "NCCL_SOCKET_IFNAME": "eth0",
    }
    kept = {"PATH", "JAX_COMPILATION_CACHE_DIR", "NCCL_SOCKET_IFNAME"}
    assert numerics.inherited(surroundings) == {name: surroundings[name] for name in kept}
    pinned = {"JAX_ENABLE_X64": "true"}
    told = set(surroundings) - kept - set(pinned)
    assert numerics.overruled(surroundings, pinned) == sorted(told)
    assert numerics.environment(TRAINER)["JAX_DEFAULT_PRNG_IMPL"] == "threefry2x32"


@pytest.mark.parametrize(
    ("platform", "fields"),
    [
        ("cpu", {}),
        ("cpu", {"mesh": {"data": 2, "model": 2}, "cpu_threads": 7, "processes": 2}),
        ("cpu", {"xla_flags": ("--xla_a=1", "--xla_b=2"), "axis_resources": {"batch": ("a", "b")}}),
        ("gpu", {"deterministic": False}),
        ("gpu", {"xla_flags": ("--xla_a=1",), "mesh": {"data": 8}}),
        ("tpu", {"parameter_axis_resources": {}}),
    ],
)
def test_a_class_on_record_is_computed_in_again(platform, fields):
    trainer = TrainerConfig(num_train_steps=1, train_batch_size=8, **fields)
    kind = None if platform == "cpu" else "some"
    known = json.loads(
        json.dumps(numerics.numerics_class(trainer, platform=platform, device_kind=kind))
    )
    read = TrainerConfig(num_train_steps=1, train_batch_size=8, **numerics.trainer_fields(known))
    again = numerics.numerics_class(read, platform=platform, device_kind=kind)
    assert json.loads(json.dumps(again)) == known
