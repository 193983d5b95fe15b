"""The devices of a run, and who holds what: physical mesh, two mappings from logical axes to it.

`compute` says how activations are split, `parameters` how weights and optimizer state are: the
compute mapping with `parameter_axis_resources` on top. `{batch: data}` with `{embed: data}` is FSDP
(each device holds a part of every weight, gathered layer by layer); with `{heads: model, mlp:
model}` in both it is tensor parallelism; `batch: [replica, data]` is FSDP within each of several
slices that hold the same weights.
"""

import dataclasses
import difflib
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from haliax.sharding import ResourceMapping
from modeling.models.config import Gpt2Config, LlamaConfig
from modeling.training.config import TrainerConfig

MAPPINGS = ("axis_resources", "parameter_axis_resources")


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
    devices_per_process(trainer)
    if needed > len(found):
        raise ValueError(
            f"trainer.mesh: {sizes} needs {needed} devices, but there are {len(found)} "
            f"({found[0].platform}). Make the mesh smaller, or on CPU start with "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={needed}."
        )
    for field, logical, physical in _entries(trainer):
        for name in physical:
            if name not in sizes:
                raise ValueError(
                    f"trainer.{field}: `{logical}: {name}` names a mesh axis that is not in "
                    f"trainer.mesh, which has {sorted(sizes)}{_hint(name, sizes)}; map to one of "
                    f"those or add `{name}` to the mesh."
                )
        if not physical or len(set(physical)) < len(physical):
            raise ValueError(
                f"trainer.{field}: `{logical}: {list(physical)}` must name one or more mesh axes, "
                f"each once."
            )
    for batch in trainer.batches.sizes:
        _check_batch(batch, trainer, sizes)
    mesh = Mesh(np.asarray(found[:needed]).reshape(tuple(sizes.values())), tuple(sizes))
    compute = dict(trainer.axis_resources)
    return Layout(mesh, compute, compute | dict(trainer.parameter_axis_resources))


def devices_per_process(trainer: TrainerConfig) -> int:
    """Returns how many of the mesh's devices each process has."""
    needed = math.prod(trainer.mesh.values())
    if needed % trainer.processes:
        raise ValueError(
            f"trainer.processes: {trainer.processes} processes cannot share the {needed} devices "
            f"of trainer.mesh {dict(trainer.mesh)} evenly; take a divisor of {needed}."
        )
    return needed // trainer.processes


def require_known_axes(trainer: TrainerConfig, known: Collection[str]) -> None:
    """Raises `ValueError` if a mapping splits an axis that neither model nor batch has.

    Such a line does nothing, and would leave whole what was meant to be split.
    """
    for field, logical, _ in _entries(trainer):
        if logical not in known:
            raise ValueError(
                f"trainer.{field}: no array of this model has an axis `{logical}`"
                f"{_hint(logical, known)}; there are {sorted(known)}."
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


def mesh_axes(physical: str | Sequence[str] | None) -> tuple[str, ...]:
    """Returns the mesh axes of one entry of a mapping."""
    if physical is None:
        return ()
    return (physical,) if isinstance(physical, str) else tuple(physical)


def _entries(trainer: TrainerConfig) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    for field in MAPPINGS:
        for logical, physical in getattr(trainer, field).items():
            yield field, logical, mesh_axes(physical)


def _hint(name: str, known: Collection[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean `{close[0]}`?)" if close else ""


def _check_batch(batch: int, trainer: TrainerConfig, sizes: Mapping[str, int]) -> None:
    pieces = trainer.num_microbatches
    if batch % pieces:
        raise ValueError(
            f"trainer.num_microbatches: {pieces} does not divide trainer.train_batch_size {batch}."
        )
    axes = mesh_axes(trainer.axis_resources.get("batch"))
    ways = math.prod(sizes[axis] for axis in axes)
    if (batch // pieces) % ways:
        raise ValueError(
            f"trainer.train_batch_size: {batch} rows in {pieces} microbatches are "
            f"{batch // pieces} rows at a time, which {ways} devices along mesh axis "
            f"`{' x '.join(axes)}` cannot share evenly; take a multiple of {pieces * ways}."
        )
