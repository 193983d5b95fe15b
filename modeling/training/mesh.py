"""The devices of a run, and who holds what: physical mesh, two mappings from logical axes to it.

`compute` says how activations are split, `parameters` how weights and optimizer state are: the
compute mapping with `parameter_axis_resources` on top. `{batch: data}` with `{embed: data}` is FSDP
(each device holds a part of every weight, gathered layer by layer); with `{heads: model, mlp:
model}` in both it is tensor parallelism.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from modeling.training.config import TrainerConfig


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh and the two axis mappings onto it."""

    mesh: Mesh
    compute: Mapping[str, str]
    parameters: Mapping[str, str]


def build_layout(trainer: TrainerConfig, devices: Sequence[Any] | None = None) -> Layout:
    """Returns the layout that `trainer` asks for over the first devices there are.

    Raises:
        ValueError: too few devices, a mapping to an axis that the mesh lacks, or a batch that does
            not divide.
    """
    found = list(jax.devices() if devices is None else devices)
    sizes = dict(trainer.mesh)
    needed = math.prod(sizes.values())
    if needed > len(found):
        raise ValueError(
            f"trainer.mesh: {sizes} needs {needed} devices, but there are {len(found)} "
            f"({found[0].platform}). Make the mesh smaller, or on CPU start with "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={needed}."
        )
    for field in ("axis_resources", "parameter_axis_resources"):
        for logical, physical in getattr(trainer, field).items():
            if physical not in sizes:
                raise ValueError(
                    f"trainer.{field}: `{logical}: {physical}` names a mesh axis that is not in "
                    f"trainer.mesh, which has {sorted(sizes)}; map to one of those or add "
                    f"`{physical}` to the mesh."
                )
    _check_batch(trainer, sizes)
    mesh = Mesh(np.asarray(found[:needed]).reshape(tuple(sizes.values())), tuple(sizes))
    compute = dict(trainer.axis_resources)
    return Layout(mesh, compute, compute | dict(trainer.parameter_axis_resources))


def _check_batch(trainer: TrainerConfig, sizes: Mapping[str, int]) -> None:
    batch, pieces = trainer.train_batch_size, trainer.num_microbatches
    if batch % pieces:
        raise ValueError(
            f"trainer.num_microbatches: {pieces} does not divide trainer.train_batch_size {batch}."
        )
    physical = trainer.axis_resources.get("batch")
    ways = 1 if physical is None else sizes[physical]
    if (batch // pieces) % ways:
        raise ValueError(
            f"trainer.train_batch_size: {batch} rows in {pieces} microbatches are "
            f"{batch // pieces} rows at a time, which {ways} devices along mesh axis `{physical}` "
            f"cannot share evenly; take a multiple of {pieces * ways}."
        )
