"""What fills a device's memory, and what to change when it does not suffice.

Three things do: the parameters, the optimizer state beside them, and what one update makes besides:
gradients and activations. The first two are known exactly from the state's arrays and how they are
split; the third is what XLA says the compiled update needs (`program.memory_of`).
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax

from modeling.experiment import ExperimentConfig
from modeling.training.manifest import MODEL_PREFIX
from modeling.training.program import Memory
from modeling.training.state import Blueprint

_LARGEST = 3


class DeviceMemoryError(RuntimeError):
    """A device's memory does not suffice; the message says what fills it and what to change."""


@dataclasses.dataclass(frozen=True)
class StateMemory:
    """Bytes of the state on one device."""

    arrays: tuple[tuple[str, int], ...]
    """Each array's path and bytes, the largest first."""

    @staticmethod
    def of(blueprint: Blueprint) -> "StateMemory":
        """Returns what a device holds of each array."""
        shapes = zip(blueprint.shardings.items(), blueprint.arrays, strict=True)
        sizes = [
            (path, math.prod(sharding.shard_shape(x.shape)) * x.dtype.itemsize)
            for (path, sharding), x in shapes
        ]
        return StateMemory(tuple(sorted(sizes, key=lambda item: -item[1])))

    @property
    def total(self) -> int:
        """Of all arrays."""
        return sum(size for _, size in self.arrays)

    @property
    def parameters(self) -> int:
        """Of the model."""
        return sum(size for path, size in self.arrays if path.startswith(MODEL_PREFIX))

    @property
    def optimizer(self) -> int:
        """Of everything else."""
        return self.total - self.parameters


def bytes_limit(devices: Sequence[Any]) -> int | None:
    """Returns what the smallest device offers, or None where the backend does not say."""
    stats = [device.memory_stats() or {} for device in devices]
    known = [found["bytes_limit"] for found in stats if "bytes_limit" in found]
    return min(known) if known else None


def require_room(
    experiment: ExperimentConfig, state: StateMemory, memory: Memory | None, limit: int | None
) -> None:
    """Raises `DeviceMemoryError` if an update is known to need more than a device has."""
    if memory is not None and limit is not None and memory.total > limit:
        raise DeviceMemoryError(
            f"An update needs {_amount(memory.total)} of each device, which has {_amount(limit)}. "
            + explanation(experiment, state, memory)
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of JAX is of that kind."""
    return isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)


def explanation(experiment: ExperimentConfig, state: StateMemory, memory: Memory | None) -> str:
    """Returns what fills the memory and what to change, the most promising first."""
    largest = ", ".join(f"`{path}` {_amount(size)}" for path, size in state.arrays[:_LARGEST])
    made, changes = "what XLA does not tell", [_for_activations(experiment), _for_state(experiment)]
    if memory is not None:
        made = f"{_amount(memory.temporaries + memory.results)} of gradients and activations"
        if memory.temporaries <= state.parameters + state.optimizer:
            changes.reverse()
    return (
        f"On each device: {_amount(state.parameters)} of parameters, {_amount(state.optimizer)} of "
        f"optimizer state (largest: {largest}), and {made}. What helps, best first: "
        + "; ".join(itertools.chain(*changes))
        + "."
    )


def _for_activations(experiment: ExperimentConfig) -> list[str]:
    trainer, model = experiment.trainer, experiment.model
    changes = []
    if model.gradient_checkpointing is not True:
        changes.append(
            f"model.gradient_checkpointing: true (now {model.gradient_checkpointing}) keeps only "
            f"the input of each layer"
        )
    changes.append(
        f"trainer.num_microbatches above {trainer.num_microbatches} takes fewer of the "
        f"{trainer.train_batch_size} rows at a time, with the same result"
    )
    return changes


def _for_state(experiment: ExperimentConfig) -> list[str]:
    trainer = experiment.trainer
    split = "embed" in trainer.parameter_axis_resources
    how = "" if split else " with trainer.parameter_axis_resources {embed: data}"
    return [f"more devices in trainer.mesh (now {dict(trainer.mesh)}){how} split the state"]


def _amount(size: int) -> str:
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size} B"
