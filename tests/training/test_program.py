"""What is read from compiled programs, against counts by hand; and peaks of devices."""

import functools
import itertools
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from modeling.training.peak import Peak, measured_flops, peak_of, published_peak
from modeling.training.program import memory_of, peak_bytes_in_use, product_flops
from modeling.training.step import compile_step
from modeling.training.trainer import make_plan

sys.path.insert(0, str(Path(__file__).parent))
import driver


def compiled_text(function, *shapes):
    structs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(function).lower(*structs).compile().as_text()


def test_products_are_counted_with_their_batch_and_contracted_axes():
    text = compiled_text(lambda a, b: jnp.einsum("bik,bkj->bij", a, b), (3, 16, 32), (3, 32, 8))
    assert product_flops(text) == 2 * 3 * 16 * 32 * 8


def test_a_product_in_a_loop_counts_as_often_as_it_runs():
    """XLA's own analysis would say one turn."""

    def layers(x, weights):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

    text = compiled_text(layers, (16, 32), (7, 32, 32))
    assert product_flops(text) == 7 * 2 * 16 * 32 * 32

    def nested(x, weights):
        return jax.lax.fori_loop(0, 5, lambda _, x: layers(x, weights), x)

    text = compiled_text(nested, (16, 32), (7, 32, 32))
    assert product_flops(text) == 5 * 7 * 2 * 16 * 32 * 32


def test_of_a_choice_the_dearest_branch_counts():
    def either(flag, x, w):
        return jax.lax.cond(flag[0] > 0, lambda: x @ w, lambda: x @ w @ w)

    text = compiled_text(either, (1,), (16, 32), (32, 32))
    assert product_flops(text) == 2 * 2 * 16 * 32 * 32


def test_text_that_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        product_flops("HloModule nothing")


@functools.cache
def tiny_step(*, remat=True, num_microbatches=1, devices=1):
    experiment = driver.experiment(
        model={"gradient_checkpointing": remat},
        trainer={"num_microbatches": num_microbatches, "mesh": {"data": devices}},
    )
    plan = make_plan(experiment, driver.counting_cache())
    config = experiment.optimizer, experiment.trainer
    Batch = plan.batch_axis(0)
    return compile_step(plan.blueprint, *config, plan.layout, Batch=Batch, Pos=plan.Pos).compiled


def test_a_whole_update_makes_the_products_of_the_formula_and_of_recomputation():
    """Three times the forward; recomputing makes all but a block's last product once more."""
    B, T, D, L, V = 8, driver.LENGTH, 32, 2, driver.VOCAB
    block = 2 * B * T * 12 * D * D + 4 * B * T * T * D
    head = 3 * 2 * B * T * D * V
    recomputed = block - 2 * B * T * 4 * D * D
    with_remat = tiny_step()
    assert product_flops(with_remat.as_text()) == L * (3 * block + recomputed) + head
    without = tiny_step(remat=False, num_microbatches=2)
    assert product_flops(without.as_text()) == L * 3 * block + head


def test_devices_share_the_products_of_an_update():
    alone, together = tiny_step(), tiny_step(devices=4)
    assert product_flops(together.as_text()) * 4 == product_flops(alone.as_text())


def test_memory_is_that_of_state_batch_and_temporaries():
    compiled = tiny_step()
    memory = memory_of(compiled)
    arguments = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(compiled.in_avals))
    assert memory.arguments == arguments
    assert memory.results < 1000, "the state is updated in place"
    assert memory.temporaries > 0
    assert memory.total == memory.arguments + memory.results + memory.temporaries
    assert peak_bytes_in_use(jax.devices()) is None, "the CPU backend does not count"


class Device:
    def __init__(self, kind, platform="gpu", stats=None):
        self.device_kind, self.platform, self._stats = kind, platform, stats

    def memory_stats(self):
        return self._stats


def test_the_fullest_device_counts():
    devices = [Device("x", stats={"peak_bytes_in_use": n}) for n in (5, 9, 7)]
    assert peak_bytes_in_use(devices) == 9


@pytest.mark.parametrize(
    ("kind", "dtype", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989.4),
        ("NVIDIA H100 80GB HBM3", "float32", 494.7),
        ("NVIDIA H100 PCIe", "bfloat16", 756.0),
        ("NVIDIA A100-SXM4-40GB", "float16", 312.0),
        ("TPU v5 lite", "bfloat16", 197.0),
        ("TPU v5p", "bfloat16", 459.0),
        ("TPU v4", "bfloat16", 275.0),
        ("TPU v6 lite", "bfloat16", 918.0),
    ],
)
def test_peaks_are_those_of_the_data_sheets(kind, dtype, teraflops):
    assert published_peak(kind, dtype) == Peak(teraflops * 1e12, "published")


def test_an_unknown_device_has_no_published_peak():
    assert published_peak("cpu", "float32") is None
    with pytest.raises(ValueError, match="dtype: 'int8' is not one of"):
        published_peak("NVIDIA H100", "int8")


def test_the_peak_of_a_run_is_that_of_all_its_devices(tmp_path):
    four = [Device("NVIDIA H200")] * 4
    peak = peak_of(four, "bfloat16", tmp_path / "peak.json")
    assert peak == Peak(4 * 989.4e12, "published")
    assert not (tmp_path / "peak.json").exists(), "nothing is measured that is published"


def test_what_is_not_published_is_measured_once(tmp_path):
    memo = tmp_path / "class" / "peak.json"
    devices = jax.devices()[:2]
    measured = peak_of(devices, "float32", memo)
    assert measured.source == "measured"
    assert measured.flops > 1e8
    memo.write_text(json.dumps({"flops": 3e9}))
    assert peak_of(devices, "float32", memo) == Peak(3e9, "measured"), "virtual devices share it"


def test_the_fastest_turn_is_the_peak():
    ticks = itertools.accumulate([0, 4, 0, 2, 0, 8])
    flops = measured_flops(jax.devices()[0], size=8, turns=3, tick=lambda: float(next(ticks)))
    assert flops == 2 * 8**3 / 2
