"""Out of memory: what fills it and what to change is said, before or after it happens."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from modeling.training import trainer
from modeling.training.memory import (
    DeviceMemoryError,
    StateMemory,
    bytes_limit,
    explanation,
    is_out_of_memory,
    require_room,
)
from modeling.training.program import Memory
from modeling.training.trainer import make_plan, train

sys.path.insert(0, str(Path(__file__).parent))
import driver


def state_of(**changes):
    return StateMemory.of(
        make_plan(driver.experiment(**changes), driver.counting_cache()).blueprint
    )


def allocate_too_much():
    jax.block_until_ready(jax.jit(lambda: jnp.zeros((2**48,), jnp.float32))())


@pytest.fixture(scope="module")
def real_error():
    """What JAX itself raises."""
    with pytest.raises(jax.errors.JaxRuntimeError) as found:
        allocate_too_much()
    return found.value


def test_an_error_of_the_runtime_is_recognized(real_error):
    assert is_out_of_memory(real_error)
    assert not is_out_of_memory(jax.errors.JaxRuntimeError("INTERNAL: something else"))
    assert not is_out_of_memory(MemoryError("RESOURCE_EXHAUSTED"))


def test_the_state_is_told_by_array_and_as_a_device_holds_it():
    alone, split = state_of(), state_of(trainer={"mesh": {"data": 4}})
    num_parameters = 61 * 32 + 16 * 32 + 2 * (12 * 32 * 32 + 13 * 32) + 2 * 32
    assert alone.parameters == 4 * num_parameters
    assert 2 * alone.parameters <= alone.optimizer <= 2 * alone.parameters + 64, "two moments"
    assert alone.arrays[0][1] == 4 * 2 * 32 * 128, "an MLP matrix of both layers"
    sizes = [size for _, size in alone.arrays]
    assert sizes == sorted(sizes, reverse=True)
    assert split.parameters < alone.parameters / 2.5, "biases stay whole"


ACTIVATIONS = Memory(arguments=2**20, results=0, temporaries=2**40)
STATE = Memory(arguments=2**20, results=0, temporaries=2**10)


def test_what_helps_most_comes_first():
    kept = driver.experiment(model={"gradient_checkpointing": False})
    told = explanation(kept, state_of(), ACTIVATIONS)
    assert "1024.0 GiB of gradients and activations" in told
    assert "mlp.c_fc.weight` 32.0 KiB" in told
    advice = told.split("best first: ")[1].split("; ")
    assert advice[0].startswith("model.gradient_checkpointing: true (now False)")
    assert advice[1].startswith("trainer.num_microbatches above 1 takes fewer of the 8 rows")
    assert advice[2].startswith("more devices in trainer.mesh (now {'data': 1})")
    whole = explanation(driver.experiment(), state_of(), STATE)
    assert whole.split("best first: ")[1].startswith("more devices in trainer.mesh")
    assert "gradient_checkpointing" not in whole


class Device:
    def __init__(self, limit=None):
        self._stats = None if limit is None else {"bytes_limit": limit}

    def memory_stats(self):
        return self._stats


def test_an_update_that_cannot_fit_is_refused_before_it_runs():
    assert bytes_limit([Device(), Device()]) is None
    limit = bytes_limit([Device(2**33), Device(2**32)])
    assert limit == 2**32
    experiment, state = driver.experiment(), state_of()
    require_room(experiment, state, STATE, limit)
    require_room(experiment, state, ACTIVATIONS, None)
    require_room(experiment, state, None, limit)
    with pytest.raises(DeviceMemoryError, match=r"needs 1024.0 GiB .* has 4.0 GiB\. On each"):
        require_room(experiment, state, ACTIVATIONS, limit)


def test_a_run_that_runs_out_says_after_which_step_and_what_to_do(
    tmp_path, monkeypatch, real_error
):
    def out_of_memory(self):
        raise real_error

    monkeypatch.setattr(trainer._Run, "_initial_arrays", out_of_memory)
    with pytest.raises(
        DeviceMemoryError, match=r"Out of memory after step 0\..*best first"
    ) as found:
        train(driver.experiment(), driver.counting_cache(), driver.workspace(tmp_path))
    assert found.value.__cause__ is real_error


def test_a_device_too_small_is_found_out_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "bytes_limit", lambda devices: 1000)
    with pytest.raises(DeviceMemoryError, match=r"which has 1000 B\. On each device"):
        train(driver.experiment(), driver.counting_cache(), driver.workspace(tmp_path))
    assert not list(tmp_path.rglob("step-*"))
