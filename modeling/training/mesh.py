"""The devices of a run, and who holds what: physical mesh, two mappings from logical axes to it.

`compute` says how activations are split, `parameters` how weights and optimizer state are: the
compute mapping with `parameter_axis_resources` on top. `{batch: data}` with `{embed: data}` is FSDP
(each device holds a part of every weight, gathered layer by layer); with `{heads: model, mlp:
model}` in both it is tensor parallelism; `batch: [replica, data]` is FSDP within each of several
slices that hold the same weights.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from haliax.sharding import ResourceMapping
from modeling.models.config import Gpt2Config, LlamaConfig
from modeling.training.config import TrainerConfig
from modeling.training.feasibility import MAPPINGS, mesh_axes, require_layout


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh and the two axis mappings onto it."""

    mesh: Mesh
    compute: ResourceMapping
    parameters: ResourceMapping


def build_layout(trainer: TrainerConfig, devices: Sequence[Any] | None = None) -> Layout:
    """Returns the layout that `trainer` asks for over the first devices there are.

    Raises:
        ValueError: too few devices, processes that cannot share them, a mapping to an axis that the
            mesh lacks, or a batch that does not divide.
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
    require_layout(trainer)
    mesh = Mesh(np.asarray(found[:needed]).reshape(tuple(sizes.values())), tuple(sizes))
    compute = dict(trainer.axis_resources)
    return Layout(mesh, compute, compute | dict(trainer.parameter_axis_resources))


def idle_devices(layout: Layout, devices: Sequence[Any] | None = None) -> str | None:
    """Returns what to tell of accelerators that the mesh leaves out; None if it takes all.

    Devices of a CPU are virtual: no work is lost with one that is not used.
    """
    found = list(jax.devices() if devices is None else devices)
    size = layout.mesh.size
    if found[0].platform == "cpu" or len(found) <= size:
        return None
    shape, remedy = dict(layout.mesh.shape), ""
    axes = mesh_axes(layout.compute.get("batch"))
    if axes and len(found) % size == 0:
        more = shape | {axes[-1]: shape[axes[-1]] * (len(found) // size)}
        remedy = f" Take them in with trainer.mesh {more}."
    return (
        f"{len(found) - size} of {len(found)} {found[0].device_kind} devices are idle: "
        f"trainer.mesh {shape} takes {size}.{remedy}"
    )


def require_divisible_vocabulary(
    layout: Layout, model: Gpt2Config | LlamaConfig, vocab_size: int
) -> None:
    """Raises `ValueError` if the vocabulary is split over devices that cannot share its rows."""
    rows = model.vocab_rows(vocab_size)
    for field, mapping in zip(MAPPINGS, (layout.compute, layout.parameters), strict=True):
        axes = mesh_axes(mapping.get("vocab"))
        ways = math.prod(layout.mesh.shape[axis] for axis in axes)
        if rows % ways:
            multiple = math.lcm(model.vocab_pad_multiple, ways)
            raise ValueError(
                f"trainer.{field}: `vocab: {' x '.join(axes)}` splits the {rows} rows of the "
                f"embedding ({vocab_size} ids) over {ways} devices, which cannot share them "
                f"evenly. Pad them with model.vocab_pad_multiple: {multiple}, which changes no id."
            )
